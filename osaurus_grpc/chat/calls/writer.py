"""Calls as text, for templates that leave them out of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from osaurus_grpc.chat.calls import elements, xtml
from osaurus_grpc.chat.calls.syntax import (
    CallSyntax,
    InlineParameters,
    JsonObject,
    NamedJson,
    NestedElements,
    TaggedParameters,
    XtmlElements,
)
from osaurus_grpc.chat.calls.values import compact, members
from osaurus_grpc.chat.control_tokens import Spliced
from osaurus_grpc.chat.types import ToolCall


def write_calls(syntax: CallSyntax, calls: Sequence[ToolCall]) -> Spliced:
    """The calls as the model itself would write them; the marks around them stay control tokens."""
    parts: list[tuple[str, bool]] = []
    for index, call in enumerate(calls):
        if index:
            parts.append((syntax.separator, True))
        if not index or syntax.repeats_section:
            parts.append((syntax.begin, True))
        parts.append((syntax.call_open, True))
        parts += _call(syntax, call, index)
        parts.append((syntax.call_close, True))
        if index == len(calls) - 1 or syntax.repeats_section:
            parts.append((syntax.end, True))
    return Spliced.of(parts)


def _call(syntax: CallSyntax, call: ToolCall, index: int) -> list[tuple[str, bool]]:
    arguments = call.arguments_json.strip() or "{}"
    body = syntax.body
    match body:
        case JsonObject():
            lead = f'"{body.index_key}": "{index}", ' if body.index_key else ""
            tail = f', "{body.id_key}": {compact(call.id)}' if body.id_key else ""
            name = compact(call.name)
            text = f'{{{lead}"{body.name_key}": {name}, "{body.arguments_key}": {arguments}{tail}}}'
            return [(text, False)]
        case NamedJson():
            lead = f"{call.id}{body.id_close}" if body.id_close else ""
            count = f":{index}" if body.counts else ""
            tail = f"{body.id_open}{call.id}" if body.id_open else ""
            head = [(lead + body.before, True), (call.name + count, False), (tail + body.after, True)]
            return [*head, (arguments, False)]
        case TaggedParameters():
            return _tagged(body, call.name, arguments)
        case InlineParameters():
            return _inline(body, call.name, arguments)
        case XtmlElements():
            return xtml.written(call.name, arguments, index)
        case NestedElements():
            return elements.written(call.name, arguments)
        case _ as unreachable:
            assert_never(unreachable)


def _tagged(body: TaggedParameters, name: str, arguments: str) -> list[tuple[str, bool]]:
    parts = [(body.name_open, True), (name, False), (body.name_close, True)]
    for key, value, is_string in members(arguments):
        key_close = body.string_key_close if is_string and body.string_key_close else body.key_close
        parts += [(body.key_open, True), (key, False), (key_close, True)]
        parts += [(value, False), (body.value_close + body.separator, True)]
    return [*parts, (body.end, True)]


def _inline(body: InlineParameters, name: str, arguments: str) -> list[tuple[str, bool]]:
    parts = [(body.name_open, True), (name, False), (body.open, True)]
    for index, (key, value, is_string) in enumerate(members(arguments)):
        if index:
            parts.append((body.separator, True))
        parts += [(key, False), (body.assign, True)]
        if body.quote and is_string:
            parts += [(body.quote, True), (value, False), (body.quote, True)]
        else:
            parts.append((compact(value) if is_string else value, False))
    return [*parts, (body.close, True)]
