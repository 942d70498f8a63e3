"""Every family's syntax: what its grammar lets through is read as calls that satisfy their schemas."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema
import pytest
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.assembler import Assembler
from osaurus_grpc.chat.calls import families
from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.calls.lark import CallGrammar, call_grammar, checked_tool
from osaurus_grpc.chat.calls.pieces import ToolTable
from osaurus_grpc.chat.calls.syntax import CallSyntax, InlineParameters, TaggedParameters
from osaurus_grpc.chat.calls.writer import write_calls
from osaurus_grpc.chat.grammar import Grammars, Trigger
from osaurus_grpc.chat.types import (
    AnswerEnd,
    AnswerEvent,
    AnswerFinished,
    TextDelta,
    ToolArgumentsDelta,
    ToolCall,
    ToolCallStarted,
    ToolSpec,
)
from tests.chat.calls.walks import Model, tokenizer_with_marks, walk

SCHEMAS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["city", "unit"],
    },
    "make-thing.x": {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
            "o": {
                "type": "object",
                "properties": {"x": {"type": "boolean"}, "é": {"type": ["string", "null"], "maxLength": 5}},
                "required": ["x"],
                "additionalProperties": False,
            },
            "d": {"type": "string", "format": "date"},
        },
        "required": ["o"],
    },
    "ping": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [ToolSpec(name, "what it does", json.dumps(schema)) for name, schema in SCHEMAS.items()]
# Harmony's reader is another one, and its marks are always special; see test_harmony.
SYNTAXES = [value for value in vars(families).values() if isinstance(value, CallSyntax)]
SYNTAXES.remove(families.HARMONY)
SPELLED_OUT = [families.HERMES, families.QWEN3_CODER, families.GLM, families.LFM2, families.DEEPSEEK_V31]


def string_ends(syntax: CallSyntax) -> list[str]:
    """What ends a string that stands as it is."""
    match syntax.body:
        case TaggedParameters(value_close=close) | InlineParameters(quote=close):
            return [close.strip()] if close else []
        case _:
            return []


def grammar_of(
    syntax: CallSyntax, tokenizer: PreTrainedTokenizerBase, *, is_forced: bool, is_parallel: bool = True
) -> CallGrammar:
    tools = [checked_tool(tool, index, is_strict=True) for index, tool in enumerate(TOOLS)]
    return call_grammar(syntax, tokenizer, tools, is_forced=is_forced, is_parallel=is_parallel)


def read(
    syntax: CallSyntax,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[int],
    sizes: list[int],
    *,
    streams: bool = True,
) -> tuple[list[tuple[str, str]], str, AnswerEnd]:
    """The calls, the content and the end of an answer whose tokens come in groups of these sizes."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    shown = frozenset(i for i in special if any(tokenizer.decode([i]) in text for text in syntax.texts))
    reader = AnswerReader(marks=None, syntax=syntax, tools=ToolTable.of(TOOLS), streams_calls=streams)
    assembler = Assembler(tokenizer, shown=shown, reader=reader)
    events: list[AnswerEvent] = []
    position = 0
    for size in [*sizes, len(token_ids)]:
        events += assembler.feed(token_ids[position : position + size])
        position += size
    events += assembler.finish(AnswerEnd.STOP)
    calls: list[list[str]] = []
    text = ""
    for event in events:
        match event:
            case ToolCallStarted():
                calls.append([event.name, ""])
            case ToolArgumentsDelta():
                calls[event.index][1] += event.arguments_json
            case TextDelta():
                text += event.text
            case _:
                assert isinstance(event, AnswerFinished)
    assert isinstance(events[-1], AnswerFinished)
    return [(name, arguments) for name, arguments in calls], text, events[-1].cause


@pytest.mark.parametrize(
    ("syntax", "is_special"),
    [(syntax, True) for syntax in SYNTAXES] + [(syntax, False) for syntax in SPELLED_OUT],
    ids=lambda value: getattr(value, "name", "special" if value is True else "plain"),
)
async def test_any_walk_is_calls_that_satisfy_their_schemas(
    smollm_dir: Path, syntax: CallSyntax, is_special: bool
) -> None:
    folder = str(smollm_dir / "smollm2-135m-instruct")
    tokenizer = tokenizer_with_marks(folder, syntax, is_special=is_special)
    assert isinstance(tokenizer.eos_token_id, int)
    model = Model(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    grammars = Grammars()
    closing = [tokenizer.encode(mark, add_special_tokens=False) for mark in string_ends(syntax)]
    for seed, is_forced in enumerate([True, False]):
        grammar = grammar_of(syntax, tokenizer, is_forced=is_forced, is_parallel=is_forced)
        compiled = await grammars.lark(model, grammar.text)
        begun: list[int] = []
        constraint = compiled.constraint()
        if not is_forced:
            begin = Trigger(token_ids=grammar.trigger_ids, text=grammar.trigger, is_required=False)
            constraint = compiled.constraint(begin, repeats=grammar.repeats)
            begun = list(grammar.trigger_ids) or tokenizer.encode(grammar.trigger, add_special_tokens=False)
        for attempt in range(2):
            token_ids = walk(model, constraint.fork(), 10 * seed + attempt, begun, closing)
            check(syntax, tokenizer, token_ids, is_single=not is_forced)
    grammars.close()


def check(
    syntax: CallSyntax, tokenizer: PreTrainedTokenizerBase, token_ids: list[int], *, is_single: bool
) -> None:
    """The tokens are whole calls that satisfy their schemas, however they are cut."""
    calls, text, cause = read(syntax, tokenizer, token_ids, [])
    assert cause is AnswerEnd.TOOL_CALLS
    assert not text.strip()
    assert calls
    assert len(calls) == 1 or not is_single
    for name, arguments in calls:
        checker = jsonschema.FormatChecker()
        jsonschema.validate(json.loads(arguments), SCHEMAS[name], format_checker=checker)
    rng = random.Random(len(token_ids))
    sizes = [rng.randint(0, 3) for _ in token_ids]
    for streams in (True, False):
        assert read(syntax, tokenizer, token_ids, sizes, streams=streams) == (calls, text, cause)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
def test_calls_as_templates_write_them_are_read_again(
    tokenizer: PreTrainedTokenizerBase, syntax: CallSyntax
) -> None:
    asked = [
        ToolCall("abcdefgh1", "get_weather", '{"city": "Köln \\"x\\"", "days": 3, "unit": "C"}'),
        ToolCall("abcdefgh2", "ping", "{}"),
        ToolCall("abcdefgh3", "make-thing.x", '{"a": [1, 2.5], "o": {"é": null}, "d": "2026-01-02"}'),
    ]
    token_ids = tokenizer.encode(str(write_calls(syntax, asked)), add_special_tokens=False)
    calls, text, cause = read(syntax, tokenizer, token_ids, [1] * len(token_ids))

    assert [name for name, _ in calls] == [call.name for call in asked]
    assert [json.loads(arguments) for _, arguments in calls] == [
        json.loads(call.arguments_json) for call in asked
    ]
    assert not text.strip()
    assert cause is AnswerEnd.TOOL_CALLS


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
def test_a_call_of_an_unknown_tool_is_content(tokenizer: PreTrainedTokenizerBase, syntax: CallSyntax) -> None:
    written = str(write_calls(syntax, [ToolCall("abcdefgh1", "launch", '{"now": true}')]))
    token_ids = tokenizer.encode(f"Well: {written} Done.", add_special_tokens=False)

    assert read(syntax, tokenizer, token_ids, [1] * len(token_ids)) == (
        [],
        tokenizer.decode(token_ids),
        AnswerEnd.STOP,
    )
