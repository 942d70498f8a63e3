"""The bound on a text's tokens: it never says more than there are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from osaurus_grpc.chat import length
from osaurus_grpc.chat.detokenize import byte_level_alphabet
from osaurus_grpc.chat.length import fewest_tokens
from tests.chat import tokenizers as kinds


@pytest.fixture(autouse=True)
def _no_text_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length, "_SHORT_TEXT_CHARACTERS", 0)


def composing() -> Any:
    """Byte-level BPE behind NFC, as Qwen's: composed characters are shorter than what they were made of."""
    alphabet = list(byte_level_alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*kinds.SPECIAL, *alphabet, "aaaaaaaa"])}
    for size in (2, 4):
        vocabulary["a" * size] = len(vocabulary)
    merges = [("a" * size, "a" * size) for size in (1, 2, 4)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return kinds.wrapped(tokenizer)


# Decomposed characters, Hangul among them, what decomposes to one byte, and long runs.
texts = st.lists(
    st.sampled_from(
        ["a" * 8, " " * 30, "e\u0301", "\u1112\u1161\u11ab", "\u212a", "\ufb2c", "\n", "🦖", "</s>", "\x04"]
    )
    | st.text(max_size=4),
    max_size=30,
).map("".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=80)
@given(text=texts)
@pytest.mark.parametrize("kind", ["smollm", "composing", "sentencepiece"])
def test_no_text_has_fewer_tokens(tokenizer: Any, kind: str, text: str) -> None:
    made = {"smollm": lambda: tokenizer, "composing": composing, "sentencepiece": kinds.byte_fallback}[kind]()

    assert fewest_tokens(made, text) <= len(made.encode(text, add_special_tokens=False))


def test_the_bound_is_near_where_a_text_is_of_the_longest_tokens(tokenizer: Any) -> None:
    longest = max(tokenizer.get_vocab(), key=len)
    text = str(tokenizer.backend_tokenizer.decoder.decode([longest])) * 1_000
    count = len(tokenizer.encode(text, add_special_tokens=False))

    assert 0 < fewest_tokens(tokenizer, text) <= count


def test_bytes_that_the_vocabulary_lacks_do_not_count(tokenizer: Any) -> None:
    assert tokenizer.encode("\x04" * 1_000, add_special_tokens=False) == []
    assert fewest_tokens(tokenizer, "\x04" * 1_000) == 0


def with_greedy_token(tokenizer: Any) -> Any:
    tokenizer.add_tokens([AddedToken("<end>", special=True, rstrip=True)])
    return tokenizer


def with_normalizer(normalizer: Any) -> Any:
    tokenizer = composing()
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


UNKNOWN = {
    "swallows spaces": lambda: with_greedy_token(kinds.byte_fallback()),
    "strips": lambda: with_normalizer(normalizers.Strip()),
    "replaces": lambda: with_normalizer(normalizers.Replace("aa", "a")),
    "compatibility forms": lambda: with_normalizer(normalizers.Sequence([normalizers.NFKC()])),
    "unigram": kinds.metaspace,
    "word pieces": kinds.word_piece,
    "not all bytes": kinds.word_suffix,
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_nothing_is_said_of_tokenizers_that_may_drop_text(kind: str) -> None:
    assert fewest_tokens(UNKNOWN[kind](), "a" * 10_000) == 0
