"""Every family's syntax: what its grammar lets through is read as calls that satisfy their schemas."""

from __future__ import annotations

import json
from functools import partial

import pytest
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.calls import families
from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.calls.pieces import ToolTable
from osaurus_grpc.chat.calls.syntax import CallSyntax
from osaurus_grpc.chat.calls.writer import write_calls
from osaurus_grpc.chat.grammar import Grammars, Trigger
from osaurus_grpc.chat.types import AnswerEnd, ToolCall
from tests.chat.calls.answers import TOOLS, begun_with, check, grammar_of, read, string_ends
from tests.chat.calls.walks import Model, tokenizer_with_marks, walk

# Harmony's reader is another one, and its marks are always special; see test_harmony.
SYNTAXES = [value for value in vars(families).values() if isinstance(value, CallSyntax)]
SYNTAXES.remove(families.HARMONY)
SPELLED_OUT = [families.HERMES, families.QWEN3_CODER, families.GLM, families.LFM2, families.DEEPSEEK_V31]


@pytest.mark.parametrize(
    ("syntax", "is_special"),
    [(syntax, True) for syntax in SYNTAXES] + [(syntax, False) for syntax in SPELLED_OUT],
    ids=lambda value: getattr(value, "name", "special" if value is True else "plain"),
)
async def test_any_walk_is_calls_that_satisfy_their_schemas(
    tokenizer: PreTrainedTokenizerBase, syntax: CallSyntax, is_special: bool
) -> None:
    marked = tokenizer_with_marks(tokenizer, syntax, is_special=is_special)
    assert isinstance(marked.eos_token_id, int)
    model = Model(marked, frozenset({marked.eos_token_id}), len(marked))
    grammars = Grammars()
    closing = [marked.encode(mark, add_special_tokens=False) for mark in string_ends(syntax)]
    for seed, is_forced in enumerate([True, False]):
        grammar = grammar_of(syntax, marked, is_forced=is_forced, is_parallel=is_forced)
        compiled = await grammars.lark(model, grammar.text)
        begun: list[int] = []
        constraint = compiled.constraint()
        if not is_forced:
            begun = begun_with(syntax, marked, grammar)
            if not syntax.is_unmarked:
                begin = Trigger(token_ids=grammar.trigger_ids, text=grammar.trigger, is_required=False)
                constraint = compiled.constraint(begin, repeats=grammar.repeats)
        for attempt in range(2):
            token_ids = walk(model, constraint.fork(), 10 * seed + attempt, begun, closing)
            check(
                marked,
                partial(reader_of, syntax),
                shown_of(marked, syntax),
                token_ids,
                is_single=not is_forced,
            )
    grammars.close()


def shown_of(tokenizer: PreTrainedTokenizerBase, syntax: CallSyntax) -> frozenset[int]:
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(i for i in special if any(tokenizer.decode([i]) in text for text in syntax.texts))


def reader_of(syntax: CallSyntax, streams: bool = True) -> AnswerReader:
    return AnswerReader(marks=None, syntax=syntax, tools=ToolTable.of(TOOLS), streams_calls=streams)


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
    calls, text, cause = read(
        tokenizer, reader_of(syntax), shown_of(tokenizer, syntax), token_ids, [1] * len(token_ids)
    )

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

    assert read(
        tokenizer, reader_of(syntax), shown_of(tokenizer, syntax), token_ids, [1] * len(token_ids)
    ) == (
        [],
        tokenizer.decode(token_ids),
        AnswerEnd.STOP,
    )
