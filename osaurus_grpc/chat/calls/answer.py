"""An answer's text, read while it is written: reasoning, content and calls."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence

from osaurus_grpc.chat.calls.harmony import HarmonyReader
from osaurus_grpc.chat.calls.pieces import CallWriter, Piece, PieceKind, ToolTable
from osaurus_grpc.chat.calls.reader import CallReader
from osaurus_grpc.chat.calls.source import Reading, Source
from osaurus_grpc.chat.calls.syntax import CallSyntax, TaggedParameters
from osaurus_grpc.chat.reasoning import HARMONY, ThinkMarks

_SPACE = " \t\r\n"
_FENCE = "```"
_FENCE_LANGUAGES = frozenset({"", "json", "tool_call", "tool_calls"})
_MAX_LANGUAGE_CHARACTERS = 16
_LIST = "[],;"
_SPEAKER = re.compile("assistant:", re.IGNORECASE)


class AnswerReader:
    """Takes an answer's text in any pieces and gives its parts.

    Text that turns out to be no whole call is content. So is everything that nothing else claims:
    the texts of all pieces, with the marks between them, are the text.

    Args:
        marks: The model's reasoning marks, None if it has none.
        is_reasoning: The prompt opened the reasoning.
        syntax: How calls are written; None where there is nothing to call.
        tools: What may be called.
        streams_calls: Calls are held to a grammar, so that their parts may go out as they come.
    """

    def __init__(
        self,
        *,
        marks: ThinkMarks | None,
        is_reasoning: bool = False,
        syntax: CallSyntax | None = None,
        tools: ToolTable | None = None,
        streams_calls: bool = False,
    ) -> None:
        self._source = Source()
        self._out: list[Piece] = []
        self._marks = marks
        self._is_reasoning = is_reasoning
        self._syntax = syntax if tools else None
        self._tools = tools or ToolTable({})
        self._streams = streams_calls
        self._reading: Generator[None, None, None] | None = self._answer()
        next(self._reading)

    def feed(self, text: str) -> list[Piece]:
        """More of the answer; returns what is decided by it."""
        if self._reading is not None:
            self._source.append(text)
            self._resume()
        return self._taken()

    def finish(self) -> list[Piece]:
        """The answer has ended; returns the rest."""
        if self._reading is not None:
            self._source.is_final = True
            self._resume()
        return self._taken()

    def _resume(self) -> None:
        assert self._reading is not None
        try:
            next(self._reading)
        except StopIteration:
            self._reading = None

    def _taken(self) -> list[Piece]:
        out, self._out = self._out[:], []
        # Writers hold the list itself, so it is emptied and not replaced.
        return out

    def _answer(self) -> Generator[None, None, None]:
        yield
        if self._marks is HARMONY:
            harmony = HarmonyReader(self._source, self._put, self._writer, self._tools)
            yield from harmony.read()
            return
        yield from self._opening()
        if self._syntax is None:
            yield from self._stream(PieceKind.CONTENT, ())
            return
        reader = CallReader(self._source, self._syntax, self._tools)
        yield from self._bare(reader)
        yield from self._content(reader, self._syntax)

    def _opening(self) -> Reading[None]:
        """Reads the reasoning that an answer may begin with."""
        marks = self._marks
        if marks is None:
            return
        source = self._source
        if not self._is_reasoning or marks.open:
            start = source.position
            yield from source.skip()
            is_open = bool(marks.open) and (yield from source.takes(marks.open))
            if not is_open:
                source.position = start
                if not self._is_reasoning:
                    return
        yield from source.skip()
        yield from self._stream(PieceKind.REASONING, (marks.close,), keeps_space=False)
        yield from source.skip()
        source.forget()

    def _bare(self, reader: CallReader) -> Reading[None]:
        """Reads calls without marks, which are taken for calls at the beginning only."""
        source = self._source
        start = source.position
        yield from source.skip()
        if (yield from self._takes_speaker()):
            yield from source.skip()
        if not (yield from source.has_more()) or source.text[source.position] not in "{[":
            source.position = start
            return
        syntax = self._syntax
        if not (
            yield from self._objects(reader, streams=self._streams and bool(syntax and syntax.opens_bare))
        ):
            source.position = start

    def _takes_speaker(self) -> Reading[bool]:
        source = self._source
        word = "assistant:"
        while True:
            beginning = source.text[source.position : source.position + len(word)].lower()
            if beginning == word:
                source.position += len(word)
                return True
            if source.is_final or not word.startswith(beginning):
                return False
            yield

    def _objects(self, reader: CallReader, *, streams: bool) -> Reading[bool]:
        """Reads one or more calls that are JSON objects; stands behind the last whole one."""
        source = self._source
        is_wrapped = yield from self._takes_wrapper()
        count = 0
        while True:
            yield from source.skip(_SPACE + _LIST)
            start = source.position
            writer = self._writer(streams=streams)
            if not (yield from reader.read_object(writer, is_bare=True)):
                if writer.is_out:
                    return True
                source.position = start
                if is_wrapped and count:
                    yield from source.takes("}")
                return count > 0
            writer.end()
            count += 1

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

    def _content(self, reader: CallReader, syntax: CallSyntax) -> Reading[None]:
        source = self._source
        while True:
            source.forget()
            mark = yield from self._stream(PieceKind.CONTENT, (*syntax.marks, _FENCE), keeps_space=False)
            if not mark:
                return
            start = source.position - len(mark)
            # The white space before a call belongs to it.
            start -= len(source.text[:start]) - len(source.text[:start].rstrip(_SPACE))
            if mark == _FENCE:
                yield from self._fenced(reader, start)
            else:
                source.position -= len(mark)
                yield from self._section(reader, syntax, start)

    def _section(self, reader: CallReader, syntax: CallSyntax, start: int) -> Reading[None]:
        """Reads a section of calls; what is no whole call in it becomes content."""
        source = self._source
        # Whichever mark opened, a section's own is passed over; a call's is the call reader's.
        yield from source.takes_any(
            [mark for mark in (syntax.section_open.strip(), *syntax.also_opens) if mark]
        )
        close = syntax.section_close.strip()
        noise = _SPACE if isinstance(syntax.body, TaggedParameters) else _SPACE + _LIST
        count = 0
        while True:
            behind = source.position
            if count:
                yield from source.skip(_SPACE)
                begins = source.position
                if (yield from source.takes_any(syntax.marks)):
                    # The next section, which begins as this one did.
                    source.position = begins
                    return
            yield from source.skip(noise)
            if close and (yield from source.takes(close)):
                if not count:
                    self._put(PieceKind.CONTENT, start, source.position)
                return
            if not (yield from source.has_more()):
                if not count:
                    self._put(PieceKind.CONTENT, start, source.position)
                return
            writer = self._writer()
            is_call = yield from reader.read(writer)
            if not is_call:
                self._broken(writer, behind if count else start)
                return
            count += 1
            if not syntax.section_open:
                return

    def _broken(self, writer: CallWriter, start: int) -> None:
        """What did not become a call is content."""
        source = self._source
        if writer.is_out:
            return
        source.position = max(source.position, start)
        self._put(PieceKind.CONTENT, start, source.position)

    def _fenced(self, reader: CallReader, start: int) -> Reading[None]:
        """Reads calls in a code block, which small models put them in."""
        source = self._source
        inside = source.position
        line = yield from source.until(["\n", "{"], _MAX_LANGUAGE_CHARACTERS)
        if line is not None and line[0].strip() in _FENCE_LANGUAGES:
            if line[1] == "{":
                source.position -= 1
            yield from source.skip()
            is_call = (yield from source.has_more()) and source.text[source.position] in "{["
            if is_call and (yield from self._objects(reader, streams=False)):
                yield from source.skip(_SPACE + _LIST)
                yield from source.takes(_FENCE)
                return
        source.position = inside
        self._put(PieceKind.CONTENT, start, inside)

    def _stream(self, kind: PieceKind, marks: Sequence[str], *, keeps_space: bool = True) -> Reading[str]:
        """Lets text go as it comes, up to the first of several marks, and reads over it.

        Args:
            kind: What the text is.
            marks: Where it ends; none is at the end of the answer.
            keeps_space: Whether white space before a mark belongs to the text.

        Returns:
            The mark, "" at the end of the answer.
        """
        source = self._source
        while True:
            rest = source.text[source.position :]
            found = min(((rest.find(mark), mark) for mark in marks if mark in rest), default=(-1, ""))
            cut = found[0] if found[1] else len(rest) - (0 if source.is_final else _held(rest, marks))
            if not keeps_space and not (source.is_final and not found[1] and kind is PieceKind.CONTENT):
                cut = len(rest[:cut].rstrip(_SPACE))
            if cut > 0:
                self._put(kind, source.position, source.position + cut)
                source.position += cut
            if found[1]:
                source.position += found[0] - cut + len(found[1])
                return found[1]
            if source.is_final:
                source.position = len(source.text)
                return ""
            if cut > 0:
                source.forget()
            yield

    def _put(self, kind: PieceKind, start: int, end: int) -> None:
        source = self._source
        if end > start:
            self._out.append(Piece(kind, source.text[start:end], source.base + start, source.base + end))

    def _writer(self, *, streams: bool | None = None) -> CallWriter:
        streams = self._streams if streams is None else streams
        return CallWriter(self._source, self._put_piece, streams=streams)

    def _put_piece(self, piece: Piece) -> None:
        self._out.append(piece)


def _held(text: str, marks: Sequence[str]) -> int:
    """Characters at the end of a text that may become one of the marks."""
    longest = 0
    for mark in marks:
        first = mark[0]
        place = text.find(first, max(0, len(text) - len(mark) + 1))
        while place >= 0:
            if mark.startswith(text[place:]):
                longest = max(longest, len(text) - place)
                break
            place = text.find(first, place + 1)
    return longest
