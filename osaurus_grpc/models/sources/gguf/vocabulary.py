"""Reads the vocabulary out of a GGUF file's "tokenizer.ggml.*" metadata.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's src/llama-arch.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from gguf.constants import TokenType

from osaurus_grpc.errors import SourceInvalidError
from osaurus_grpc.models.sources.gguf.reader import MetadataValue

# Control tokens that end an answer whatever the metadata says: llama.cpp finds them by their text as
# well (src/llama-vocab.cpp, `special_eog_ids`), since many files name only one of theirs.
_END_TEXTS: Final = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<｜end▁of▁sentence｜>",
    }
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the metadata says of the tokenizer.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece).
        pre: Name of the pre-tokenizer; "" where none is given.
        tokens: Text of each token, by id.
        types: `gguf.constants.TokenType` of each token.
        scores: Score of each token, empty where none are given.
        merges: "left right" pairs, best first; empty where none are given.
        bos, eos, unk, pad: Token ids, or None.
        ends: Ids of all tokens that end an answer, EOS first.
        add_bos, add_eos: Whether a prompt gets the token, or None where the metadata does not say.
        add_space_prefix: Whether a space is put before the text, or None.
        chat_template: "" where there is none.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    ends: list[int]
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    chat_template: str


def wrong(key: str) -> SourceInvalidError:
    """The error for a tokenizer setting that cannot be used."""
    return SourceInvalidError(f"The GGUF file's setting tokenizer.{key} is missing or out of range.")


def _text(metadata: Mapping[str, MetadataValue], key: str) -> str:
    value = metadata.get(f"tokenizer.{key}", "")
    if not isinstance(value, str):
        raise wrong(key)
    return value


def _texts(metadata: Mapping[str, MetadataValue], key: str) -> list[str]:
    value = metadata.get(f"tokenizer.{key}", [])
    if isinstance(value, np.ndarray) and len(value) == 0:
        return []
    if not isinstance(value, list):
        raise wrong(key)
    return value


def _numbers(metadata: Mapping[str, MetadataValue], key: str, count: int) -> list[float]:
    """Numbers, one a token, or none at all."""
    value = metadata.get(f"tokenizer.{key}")
    if value is None:
        return []
    if not isinstance(value, np.ndarray) or len(value) != count or not np.isfinite(value).all():
        raise wrong(key)
    return [float(number) for number in value]


def _flag(metadata: Mapping[str, MetadataValue], key: str) -> bool | None:
    value = metadata.get(f"tokenizer.{key}")
    if value is not None and not isinstance(value, bool):
        raise wrong(key)
    return value


def _token_id(metadata: Mapping[str, MetadataValue], key: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(f"ggml.{key}_token_id")
    if value in (-1, 0xFFFFFFFF):  # how "none" is written
        return None
    if not 0 <= value < count:
        raise wrong(f"ggml.{key}_token_id")
    return value


def _ends(metadata: Mapping[str, MetadataValue], tokens: list[str], types: list[int]) -> list[int]:
    named = [_token_id(metadata, key, len(tokens)) for key in ("eos", "eot", "eom")]
    found = [
        number
        for number, text in enumerate(tokens)
        if text in _END_TEXTS and types[number] == TokenType.CONTROL
    ]
    return list(dict.fromkeys([number for number in named if number is not None] + found))


def read_vocabulary(metadata: Mapping[str, MetadataValue]) -> Vocabulary:
    """Reads and checks the tokenizer's metadata.

    Raises:
        SourceInvalidError: A part is missing, of the wrong form, or contradicts another.
    """
    tokens = _texts(metadata, "ggml.tokens")
    count = len(tokens)
    if count == 0:
        raise SourceInvalidError("The GGUF file has no tokenizer.")
    if len(set(tokens)) != count:
        raise SourceInvalidError("The GGUF file is corrupt: its vocabulary holds a token twice.")
    types = [int(number) for number in _numbers(metadata, "ggml.token_type", count)]
    types = types or [int(TokenType.NORMAL)] * count
    return Vocabulary(
        model=_text(metadata, "ggml.model"),
        pre=_text(metadata, "ggml.pre"),
        tokens=tokens,
        types=types,
        scores=_numbers(metadata, "ggml.scores", count),
        merges=_texts(metadata, "ggml.merges"),
        bos=_token_id(metadata, "bos", count),
        eos=_token_id(metadata, "eos", count),
        unk=_token_id(metadata, "unknown", count),
        pad=_token_id(metadata, "padding", count),
        ends=_ends(metadata, tokens, types),
        add_bos=_flag(metadata, "ggml.add_bos_token"),
        add_eos=_flag(metadata, "ggml.add_eos_token"),
        add_space_prefix=_flag(metadata, "ggml.add_space_prefix"),
        chat_template=_text(metadata, "chat_template"),
    )
