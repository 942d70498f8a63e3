"""Texts that may come as token ids: the prompts of completions, the inputs of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, PlainValidator, StringConstraints, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from rest_shim.openai.sampling import MAX_INT32, TokenId

MAX_TEXTS = 2_048

Prompt = str | Sequence[int]

_ID_TEXT = "must be a token id: a whole number from 0 to 2147483647"
_FORM_TEXT = "must be a string, a list of strings, a list of token ids or a list of such lists, none empty"


def _wrong(value: object, text: str, *place: int) -> ValidationError:
    """An error that names the item which is wrong, whose place is below the field's."""
    said = PydanticCustomError("text", "{text}", {"text": text})
    details = InitErrorDetails(type=said, loc=place, input=value)
    return ValidationError.from_exception_data("texts", [details])


def _token(value: object) -> int | None:
    # 2.0 is a whole number too, as everywhere in these requests; True is not.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        return None
    return int(value) if 0 <= value <= MAX_INT32 else None


def _tokens(value: Sequence[object], *place: int) -> Sequence[int]:
    tokens: list[int] = []
    for index, item in enumerate(value):
        token = _token(item)
        if token is None:
            raise _wrong(item, _ID_TEXT, *place, index)
        tokens.append(token)
    return tokens


def _text(value: object, index: int, may_be_empty: bool) -> str:
    if not isinstance(value, str):
        raise _wrong(value, "must be a string like the others", index)
    if not (value or may_be_empty):
        raise _wrong(value, "must not be empty", index)
    return value


def _token_list(value: object, index: int) -> Sequence[int]:
    if not isinstance(value, list) or not value:
        raise _wrong(value, "must be a list of token ids like the others, and not empty", index)
    return _tokens(value, index)


def _prompts(value: object, *, may_be_empty: bool = True) -> Sequence[Prompt]:
    if isinstance(value, str) and (value or may_be_empty):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(_FORM_TEXT if may_be_empty or value != "" else "must not be empty")
    if isinstance(value[0], int | float) and not isinstance(value[0], bool):
        return [_tokens(value)]
    if len(value) > MAX_TEXTS:
        raise ValueError(f"must hold at most {MAX_TEXTS} items")
    if isinstance(value[0], str):
        return [_text(item, index, may_be_empty) for index, item in enumerate(value)]
    if isinstance(value[0], list):
        return [_token_list(item, index) for index, item in enumerate(value)]
    raise _wrong(value[0], "must be a string, a token id or a list of token ids", 0)


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
    return _prompts(value, may_be_empty=False)


Inputs = Annotated[
    Sequence[Prompt],
    PlainValidator(_filled, json_schema_input_type=_FilledText | _FilledTexts | _Tokens | _SomeTokens),
]
