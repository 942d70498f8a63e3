"""Answers in gpt-oss's Harmony format: messages in channels.

https://cookbook.openai.com/articles/openai-harmony. An answer continues `<|start|>assistant`: each
message has a header with a channel and, for a call, a recipient, then `<|message|>` and the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from osaurus_grpc.chat.calls.json_text import read_value
from osaurus_grpc.chat.calls.pieces import CallWriter, PieceKind, ToolTable
from osaurus_grpc.chat.calls.source import Reading, Source

MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.\-]+)")
_MAX_HEADER_CHARACTERS = 512

Put = Callable[[PieceKind, int, int], None]
Mark = Callable[[PieceKind, int], None]


class HarmonyReader:
    """Reads an answer's messages.

    Args:
        source: What is read.
        put: Takes a piece of source.text, from and to.
        mark: Takes a place in source.text where reasoning begins or ends.
        make_writer: Makes the writer of a call.
        tools: What may be called.
    """

    def __init__(
        self,
        source: Source,
        put: Put,
        mark: Mark,
        make_writer: Callable[[], CallWriter],
        tools: ToolTable,
    ) -> None:
        self._source = source
        self._put = put
        self._mark = mark
        self._make_writer = make_writer
        self._tools = tools

    def read(self) -> Reading[None]:
        """Reads to the end of the answer."""
        source = self._source
        while (yield from source.has_more()):
            start = source.position
            if not (yield from self._has_header()):
                yield from self._body(PieceKind.CONTENT)
                continue
            header = yield from source.until(["<|message|>"], _MAX_HEADER_CHARACTERS)
            if header is None:
                source.position = len(source.text) if source.is_final else source.position + 1
                if source.is_cut:
                    return
                self._put(PieceKind.CONTENT, start, source.position)
                continue
            if not (yield from self._call(header[0], start)):
                channel = _CHANNEL.search(header[0])
                is_analysis = channel is not None and channel[1] == "analysis"
                yield from self._body(PieceKind.REASONING if is_analysis else PieceKind.CONTENT)

    def _has_header(self) -> Reading[bool]:
        start = self._source.position
        yield from self._source.skip()
        for mark in ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "to="):
            if (yield from self._source.takes(mark)):
                self._source.position = start
                return True
        self._source.position = start
        return False

    def _call(self, header: str, start: int) -> Reading[bool]:
        recipient = _RECIPIENT.search(header)
        if recipient is None or recipient[1] not in self._tools:
            return False
        source = self._source
        body = source.position
        writer = self._make_writer()
        writer.name(recipient[1])
        yield from source.skip()
        out = source.position

        def report() -> None:
            nonlocal out
            writer.arguments(source.text[out : source.position])
            out = source.position

        if not (yield from source.has_more()) or source.text[source.position] != "{":
            is_whole = False
        else:
            is_whole = yield from read_value(source, report)
        if is_whole:
            yield from source.skip()
            yield from source.takes_any(["<|call|>", "<|end|>"])
            writer.end()
            source.forget()
            return True
        if writer.is_out:
            return True
        source.position = body
        return False

    def _body(self, kind: PieceKind) -> Reading[None]:
        """Lets a message's text go as it comes, up to its end."""
        source = self._source
        source.forget()
        if kind is PieceKind.REASONING:
            self._mark(PieceKind.REASONING_BEGIN, source.position)
        while True:
            rest = source.text[source.position :]
            place = min((rest.find(end) for end in _ENDS if end in rest), default=-1)
            cut = place if place >= 0 else len(rest) - (0 if source.is_final else _held(rest))
            self._put(kind, source.position, source.position + cut)
            source.position += cut
            source.forget()
            if place >= 0:
                if kind is PieceKind.REASONING:
                    self._mark(PieceKind.REASONING_END, source.position)
                # What ends a message and begins none is no part of the next one.
                yield from source.takes_any(["<|end|>", "<|call|>", "<|return|>"])
                return
            if source.is_final:
                return
            yield


def _held(text: str) -> int:
    place = text.rfind("<|", max(0, len(text) - 12))
    if place >= 0 and any(end.startswith(text[place:]) for end in _ENDS):
        return len(text) - place
    return 1 if text.endswith("<") else 0
