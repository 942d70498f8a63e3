"""Conversations with tools in a form that the model's template shows whole.

What a template would lose is put into messages that it shows: tools into the system message, calls
into the assistant's text, results into a user message.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from osaurus_grpc.chat.abilities import Abilities
from osaurus_grpc.chat.calls.syntax import CallSyntax
from osaurus_grpc.chat.calls.writer import write_calls
from osaurus_grpc.chat.control_tokens import Spliced
from osaurus_grpc.chat.types import JSON, Message, Role, ToolCall, ToolSpec

_INSTRUCTIONS: Final = """\
You can call functions. They are listed below, one JSON object a line.

{tools}

To call a function, answer with nothing but its name and its arguments in this form:
"""
_AFTER_EXAMPLE: Final = """
Write one such block for each call. The results come in the next message. Where no function is needed, \
answer in plain text."""
_EXAMPLE: Final = ToolCall("call00000", "FUNCTION", '{"ARGUMENT": "VALUE"}')


def tool_json(tool: ToolSpec, *, describes: bool = False) -> JSON:
    """A tool in the form of OpenAI's API, which templates expect.

    Args:
        tool: The tool.
        describes: Arguments without a description get an empty one.
    """
    function: dict[str, JSON] = {"name": tool.name, "description": tool.description}
    parameters = json.loads(tool.parameters_json or '{"type": "object", "properties": {}}')
    if describes and isinstance(parameters.get("properties"), dict):
        for schema in parameters["properties"].values():
            if isinstance(schema, dict):
                schema.setdefault("description", "")
    function["parameters"] = parameters
    return {"type": "function", "function": function}


def matched(messages: Sequence[Message]) -> list[Message]:
    """The conversation with an id on every call and on every result, made up where there was none.

    A result without an id answers the first open call of its name, or the first one at all.
    """
    found: list[Message] = []
    open_calls: list[ToolCall] = []
    for number, message in enumerate(messages):
        if message.tool_calls:
            calls = tuple(
                call if call.id else replace(call, id=f"call{number}x{index}")
                for index, call in enumerate(message.tool_calls)
            )
            open_calls = list(calls)
            message = replace(message, tool_calls=calls)
        elif message.role is Role.TOOL:
            call = _answered(message, open_calls)
            if call is not None:
                open_calls.remove(call)
                message = replace(message, tool_call_id=call.id, name=message.name or call.name)
        found.append(message)
    return found


def _answered(message: Message, open_calls: Sequence[ToolCall]) -> ToolCall | None:
    if message.tool_call_id:
        return next((call for call in open_calls if call.id == message.tool_call_id), None)
    named = (call for call in open_calls if call.name == message.name)
    return next(named, open_calls[0] if open_calls else None)


@dataclass(frozen=True, slots=True)
class Replay:
    """A conversation for a template.

    Attributes:
        messages: What to render.
        tools: What to hand to the template as its tools; empty where they are in the messages.
    """

    messages: list[Message]
    tools: list[JSON]


def replayed(
    messages: Sequence[Message], tools: Sequence[ToolSpec], abilities: Abilities, syntax: CallSyntax
) -> Replay:
    """The conversation in the form that a template with these abilities shows whole.

    Args:
        messages: As they came.
        tools: Those that the model may see.
        abilities: The template's.
        syntax: How the model writes calls.
    """
    turns = matched(messages)
    is_native = abilities.tools and syntax.is_native
    # A template that shows tools and calls in a form that is not known is given neither: the model is to
    # see calls as it is asked to write them.
    shows_calls = abilities.calls and (syntax.is_native or not abilities.tools)
    shows_calls = shows_calls and not syntax.is_shown_as_text
    # A template that passes any role through and knows of no tools has no place for results.
    shows_results = abilities.results and (is_native or shows_calls)
    if any(turn.role is Role.TOOL for turn in turns) and not shows_results:
        turns = list(_results_by_user(turns))
    if any(turn.tool_calls for turn in turns):
        if not shows_calls:
            turns = [_with_calls_as_text(turn, syntax) for turn in turns]
        elif not abilities.many_calls:
            turns = list(_one_call_a_turn(turns))
    if tools and not is_native:
        turns = _with_system(turns, instructions(tools, syntax))
    if not abilities.system:
        turns = _without_system(turns)
    shown = [tool_json(tool, describes=not abilities.undescribed) for tool in tools] if is_native else []
    return Replay(turns, shown)


def instructions(tools: Iterable[ToolSpec], syntax: CallSyntax) -> Spliced:
    """Tells a model whose template knows of no tools about them, and how to call one."""
    lines = (json.dumps(tool_json(tool), ensure_ascii=False) for tool in tools)
    opening = _INSTRUCTIONS.format(tools="\n".join(lines))
    return Spliced.of(((opening, False), *write_calls(syntax, [_EXAMPLE]).parts, (_AFTER_EXAMPLE, False)))


def _with_calls_as_text(turn: Message, syntax: CallSyntax) -> Message:
    if not turn.tool_calls:
        return turn
    written = write_calls(syntax, turn.tool_calls)
    lead = [(f"{turn.content}\n", False)] if turn.content else []
    return replace(turn, content=Spliced.of((*lead, *written.parts)), tool_calls=())


def _results_by_user(turns: Sequence[Message]) -> Iterable[Message]:
    """Results as what the user says, those of one turn and a question behind them in one message."""
    held: list[str] = []
    for turn in turns:
        if turn.role is Role.TOOL:
            name = f' name="{turn.name}"' if turn.name else ""
            held.append(f"<tool_response{name}>\n{turn.content}\n</tool_response>")
            continue
        if held and turn.role is Role.USER:
            yield replace(turn, content="\n".join([*held, turn.content]))
        elif held:
            yield Message(Role.USER, "\n".join(held))
            yield turn
        else:
            yield turn
        held = []
    if held:
        yield Message(Role.USER, "\n".join(held))


def _one_call_a_turn(turns: Sequence[Message]) -> Iterable[Message]:
    """Several calls as several turns, each with its result behind it (Llama 3)."""
    results = {turn.tool_call_id: turn for turn in turns if turn.role is Role.TOOL}
    moved: set[str] = set()
    for turn in turns:
        if turn.role is Role.TOOL and turn.tool_call_id in moved:
            continue
        if len(turn.tool_calls) < 2:
            yield turn
            continue
        for index, call in enumerate(turn.tool_calls):
            yield replace(turn, content="" if index else turn.content, tool_calls=(call,))
            result = results.get(call.id)
            if result is not None and call.id not in moved:
                moved.add(call.id)
                yield result


def _with_system(turns: Sequence[Message], text: Spliced) -> list[Message]:
    first = turns[0]
    if first.role in (Role.SYSTEM, Role.DEVELOPER):
        lead = [(f"{first.content}\n\n", False)] if first.content else []
        content = Spliced.of((*lead, *text.parts))
        return [replace(first, content=content), *turns[1:]]
    return [Message(Role.SYSTEM, text), *turns]


def _without_system(turns: Sequence[Message]) -> list[Message]:
    """System messages put before what the user says next (Gemma 2)."""
    held: list[tuple[str, bool]] = []
    found: list[Message] = []
    for turn in turns:
        if turn.role in (Role.SYSTEM, Role.DEVELOPER):
            held += [*_parts(turn.content), ("\n\n", False)]
        elif held and turn.role is Role.USER:
            found.append(replace(turn, content=Spliced.of((*held, *_parts(turn.content)))))
            held = []
        else:
            found.append(turn)
    return [*found, Message(Role.USER, Spliced.of(held[:-1]))] if held else found


def _parts(text: str) -> tuple[tuple[str, bool], ...]:
    return text.parts if isinstance(text, Spliced) else ((text, False),)
