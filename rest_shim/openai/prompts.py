"""Texts that may come as token ids: the prompts of completions, the inputs of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, PlainValidator, StringConstraints

from rest_shim.openai.sampling import MAX_INT32, TokenId

MAX_TEXTS = 2_048

Prompt = str | Sequence[int]

_TOKENS_TEXT = "token ids must be whole numbers from 0 to 2147483647"
_FORM_TEXT = "must be a string, a list of strings, a list of token ids or a list of such lists, none empty"


def _token(value: object) -> int | None:
    # 2.0 is a whole number too, as everywhere in these requests; True is not.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        return None
    return int(value) if 0 <= value <= MAX_INT32 else None


def _tokens(value: Sequence[object]) -> Sequence[int]:
    tokens = [token for token in map(_token, value) if token is not None]
    if len(tokens) != len(value):
        raise ValueError(_TOKENS_TEXT)
    return tokens


def _prompt(value: object) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        return _tokens(value)
    raise ValueError(_FORM_TEXT)


def _prompts(value: object) -> Sequence[Prompt]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(_FORM_TEXT)
    if isinstance(value[0], int | float) and not isinstance(value[0], bool):
        return [_tokens(value)]
    if len(value) > MAX_TEXTS:
        raise ValueError(f"must hold at most {MAX_TEXTS} items")
    if len({isinstance(item, str) for item in value}) > 1:
        raise ValueError("must not mix strings and lists of token ids")
    return [_prompt(item) for item in value]


_Tokens = Annotated[list[TokenId], Field(min_length=1)]
_SomeTexts = Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
_SomeTokens = Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_TEXTS)]
_FilledText = Annotated[str, StringConstraints(min_length=1)]
_FilledTexts = Annotated[list[_FilledText], Field(min_length=1, max_length=MAX_TEXTS)]

Prompts = Annotated[
    Sequence[Prompt],
    PlainValidator(_prompts, json_schema_input_type=str | _SomeTexts | _Tokens | _SomeTokens),
]


def _filled(value: object) -> Sequence[Prompt]:
    prompts = _prompts(value)
    if "" in prompts:
        raise ValueError("must not hold an empty string")
    return prompts


Inputs = Annotated[
    Sequence[Prompt],
    PlainValidator(_filled, json_schema_input_type=_FilledText | _FilledTexts | _Tokens | _SomeTokens),
]
