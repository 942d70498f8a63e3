"""An answer's text, read while it is written: reasoning, content and calls."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from osaurus_grpc.chat.calls.bare import BareCalls
from osaurus_grpc.chat.calls.harmony import HarmonyReader
from osaurus_grpc.chat.calls.pieces import CallWriter, Piece, PieceKind, ToolTable
from osaurus_grpc.chat.calls.reader import CallReader
from osaurus_grpc.chat.calls.source import Reading, Source, held
from osaurus_grpc.chat.calls.syntax import CallSyntax, NestedElements, TaggedParameters, XtmlElements
from osaurus_grpc.chat.reasoning import HARMONY, ThinkMarks

_SPACE = " \t\r\n"
_FENCE = "```"
_FENCE_LANGUAGES = frozenset({"", "json", "tool_call", "tool_calls"})
_MAX_LANGUAGE_CHARACTERS = 16
_LIST = "[],;"


class AnswerReader:
    """Takes an answer's text in any pieces and gives its parts.

    Text that turns out to be no whole call is content. So is everything that nothing else claims:
    the texts of all pieces, with the marks between them, are the text.

    Args:
        marks: The model's reasoning marks, None if it has none.
        is_reasoning: The prompt opened the reasoning.
        syntax: How the model writes calls; None where there is nothing to call and nothing of the syntax
            around answers without calls.
        tools: What may be called.
        streams_calls: Calls are held to a grammar, so that their parts may go out as they come.
        is_forced: The answer is held to be calls and nothing else, so that there is no content.
    """

    def __init__(
        self,
        *,
        marks: ThinkMarks | None,
        is_reasoning: bool = False,
        syntax: CallSyntax | None = None,
        tools: ToolTable | None = None,
        streams_calls: bool = False,
        is_forced: bool = False,
    ) -> None:
        self._source = Source()
        self._out: list[Piece] = []
        self._marks = marks
        self._is_reasoning = is_reasoning
        self._syntax = syntax if tools else None
        self._tools = tools or ToolTable({}, {})
        self._streams = streams_calls
        self._is_forced = is_forced
        self._recipient = f"{syntax.recipient}\n" if syntax and syntax.recipient else ""
        # Marks around the answer or its calls, which are no part of it.
        self._dropped = (*(syntax.around if syntax else ()), *(marks.parts if marks else ()))
        self._reading: Generator[None, None, None] | None = self._answer()
        next(self._reading)

    def feed(self, text: str) -> list[Piece]:
        """More of the answer; returns what is decided by it."""
        if self._reading is not None:
            self._source.append(text)
            self._resume()
        return self._taken()

    def finish(self, *, is_cut: bool = False) -> list[Piece]:
        """The answer has ended; returns the rest.

        Args:
            is_cut: It would have gone on, so that marks at its end may lack what they were for.
        """
        if self._reading is not None:
            self._source.is_final = True
            self._source.is_cut = is_cut
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
            harmony = HarmonyReader(self._source, self._put, self._mark, self._writer, self._tools)
            yield from harmony.read()
            return
        yield from self._opening()
        if self._syntax is None:
            if self._recipient:
                yield from self._source.takes(self._recipient)
            while (yield from self._stream(PieceKind.CONTENT, self._dropped)):
                pass
            return
        reader = CallReader(self._source, self._syntax, self._tools)
        yield from self._bare(reader, self._syntax)
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
                    # Where it does not reason, MiniMax M3 says so by the closing mark.
                    yield from source.takes(marks.close)
                    return
        self._mark(PieceKind.REASONING_BEGIN, source.position)
        yield from source.skip()
        close = yield from self._stream(PieceKind.REASONING, (marks.close,), keeps_space=False)
        if close:
            self._mark(PieceKind.REASONING_END, source.position - len(close))
        yield from source.skip()
        opening, ending = marks.answer
        if opening and (yield from source.takes(opening)):
            self._dropped = (*self._dropped, ending)
            yield from source.skip()
        source.forget()

    def _bare(self, reader: CallReader, syntax: CallSyntax) -> Reading[None]:
        """Reads calls without marks, which are taken for calls at the beginning only."""
        source = self._source
        start = source.position
        bare = BareCalls(source, reader, self._writer, self._tools)
        yield from source.skip()
        if syntax.recipient:
            is_read = yield from bare.addressed(syntax)
        else:
            yield from bare.takes_speaker()
            yield from source.takes_any(self._dropped)
            yield from source.skip()
            if syntax.is_unmarked:
                is_read = yield from bare.listed(syntax)
            else:
                is_read = yield from bare.objects(streams=self._streams and syntax.opens_bare)
        if not is_read:
            source.position = start

    def _content(self, reader: CallReader, syntax: CallSyntax) -> Reading[None]:
        source = self._source
        while True:
            source.forget()
            marks = (*syntax.marks, _FENCE, *self._dropped)
            mark = yield from self._stream(PieceKind.CONTENT, marks, keeps_space=False)
            if not mark:
                return
            if mark in self._dropped or (
                self._recipient and mark != _FENCE and (yield from source.takes(self._recipient))
            ):
                continue
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
        has_marks = isinstance(syntax.body, TaggedParameters | XtmlElements | NestedElements)
        noise = _SPACE if has_marks else _SPACE + _LIST
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
                if not count and not self._is_cut_call:
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
        if self._is_cut_call:
            source.position = len(source.text)
            return
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
            bare = BareCalls(source, reader, self._writer, self._tools)
            if (yield from bare.objects(streams=False)):
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
            cut = len(rest) - (0 if source.is_final else held(rest, marks))
            # A mark may hold another one, and have begun before it.
            found = found if found[0] <= cut else (-1, "")
            cut = found[0] if found[1] else cut
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

    @property
    def _is_cut_call(self) -> bool:
        """Whether what began as a call, and is none, lacks its end only."""
        return self._streams and self._source.is_cut

    def _put(self, kind: PieceKind, start: int, end: int) -> None:
        source = self._source
        if self._is_forced and source.is_cut and kind is PieceKind.CONTENT:
            # The beginning of a call whose name did not come any more.
            return
        if end > start:
            self._out.append(Piece(kind, source.text[start:end], source.base + start, source.base + end))

    def _mark(self, kind: PieceKind, place: int) -> None:
        source = self._source
        self._out.append(Piece(kind, "", source.base + place, source.base + place))

    def _writer(self, *, streams: bool | None = None) -> CallWriter:
        streams = self._streams if streams is None else streams
        return CallWriter(self._source, self._put_piece, streams=streams)

    def _put_piece(self, piece: Piece) -> None:
        self._out.append(piece)
