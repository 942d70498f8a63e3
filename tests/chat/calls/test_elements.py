"""MiniMax M3's calls: elements all the way down."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.calls import families
from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.calls.lark import call_grammar
from osaurus_grpc.chat.calls.pieces import PieceKind, ToolTable
from osaurus_grpc.chat.calls.rules import checked_tool
from osaurus_grpc.chat.calls.writer import write_calls
from osaurus_grpc.chat.reasoning import ThinkMarks
from osaurus_grpc.chat.types import JSON, ToolCall, ToolSpec
from osaurus_grpc.errors import InvalidRequestError

MARK = "]<]minimax[>["
SCHEMA: JSON = {
    "type": "object",
    "properties": {
        "s": {"type": "string"},
        "n": {"type": "number"},
        "b": {"type": "boolean"},
        "l": {"type": "array", "items": {"type": "string"}},
        "o": {
            "type": "object",
            "properties": {"x": {"type": "string"}, "y": {"type": "array", "items": {"type": "integer"}}},
        },
        "any": {},
    },
}
TOOLS = [ToolSpec("f", parameters_json=json.dumps(SCHEMA))]


def called(arguments: str) -> str:
    """An answer that calls f; "~" stands for the mark."""
    text = f'~<tool_call>\n~<invoke name="f">{arguments}~</invoke>\n~</tool_call>'
    return text.replace("~", MARK)


def read(
    chunks: list[str], *, streams: bool = False, marks: ThinkMarks | None = None
) -> tuple[str, str, int]:
    """Content, arguments, and the number of whole calls."""
    tools = ToolTable.of(TOOLS)
    reader = AnswerReader(marks=marks, syntax=families.MINIMAX_M3, tools=tools, streams_calls=streams)
    pieces = [piece for chunk in chunks for piece in reader.feed(chunk)] + reader.finish()
    content, arguments = (
        "".join(piece.text for piece in pieces if piece.kind is kind)
        for kind in (PieceKind.CONTENT, PieceKind.CALL_ARGUMENTS)
    )
    return content, arguments, sum(piece.kind is PieceKind.CALL_END for piece in pieces)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ("~<s>1 <b> \n~</s>", {"s": "1 <b> \n"}),
        ("~<s>~</s>~<l>~</l>~<o>~</o>", {"s": "", "l": [], "o": {}}),
        ("\n~<n>2.5~</n>\n~<b>true~</b>", {"n": 2.5, "b": True}),
        ("~<l>~<item>true~</item>~<item>1~</item>~</l>", {"l": ["true", "1"]}),
        ("~<o>~<x>1~</x>~<y>~<item>1~</item>~</y>~</o>", {"o": {"x": "1", "y": [1]}}),
        ('~<l>["a", "b"]~</l>~<o>{"x": "1"}~</o>', {"l": ["a", "b"], "o": {"x": "1"}}),
        ("~<any>~<item>~<k>1~</k>~</item>~<item>x~</item>~</any>", {"any": [{"k": 1}, "x"]}),
        ("~<any>[1, null]~</any>~<other>text~</other>", {"any": [1, None], "other": "text"}),
    ],
)
def test_arguments(arguments: str, expected: JSON) -> None:
    text = called(arguments)
    for streams in (False, True):
        content, found, count = read([text], streams=streams)
        assert (content, json.loads(found), count) == ("", expected, 1)
        assert read(list(text), streams=streams) == (content, found, count)


@pytest.mark.parametrize(
    "arguments", ["~<s>never closed", "~<l>~<item>1~</item>~<x>1~</x>~</l>", "~<>1~</>", "text"]
)
def test_what_is_no_call_is_content(arguments: str) -> None:
    text = called(arguments)
    assert read([text]) == read(list(text)) == (text, "", 0)


def test_the_mark_that_says_there_is_no_reasoning_is_no_content() -> None:
    marks = ThinkMarks("<mm:think>", "</mm:think>")
    for chunks in (["</mm:think>Yes."], list("</mm:think>Yes.")):
        assert read(chunks, marks=marks) == ("Yes.", "", 0)


def test_what_is_written_is_read_again() -> None:
    arguments = '{"s": "a\\"", "n": 2.50, "l": ["x"], "o": {"x": "", "y": [1]}, "any": {"k": [true]}}'
    text = str(write_calls(families.MINIMAX_M3, [ToolCall("1", "f", arguments)]))
    assert f"{MARK}<n>2.50{MARK}</n>" in text
    assert json.loads(read([text])[1]) == json.loads(arguments)


def test_a_name_that_no_element_can_have_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    schema = json.dumps({"properties": {"a>b": {"type": "string"}}})
    tool = checked_tool(ToolSpec("f", parameters_json=schema), 0, is_strict=False)
    with pytest.raises(InvalidRequestError, match="name"):
        call_grammar(families.MINIMAX_M3, tokenizer, [tool], is_forced=True, is_parallel=True)
