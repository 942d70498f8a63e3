"""Calls as elements with attributes, Kimi K3's form: how they are read, held to form and written.

`<|open|>call tool="f" index="1"<|sep|><|open|>argument key="a" type="string"<|sep|>b<|close|>argument<|sep|>
<|close|>call<|sep|>`, on one line. Strings stand as they are, all other values as JSON. In the place of
the arguments one element may hold all of them as a JSON object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from osaurus_grpc.chat.calls.pieces import CallWriter, ToolTable
from osaurus_grpc.chat.calls.rules import CheckedTool, Rules, embedded, parameters
from osaurus_grpc.chat.calls.source import Reading, Source
from osaurus_grpc.chat.calls.streamed import stream_string, stream_value
from osaurus_grpc.chat.calls.values import compact, is_plain_string, members, read_marked, value_json
from osaurus_grpc.errors import InvalidRequestError

_ATTRIBUTE: Final = re.compile(r'(\w+)="([^"]*)"')
_MAX_TAG_CHARACTERS: Final = 1024
_TYPES: Final = {
    "integer": "number",
    "number": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "object",
    "array": "array",
}
_TYPE_OF_FIRST: Final = {"t": "boolean", "f": "boolean", "n": "null", "{": "object", "[": "array"}


def read_call(source: Source, tools: ToolTable, writer: CallWriter) -> Reading[bool]:
    """Reads a call; whether there is a whole one, without its end being said to the writer."""
    attributes = yield from _opened(source, "call")
    name = (attributes or {}).get("tool", "")
    if name not in tools:
        return False
    writer.name(name)
    if (yield from _opened(source, "json")) is not None:
        yield from source.skip()
        if not (yield from source.has_more()) or source.text[source.position] != "{":
            return False
        is_whole = yield from stream_value(source, writer)
        return is_whole and (yield from _closed(source, "json")) and (yield from _closed(source, "call"))
    count = 0
    while (argument := (yield from _opened(source, "argument"))) is not None:
        lead = f"{', ' if count else '{'}{compact(argument.get('key', ''))}: "
        is_string = argument.get("type") == "string"
        if is_string:
            writer.arguments(f'{lead}"')
            if not (yield from stream_string(source, writer, _close("argument"))):
                return False
            writer.arguments('"')
        else:
            value = yield from read_marked(source, _close("argument"))
            if value is None:
                return False
            is_string = argument.get("key") in tools.strings[name]
            writer.arguments(lead + value_json(value, is_string=is_string))
        count += 1
    if not (yield from _closed(source, "call")):
        return False
    writer.arguments("}" if count else "{}")
    return True


def add_rules(rules: Rules, tool: CheckedTool, rule: str) -> None:
    """Adds the rule of a call from its tool's name on.

    Where an argument has no single type, or is a string of some form, all of them are one JSON object.
    """
    head = rules.literal(_escaped(tool.tool.name) + '" index="')
    parts = [head, "/[1-9][0-9]?/", rules.literal('"<|sep|>')]
    arguments = _typed(tool)
    if arguments is None:
        opening, close = rules.literal('<|open|>json type="object"<|sep|>'), rules.literal(_close("json"))
        parts += [opening, f"%json {tool.schema_text}", close]
    for number, (key, schema, kind, is_required) in enumerate(arguments or ()):
        part = f"{rule}_{number}"
        head = rules.literal(f'<|open|>argument key="{_escaped(key)}" type="{kind}"<|sep|>')
        if kind == "string":
            rules.string(f"{part}_v", schema, _close("argument"))
            rules.add(part, f"{head} {part}_v")
        else:
            rules.add(part, f"{head} %json {embedded(schema, tool)} {rules.literal(_close('argument'))}")
        parts.append(part if is_required else f"{part}?")
    rules.add(rule, " ".join([*parts, rules.literal(_close("call"))]))


def written(name: str, arguments: str, index: int) -> list[tuple[str, bool]]:
    """A call as the model writes it: texts, and whether each is the form's own."""
    parts = [('<|open|>call tool="', True), (_escaped(name), False), (f'" index="{index + 1}"<|sep|>', True)]
    for key, value, is_string in members(arguments):
        kind = "string" if is_string else _TYPE_OF_FIRST.get(value[0], "number")
        parts += [('<|open|>argument key="', True), (_escaped(key), False)]
        parts += [(f'" type="{kind}"<|sep|>', True), (value, False), (_close("argument"), True)]
    return [*parts, (_close("call"), True)]


def _typed(tool: CheckedTool) -> list[tuple[str, Mapping[str, Any], str, bool]] | None:
    """The arguments with their types; None where they cannot be written one by one."""
    try:
        arguments = parameters(tool)
    except InvalidRequestError:
        return None
    typed = [(key, schema, _type_of(schema), is_required) for key, schema, is_required in arguments]
    return typed if all(kind for _, _, kind, _ in typed) else None


def _type_of(schema: Any) -> str:
    if is_plain_string(schema):
        return "string"
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    return _TYPES.get(kind, "") if isinstance(kind, str) else ""


def _close(tag: str) -> str:
    return f"<|close|>{tag}<|sep|>"


def _opened(source: Source, tag: str) -> Reading[dict[str, str] | None]:
    """Passes over an element's beginning and gives its attributes; None where it does not begin here."""
    start = source.position
    yield from source.skip()
    if (yield from source.takes(f"<|open|>{tag}")):
        found = yield from source.until(["<|sep|>"], _MAX_TAG_CHARACTERS)
        if found is not None:
            return {key: _unescaped(value) for key, value in _ATTRIBUTE.findall(found[0])}
    source.position = start
    return None


def _closed(source: Source, tag: str) -> Reading[bool]:
    yield from source.skip()
    return (yield from source.takes(_close(tag)))


def _escaped(value: str) -> str:
    return value.replace("&", "&amp;").replace('"', "&quot;")


def _unescaped(value: str) -> str:
    return value.replace("&quot;", '"').replace("&amp;", "&")
