"""Arguments that go out while they are written."""

from __future__ import annotations

from osaurus_grpc.chat.calls.json_text import read_value
from osaurus_grpc.chat.calls.pieces import CallWriter
from osaurus_grpc.chat.calls.source import Reading, Source, held
from osaurus_grpc.chat.calls.values import escaped


def stream_value(source: Source, writer: CallWriter) -> Reading[bool]:
    """Reads a JSON value whose text goes out as it comes, byte for byte."""
    out = source.position

    def report() -> None:
        nonlocal out
        writer.arguments(source.text[out : source.position])
        out = source.position

    return (yield from read_value(source, report))


def stream_string(source: Source, writer: CallWriter, close: str, space: str = "") -> Reading[bool]:
    """Lets a string that stands as it is go as it comes, and reads over its end.

    Args:
        source: Stands at its first character.
        writer: Takes the text as that of a JSON string.
        close: What ends it.
        space: White space before that, which is no part of the string.
    """
    ends = (space + close, close)
    while True:
        rest = source.text[source.position :]
        place = rest.find(close)
        text = rest[:place].removesuffix(space) if place >= 0 else rest[: len(rest) - held(rest, ends)]
        source.position += place + len(close) if place >= 0 else len(text)
        writer.arguments(escaped(text))
        if place >= 0:
            return True
        if source.is_final:
            return False
        yield
