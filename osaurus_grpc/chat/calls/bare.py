"""Calls without a mark, at the beginning of an answer or of a code block."""

from __future__ import annotations

from typing import Protocol

from osaurus_grpc.chat.calls.pieces import CallWriter, ToolTable
from osaurus_grpc.chat.calls.reader import CallReader
from osaurus_grpc.chat.calls.source import Reading, Source
from osaurus_grpc.chat.calls.syntax import CallSyntax, InlineParameters

_SPACE = " \t\r\n"
_LIST = "[],;"
_SPEAKER = "assistant:"


class MakeWriter(Protocol):
    """Makes the writer of a call."""

    def __call__(self, *, streams: bool | None = None) -> CallWriter:
        """Makes it; whether the call's parts go out as they come is the answer's matter where None."""


class BareCalls:
    """Reads calls that only their own form tells from text.

    Args:
        source: What is read.
        reader: Reads single calls.
        make_writer: Makes the writer of a call.
        tools: What may be called.
    """

    def __init__(self, source: Source, reader: CallReader, make_writer: MakeWriter, tools: ToolTable) -> None:
        self._source = source
        self._reader = reader
        self._make_writer = make_writer
        self._tools = tools

    def takes_speaker(self) -> Reading[None]:
        """Passes over "assistant:", which small models begin with, and white space behind it."""
        source = self._source
        while True:
            beginning = source.text[source.position : source.position + len(_SPEAKER)].lower()
            if beginning == _SPEAKER:
                source.position += len(_SPEAKER)
                yield from source.skip()
                return
            if source.is_final or not _SPEAKER.startswith(beginning):
                return
            yield

    def objects(self, *, streams: bool) -> Reading[bool]:
        """Reads one or more calls that are JSON objects; stands behind the last whole one.

        Args:
            streams: Their parts go out as they come.

        Returns:
            Whether there is one. Where not, the source stands anywhere.
        """
        source = self._source
        if not (yield from source.has_more()) or source.text[source.position] not in "{[":
            return False
        is_wrapped = yield from self._takes_wrapper()
        count = 0
        while True:
            yield from source.skip(_SPACE + _LIST)
            start = source.position
            writer = self._make_writer(streams=streams)
            if not (yield from self._reader.read_object(writer, is_bare=True)):
                if writer.is_out:
                    return True
                source.position = start
                if is_wrapped and count:
                    yield from source.takes("}")
                return count > 0
            writer.end()
            count += 1

    def listed(self, syntax: CallSyntax) -> Reading[bool]:
        """Reads a list of calls that are written as in a program; returns as objects() does."""
        assert isinstance(syntax.body, InlineParameters)
        source = self._source
        opens = [f"{name}{syntax.body.open}" for name in self._tools]
        separator, close = syntax.separator.strip(), syntax.end
        if not (yield from source.takes(syntax.begin)):
            return False
        count = 0
        while True:
            behind = source.position
            if count and not (yield from self._takes_mark(separator)):
                yield from self._takes_mark(close)
                return True
            yield from source.skip()
            start = source.position
            is_known = yield from source.takes_any(opens)
            source.position = start
            writer = self._make_writer()
            if not is_known or not (yield from self._reader.read(writer)):
                source.position = source.position if writer.is_out else behind
                return count > 0 or writer.is_out
            count += 1

    def addressed(self, syntax: CallSyntax) -> Reading[bool]:
        """Reads the line that says whom an answer is for, and the call where that is a tool.

        Returns:
            Whether there is one, or a whole call. Where not, the source stands anywhere.
        """
        source = self._source
        start = source.position
        to_user = f"{syntax.recipient}\n"
        addressee = yield from source.takes_any([to_user, *(f"{name}\n" for name in self._tools)])
        if not addressee or addressee == to_user:
            return bool(addressee)
        source.position = start
        writer = self._make_writer()
        return (yield from self._reader.read(writer)) or writer.is_out

    def _takes_mark(self, mark: str) -> Reading[bool]:
        start = self._source.position
        yield from self._source.skip()
        if (yield from self._source.takes(mark)):
            return True
        self._source.position = start
        return False

    def _takes_wrapper(self) -> Reading[bool]:
        """Passes over the beginning of {"tool_calls": [...]}, the form of OpenAI's messages."""
        source = self._source
        start = source.position
        for part in ("{", '"tool_calls"', ":"):
            yield from source.skip()
            if not (yield from source.takes(part)):
                source.position = start
                return False
        return True
