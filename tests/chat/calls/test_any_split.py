"""However a text is split into tokens, its events are the same: in every syntax, and in any new one."""

from __future__ import annotations

from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat import reasoning
from osaurus_grpc.chat.assembler import Assembler
from osaurus_grpc.chat.calls import families
from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.calls.pieces import ToolTable
from osaurus_grpc.chat.calls.syntax import CallSyntax
from osaurus_grpc.chat.calls.writer import write_calls
from osaurus_grpc.chat.reasoning import ThinkMarks
from osaurus_grpc.chat.types import (
    AnswerEnd,
    AnswerFinished,
    ReasoningDelta,
    TextDelta,
    ToolArgumentsDelta,
    ToolCall,
    ToolCallStarted,
    ToolSpec,
)

SYNTAXES = {value.name: value for value in vars(families).values() if isinstance(value, CallSyntax)}
TOOLS = ToolTable.of(
    [
        ToolSpec(
            "f",
            parameters_json='{"type":"object","properties":{"a":{"type":"string"},"n":{"type":"integer"}}}',
        )
    ]
)
CALL = ToolCall("abcdefgh1", "f", '{"a": "é\\n<b", "n": 1}')
PLAIN = ["Hello", " ", "\n", "é🦕", '"', "\\", "{", "}", "[", "]", ",", "<", "```json\n", "```", "f", ": 1"]
_EXAMPLES = 12


def parts_of(syntax: CallSyntax, marks: ThinkMarks) -> list[str]:
    """What answers are put together from: the syntax's own marks whole and halved, calls, and text."""
    own = [*syntax.texts, *syntax.marks, marks.open, marks.close]
    halves = [text[: len(text) // 2] for text in own]
    return [text for text in dict.fromkeys([*own, *halves, *PLAIN]) if text] + [
        str(write_calls(syntax, [CALL]))
    ] * 4


def events_of(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], sizes: list[int], reader: AnswerReader
) -> list[tuple[str, str]]:
    """Kinds and texts of an answer's events, neighbours of one kind made one."""
    numbers = count()
    assembler = Assembler(tokenizer, reader=reader, make_id=lambda: str(next(numbers)))
    events = []
    start = 0
    for size in [*sizes, len(token_ids)]:
        events += assembler.feed(token_ids[start : start + size])
        start += size
    events += assembler.finish(AnswerEnd.STOP)
    found: list[tuple[str, str]] = []
    for event in events:
        match event:
            case TextDelta(text) | ReasoningDelta(text):
                kind = type(event).__name__
            case ToolCallStarted(index, _, name):
                kind, text = f"call {index}", name
            case ToolArgumentsDelta(index, text):
                kind = f"arguments {index}"
            case AnswerFinished(cause):
                kind, text = "end", cause.name
        if found and found[-1][0] == kind:
            text = found.pop()[1] + text
        found.append((kind, text))
    assert sum(getattr(event, "token_count", 0) for event in events) <= len(token_ids)
    assert assembler.reasoning_tokens <= len(token_ids)
    return found


@pytest.mark.parametrize("name", SYNTAXES)
@settings(max_examples=_EXAMPLES)
@given(data=st.data(), is_reasoning=st.booleans(), streams=st.booleans())
def test_any_split_gives_the_same_events(
    tokenizer: PreTrainedTokenizerBase, name: str, data: st.DataObject, is_reasoning: bool, streams: bool
) -> None:
    syntax = SYNTAXES[name]
    marks = reasoning.HARMONY if syntax is families.HARMONY else ThinkMarks("<think>", "</think>")
    text = "".join(data.draw(st.lists(st.sampled_from(parts_of(syntax, marks)), max_size=8)))
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    chunks = [text[start:end] for start, end in pairwise([0, *sorted(places), len(text)])]
    sizes = data.draw(st.lists(st.integers(0, 7), max_size=12))

    def events(pieces: list[str], sizes: list[int]) -> list[tuple[str, str]]:
        token_ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]
        reader = AnswerReader(
            marks=marks, is_reasoning=is_reasoning, syntax=syntax, tools=TOOLS, streams_calls=streams
        )
        return events_of(tokenizer, token_ids, sizes, reader)

    whole = events([text], [])
    assert events(chunks, sizes) == whole
    assert events(list(text), [1] * len(text)) == whole
