"""Stop strings, found in streamed text wherever the chunks are cut."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from osaurus_grpc.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class StopResult:
    """What one piece of text let go.

    Attributes:
        text: Text that is certainly part of the answer; may be empty.
        matched: The stop string that was met, else None.
    """

    text: str
    matched: str | None


class StopMatcher:
    """Finds the first of several stop strings and holds back what may become one.

    An Aho-Corasick automaton over characters (Aho and Corasick 1975, "Efficient string matching").
    Its state is the longest suffix of the text that begins a stop string, which is exactly what has
    to be held back. The stop that completes first wins; of those that complete at the same
    character, the longest, since it begins first. So the result does not depend on how the text is
    cut, and the text let go never contains a stop string. Time is linear in the text, whatever the
    stop strings; text in which no character begins one is passed over by a regular expression.

    Args:
        stops: Stop strings, none empty; none at all is allowed.

    Raises:
        InvalidRequestError: One is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for index, stop in enumerate(stops):
            if not stop:
                raise InvalidRequestError("A stop text may not be empty.", field=f"sampling.stop[{index}]")
            self._insert(stop)
        self._fail = self._failure_links()
        first = "".join(map(re.escape, self._next[0]))
        self._begins = re.compile(f"[{first}]" if first else "(?!)")
        self._state = 0
        self._held = ""
        self._matched: str | None = None

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            child = self._next[state].get(char)
            if child is None:
                child = len(self._next)
                self._next[state][char] = child
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(None)
            state = child
        self._match[state] = stop

    def _failure_links(self) -> list[int]:
        """Per state, the state of its longest proper suffix; breadth first, so suffixes come first."""
        fail = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            self._match[state] = self._match[state] or self._match[fail[state]]
            for char, child in self._next[state].items():
                queue.append(child)
                fallback = fail[state]
                while fallback and char not in self._next[fallback]:
                    fallback = fail[fallback]
                fail[child] = self._next[fallback].get(char, 0)
        return fail

    def feed(self, text: str) -> StopResult:
        """Takes more text; after a match everything is dropped."""
        if self._matched is not None:
            return StopResult("", None)
        if not self._state and not self._begins.search(text):
            return StopResult(text, None)
        buffer = self._held + text
        end = self._scan(buffer, len(self._held))
        if end is None:
            cut = len(buffer) - self._depth[self._state]
            self._held = buffer[cut:]
            return StopResult(buffer[:cut], None)
        matched = self._matched = self._match[self._state] or ""
        self._held = ""
        return StopResult(buffer[: end - len(matched)], matched)

    def _scan(self, buffer: str, position: int) -> int | None:
        """Runs the automaton from a position; returns where a stop string ends, if one does."""
        following, fail, match = self._next, self._fail, self._match
        state = self._state
        while position < len(buffer):
            if not state:
                found = self._begins.search(buffer, position)
                if found is None:
                    break
                position = found.start()
            char = buffer[position]
            while state and char not in following[state]:
                state = fail[state]
            state = following[state].get(char, 0)
            position += 1
            if match[state] is not None:
                self._state = state
                return position
        self._state = state
        return None

    def flush(self) -> str:
        """Returns what is held back, at the end of the text."""
        held, self._held, self._state = self._held, "", 0
        return held
