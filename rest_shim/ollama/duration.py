"""Ollama's durations: seconds as a number, or Go's duration text."""

from __future__ import annotations

import re

from google.protobuf.duration_pb2 import Duration

# The span that google.protobuf.Duration is defined for.
_MAX_SECONDS = 315_576_000_000.0
# More than any duration needs.
_MAX_CHARACTERS = 64

_UNIT_SECONDS = {
    "ns": 1e-9,
    "us": 1e-6,
    "\u00b5s": 1e-6,
    "\u03bcs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
# Digits have one way to match only: with two, a long number without a unit takes quadratic time.
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_TERM = re.compile(rf"({_NUMBER})(ns|us|\u00b5s|\u03bcs|ms|s|m|h)")
# Not Go's; but what is a number in JSON is often text in a settings page, "-1" above all.
_SECONDS = re.compile(rf"[+-]?{_NUMBER}")
_TEXT = re.compile(rf"([+-]?)((?:{_NUMBER}(?:ns|us|\u00b5s|\u03bcs|ms|s|m|h))+|0)")


def parse_seconds(text: str) -> float | None:
    """Seconds of a Go duration such as "1h30m" or "-1s" (time.ParseDuration), or of a number.

    None where the text is neither.
    """
    if len(text) > _MAX_CHARACTERS:
        return None
    if _SECONDS.fullmatch(text):
        return float(text)
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    total = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in _TERM.findall(match[2]))
    return -total if match[1] == "-" else total


def to_proto(seconds: float) -> Duration:
    """A protobuf duration, held to the span that it has."""
    bounded = min(max(seconds, -_MAX_SECONDS), _MAX_SECONDS)
    duration = Duration()
    duration.FromNanoseconds(round(bounded * 1e9))
    return duration
