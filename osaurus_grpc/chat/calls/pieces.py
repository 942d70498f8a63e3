"""The parts of an answer's text, as a reader finds them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple

from osaurus_grpc.chat.calls.source import Source
from osaurus_grpc.chat.calls.values import StringNames, string_parameters
from osaurus_grpc.chat.types import ToolSpec


class PieceKind(Enum):
    """What a piece is.

    REASONING_BEGIN and REASONING_END are places without text: behind the mark that opens reasoning and
    before the one that closes it. Reasoning that the answer's end cuts off has no end of its own.
    """

    CONTENT = auto()
    REASONING_BEGIN = auto()
    REASONING = auto()
    REASONING_END = auto()
    CALL_NAME = auto()
    CALL_ARGUMENTS = auto()
    CALL_END = auto()


class Piece(NamedTuple):
    """A part of the answer.

    Attributes:
        kind: What it is.
        text: What it says; the arguments as JSON text.
        start: Where it begins in the answer's text, in characters.
        end: Where it ends; what lies between two pieces are marks.
    """

    kind: PieceKind
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ToolTable:
    """What a reader has to know of a request's tools.

    Attributes:
        strings: By tool, the arguments that are plain strings.
        schemas: By tool, the schema of its arguments.
    """

    strings: Mapping[str, StringNames]
    schemas: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, tools: Sequence[ToolSpec]) -> ToolTable:
        """Looks through the schemas."""
        schemas = {tool.name: json.loads(tool.schema_json) for tool in tools}
        return cls({tool.name: string_parameters(tool.schema_json) for tool in tools}, schemas)

    def __contains__(self, name: object) -> bool:
        return name in self.strings

    def __iter__(self) -> Iterator[str]:
        return iter(self.strings)

    def __bool__(self) -> bool:
        return bool(self.strings)


class CallWriter:
    """Takes one call's parts from a reader.

    Where calls are held to a grammar while they are written, their parts go out as they come; else
    only once the call is whole, since what turns out malformed has to become content.

    Args:
        source: What is read.
        put: Takes pieces that go out.
        streams: Parts go out as they come.
    """

    def __init__(self, source: Source, put: Callable[[Piece], None], *, streams: bool) -> None:
        self._source = source
        self._put = put
        self.streams = streams
        """Parts go out as they come."""
        self._held: list[Piece] = []
        self._done = source.offset

    @property
    def is_out(self) -> bool:
        """Whether something of the call went out."""
        return self.streams and bool(self._held)

    def name(self, name: str) -> None:
        """The call's name is known; the source stands behind it."""
        self._add(PieceKind.CALL_NAME, name)

    def arguments(self, text: str) -> None:
        """More JSON text of the arguments; the source stands behind where it came from."""
        if text:
            self._add(PieceKind.CALL_ARGUMENTS, text)

    def end(self) -> None:
        """The call is whole."""
        self._add(PieceKind.CALL_END, "")
        if not self.streams:
            for piece in self._held:
                self._put(piece)

    def _add(self, kind: PieceKind, text: str) -> None:
        end = self._source.offset
        piece = Piece(kind, text, self._done, end)
        self._done = end
        if self.streams:
            self._put(piece)
            self._held = [piece]
        else:
            self._held.append(piece)
