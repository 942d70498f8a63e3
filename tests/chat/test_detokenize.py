from __future__ import annotations

import codecs
import gc
import weakref
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from osaurus_grpc.chat.detokenize import Detokenizer, token_bytes
from tests.chat import tokenizers

UNICODE = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=30)
SCRIPTS = st.lists(
    st.sampled_from(
        ["👩‍👩‍👧", "🏳️‍🌈", "你好", "e\u0301", "क्षि", " ", "  ", "\n\n", "Paris", "é", "\ufffd", "\0"]
    ),
    max_size=12,
).map("".join)


def detokenized(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], *, skip_special_tokens: bool = True
) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return "".join([detokenizer.step(token_id) for token_id in token_ids]) + detokenizer.finish()


def library_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], *, skip_special_tokens: bool = True
) -> str:
    return str(
        tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
    )


@given(text=SCRIPTS)
def test_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert detokenized(tokenizer, token_ids) == text
    assert b"".join(token_bytes(tokenizer, token_id) for token_id in token_ids) == text.encode()


@given(text=UNICODE)
def test_any_text_decodes_as_the_library_does(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    # Not always the text itself: SmolLM2's vocabulary lacks some bytes.
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    decoded = detokenized(tokenizer, token_ids)
    assert library_text(tokenizer, token_ids) in (decoded, decoded + "\ufffd")


@given(token_ids=st.lists(st.integers(0, 49_151), max_size=12))
def test_any_tokens_decode_as_the_library_does(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int]
) -> None:
    for skip in (True, False):
        text = detokenized(tokenizer, token_ids, skip_special_tokens=skip)
        expected = library_text(tokenizer, token_ids, skip_special_tokens=skip)
        # All but an incomplete character at the end, which the library shows as one U+FFFD.
        assert expected in (text, text + "\ufffd")


@given(data=st.binary(max_size=12))
def test_any_bytes_decode_as_the_library_does(tokenizer: PreTrainedTokenizerBase, data: bytes) -> None:
    by_byte = {token_bytes(tokenizer, token_id): token_id for token_id in range(300)}
    token_ids = [by_byte[bytes([byte])] for byte in data if bytes([byte]) in by_byte]
    text = detokenized(tokenizer, token_ids)
    # The first two bytes of a surrogate wait for a third and are dropped too; the library shows two.
    assert library_text(tokenizer, token_ids) in (text, text + "\ufffd", text + "\ufffd\ufffd")


def test_a_character_is_never_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    token_ids = tokenizer.encode("🦕", add_special_tokens=False)
    assert len(token_ids) > 1
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.step(token_id) for token_id in token_ids]
    assert texts == [""] * (len(token_ids) - 1) + ["🦕"]


def test_an_incomplete_last_character_is_dropped_and_what_precedes_it_kept(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    token_ids = tokenizer.encode("ok 🦕", add_special_tokens=False)
    assert detokenized(tokenizer, token_ids[:-1]) == "ok "


def test_leading_spaces_are_exact(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer)
    token_ids = tokenizer.encode(" Paris is", add_special_tokens=False)
    assert [detokenizer.step(token_id) for token_id in token_ids] == [" Paris", " is"]


def test_special_tokens_hide_or_show(tokenizer: PreTrainedTokenizerBase) -> None:
    token_ids = tokenizer.encode("a<|im_end|>b", add_special_tokens=False)
    assert detokenized(tokenizer, token_ids) == "ab"
    assert detokenized(tokenizer, token_ids, skip_special_tokens=False) == "a<|im_end|>b"


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert detokenized(tokenizer, [10_000_000]) == ""
    assert token_bytes(tokenizer, 10_000_000) == b""


@pytest.mark.parametrize("strips", [True, False])
@given(text=st.text(alphabet="helo wrd.é世🦕\n", max_size=20))
def test_byte_fallback_text_comes_back(strips: bool, text: str) -> None:
    tokenizer = tokenizers.byte_fallback(strips_first_space=strips)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert detokenized(tokenizer, token_ids) == library_text(tokenizer, token_ids)
    raw = b"".join(token_bytes(tokenizer, token_id) for token_id in token_ids).decode()
    assert raw == (f" {text}" if text else "")


@given(data=st.binary(max_size=10))
def test_byte_fallback_survives_any_bytes(data: bytes) -> None:
    tokenizer = tokenizers.byte_fallback()
    token_ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    expected = codecs.getincrementaldecoder("utf-8")("replace").decode(data)
    assert detokenized(tokenizer, token_ids) == expected.removeprefix(" ")


@given(token_ids=st.lists(st.integers(3, 33), max_size=10))
def test_metaspace_decodes_as_the_library_does(token_ids: list[int]) -> None:
    tokenizer = tokenizers.metaspace()
    assert detokenized(tokenizer, token_ids) == library_text(tokenizer, token_ids)


@given(token_ids=st.lists(st.integers(3, 10), max_size=10))
def test_word_pieces_decode_as_the_library_does(token_ids: list[int]) -> None:
    tokenizer = tokenizers.word_piece()
    assert detokenized(tokenizer, token_ids) == library_text(tokenizer, token_ids)


def test_token_bytes_of_other_vocabularies() -> None:
    metaspace, word_piece = tokenizers.metaspace(), tokenizers.word_piece()
    word_suffix = tokenizers.word_suffix()
    assert token_bytes(metaspace, metaspace.convert_tokens_to_ids("▁hello")) == b" hello"
    assert token_bytes(word_piece, word_piece.convert_tokens_to_ids("##ing")) == b"ing"
    assert token_bytes(word_piece, word_piece.convert_tokens_to_ids("play")) == b"play"
    assert token_bytes(word_suffix, word_suffix.convert_tokens_to_ids("ab</w>")) == b"ab"
    assert token_bytes(metaspace, metaspace.convert_tokens_to_ids("</s>")) == b"</s>"


@given(text=UNICODE)
def test_a_tokenizer_without_a_rust_backend(text: str) -> None:
    tokenizer = ByT5Tokenizer()
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert detokenized(tokenizer, token_ids) == library_text(tokenizer, token_ids)


def test_an_unloaded_tokenizer_is_freed() -> None:
    tokenizer = tokenizers.byte_fallback()
    assert detokenized(tokenizer, tokenizer.encode("hello", add_special_tokens=False)) == "hello"
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", [tokenizers.byte_fallback, tokenizers.metaspace])
def test_a_continued_text_keeps_the_space_between(kind: Callable[[], PreTrainedTokenizerBase]) -> None:
    tokenizer = kind()
    begun, *added = tokenizer.encode("hello world", add_special_tokens=False)[-6:]
    assert detokenized(tokenizer, added) == library_text(tokenizer, added)
    detokenizer = Detokenizer(tokenizer, context=[begun])
    text = "".join([detokenizer.step(token_id) for token_id in added]) + detokenizer.finish()
    assert text == " world"
