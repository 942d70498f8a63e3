"""Values of arguments in syntaxes that do not write JSON, to JSON text and back."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import TypeAlias

from osaurus_grpc.chat.calls.json_text import read_value
from osaurus_grpc.chat.calls.source import Reading, Source
from osaurus_grpc.chat.turns import Numbers

# Names of arguments whose values are strings, and whether these stand as they are; else they may also be
# written as JSON.
StringNames: TypeAlias = Mapping[str, bool]

# What may stand beside "type": "string" in a schema without making values that only JSON can write.
_ANNOTATIONS = frozenset({"type", "title", "description", "default", "examples", "example", "enum", "const"})
_ESCAPE = re.compile(r"\\.", re.DOTALL)
_BARE_KEY = re.compile(r"[^\s,:{}\[\]\"'<>]+")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_MAX_NESTING = 64


def string_parameters(schema_json: str) -> StringNames:
    """Properties of an object schema that are strings and nothing but strings.

    In syntaxes that write strings as they are, those with a pattern, a format or a length are written as
    JSON, so that a grammar can hold them to their schema.
    """
    properties = json.loads(schema_json).get("properties")
    if not isinstance(properties, Mapping):
        return {}
    return {
        name: is_plain_string(schema)
        for name, schema in properties.items()
        if isinstance(schema, Mapping) and schema.get("type") == "string"
    }


def is_plain_string(schema: object) -> bool:
    """Whether every value of a schema is a string and, but for a list of values, any string is one."""
    if not isinstance(schema, Mapping) or schema.get("type") != "string" or not schema.keys() <= _ANNOTATIONS:
        return False
    listed = schema.get("enum", [])
    return isinstance(listed, list) and all(isinstance(value, str) for value in listed)


def compact(value: object) -> str:
    """JSON text as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def escaped(text: str) -> str:
    """Text as it stands between the quotes of a JSON string; that of parts joins to that of the whole."""
    return compact(text)[1:-1]


def read_marked(source: Source, close: str) -> Reading[str | None]:
    """Reads a value and over the mark behind it; one inside of a JSON string is no end of the value.

    Returns:
        The value's text; None where the mark is missing.
    """
    found = yield from source.until([close])
    if found is None:
        return None
    text, _ = found
    first = text, source.position
    while _ends_in_string(text):
        found = yield from source.until([close])
        if found is None:
            # What only begins like JSON ends at its first mark.
            text, source.position = first
            return None if source.is_cut else text
        text += close + found[0]
    if is_json(text.strip()):
        return text
    text, source.position = first
    return text


def _ends_in_string(text: str) -> bool:
    """Whether a text begins like JSON and ends within a string of it."""
    return text.lstrip()[:1] in ('"', "{", "[") and _ESCAPE.sub("", text).count('"') % 2 == 1


def value_json(text: str, *, is_string: bool = False) -> str:
    """The JSON of an argument that stands between marks.

    Args:
        text: What stands there.
        is_string: It is a string, written as JSON or as it is.
    """
    stripped = text.strip()
    if is_string:
        return stripped if stripped.startswith('"') and is_json(stripped) else compact(text)
    if is_json(stripped):
        return stripped
    try:
        return compact(ast.literal_eval(stripped))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return compact(text)


def is_json(text: str) -> bool:
    """Whether the text is one JSON value."""
    source = Source()
    source.append(text)
    source.is_final = True
    try:
        next(read_value(source))
    except StopIteration as done:
        return bool(done.value) and source.position == len(text)
    return False


def members(arguments: str) -> list[tuple[str, str, bool]]:
    """An object's members: name, value as templates write it, and whether it is a string."""
    numbers = Numbers()
    try:
        loaded = json.loads(arguments, parse_float=numbers.parse)
    except (ValueError, RecursionError):
        return []
    if not isinstance(loaded, dict):
        return []
    return [
        (key, value if isinstance(value, str) else numbers.restore(compact(value)), isinstance(value, str))
        for key, value in loaded.items()
    ]


def read_literal(source: Source, quote: str, levels: int = _MAX_NESTING) -> Reading[str | None]:
    """Reads a value as a program would have it, JSON included, and returns it as JSON text.

    Args:
        source: Stands at the value.
        quote: A mark around strings that stand as they are; "" if there is none.
        levels: How deep it may be nested.

    Returns:
        None where it is no value.
    """
    yield from source.skip()
    if not levels or not (yield from source.has_more()):
        return None
    if quote and (yield from source.takes(quote)):
        found = yield from source.until([quote])
        return None if found is None else compact(found[0])
    first = source.text[source.position]
    if first in "'\"":
        return (yield from _quoted(source))
    if first == "[":
        return (yield from _list(source, quote, levels - 1))
    if first == "{":
        return (yield from _object(source, quote, levels - 1))
    if first.isalpha():
        return (yield from _word(source))
    start = source.position
    is_number = yield from read_value(source)
    return source.text[start : source.position] if is_number else None


def _quoted(source: Source) -> Reading[str | None]:
    start = source.position
    end = start + 1
    while True:
        while end >= len(source.text):
            if source.is_final:
                return None
            yield
        character = source.text[end]
        end += 2 if character == "\\" else 1
        if character == source.text[start]:
            break
    source.position = end
    literal = source.text[start:end]
    if literal[0] == '"' and is_json(literal):
        return literal
    try:
        return compact(ast.literal_eval(literal.replace("\n", "\\n")))
    except (ValueError, SyntaxError):
        return None


def _word(source: Source) -> Reading[str | None]:
    start = source.position
    while (yield from source.has_more()) and source.text[source.position].isalpha():
        source.position += 1
    return _WORDS.get(source.text[start : source.position])


def _list(source: Source, quote: str, levels: int) -> Reading[str | None]:
    source.position += 1
    items: list[str] = []
    while True:
        yield from source.skip()
        if (yield from source.takes("]")):
            return f"[{', '.join(items)}]"
        item = yield from read_literal(source, quote, levels)
        if item is None:
            return None
        items.append(item)
        yield from source.skip()
        if not (yield from source.takes(",")) and not _stands_at(source, "]"):
            return None


def _object(source: Source, quote: str, levels: int) -> Reading[str | None]:
    source.position += 1
    members: list[str] = []
    while True:
        yield from source.skip()
        if (yield from source.takes("}")):
            return f"{{{', '.join(members)}}}"
        key = yield from _object_key(source, quote)
        yield from source.skip()
        if key is None or not (yield from source.takes(":")):
            return None
        value = yield from read_literal(source, quote, levels)
        if value is None:
            return None
        members.append(f"{key}: {value}")
        yield from source.skip()
        if not (yield from source.takes(",")) and not _stands_at(source, "}"):
            return None


def _object_key(source: Source, quote: str) -> Reading[str | None]:
    if not (yield from source.has_more()):
        return None
    if quote and (yield from source.takes(quote)):
        found = yield from source.until([quote])
        return None if found is None else compact(found[0])
    if source.text[source.position] in "'\"":
        return (yield from _quoted(source))
    start = source.position
    while (yield from source.has_more()) and _BARE_KEY.match(source.text[source.position]):
        source.position += 1
    return compact(source.text[start : source.position]) if source.position > start else None


def _stands_at(source: Source, character: str) -> bool:
    return source.text.startswith(character, source.position)
