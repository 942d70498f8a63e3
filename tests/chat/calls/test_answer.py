"""Reasoning, content and calls in answers as models write them, cut in any way."""

from __future__ import annotations

import json
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
    is_forced: bool = False,
    is_cut: bool = False,
) -> Answer:
    """Reasoning, content, calls and the number of whole calls; checks that pieces lie in order."""
    reader = AnswerReader(
        marks=marks,
        is_reasoning=is_reasoning,
        syntax=syntax,
        tools=TOOLS,
        streams_calls=streams,
        is_forced=is_forced,
    )
    pieces = [piece for chunk in chunks for piece in reader.feed(chunk)] + reader.finish(is_cut=is_cut)
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


FUZZED = [
    families.HERMES, families.QWEN3_CODER, families.MISTRAL, families.LLAMA, families.GLM, families.MINICPM,
    families.GEMMA_4, families.COMMAND_R, families.PYTHONIC, families.FUNCTIONARY_32,
]  # fmt: skip
PARTS = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"a": "b"}',
     "}", "\n", "```json\n", "```", "assistant:", "Hello", " ", '{"x": 1}', "<", "[", "]", ",",
     '{"tool_calls": [', CALL,
     "[TOOL_CALLS]", "f[ARGS]", "<function=f>", "<parameter=a>", "</parameter>", "</function>",
     "<tool_call>f", "<arg_key>a</arg_key>", "<arg_value>", "</arg_value>",
     '<function name="f"><param name="a">', "<![CDATA[", "]]>", "</param>",
     "<|tool_call>call:f{a:", '<|"|>', "}<tool_call|>",
     "<tool_call>\n<function=f>\n<parameter=a>\n", "\n</parameter>\n</function>\n</tool_call>",
     "Action: ", "Action: ```json\n[",
     "[f(", "a=", ")", "<|python_start|>", ">>>", "all\n", 'f\n{"a": "b"}',
     "é", '"', "\\"]
)  # fmt: skip


@given(
    text=st.lists(PARTS, max_size=12).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=30),
    syntax=st.sampled_from([*FUZZED, None]),
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


@pytest.mark.parametrize("syntax", [families.GRANITE, None], ids=["tools", "no tools"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>Hm.</think><response>Yes.</response>", ("Hm.", "Yes.", [], 0)),
        ("<think>Hm.</think>\n<response>\nYes <response>.</response>", ("Hm.", "Yes <response>.", [], 0)),
        ("<think>Hm.</think>Yes.</response>", ("Hm.", "Yes.</response>", [], 0)),
        ("What is <response>?</response>", ("", "What is <response>?</response>", [], 0)),
        ("<think>Hm.</think><response>Cut</resp", ("Hm.", "Cut</resp", [], 0)),
    ],
)
def test_an_answer_between_marks(text: str, expected: Answer, syntax: CallSyntax | None) -> None:
    marks = ThinkMarks("<think>", "</think>", ("<response>", "</response>"))
    assert read([text], marks=marks, syntax=syntax) == expected
    assert read(list(text), marks=marks, syntax=syntax) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[f(a="b")]', ("", "", [("f", '{"a": "b"}')], 1)),
        ("\n[f(a='b'), f()]", ("", "", [("f", '{"a": "b"}'), ("f", "{}")], 2)),
        ('<|python_start|>[f(a="b")]<|python_end|>', ("", "", [("f", '{"a": "b"}')], 1)),
        ("[f(a=[1, {'x': True}])] Done.", ("", " Done.", [("f", '{"a": [1, {"x": true}]}')], 1)),
        ("[1] says so.", ("", "[1] says so.", [], 0)),
        ("[f is a function]", ("", "[f is a function]", [], 0)),
        ('[g(a="b")]', ("", '[g(a="b")]', [], 0)),
        ("[f(a=", ("", "[f(a=", [], 0)),
        ('Call [f(a="b")] for it.', ("", 'Call [f(a="b")] for it.', [], 0)),
    ],
)
def test_a_list_of_calls_as_in_a_program(text: str, expected: Answer) -> None:
    assert read([text], syntax=families.PYTHONIC, marks=None) == expected
    assert read(list(text), syntax=families.PYTHONIC, marks=None) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all\nHello.", ("", "Hello.", [], 0)),
        ('f\n{"a": "b"}', ("", "", [("f", '{"a": "b"}')], 1)),
        ('f\n{"a": "b"}>>>f\n{}', ("", "", [("f", '{"a": "b"}'), ("f", "{}")], 2)),
        ('all\nLet me see.>>>f\n{"a": "b"}', ("", "Let me see.", [("f", '{"a": "b"}')], 1)),
        ('f\n{"a": "b"}>>>all\nAsked.', ("", "Asked.", [("f", '{"a": "b"}')], 1)),
        ("all\n>>> print(1)\n1", ("", ">>> print(1)\n1", [], 0)),
        ("f\nis a function.", ("", "f\nis a function.", [], 0)),
        ("alloy", ("", "alloy", [], 0)),
    ],
)
def test_an_answer_with_a_recipient(text: str, expected: Answer) -> None:
    assert read([text], syntax=families.FUNCTIONARY_32, marks=None) == expected
    assert read(list(text), syntax=families.FUNCTIONARY_32, marks=None) == expected


def test_an_answer_to_the_user_where_there_are_no_tools() -> None:
    for text in ("all\nHello >>> you", "Hello >>> you"):
        for chunks in ([text], list(text)):
            reader = AnswerReader(marks=None, syntax=families.FUNCTIONARY_32)
            pieces = [piece for chunk in chunks for piece in reader.feed(chunk)] + reader.finish()
            assert "".join(piece.text for piece in pieces) == "Hello >>> you"


def test_reasoning_that_the_prompt_opened() -> None:
    assert read(list("Hm.</think>Yes."), is_reasoning=True) == ("Hm.", "Yes.", [], 0)
    assert read(list("<think>Hm.</think>Yes."), is_reasoning=True) == ("Hm.", "Yes.", [], 0)


def test_a_streamed_call_that_is_cut_off_keeps_what_came() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "b'
    assert read(list(text), streams=True) == ("", "", [("f", '{"a": "b')], 0)


@pytest.mark.parametrize(
    ("syntax", "marks", "call"),
    [
        (families.HERMES, THINK, CALL),
        (families.LLAMA, None, '{"name": "f", "parameters": {"a": "b"}}'),
        (
            families.QWEN3_CODER,
            None,
            "<tool_call>\n<function=f>\n<parameter=a>\nb\n</parameter>\n</function>",
        ),
        (families.MISTRAL, None, '[TOOL_CALLS]f[ARGS]{"a": "b"}'),
        (families.PYTHONIC, None, '[f(a="b")]'),
        (families.GLM, THINK, "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>b</arg_value>\n</tool_call>"),
        (families.HARMONY, HARMONY, '<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>'),
    ],
)
def test_no_mark_of_a_call_that_was_cut_off_becomes_content(
    syntax: CallSyntax, marks: ThinkMarks | None, call: str
) -> None:
    for end in range(1, len(call)):
        _, content, calls, _ = read(
            list(call[:end]), syntax=syntax, marks=marks, streams=True, is_forced=True, is_cut=True
        )
        assert not content
        assert [name for name, _ in calls] in ([], ["f"])
    # A model that is free to call may have meant no more than the beginning of a mark; not so a whole one.
    marked = next((mark for mark in syntax.marks if call.startswith(mark)), None)
    if marked and marks is not HARMONY:
        for end in range(len(marked), len(call)):
            text = f"Yes. {call[:end]}"
            assert read(list(text), syntax=syntax, marks=marks, streams=True, is_cut=True)[1] == "Yes."


@pytest.mark.parametrize(
    ("syntax", "before", "close", "after"),
    [
        (
            families.QWEN3_CODER,
            "<tool_call>\n<function=f>\n<parameter=o>\n",
            "\n</parameter>",
            "\n</function>\n</tool_call>",
        ),
        (
            families.GLM,
            "<tool_call>f\n<arg_key>o</arg_key>\n<arg_value>",
            "</arg_value>",
            "\n</tool_call>",
        ),
        (
            families.KIMI_K3,
            '<|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|>'
            '<|open|>argument key="o" type="object"<|sep|>',
            "<|close|>argument<|sep|>",
            "<|close|>call<|sep|><|close|>tools<|sep|>",
        ),
        (
            families.MINIMAX_M3,
            ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="f">]<]minimax[>[<o>',
            "]<]minimax[>[</o>",
            "]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>",
        ),
    ],
)
def test_a_mark_within_a_string_of_json_is_no_end_of_the_value(
    syntax: CallSyntax, before: str, close: str, after: str
) -> None:
    for value in (f'{{"x": "1{close.strip()}2"}}', f'["\\"{close.strip()}", "{close.strip()}"]'):
        text = before + value + close + after
        for streams in (False, True):
            expected = "", "", [("f", f'{{"o": {value}}}')], 1
            assert read(list(text), syntax=syntax, marks=None, streams=streams) == expected
        # Where it is cut off, its beginning is not taken for another value.
        for end in range(len(before) + 1, len(before + value)):
            answer = read(list(text[:end]), syntax=syntax, marks=None, streams=True, is_cut=True)
            assert all(arguments in ("", '{"o": ') for _, arguments in answer[2])
    # What is no JSON ends where it always did.
    text = before + '"x' + close + after
    assert read(list(text), syntax=syntax, marks=None)[2] == [("f", '{"o": "\\"x"}')]


def test_what_began_like_a_call_is_content_where_the_answer_ended_by_itself() -> None:
    assert read(list("It is <tool_call>"), streams=True)[1] == "It is <tool_call>"
    assert read(list("It is <tool_call>"), is_cut=True)[1] == "It is <tool_call>"


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


@pytest.mark.parametrize(
    ("syntax", "opening", "close", "end"),
    [
        (
            families.QWEN3_CODER,
            "<tool_call>\n<function=f>\n<parameter=a>\n",
            "\n</parameter>",
            "\n</function>\n</tool_call>",
        ),
        (families.GLM, "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>", "</arg_value>", "\n</tool_call>"),
        (
            families.MINICPM,
            '<function name="f"><param name="a"><![CDATA[',
            "]]></param>",
            "</function>",
        ),
        (families.GEMMA_4, '<|tool_call>call:f{a:<|"|>', '<|"|>', "}<tool_call|>"),
    ],
    ids=["qwen3-coder", "glm", "minicpm", "gemma-4"],
)
def test_a_string_that_stands_as_it_is_streams(
    syntax: CallSyntax, opening: str, close: str, end: str
) -> None:
    value = 'First "line",\n\tsecond \\ line </param eter> \U0001f995 <\n\n'
    reader = AnswerReader(marks=None, syntax=syntax, tools=TOOLS, streams_calls=True)
    written = "".join(piece.text for piece in reader.feed(opening) if piece.kind is PieceKind.CALL_ARGUMENTS)
    assert written in ("", '{"a": ', '{"a": "')
    for count, character in enumerate(value, start=1):
        for piece in reader.feed(character):
            assert piece.kind is PieceKind.CALL_ARGUMENTS
            written += piece.text
        # What may begin the mark behind the value waits, no more; an escape is never cut.
        shown = json.loads(f'{written}"}}')["a"]
        assert value.startswith(shown)
        assert count - len(shown) < len("\n</parameter>")
    rest = reader.feed(close + end) + reader.finish()
    written += "".join(piece.text for piece in rest if piece.kind is PieceKind.CALL_ARGUMENTS)
    assert json.loads(written) == {"a": value}
    assert PieceKind.CALL_END in {piece.kind for piece in rest}


def test_a_string_with_a_form_is_read_as_it_is_and_as_json() -> None:
    tools = ToolTable.of(
        [ToolSpec("f", parameters_json='{"properties":{"d":{"type":"string","maxLength":3}}}')]
    )
    for text in ("123", '"123"'):
        reader = AnswerReader(marks=None, syntax=families.SEED, tools=tools)
        answer = (
            f"<seed:tool_call>\n<function=f>\n<parameter=d>{text}</parameter>\n</function>\n</seed:tool_call>"
        )
        pieces = reader.feed(answer) + reader.finish()
        arguments = "".join(piece.text for piece in pieces if piece.kind is PieceKind.CALL_ARGUMENTS)
        assert json.loads(arguments) == {"d": "123"}
