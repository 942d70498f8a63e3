"""Raw prompts by the rules of several kinds of tokenizers."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from osaurus_grpc.chat import raw
from osaurus_grpc.errors import CapabilityError, InvalidRequestError
from tests.chat import tokenizers as kinds


def beginning_with_bos(*, ends: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece that puts <s> before a plain text, and </s> behind it where it ends."""
    tokenizer = kinds.byte_fallback()
    single = "<s> $A </s>" if ends else "<s> $A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=None, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def pieces(tokenizer: PreTrainedTokenizerFast, token_ids: tuple[int, ...]) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(list(token_ids)))


@pytest.mark.parametrize("ends", [False, True])
def test_a_text_begins_as_the_tokenizer_has_it_and_is_left_open(ends: bool) -> None:
    tokenizer = beginning_with_bos(ends=ends)

    assert pieces(tokenizer, raw.encode(tokenizer, "he")) == ["<s>", "▁h", "e"]
    assert pieces(tokenizer, raw.encode(tokenizer, "<s>he")) == ["<s>", "▁h", "e"]
    assert pieces(tokenizer, raw.encode(tokenizer, "")) == ["<s>"]


def test_nothing_is_put_before_a_text_where_the_tokenizer_puts_nothing() -> None:
    tokenizer = kinds.byte_fallback()

    assert pieces(tokenizer, raw.encode(tokenizer, "he")) == ["▁h", "e"]
    assert pieces(tokenizer, raw.encode(tokenizer, "")) == ["<s>"]


def test_an_empty_text_without_a_token_to_begin_with_is_refused() -> None:
    tokenizer = kinds.byte_fallback()
    tokenizer.bos_token = None

    with pytest.raises(InvalidRequestError) as raised:
        raw.encode(tokenizer, "")
    assert raised.value.field == "text"


FORMS = {
    "qwen": (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"], "{0}▁h e{1}▁w o{2}"),
    "starcoder": (["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>"], "{0}▁h e{1}▁w o{2}"),
    "deepseek": (["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"], "{0}▁h e{1}▁w o{2}"),
    "codellama": (["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"], "{0}▁h e{1}▁w o{2}"),
    "codestral": (["[PREFIX]", "[SUFFIX]"], "{1}▁w o{0}▁h e"),
}


@pytest.mark.parametrize("family", FORMS)
def test_a_gap_in_each_familys_form(family: str) -> None:
    marks, form = FORMS[family]
    tokenizer = beginning_with_bos()
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])

    # SentencePiece's space stands before the first text, and before the second only what it begins with.
    gap = raw.encode_gap(tokenizer, "he", " wo")

    written = "".join(pieces(tokenizer, gap.token_ids))
    assert written == "<s>" + form.format(*marks).replace(" ", "")
    ends = [mark for mark in marks if "pad" in mark or "EOT" in mark]
    assert gap.end_tokens == frozenset(tokenizer.convert_tokens_to_ids(ends))
    bare = pieces(tokenizer, raw.encode_gap(tokenizer, "he", "wo").token_ids)
    assert bare[bare.index(marks[1]) + 1] == "w"


def test_a_tokenizer_with_half_of_the_marks_fills_no_gap() -> None:
    tokenizer = kinds.byte_fallback()
    tokenizer.add_tokens([AddedToken("<fim_prefix>", special=True), AddedToken("<fim_suffix>", special=True)])

    with pytest.raises(CapabilityError) as raised:
        raw.encode_gap(tokenizer, "he", "wo")
    assert raised.value.metadata["capability"] == "insert"


def test_tokens_are_decoded_with_their_control_tokens() -> None:
    tokenizer = beginning_with_bos()

    assert raw.decode(tokenizer, raw.encode(tokenizer, "hello world")) == "<s> hello world"


def test_a_beginning_is_taken_away_only_where_it_begins_the_text_and_no_turn() -> None:
    tokenizer = kinds.byte_fallback()

    assert raw.without_beginning(tokenizer, [1, 5, 6]) == [5, 6]
    assert raw.without_beginning(tokenizer, [1, 5, 1, 6]) == [1, 5, 1, 6]
    assert raw.without_beginning(tokenizer, [5, 6]) == [5, 6]
    assert raw.without_beginning(tokenizer, [1]) == [1]
