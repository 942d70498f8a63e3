"""Reasoning, content and calls in answers as models write them, cut in any way."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.chat.calls import families
from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.calls.pieces import PieceKind, ToolTable
from osaurus_grpc.chat.calls.syntax import CallSyntax
from osaurus_grpc.chat.reasoning import HARMONY, ThinkMarks
from osaurus_grpc.chat.types import ToolSpec

TOOLS = ToolTable.of(
    [ToolSpec("f", parameters_json='{"type":"object","properties":{"a":{"type":"string"}}}')]
)
THINK = ThinkMarks("<think>", "</think>")
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1.50}}\n</tool_call>'
Answer = tuple[str, str, list[tuple[str, str]], int]


def read(
    chunks: list[str],
    *,
    syntax: CallSyntax | None = families.HERMES,
    marks: ThinkMarks | None = THINK,
    is_reasoning: bool = False,
    streams: bool = False,
) -> Answer:
    """Reasoning, content, calls and the number of whole calls; checks that pieces lie in order."""
    reader = AnswerReader(
        marks=marks, is_reasoning=is_reasoning, syntax=syntax, tools=TOOLS, streams_calls=streams
    )
    pieces = [piece for chunk in chunks for piece in reader.feed(chunk)] + reader.finish()
    reasoning = content = ""
    calls: list[tuple[str, str]] = []
    whole = end = 0
    text = "".join(chunks)
    for piece in pieces:
        assert end <= piece.start <= piece.end <= len(text)
        end = piece.end
        match piece.kind:
            case PieceKind.REASONING:
                reasoning += piece.text
                assert text[piece.start : piece.end] == piece.text
            case PieceKind.CONTENT:
                content += piece.text
                assert text[piece.start : piece.end] == piece.text
            case PieceKind.CALL_NAME:
                calls.append((piece.text, ""))
            case PieceKind.CALL_ARGUMENTS:
                calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
            case PieceKind.CALL_END:
                whole += 1
    return reasoning, content, calls, whole


PARTS = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"a": "b"}',
     "}", "\n", "```json\n", "```", "assistant:", "Hello", " ", '{"x": 1}', "<", "[", "]", ",",
     '{"tool_calls": [', CALL,
     "[TOOL_CALLS]", "f[ARGS]", "<function=f>", "<parameter=a>", "</parameter>", "</function>",
     "é", '"', "\\"]
)  # fmt: skip


@given(
    text=st.lists(PARTS, max_size=12).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=30),
    syntax=st.sampled_from([families.HERMES, families.QWEN3_CODER, families.MISTRAL, families.LLAMA, None]),
    is_reasoning=st.booleans(),
    streams=st.booleans(),
)
def test_the_cuts_do_not_matter(
    text: str, cuts: list[int], syntax: CallSyntax | None, is_reasoning: bool, streams: bool
) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[start:end] for start, end in pairwise(places)]

    def answer(pieces: list[str]) -> Answer:
        return read(pieces, syntax=syntax, is_reasoning=is_reasoning, streams=streams)

    assert answer(chunks) == answer([text]) == answer(list(text))


@given(text=st.text(alphabet="ab <>{}[]\n`\"':,é", max_size=60))
def test_text_without_marks_is_content(text: str) -> None:
    _, content, calls, _ = read(list(text))
    assert content == text
    assert calls == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Let me see.\n\n{CALL}", ("", "Let me see.", [("f", '{"a": 1.50}')], 1)),
        (f"<think>\nHm.\n</think>\n\n{CALL}\n{CALL}", ("Hm.", "", [("f", '{"a": 1.50}')] * 2, 2)),
        ('assistant: {"name": "f", "parameters": {"a": 1}}', ("", "", [("f", '{"a": 1}')], 1)),
        ('```json\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n```', ("", "", [("f", '{"a": 1}')], 1)),
        ('Sure:\n```\n{"name": "f", "arguments": {}}\n```\nDone', ("", "Sure:\nDone", [("f", "{}")], 1)),
        (
            '{"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}',
            ("", "", [("f", "{}")], 1),
        ),
        ('{"name": "Ann", "arguments": {}}', ("", '{"name": "Ann", "arguments": {}}', [], 0)),
        ('{"answer": 4}', ("", '{"answer": 4}', [], 0)),
        ("<tool_call>\n{oops}\n</tool_call>", ("", "<tool_call>\n{oops}\n</tool_call>", [], 0)),
        ('<tool_call>\n{"name": "f", "argu', ("", '<tool_call>\n{"name": "f", "argu', [], 0)),
        ('<tool_call>{"arguments": {"a": 2}, "name": "f"}</tool_call>', ("", "", [("f", '{"a": 2}')], 1)),
        ("```python\nprint()\n```", ("", "```python\nprint()\n```", [], 0)),
        ("<think>never closed", ("never closed", "", [], 0)),
        ("What is <think>?", ("", "What is <think>?", [], 0)),
    ],
)
def test_answers(text: str, expected: Answer) -> None:
    assert read([text]) == read(list(text)) == expected


def test_reasoning_that_the_prompt_opened() -> None:
    assert read(list("Hm.</think>Yes."), is_reasoning=True) == ("Hm.", "Yes.", [], 0)
    assert read(list("<think>Hm.</think>Yes."), is_reasoning=True) == ("Hm.", "Yes.", [], 0)


def test_a_streamed_call_that_is_cut_off_keeps_what_came() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "b'
    assert read(list(text), streams=True) == ("", "", [("f", '{"a": "b')], 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            ("Hm.", "Yes.", [], 0),
        ),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
            '<|constrain|>json<|message|>{"a": 1}',
            ("Hm.", "", [("f", '{"a": 1}')], 1),
        ),
        (
            ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
            ("", "", [("f", '{"a": 1}')], 1),
        ),
        ("<|channel|>commentary<|message|>One moment.<|end|>", ("", "One moment.", [], 0)),
        ("Plain.", ("", "Plain.", [], 0)),
    ],
)
def test_harmony(text: str, expected: Answer) -> None:
    for streams in (True, False):
        whole = read([text], syntax=families.HARMONY, marks=HARMONY, streams=streams)
        assert whole == read(list(text), syntax=families.HARMONY, marks=HARMONY, streams=streams) == expected
