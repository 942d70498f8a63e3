"""A text that is still arriving, and readers that wait for more of it.

Readers are generators: each yields where what has arrived does not decide how to go on, and is resumed
when more is there. What a reader returns depends on the text alone, never on how it was cut.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeAlias, TypeVar

T = TypeVar("T")

# Yields to wait for more text; returns its result.
Reading: TypeAlias = Generator[None, None, T]

_SPACE = " \t\r\n"


class Source:
    """The text that has arrived, from a base offset on.

    Attributes:
        text: What is still of interest.
        position: Where reading goes on, in text.
        base: Offset of text in the whole answer, in characters.
        is_final: Nothing more will come.
        is_cut: The answer was cut off there.
    """

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.base = 0
        self.is_final = False
        self.is_cut = False

    @property
    def offset(self) -> int:
        """The position in the whole answer."""
        return self.base + self.position

    def append(self, text: str) -> None:
        """More has arrived."""
        self.text += text

    def forget(self) -> None:
        """Drops what is read."""
        self.base += self.position
        self.text = self.text[self.position :]
        self.position = 0

    def has_more(self) -> Reading[bool]:
        """Whether there is a character at the position."""
        while self.position >= len(self.text):
            if self.is_final:
                return False
            yield
        return True

    def skip(self, characters: str = _SPACE) -> Reading[None]:
        """Passes over any of the characters."""
        while (yield from self.has_more()) and self.text[self.position] in characters:
            self.position += 1

    def takes(self, mark: str) -> Reading[bool]:
        """Passes over a mark if it is there."""
        while len(self.text) - self.position < len(mark):
            if self.is_final or not mark.startswith(self.text[self.position :]):
                return False
            yield
        if not self.text.startswith(mark, self.position):
            return False
        self.position += len(mark)
        return True

    def takes_any(self, marks: Sequence[str]) -> Reading[str]:
        """Passes over the longest of several marks that is there and returns it, "" if none is."""
        found = ""
        start = self.position
        for mark in marks:
            if len(mark) > len(found) and (yield from self.takes(mark)):
                found = mark
                self.position = start
        self.position = start + len(found)
        return found

    def until(self, marks: Sequence[str], limit: int = 0) -> Reading[tuple[str, str] | None]:
        """Reads to the first of several marks, and over it.

        Args:
            marks: None empty; of two that begin at one place the longer wins.
            limit: Characters that the text before it may have; 0 is any number.

        Returns:
            The text before the mark, and the mark; None where there is none, with nothing read.
        """
        start = searched = self.position
        overlap = max(map(len, marks)) - 1
        while True:
            places = [(self.text.find(mark, searched), mark) for mark in marks]
            found = min(((place, -len(mark)) for place, mark in places if place >= 0), default=None)
            # A longer mark may still begin at the same place or before it.
            if found is not None and (self.is_final or found[0] + overlap < len(self.text)):
                place, length = found[0], -found[1]
                self.position = place + length
                if limit and place - start > limit:
                    self.position = start
                    return None
                return self.text[start:place], self.text[place : self.position]
            if self.is_final or (limit and len(self.text) - start > limit + overlap):
                return None
            searched = max(start, len(self.text) - overlap) if found is None else searched
            yield


def held(text: str, marks: Sequence[str]) -> int:
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
