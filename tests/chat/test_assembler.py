from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat import reasoning
from osaurus_grpc.chat.assembler import Assembler
from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.detokenize import Detokenizer
from osaurus_grpc.chat.types import AnswerEnd, AnswerEvent, AnswerFinished, TextDelta
from tests.chat.test_stop import reference

SENTENCES = st.text(alphabet="ab \n🦕é", max_size=40)
STOPS = st.lists(st.text(alphabet="ab \n🦕", min_size=1, max_size=5), max_size=4)


def assembled(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], stops: list[str], sizes: list[int]
) -> list[AnswerEvent]:
    """All events of an answer whose tokens arrive in groups of the given sizes."""
    assembler = Assembler(tokenizer, stop=stops)
    events: list[AnswerEvent] = []
    position = 0
    for size in [*sizes, len(token_ids)]:
        events += assembler.feed(token_ids[position : position + size])
        position += size
    events += assembler.finish(AnswerEnd.LENGTH)
    assert assembler.is_finished
    assert assembler.feed(token_ids) == []
    assert assembler.finish(AnswerEnd.STOP) == []
    return events


def text_of(events: list[AnswerEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def tokens_out(events: list[AnswerEvent]) -> int:
    return sum(event.token_count for event in events if isinstance(event, TextDelta))


@given(text=SENTENCES, stops=STOPS, sizes=st.lists(st.integers(0, 5), max_size=20), cut=st.integers(0, 3))
def test_any_grouping_gives_the_full_text_cut_at_the_first_stop(
    tokenizer: PreTrainedTokenizerBase, text: str, stops: list[str], sizes: list[int], cut: int
) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    token_ids = token_ids[: len(token_ids) - cut]
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.step(token_id) for token_id in token_ids]
    expected, matched = reference("".join(texts), stops)

    events = assembled(tokenizer, token_ids, stops, sizes)

    assert text_of(events) == expected
    finished = AnswerFinished(AnswerEnd.LENGTH)
    if matched is not None:
        finished = AnswerFinished(AnswerEnd.STOP_SEQUENCE, matched)
    assert events[-1] == finished
    assert not any(isinstance(event, AnswerFinished) for event in events[:-1])
    assert all(event.text and event.token_count >= 0 for event in events if isinstance(event, TextDelta))
    # A token is out when text behind the place where it was generated is out.
    before = [len("".join(texts[:index])) for index in range(len(texts))]
    assert tokens_out(events) == sum(start < len(expected) for start in before)


@given(text=SENTENCES, stops=STOPS)
def test_counts_run_with_the_text(tokenizer: PreTrainedTokenizerBase, text: str, stops: list[str]) -> None:
    assembler = Assembler(tokenizer, stop=stops)
    out = 0
    for fed, token_id in enumerate(tokenizer.encode(text, add_special_tokens=False), start=1):
        out += tokens_out(assembler.feed([token_id]))
        assert out <= fed


def test_without_stops_every_token_comes_out_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    assembler = Assembler(tokenizer)
    token_ids = tokenizer.encode("The capital", add_special_tokens=False)
    assert [assembler.feed([token_id]) for token_id in token_ids] == [
        [TextDelta("The", 1)],
        [TextDelta(" capital", 1)],
    ]
    assert assembler.finish(AnswerEnd.STOP) == [AnswerFinished(AnswerEnd.STOP)]


def test_a_special_token_counts_with_the_text_that_follows(tokenizer: PreTrainedTokenizerBase) -> None:
    token_ids = tokenizer.encode("a<|im_start|>b<|im_start|>", add_special_tokens=False)
    for stops in ([], ["zzz"]):
        assembler = Assembler(tokenizer, stop=stops)
        assert assembler.feed(token_ids) == [TextDelta("ab", 3)]


def test_held_back_text_comes_out_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    assembler = Assembler(tokenizer, stop=[" Paris Match"])
    token_ids = tokenizer.encode("It is Paris", add_special_tokens=False)
    assert assembler.feed(token_ids) == [TextDelta("It is", 2)]
    assert assembler.finish(AnswerEnd.STOP) == [TextDelta(" Paris", 1), AnswerFinished(AnswerEnd.STOP)]


def test_a_token_cut_by_a_stop_counts_where_its_beginning_is_out(tokenizer: PreTrainedTokenizerBase) -> None:
    token_ids = tokenizer.encode("The capital of", add_special_tokens=False)
    assert Assembler(tokenizer, stop=["apital"]).feed(token_ids) == [
        TextDelta("The c", 2),
        AnswerFinished(AnswerEnd.STOP_SEQUENCE, "apital"),
    ]
    assert Assembler(tokenizer, stop=[" capital"]).feed(token_ids) == [
        TextDelta("The", 1),
        AnswerFinished(AnswerEnd.STOP_SEQUENCE, " capital"),
    ]
    assert Assembler(tokenizer, stop=["The"]).feed(token_ids) == [
        AnswerFinished(AnswerEnd.STOP_SEQUENCE, "The")
    ]


MARKS = {marks.close: marks for marks in (*reasoning._KNOWN, reasoning.HARMONY)}


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("is_closed", [True, False])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_reasoning_tokens_are_those_between_the_marks(
    tokenizer: PreTrainedTokenizerBase, name: str, is_closed: bool, size: int
) -> None:
    """In every family the same: neither the marks nor what follows count, white space does."""
    marks = MARKS[name]
    inner = [tokenizer.encode(part, add_special_tokens=False) for part in ("\n", "Let me see.", "\n\n")]
    thought = [token_id for part in inner for token_id in part]
    # Without an opening mark of its own, the prompt opened it.
    token_ids = tokenizer.encode(marks.open, add_special_tokens=False) + thought
    if is_closed:
        token_ids += tokenizer.encode(marks.close, add_special_tokens=False)
        answer = "<|start|>assistant<|channel|>final<|message|>Yes." if marks is reasoning.HARMONY else "Yes."
        token_ids += tokenizer.encode(answer, add_special_tokens=False)
    reader = AnswerReader(marks=marks, is_reasoning=not marks.open)
    assembler = Assembler(tokenizer, reader=reader)
    events: list[AnswerEvent] = []
    for start in range(0, len(token_ids), size):
        events += assembler.feed(token_ids[start : start + size])
    events += assembler.finish(AnswerEnd.STOP)
    assert assembler.reasoning_tokens == len(thought)
    assert text_of(events) == ("Yes." if is_closed else "")


@pytest.mark.parametrize("stops", [[], ["Yes!"]])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_marks_are_told_from_the_tokens_of_the_text(
    tokenizer: PreTrainedTokenizerBase, size: int, stops: list[str]
) -> None:
    marks = MARKS["</think>"]
    parts = (marks.open, "\n", "Hm.", marks.close, "\n\n", "Yes. ", "So.")
    encoded = [tokenizer.encode(part, add_special_tokens=False) for part in parts]
    token_ids = [token_id for part in encoded for token_id in part]
    assembler = Assembler(tokenizer, reader=AnswerReader(marks=marks), stop=stops)
    events: list[AnswerEvent] = []
    for start in range(0, len(token_ids), size):
        events += assembler.feed(token_ids[start : start + size])
    events += assembler.finish(AnswerEnd.STOP)

    own: list[int] = []
    position = 0
    for event in events:
        if isinstance(event, AnswerFinished):
            continue
        following = token_ids[position : position + event.token_count]
        position += event.token_count
        if isinstance(event, TextDelta):
            own += following[event.mark_count :]
    assert tokenizer.decode(own) == text_of(events) == "Yes. So."
