"""JSON that is still arriving: where a value ends, and whether it is JSON at all (RFC 8259)."""

from __future__ import annotations

import re
from collections.abc import Callable

from osaurus_grpc.chat.calls.source import Reading, Source

_SPACE = " \t\r\n"
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_CHARACTERS = frozenset("+-.0123456789eE")
_WORDS = {"t": "true", "f": "false", "n": "null"}
_HEX = frozenset("0123456789abcdefABCDEF")
_MAX_NESTING = 64

Report = Callable[[], None]


def _ignore() -> None:
    return None


def read_value(source: Source, report: Report = _ignore) -> Reading[bool]:
    """Reads one JSON value; the source stands behind it then.

    Args:
        source: Stands at the value, white space before it allowed.
        report: Called whenever the source has advanced over more of a value that is well formed so
            far.

    Returns:
        Whether it is a whole value. Where not, the source stands where it went wrong.
    """
    return (yield from _value(source, report, _MAX_NESTING))


def read_string(source: Source, report: Report = _ignore) -> Reading[str | None]:
    """Reads a string's JSON text, quotes included; None where it is none."""
    start = source.position
    if not (yield from source.takes('"')):
        return None
    while (yield from source.has_more()):
        match = _PLAIN.match(source.text, source.position)
        if match is not None and match.end() > source.position:
            source.position = match.end()
            report()
            continue
        character = source.text[source.position]
        if character == '"':
            source.position += 1
            report()
            return source.text[start : source.position]
        if character != "\\" or not (yield from _escape(source)):
            return None
    return None


def _escape(source: Source) -> Reading[bool]:
    start = source.position
    source.position += 1
    if not (yield from source.has_more()):
        source.position = start
        return False
    letter = source.text[source.position]
    source.position += 1
    if letter in '"\\/bfnrt':
        return True
    if letter != "u":
        return False
    for _ in range(4):
        if not (yield from source.has_more()) or source.text[source.position] not in _HEX:
            return False
        source.position += 1
    return True


def _value(source: Source, report: Report, levels: int) -> Reading[bool]:
    yield from source.skip(_SPACE)
    if not levels or not (yield from source.has_more()):
        return False
    first = source.text[source.position]
    if first == '"':
        return (yield from read_string(source, report)) is not None
    if first in "{[":
        return (yield from _container(source, report, levels - 1))
    if first in _WORDS:
        is_word = yield from source.takes(_WORDS[first])
        report()
        return is_word
    return (yield from _number(source, report))


def _number(source: Source, report: Report) -> Reading[bool]:
    start = source.position
    while (yield from source.has_more()) and source.text[source.position] in _NUMBER_CHARACTERS:
        source.position += 1
    if _NUMBER.fullmatch(source.text, start, source.position) is None:
        source.position = start
        return False
    report()
    return True


def _container(source: Source, report: Report, levels: int) -> Reading[bool]:
    is_object = source.text[source.position] == "{"
    close = "}" if is_object else "]"
    source.position += 1
    yield from source.skip(_SPACE)
    if (yield from source.takes(close)):
        report()
        return True
    while True:
        if is_object and not (yield from _key(source, report)):
            return False
        if not (yield from _value(source, report, levels)):
            return False
        yield from source.skip(_SPACE)
        if (yield from source.takes(close)):
            report()
            return True
        if not (yield from source.takes(",")):
            return False
        report()


def _key(source: Source, report: Report) -> Reading[bool]:
    yield from source.skip(_SPACE)
    if (yield from read_string(source, report)) is None:
        return False
    yield from source.skip(_SPACE)
    has_colon = yield from source.takes(":")
    report()
    return has_colon
