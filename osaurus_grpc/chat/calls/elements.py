"""Calls whose arguments are elements all the way down, MiniMax M3's form: read, held to form and written.

Every tag has the model's mark before it: objects are elements named by their keys, lists are elements
named "item", and all that is neither stands as it is. An empty element is an empty object, list or string,
and `true` a word or a truth value: the tool's schema tells. Values that no elements can write or hold to
their schema are written as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from osaurus_grpc.chat.calls.pieces import CallWriter, ToolTable
from osaurus_grpc.chat.calls.rules import CheckedTool, Rules, embedded, parameters
from osaurus_grpc.chat.calls.source import Reading, Source
from osaurus_grpc.chat.calls.streamed import stream_string
from osaurus_grpc.chat.calls.values import compact, is_plain_string, read_marked, value_json
from osaurus_grpc.chat.turns import Numbers
from osaurus_grpc.chat.types import JSON
from osaurus_grpc.errors import InvalidRequestError

_MARK: Final = "]<]minimax[>["
_MAX_NAME_CHARACTERS: Final = 256
_MAX_NESTING: Final = 32
_KEY: Final = re.compile(r"[^\s<>/][^<>\n]*")
_ANNOTATIONS: Final = frozenset({"type", "title", "description", "default", "examples"})
_OBJECT_KEYWORDS: Final = _ANNOTATIONS | {"properties", "required", "additionalProperties"}
_LIST_KEYWORDS: Final = _ANNOTATIONS | {"items", "minItems", "maxItems"}


def read_call(source: Source, tools: ToolTable, writer: CallWriter) -> Reading[bool]:
    """Reads a call; whether there is a whole one, without its end being said to the writer."""
    yield from source.skip()
    if not (yield from source.takes(f'{_MARK}<invoke name="')):
        return False
    found = yield from source.until(['">'], _MAX_NAME_CHARACTERS)
    if found is None or found[0] not in tools:
        return False
    writer.name(found[0])
    reader = _ElementReader(source, writer)
    return (yield from reader.members(tools.schemas[found[0]], f"{_MARK}</invoke>", _MAX_NESTING))


class _ElementReader:
    """Reads values; each as far as the end of the element that it stands in."""

    def __init__(self, source: Source, writer: CallWriter) -> None:
        self._source = source
        self._writer = writer

    def members(self, schema: Any, close: str, levels: int) -> Reading[bool]:
        """Reads elements named by keys, as an object."""
        source = self._source
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        lead = "{"
        while True:
            yield from source.skip()
            if (yield from source.takes(close)):
                self._writer.arguments("{}" if lead == "{" else "}")
                return True
            if not levels or not (yield from source.takes(f"{_MARK}<")):
                return False
            found = yield from source.until([">"], _MAX_NAME_CHARACTERS)
            if found is None or not _KEY.fullmatch(found[0]):
                return False
            key = found[0]
            self._writer.arguments(f"{lead}{compact(key)}: ")
            inner = properties.get(key) if isinstance(properties, Mapping) else None
            if not (yield from self._value(inner, f"{_MARK}</{key}>", levels - 1)):
                return False
            lead = ", "

    def _items(self, schema: Any, close: str, levels: int) -> Reading[bool]:
        source = self._source
        items = schema.get("items") if isinstance(schema, Mapping) else None
        lead = "["
        while True:
            yield from source.skip()
            if (yield from source.takes(close)):
                self._writer.arguments("[]" if lead == "[" else "]")
                return True
            if not levels or not (yield from source.takes(f"{_MARK}<item>")):
                return False
            self._writer.arguments(lead)
            if not (yield from self._value(items, f"{_MARK}</item>", levels - 1)):
                return False
            lead = ", "

    def _value(self, schema: Any, close: str, levels: int) -> Reading[bool]:
        source, writer = self._source, self._writer
        if is_plain_string(schema):
            writer.arguments('"')
            if not (yield from stream_string(source, writer, close)):
                return False
            writer.arguments('"')
            return True
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        start = source.position
        yield from source.skip()
        begins = source.position
        has_items = yield from source.takes(f"{_MARK}<item>")
        source.position = begins
        is_empty = yield from source.takes(close)
        source.position = begins
        has_elements = not is_empty and (yield from source.takes(f"{_MARK}<"))
        source.position = begins
        if kind == "array" and (is_empty or has_items):
            return (yield from self._items(schema, close, levels))
        if kind == "object" and (is_empty or has_elements):
            return (yield from self.members(schema, close, levels))
        if has_elements:
            # The schema says nothing of it, so that its own form has to.
            read = self._items if has_items else self.members
            return (yield from read(schema, close, levels))
        source.position = start
        value = yield from read_marked(source, close)
        if value is None:
            return False
        writer.arguments(value_json(value, is_string=kind == "string"))
        return True


def add_rules(rules: Rules, tool: CheckedTool, rule: str) -> None:
    """Adds the rule of a call from its tool's name on.

    Raises:
        InvalidRequestError: The tool's schema does not list its arguments, or one has a name that no
            element can have.
    """
    parts = [rules.literal(f'{tool.tool.name}">')]
    for number, (key, schema, is_required) in enumerate(parameters(tool)):
        if not _KEY.fullmatch(key):
            raise InvalidRequestError(
                f"{tool.field}: an argument of this name cannot be written in the form in which this model "
                f"writes calls.",
                field=tool.field,
            )
        part = f"{rule}_{number}"
        rules.add(part, _element(rules, tool, part, key, schema))
        parts.append(part if is_required else f"{part}?")
    rules.add(rule, " ".join([*parts, rules.literal(f"{_MARK}</invoke>")]))


def _element(rules: Rules, tool: CheckedTool, rule: str, key: str, schema: Any) -> str:
    head, close = rules.literal(f"{_MARK}<{key}>"), f"{_MARK}</{key}>"
    if is_plain_string(schema):
        rules.string(f"{rule}_v", schema, close)
        return f"{head} {rule}_v"
    end = rules.literal(close)
    if _is_object_of_elements(schema):
        required = schema.get("required", ())
        inner = []
        for number, (name, value) in enumerate(schema["properties"].items()):
            part = f"{rule}_{number}"
            rules.add(part, _element(rules, tool, part, name, value))
            inner.append(part if name in required else f"{part}?")
        return " ".join([head, *inner, end])
    if _is_list_of_elements(schema):
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        rules.add(f"{rule}_i", _element(rules, tool, f"{rule}_i", "item", schema["items"]))
        times = f"{{{least},{'' if most is None else most}}}"
        return f"{head} {'' if most == 0 else f'{rule}_i{times}'} {end}"
    return f"{head} %json {embedded(schema, tool)} {end}"


def _is_object_of_elements(schema: Any) -> bool:
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        return False
    properties = schema.get("properties")
    return (
        schema.keys() <= _OBJECT_KEYWORDS
        and isinstance(properties, Mapping)
        and bool(properties)
        and all(map(_KEY.fullmatch, properties))
        and properties.keys() >= set(schema.get("required", ()))
    )


def _is_list_of_elements(schema: Any) -> bool:
    if not isinstance(schema, Mapping) or schema.get("type") != "array":
        return False
    return schema.keys() <= _LIST_KEYWORDS and isinstance(schema.get("items"), Mapping)


def written(name: str, arguments: str) -> list[tuple[str, bool]]:
    """A call as the model writes it: texts, and whether each is the form's own."""
    numbers = Numbers()
    try:
        loaded = json.loads(arguments, parse_float=numbers.parse)
    except (ValueError, RecursionError):
        loaded = {}
    inner = _written(loaded, numbers) if isinstance(loaded, dict) else []
    return [
        (f'{_MARK}<invoke name="', True),
        (name, False),
        ('">', True),
        *inner,
        (f"{_MARK}</invoke>", True),
    ]


def _written(value: JSON, numbers: Numbers) -> list[tuple[str, bool]]:
    if isinstance(value, dict):
        named = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        named = [("item", item) for item in value]
    else:
        return [(value if isinstance(value, str) else numbers.restore(compact(value)), False)]
    parts: list[tuple[str, bool]] = []
    for key, item in named:
        parts += [(f"{_MARK}<", True), (key, False), (">", True), *_written(item, numbers)]
        parts += [(f"{_MARK}</", True), (key, False), (">", True)]
    return parts
