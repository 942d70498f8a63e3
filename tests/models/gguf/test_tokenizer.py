from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf.constants import TokenType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from osaurus_grpc.errors import SourceInvalidError
from osaurus_grpc.models.sources.gguf.pretokenizers import PRE_TOKENIZERS
from osaurus_grpc.models.sources.gguf.tokenizer import build_tokenizer, tokenizer_config
from osaurus_grpc.models.sources.gguf.vocabulary import Vocabulary, read_vocabulary
from tests.models.gguf.files import CHAT_TEMPLATE, byte_level_metadata

N, U, C, D, B = (
    TokenType.NORMAL,
    TokenType.UNKNOWN,
    TokenType.CONTROL,
    TokenType.USER_DEFINED,
    TokenType.BYTE,
)


def as_read(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata as the reader gives it: numbers in arrays are NumPy's."""
    return {
        key: np.array(value) if isinstance(value, list) and value and not isinstance(value[0], str) else value
        for key, value in metadata.items()
        if value is not None
    }


def vocabulary(base: dict[str, Any], **changes: Any) -> Vocabulary:
    return read_vocabulary(as_read(base | {f"tokenizer.{key}": value for key, value in changes.items()}))


def byte_level(**changes: Any) -> Tokenizer:
    return build_tokenizer(vocabulary(byte_level_metadata(), **changes))


def sentence_piece_metadata() -> dict[str, Any]:
    pieces: list[tuple[str, float, TokenType]] = [("<unk>", 0, U), ("<s>", 0, C), ("</s>", 0, C)]
    pieces += [(f"<0x{byte:02X}>", 0, B) for byte in range(256)]
    # As in SentencePiece, a better score is a larger one; "ab" beats "bc", so "abc" is "ab" + "c".
    pieces += [("ab", -1, N), ("bc", -2, N), ("▁h", -3, N), ("el", -4, N), ("lo", -5, N), ("▁hel", -6, N)]
    pieces += [("▁hello", -7, N), ("▁w", -8, N)]
    pieces += [(letter, -20, N) for letter in "▁abcdehlorw"]
    pieces += [("<start_of_turn>", 0, C), ("<table>", 0, D), ("\n\n", 0, D)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces],
        "tokenizer.ggml.scores": [float(score) for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [int(kind) for _, _, kind in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def sentence_piece(**changes: Any) -> Tokenizer:
    return build_tokenizer(vocabulary(sentence_piece_metadata(), **changes))


BYTE_LEVEL = byte_level()
SENTENCE_PIECE = sentence_piece()


@given(st.text())
def test_byte_level_text_comes_back(text):
    ids = BYTE_LEVEL.encode(text).ids
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == text


@given(st.text())
def test_sentence_piece_text_comes_back(text):
    ids = SENTENCE_PIECE.encode(text, add_special_tokens=False).ids
    # The sign for a space cannot be told from a space: true of SentencePiece itself.
    decoded = SENTENCE_PIECE.decode(ids, skip_special_tokens=False)
    assert decoded == text.replace("▁", " ")


def test_merges_apply_in_order():
    assert BYTE_LEVEL.encode("hello world").tokens == ["hello", "Ġw", "or", "l", "d"]


def test_scores_decide_what_is_joined_first():
    assert SENTENCE_PIECE.encode("abc", add_special_tokens=False).tokens == ["▁", "ab", "c"]
    assert SENTENCE_PIECE.encode("hello w", add_special_tokens=False).tokens == ["▁hello", "▁w"]


def test_what_is_not_in_the_vocabulary_becomes_bytes():
    assert SENTENCE_PIECE.encode("é", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>"]


def test_control_tokens_are_found_in_text_and_special():
    encoded = BYTE_LEVEL.encode("<|im_start|>hello<|im_end|>")
    assert encoded.ids == [1, BYTE_LEVEL.token_to_id("hello"), 2]
    assert BYTE_LEVEL.decode(encoded.ids) == "hello"


def test_user_defined_tokens_are_found_in_text_and_stay_visible():
    encoded = BYTE_LEVEL.encode("hello<tool>")
    assert encoded.tokens == ["hello", "<tool>"]
    assert BYTE_LEVEL.decode(encoded.ids) == "hello<tool>"
    assert SENTENCE_PIECE.encode("<table>", add_special_tokens=False).tokens == ["<table>"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ["hello"]),
        ({"ggml.add_bos_token": True}, ["<|im_start|>", "hello"]),
        ({"ggml.add_eos_token": True}, ["hello", "<|im_end|>"]),
        ({"ggml.pre": "llama-bpe"}, ["<|im_start|>", "hello"]),
        ({"ggml.pre": "llama-bpe", "ggml.add_bos_token": False}, ["hello"]),
        ({"ggml.pre": "llama-bpe", "ggml.bos_token_id": None}, ["hello"]),
    ],
)
def test_bos_and_eos_of_byte_level(flags, expected):
    assert byte_level(**flags).encode("hello").tokens == expected


def test_bos_and_space_prefix_of_sentence_piece():
    assert SENTENCE_PIECE.encode("hello").tokens == ["<s>", "▁hello"]
    bare = sentence_piece(**{"ggml.add_bos_token": False, "ggml.add_space_prefix": False})
    assert bare.encode("a hello").tokens == ["a", "▁hello"]
    assert bare.decode(bare.encode(" hello").ids) == " hello"


# What each model's own tokenizer makes of it; "Ġ" is a space, "Ċ" a line's end.
SPLITS = {
    "smollm": ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġwords", "!", "ĊĊ", "Ġx"],
    "qwen2": ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġwords", "!ĊĊ", "Ġx"],
    "llama-bpe": ["It", "'s", "Ġ", "123", "4", "Ġwords", "!ĊĊ", "Ġx"],
    "gpt-2": ["It", "'s", "Ġ1234", "Ġwords", "!", "ĊĊ", "Ġx"],
    "tekken": ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġwords", "!ĊĊ", "Ġx"],
    "gpt-4o": ["It's", "Ġ", "123", "4", "Ġwords", "!ĊĊ", "Ġx"],
    "deepseek-v3": ["It", "'s", "Ġ", "123", "4", "Ġwords", "!ĊĊ", "Ġx"],
}


@pytest.mark.parametrize("name", SPLITS)
def test_pre_tokenizers_split_as_their_models_do(name):
    splitter = byte_level(**{"ggml.pre": name}).pre_tokenizer
    pieces = [piece for piece, _ in splitter.pre_tokenize_str("It's 1234 words!\n\n x")]
    assert pieces == SPLITS[name]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_the_text(name):
    tokenizer = byte_level(**{"ggml.pre": name, "ggml.add_bos_token": False})
    text = "Don't stop 12345.67 at\t\n\n  naïve 日本語 Привет 🦕! $x^2+|y|` \r\n end  "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_qwen2_composes_characters():
    assert byte_level(**{"ggml.pre": "qwen2"}).encode("e\u0301").tokens == ["Ã", "©"]
    assert byte_level(**{"ggml.pre": "llama-bpe"}).encode("e\u0301", add_special_tokens=False).tokens == [
        "e", "Ì", "ģ",
    ]  # fmt: skip


def test_a_whole_token_wins_over_merges_where_the_model_says_so():
    # "held" is a token that no merge leads to.
    base = byte_level_metadata()
    tokens = [*base["tokenizer.ggml.tokens"], "held"]
    types = [*base["tokenizer.ggml.token_type"], int(N)]
    extended = {"ggml.tokens": tokens, "ggml.token_type": types, "ggml.add_bos_token": False}
    assert byte_level(**extended, **{"ggml.pre": "llama-bpe"}).encode("held").tokens == ["held"]
    assert byte_level(**extended, **{"ggml.pre": "qwen2"}).encode("held").tokens == ["he", "l", "d"]


def test_every_token_that_ends_an_answer_is_listed():
    assert vocabulary(byte_level_metadata()).ends == [2, 0]
    assert vocabulary(byte_level_metadata(), **{"ggml.eot_token_id": 7}).ends == [2, 7, 0]
    assert vocabulary(byte_level_metadata(), **{"ggml.eos_token_id": 0xFFFFFFFF}).ends == [0, 2]


def test_tokenizer_config():
    config = tokenizer_config(vocabulary(byte_level_metadata()), 512)
    assert config["chat_template"] == CHAT_TEMPLATE
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>",
    )  # fmt: skip
    assert config["model_max_length"] == 512
    assert "unk_token" not in config


TOKENS = byte_level_metadata()["tokenizer.ggml.tokens"]
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no tokens": (byte_level_metadata(), {"ggml.tokens": []}, "no tokenizer"),
    "no model": (byte_level_metadata(), {"ggml.model": None}, "of the kind ''"),
    "another model": (byte_level_metadata(), {"ggml.model": "bert"}, "of the kind 'bert'"),
    "another pre-tokenizer": (byte_level_metadata(), {"ggml.pre": "kimi-k2"}, "pre-tokenizer 'kimi-k2'"),
    "no merges": (byte_level_metadata(), {"ggml.merges": None}, "ggml.merges"),
    "a merge of one": (byte_level_metadata(), {"ggml.merges": ["hello"]}, "ggml.merges"),
    "a merge with nothing": (byte_level_metadata(), {"ggml.merges": ["h "]}, "ggml.merges"),
    "a merge into nothing": (byte_level_metadata(), {"ggml.merges": ["h h"]}, "merges name a token"),
    "a token twice": (byte_level_metadata(), {"ggml.tokens": [*TOKENS[:-1], "h"]}, "holds a token twice"),
    "too few types": (byte_level_metadata(), {"ggml.token_type": [1, 1]}, "ggml.token_type"),
    "an id out of range": (byte_level_metadata(), {"ggml.eos_token_id": 5_000}, "ggml.eos_token_id"),
    "an id that is a list": (byte_level_metadata(), {"ggml.eos_token_id": [1, 2]}, "ggml.eos_token_id"),
    "an id that is a text": (byte_level_metadata(), {"ggml.bos_token_id": "1"}, "ggml.bos_token_id"),
    "a template that is a number": (byte_level_metadata(), {"chat_template": 1}, "chat_template"),
    "a flag that is a text": (byte_level_metadata(), {"ggml.add_bos_token": "yes"}, "ggml.add_bos_token"),
    "no scores": (sentence_piece_metadata(), {"ggml.scores": None}, "ggml.scores"),
    "scores that are no numbers": (
        sentence_piece_metadata(),
        {"ggml.scores": [float("nan")] * len(sentence_piece_metadata()["tokenizer.ggml.tokens"])},
        "ggml.scores",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_cannot_be_converted_says_why(case):
    base, changes, expected = REFUSED[case]
    with pytest.raises(SourceInvalidError) as caught:
        build_tokenizer(vocabulary(base, **changes))
    assert expected in caught.value.message
