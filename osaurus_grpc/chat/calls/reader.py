"""Calls, read out of an answer while it is written."""

from __future__ import annotations

import json
import re
from typing import assert_never

from osaurus_grpc.chat.calls import elements, xtml
from osaurus_grpc.chat.calls.json_text import read_string, read_value
from osaurus_grpc.chat.calls.pieces import CallWriter, ToolTable
from osaurus_grpc.chat.calls.source import Reading, Source
from osaurus_grpc.chat.calls.streamed import stream_string, stream_value
from osaurus_grpc.chat.calls.syntax import (
    CallSyntax,
    InlineParameters,
    JsonObject,
    NamedJson,
    NestedElements,
    TaggedParameters,
    XtmlElements,
)
from osaurus_grpc.chat.calls.values import (
    StringNames,
    compact,
    is_json,
    read_literal,
    read_marked,
    value_json,
)

_NAME_KEYS = frozenset({"name", "tool_name", "function_name"})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
# What an object that begins an answer may begin with, to be taken for a call.
_FIRST_KEYS = _NAME_KEYS | _ARGUMENT_KEYS | {"type", "function", "id", "tool_call_id", "tool_calls"}
_MAX_NAME_CHARACTERS = 256
_DECORATION = re.compile(r"^(?:functions?\.)?(.*?)(?::\d+)?$", re.DOTALL)


class CallReader:
    """Reads single calls of one syntax.

    Args:
        source: What is read.
        syntax: How calls are written.
        tools: What may be called; anything else is no call.
    """

    def __init__(self, source: Source, syntax: CallSyntax, tools: ToolTable) -> None:
        self._source = source
        self._syntax = syntax
        self._tools = tools

    def read(self, writer: CallWriter) -> Reading[bool]:
        """Reads the call at the source's position, its marks included.

        Returns:
            Whether there is a whole one. Where not, the source stands anywhere behind its start.
        """
        body = self._syntax.body
        source = self._source
        yield from self._passes(self._syntax.call_open)
        yield from source.skip()
        if not (yield from source.has_more()):
            return False
        is_object = source.text[source.position] == "{"
        if is_object and isinstance(body, NamedJson) and body.before.startswith("{"):
            # The name is the object's only key.
            is_object = False
        if is_object and isinstance(body, JsonObject | NamedJson):
            is_whole = yield from self.read_object(writer)
        else:
            match body:
                case NamedJson():
                    is_whole = yield from self._named_json(body, writer)
                case TaggedParameters():
                    is_whole = yield from self._tagged(body, writer)
                case InlineParameters():
                    is_whole = yield from self._inline(body, writer)
                case XtmlElements():
                    is_whole = yield from xtml.read_call(source, self._tools, writer)
                case NestedElements():
                    is_whole = yield from elements.read_call(source, self._tools, writer)
                case JsonObject():
                    is_whole = False
                case _ as unreachable:
                    assert_never(unreachable)
        if is_whole:
            if not (yield from self._passes(self._syntax.call_close)):
                self._drops_cut(self._syntax.call_close)
            writer.end()
        return is_whole

    def read_object(self, writer: CallWriter, *, is_bare: bool = False) -> Reading[bool]:
        """Reads a call that is a JSON object.

        Args:
            writer: Takes the call, but for its end.
            is_bare: No mark said that this is a call, so the object has to look like one.
        """
        call = _ObjectCall(self._source, self._tools, writer, is_bare=is_bare)
        return (yield from call.read())

    def _passes(self, marks: str) -> Reading[bool]:
        """Passes over marks, with any white space before each; over nothing where one is missing."""
        start = self._source.position
        for mark in filter(None, map(str.strip, marks.split("\n"))):
            yield from self._source.skip()
            if not (yield from self._source.takes(mark)):
                self._source.position = start
                return False
        return True

    def _drops_cut(self, marks: str) -> None:
        """Passes over the beginning of marks that the answer's end cut off."""
        source = self._source
        rest = "".join(source.text[source.position :].split())
        if source.is_cut and "".join(marks.split()).startswith(rest):
            source.position = len(source.text)

    def _named_json(self, body: NamedJson, writer: CallWriter) -> Reading[bool]:
        source = self._source
        yield from self._passes(body.before)
        marks = [mark.strip() or mark for mark in (body.after, *body.alternatives)]
        found = yield from source.until(marks, _MAX_NAME_CHARACTERS)
        if found is None:
            return False
        name = found[0].strip()
        # What stands between another mark and the last one is a call id.
        if found[1] in map(str.strip, body.alternatives) and not (
            yield from source.until([body.after.strip()], _MAX_NAME_CHARACTERS)
        ):
            return False
        if body.id_close:
            name = name.rpartition(body.id_close)[2].strip()
        if name not in self._tools:
            decorated = _DECORATION.match(name)
            name = decorated[1] if decorated else name
        if name not in self._tools:
            return False
        writer.name(name)
        yield from source.skip()
        if not (yield from source.has_more()) or source.text[source.position] != "{":
            return False
        return (yield from stream_value(source, writer))

    def _tagged(self, body: TaggedParameters, writer: CallWriter) -> Reading[bool]:
        source = self._source
        yield from self._passes(body.name_open)
        end = body.end.strip() or self._syntax.section_close.strip()
        key_open = body.key_open.strip()
        found = yield from source.until(
            [mark for mark in {body.name_close.strip() or "\n", key_open, end} if mark], _MAX_NAME_CHARACTERS
        )
        if found is None or found[0].strip() not in self._tools:
            return False
        if found[1] in (key_open, end):
            source.position -= len(found[1])
        name = found[0].strip()
        writer.name(name)
        strings = self._tools.strings[name]
        count = 0
        while (yield from self._takes_mark(key_open)):
            lead = ", " if count else "{"
            if not (yield from self._tagged_argument(body, strings, lead, writer)):
                return False
            count += 1
        is_ended = yield from self._takes_mark(end) if body.end else self._has_mark(end)
        if is_ended:
            writer.arguments("}" if count else "{}")
        return is_ended

    def _tagged_argument(
        self, body: TaggedParameters, strings: StringNames, lead: str, writer: CallWriter
    ) -> Reading[bool]:
        source = self._source
        first, *rest = filter(None, map(str.strip, body.key_close.split("\n")))
        string_first = body.string_key_close.strip()
        marks = [first, string_first] if string_first else [first]
        found = yield from source.until(marks, _MAX_NAME_CHARACTERS)
        if found is None or not (yield from self._passes("\n".join(rest))):
            return False
        key, mark = found[0].strip(), found[1]
        close = body.value_close.strip()
        space = body.value_close[: len(body.value_close) - len(body.value_close.lstrip())]
        yield from source.takes(body.key_close[len(body.key_close.rstrip()) :])
        is_quoted = body.quotes is not None and (yield from source.takes(body.quotes[0]))
        ends = (body.quotes[1], "") if body.quotes is not None and is_quoted else (close, space)
        start = f"{lead}{compact(key)}: "
        if strings.get(key) or mark == string_first or is_quoted:
            writer.arguments(f'{start}"')
            if not (yield from stream_string(source, writer, *ends)):
                return False
            writer.arguments('"')
        else:
            value = yield from read_marked(source, close)
            if value is None:
                return False
            text = value_json(value.removesuffix(space), is_string=key in strings)
            writer.arguments(start + text)
        return not is_quoted or (yield from self._takes_mark(close))

    def _inline(self, body: InlineParameters, writer: CallWriter) -> Reading[bool]:
        source = self._source
        yield from self._passes(body.name_open)
        found = yield from source.until([body.open.strip()], _MAX_NAME_CHARACTERS)
        if found is None or found[0].strip() not in self._tools:
            return False
        writer.name(found[0].strip())
        count = 0
        while not (yield from self._takes_mark(body.close.strip())):
            if count and not (yield from self._takes_mark(body.separator.strip())):
                return False
            key = yield from source.until([body.assign.strip()], _MAX_NAME_CHARACTERS)
            if key is None:
                return False
            bare_key = key[0].strip().strip("'\"")
            writer.arguments(f"{', ' if count else '{'}{compact(bare_key)}: ")
            if not (yield from self._inline_value(body.quote, writer)):
                return False
            count += 1
        writer.arguments("}" if count else "{}")
        return True

    def _inline_value(self, quote: str, writer: CallWriter) -> Reading[bool]:
        source = self._source
        yield from source.skip()
        if quote and (yield from source.takes(quote)):
            writer.arguments('"')
            if not (yield from stream_string(source, writer, quote)):
                return False
            writer.arguments('"')
            return True
        if writer.streams and not quote:
            # Held to a grammar, which lets JSON through.
            return (yield from stream_value(source, writer))
        start = source.position
        value = yield from read_literal(source, quote)
        written = source.text[start : source.position].strip()
        writer.arguments(written if value and is_json(written) else value or "")
        return value is not None

    def _takes_mark(self, mark: str) -> Reading[bool]:
        start = self._source.position
        yield from self._source.skip()
        if mark and (yield from self._source.takes(mark)):
            return True
        self._source.position = start
        return False

    def _has_mark(self, mark: str) -> Reading[bool]:
        start = self._source.position
        is_there = yield from self._takes_mark(mark)
        self._source.position = start
        return is_there


class _ObjectCall:
    """A call that is a JSON object, in whichever of the usual forms.

    Also read are a "function" object around name and arguments, and arguments given as a string of
    JSON. Arguments that come before the name wait for it.
    """

    def __init__(self, source: Source, tools: ToolTable, writer: CallWriter, *, is_bare: bool) -> None:
        self._source = source
        self._tools = tools
        self._writer = writer
        self._is_bare = is_bare
        self._has_name = False
        self._has_arguments = False
        self._waiting = ""

    def read(self) -> Reading[bool]:
        if not (yield from self._members()) or not self._has_name:
            return False
        if not self._has_arguments:
            if self._is_bare:
                return False
            self._writer.arguments("{}")
        return True

    def _members(self) -> Reading[bool]:
        source = self._source
        if not (yield from source.takes("{")):
            return False
        while True:
            yield from source.skip()
            text = yield from read_string(source)
            if text is None:
                return False
            key = json.loads(text)
            if self._is_bare and not self._has_name and key not in _FIRST_KEYS:
                return False
            yield from source.skip()
            if not (yield from source.takes(":")):
                return False
            yield from source.skip()
            if not (yield from self._member(key)):
                return False
            yield from source.skip()
            if (yield from source.takes("}")):
                return True
            if not (yield from source.takes(",")):
                return False

    def _member(self, key: str) -> Reading[bool]:
        source = self._source
        if not (yield from source.has_more()):
            return False
        first = source.text[source.position]
        if not self._has_name and first == '"' and (key in _NAME_KEYS or key == "function"):
            return (yield from self._name())
        if key == "function" and first == "{":
            return (yield from self._members())
        if key in _ARGUMENT_KEYS and not self._has_arguments:
            return (yield from self._arguments(first))
        return (yield from read_value(source))

    def _name(self) -> Reading[bool]:
        text = yield from read_string(self._source)
        name = "" if text is None else json.loads(text)
        if name not in self._tools:
            return False
        self._has_name = True
        self._writer.name(name)
        self._writer.arguments(self._waiting)
        return True

    def _arguments(self, first: str) -> Reading[bool]:
        source = self._source
        start = source.position
        if first == "{" and self._has_name:
            self._has_arguments = True
            return (yield from stream_value(source, self._writer))
        if not (yield from read_value(source)):
            return False
        text = source.text[start : source.position]
        if first == '"':
            text = json.loads(text).strip() or "{}"
            first = text[0] if _is_object(text) else ""
        elif text == "null":
            text, first = "{}", "{"
        if first != "{":
            return False
        self._has_arguments = True
        if self._has_name:
            self._writer.arguments(text)
        else:
            self._waiting = text
        return True


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
