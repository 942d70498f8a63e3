"""Kimi K3's calls: elements with attributes."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.calls import families
from osaurus_grpc.chat.calls.lark import call_grammar
from osaurus_grpc.chat.calls.rules import checked_tool
from osaurus_grpc.chat.calls.writer import write_calls
from osaurus_grpc.chat.reasoning import ThinkMarks, think_marks
from osaurus_grpc.chat.types import JSON, ToolCall, ToolSpec
from tests.chat.calls.test_answer import Answer, read

CALLED = (
    '<|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|>{}<|close|>call<|sep|><|close|>tools<|sep|>'
)
TEXT = '<|open|>argument key="a" type="string"<|sep|>1 "&quot;" <b<|close|>argument<|sep|>'
NUMBER = '<|open|>argument key="n&quot;&amp;" type="number"<|sep|>1.50<|close|>argument<|sep|>'
BLOCK = '<|open|>json type="object"<|sep|>{"a": "x"}<|close|>json<|sep|>'
NOT_CLOSED = '<|open|>argument key="a" type="string"<|sep|>x'


@pytest.fixture
def marks(tokenizer: PreTrainedTokenizerBase) -> ThinkMarks:
    found = think_marks(tokenizer, "'<|open|>' '<|close|>' '<|sep|>' close_tag('think')")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CALLED.format(""), ("", "", [("f", "{}")], 1)),
        (CALLED.format(TEXT), ("", "", [("f", '{"a": "1 \\"&quot;\\" <b"}')], 1)),
        (CALLED.format(TEXT + NUMBER), ("", "", [("f", '{"a": "1 \\"&quot;\\" <b", "n\\"&": 1.50}')], 1)),
        (CALLED.format(BLOCK), ("", "", [("f", '{"a": "x"}')], 1)),
        (
            "<|open|>think<|sep|>Hm.<|close|>think<|sep|>"
            "<|open|>response<|sep|>One moment.<|close|>response<|sep|>"
            f"{CALLED.format(TEXT)}<|close|>message<|sep|>",
            ("Hm.", "One moment.", [("f", '{"a": "1 \\"&quot;\\" <b"}')], 1),
        ),
        ("Yes.<|close|>response<|sep|><|close|>message<|sep|>", ("", "Yes.", [], 0)),
        (CALLED.format(NOT_CLOSED), ("", CALLED.format(NOT_CLOSED), [], 0)),
    ],
)
def test_answers(marks: ThinkMarks, text: str, expected: Answer) -> None:
    for streams in (False, True) if expected[3] else (False,):
        for chunks in ([text], list(text)):
            assert read(chunks, syntax=families.KIMI_K3, marks=marks, streams=streams) == expected


@pytest.mark.parametrize(
    ("schema", "is_block"),
    [
        ({"properties": {"a": {"type": "string"}, "n": {"type": "integer"}}}, False),
        ({"properties": {"a": {"type": "array", "items": {"type": "string"}}}}, False),
        ({"properties": {"a": {"type": ["string", "null"]}}}, True),
        ({"properties": {"a": {"type": "string", "format": "date"}}}, True),
        ({"properties": {"a": {}}}, True),
        ({"anyOf": [{"type": "object"}]}, True),
    ],
)
def test_arguments_without_one_type_are_one_object(
    tokenizer: PreTrainedTokenizerBase, schema: JSON, is_block: bool
) -> None:
    tool = checked_tool(ToolSpec("f", parameters_json=json.dumps(schema)), 0, is_strict=False)
    grammar = call_grammar(families.KIMI_K3, tokenizer, [tool], is_forced=True, is_parallel=True)
    assert ("json type" in grammar.text) == is_block


def test_calls_are_written_with_their_types() -> None:
    arguments = '{"s": "x", "i": 1, "f": 2.50, "b": true, "z": null, "o": {}, "l": []}'
    text = str(write_calls(families.KIMI_K3, [ToolCall("1", "f", arguments)]))
    kinds = [part.split('"')[0] for part in text.split(' type="')[1:]]
    assert kinds == ["string", "number", "number", "boolean", "null", "object", "array"]
