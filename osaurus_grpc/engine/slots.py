"""Caches of finished sequences, kept where they are for the prompt that goes on from them.

A chat's next turn begins with the whole of its last one. Its blocks are in the prompt cache, but
taking them from there copies all of them; a slot is the cache itself, cut back to what the prompt
shares with it, at any token, and continued in place. One prompt can have it; others have the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from osaurus_grpc.engine import layers

# A prompt that shares less of a slot than this leaves it to its conversation.
_LEAST_SHARE = 0.5
# Room for the next turn, made while nobody waits for it.
_ROOM_TOKENS = 256


@dataclass(slots=True, eq=False)
class Slot:
    """A finished sequence.

    Attributes:
        tokens: The tokens whose keys and values are in the caches, in order.
        caches: Plain caches, one a layer.
    """

    tokens: list[int]
    caches: list[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, room included."""
        return sum(int(cache.nbytes) for cache in self.caches)

    def shared(self, prompt: Sequence[int]) -> int:
        """Tokens that a prompt begins with, its last left out: that one is always computed."""
        return common_length(self.tokens, prompt, len(prompt) - 1)

    def make_room(self) -> None:
        """Let the next turn be written without a copy of what is there."""
        layers.reserve(self.caches, len(self.tokens) + _ROOM_TOKENS)
        layers.evaluate(self.caches)


class Slots:
    """A few slots, least recently left first out.

    Args:
        max_bytes: Of keys and values; 0 keeps none.
        max_slots: At most.
    """

    def __init__(self, max_bytes: int, max_slots: int = 4) -> None:
        self._max_bytes = max_bytes
        self._max_slots = max_slots
        self._slots: list[Slot] = []

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(slot.nbytes for slot in self._slots)

    def __contains__(self, slot: object) -> bool:
        return slot in self._slots

    def find(self, prompt: Sequence[int]) -> tuple[Slot | None, int]:
        """The slot that shares most with a prompt, and how many tokens."""
        best, most = None, 0
        for slot in self._slots:
            shared = slot.shared(prompt)
            if shared > most and shared >= _LEAST_SHARE * len(slot.tokens):
                best, most = slot, shared
        return best, most

    def take(self, slot: Slot, length: int) -> list[Any]:
        """A slot's caches, cut to their first tokens; the slot is gone."""
        self._slots.remove(slot)
        for cache in slot.caches:
            cache.trim(len(slot.tokens) - length)
        return slot.caches

    def put(self, tokens: list[int], caches: list[Any]) -> Slot | None:
        """Keep a finished sequence; None where it is larger than all the slots may be."""
        slot = Slot(tokens, caches)
        if slot.nbytes > self._max_bytes:
            return None
        # One that the new one begins with can do nothing that the new one cannot.
        self._slots = [s for s in self._slots if common_length(s.tokens, tokens, len(tokens)) < len(s.tokens)]
        self._slots.append(slot)
        del self._slots[: -self._max_slots]
        self.shrink(self._max_bytes)
        return slot

    def shrink(self, max_bytes: int) -> None:
        """Drop the oldest until no more than so many bytes are held."""
        while self.nbytes > max_bytes:
            self._slots.pop(0)

    def clear(self) -> None:
        """Drop all."""
        self._slots.clear()


def common_length(left: Sequence[int], right: Sequence[int], most: int) -> int:
    """Equal tokens at the beginning of both, at most so many."""
    most = min(most, len(left), len(right))
    for i in range(most):
        if left[i] != right[i]:
            return i
    return most
