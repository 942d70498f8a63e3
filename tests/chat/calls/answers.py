"""Tools, grammars of their calls, and what is read of answers that call them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable

import jsonschema
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.assembler import Assembler
from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.calls.families import HARMONY
from osaurus_grpc.chat.calls.lark import CallGrammar, call_grammar
from osaurus_grpc.chat.calls.rules import checked_tool
from osaurus_grpc.chat.calls.syntax import (
    CallSyntax,
    InlineParameters,
    NestedElements,
    TaggedParameters,
    XtmlElements,
)
from osaurus_grpc.chat.types import (
    AnswerEnd,
    AnswerFinished,
    ReasoningDelta,
    TextDelta,
    ToolArgumentsDelta,
    ToolCallStarted,
    ToolSpec,
)

Calls = list[tuple[str, str]]
# Gives the reader of one answer; whether calls are held to a grammar says if their parts stream.
MakeReader = Callable[[bool], AnswerReader | None]

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


def string_ends(syntax: CallSyntax) -> list[str]:
    """What ends a string that stands as it is, or Harmony's reasoning."""
    if syntax is HARMONY:
        return ["<|end|>"]
    match syntax.body:
        case TaggedParameters(value_close=close) | InlineParameters(quote=close):
            return [close.strip()] if close else []
        case NestedElements():
            return ["]<]minimax[>[</city>"]
        case XtmlElements():
            return ["<|close|>argument<|sep|>"]
        case _:
            return []


def grammar_of(
    syntax: CallSyntax, tokenizer: PreTrainedTokenizerBase, *, is_forced: bool, is_parallel: bool = True
) -> CallGrammar:
    tools = [checked_tool(tool, index, is_strict=True) for index, tool in enumerate(TOOLS)]
    return call_grammar(syntax, tokenizer, tools, is_forced=is_forced, is_parallel=is_parallel)


def begun_with(syntax: CallSyntax, tokenizer: PreTrainedTokenizerBase, grammar: CallGrammar) -> list[int]:
    """Tokens with which an answer that is free to call begins a call."""
    if grammar.trigger_ids:
        return list(grammar.trigger_ids)
    text = grammar.trigger
    if not text:
        text = f"{syntax.recipient}\n>>>ping\n" if syntax.recipient else f"{syntax.begin}ping("
    return tokenizer.encode(text, add_special_tokens=False)


def read(
    tokenizer: PreTrainedTokenizerBase,
    reader: AnswerReader | None,
    shown: frozenset[int],
    token_ids: list[int],
    sizes: Iterable[int] = (),
) -> tuple[Calls, str, AnswerEnd]:
    """The calls, the content and the end of an answer whose tokens come in groups of these sizes."""
    assembler = Assembler(tokenizer, shown=shown, reader=reader)
    events = []
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
            case ReasoningDelta() | AnswerFinished():
                pass
    assert isinstance(events[-1], AnswerFinished)
    return [(name, arguments) for name, arguments in calls], text, events[-1].cause


def check(
    tokenizer: PreTrainedTokenizerBase,
    make_reader: MakeReader,
    shown: frozenset[int],
    token_ids: list[int],
    *,
    is_single: bool,
) -> Calls:
    """The calls of an answer, which are whole and satisfy their schemas, however the answer is cut."""
    calls, text, cause = read(tokenizer, make_reader(True), shown, token_ids)
    written = tokenizer.decode(token_ids)
    assert cause is AnswerEnd.TOOL_CALLS, written
    assert not text.strip(), written
    assert calls, written
    assert len(calls) == 1 or not is_single, written
    for name, arguments in calls:
        checker = jsonschema.FormatChecker()
        jsonschema.validate(json.loads(arguments), SCHEMAS[name], format_checker=checker)
    rng = random.Random(len(token_ids))
    sizes = [rng.randint(0, 3) for _ in token_ids]
    for streams in (True, False):
        assert read(tokenizer, make_reader(streams), shown, token_ids, sizes) == (calls, text, cause)
    return calls
