"""What a model's caches hold of a sequence, and how to take it out and put it back.

mlx-lm gives a model one cache a layer, some of them lists of caches. What is kept of each kind:

* KVCache: keys and values of every token.
* RotatingKVCache: those of the last tokens, as many as the layer's window is wide.
* ArraysCache: a recurrent state after the last token, which says nothing of any token before.

A model with any other kind takes no part in reuse: some cannot be merged into a batch, and those of
llama4 and afm7 misreport what they hold (mlx-lm #1494).

In mlx-lm's batch caches, tokens lie to the right: the last place in use belongs to the last token of
every row, and padding and stale values lie to the left. In ragged caches they lie to the left, as they
do where a row is alone. Row knows both.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from mlx_lm.models.cache import (
    ArraysCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
)

from osaurus_grpc.engine.kv_piece import Plane
from osaurus_grpc.engine.ragged_cache import RaggedKVCache


@dataclass(frozen=True, slots=True)
class Lane:
    """Layers that hold keys and values of the same tokens.

    Attributes:
        window: The last tokens they hold, or None for all.
        leaves: Their numbers.
    """

    window: int | None
    leaves: tuple[int, ...]

    def start(self, length: int) -> int:
        """The first token that they hold of a sequence of so many."""
        return 0 if self.window is None else max(0, length - self.window)


class CacheLayout:
    """The kinds of a model's caches.

    Args:
        caches: An empty cache a layer, as the model makes them.

    Raises:
        ValueError: One of them is of a kind that cannot be reused.
    """

    def __init__(self, caches: Sequence[Any]) -> None:
        windows: dict[int | None, list[int]] = {}
        states: list[int] = []
        for number, leaf in enumerate(_leaves(caches)):
            # Subclasses may keep more than their parents, so types must match exactly.
            if type(leaf) is KVCache:
                windows.setdefault(None, []).append(number)
            elif type(leaf) is RotatingKVCache:
                windows.setdefault(int(leaf.max_size), []).append(number)
            elif type(leaf) is ArraysCache:
                states.append(number)
            else:
                raise ValueError(f"{type(leaf).__name__} cannot be reused")
        self._caches = list(caches)
        self.lanes = tuple(
            Lane(window, tuple(leaves))
            for window, leaves in sorted(windows.items(), key=lambda item: item[0] or 0)
        )
        self.states = tuple(states)

    @property
    def is_plain(self) -> bool:
        """Whether a cache of n tokens holds the caches of all shorter beginnings."""
        return not self.states and all(lane.window is None for lane in self.lanes)

    def build(
        self, length: int, planes: Mapping[int, mx.array], states: Mapping[int, Sequence[mx.array]]
    ) -> list[Any]:
        """Caches of a sequence, one a layer, for a batch to take over.

        Args:
            length: Tokens of the sequence.
            planes: By number, of shape (1, kv_heads, tokens, head_dim); those of plain caches may have
                room after the sequence, those of windows end with it.
            states: By leaf, the arrays of its state, each of one row.
        """
        numbers = count()

        def rebuilt(cache: Any) -> Any:
            if isinstance(cache, CacheList):
                return CacheList(*(rebuilt(child) for child in cache.caches))
            number = next(numbers)
            if type(cache) is ArraysCache:
                found = ArraysCache(len(cache.cache))
                if number in states:
                    found.cache = list(states[number])
                return found
            keys, values = planes.get(2 * number), planes.get(2 * number + 1)
            if type(cache) is RotatingKVCache:
                window = RotatingKVCache(max_size=cache.max_size)
                if keys is not None and values is not None:
                    window.state = keys, values, length, 0, cache.max_size, keys.shape[2]
                return window
            if keys is None or values is None:  # a layer that never uses its cache
                return KVCache()
            plain = KVCache()
            plain.state = keys, values, length
            return plain

        return [rebuilt(cache) for cache in self._caches]


class Row:
    """One row of a batch, to be read.

    Args:
        caches: The batch's caches, or the row's own, one a layer.
        index: Of the row.
        tokens: What the row's caches hold, in order.
    """

    def __init__(self, caches: Sequence[Any], index: int, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self._leaves = list(_leaves(caches))
        self._index = index

    def planes(self, lane: Lane, start: int, end: int) -> list[Plane]:
        """Keys and values of the tokens from start up to end, which the lane must hold.

        Layers that never used their cache are left out.
        """
        planes = []
        for number in lane.leaves:
            cache = self._leaves[number]
            if cache.keys is None:
                continue
            for plane, whole in ((2 * number, cache.keys), (2 * number + 1, cache.values)):
                array, last = _in_order(cache, whole, self._index)
                shift = last - len(self.tokens)
                planes.append((plane, array[:, shift + start : shift + end]))
        return planes

    def states(self, numbers: Sequence[int]) -> dict[int, list[mx.array]] | None:
        """Copies of recurrent states, each array of one row; None where one is not there yet.

        A leaf that never had a state is left out.
        """
        states = {}
        for number in numbers:
            arrays = self._leaves[number].cache
            missing = sum(array is None for array in arrays)
            if missing == len(arrays):
                continue
            if missing:
                return None
            states[number] = [mx.contiguous(array[self._index : self._index + 1]) for array in arrays]
        return states


def _in_order(cache: Any, whole: mx.array, row: int) -> tuple[mx.array, int]:
    """A row's keys or values in order, shape (kv_heads, places, dim), and the place after the last one."""
    if isinstance(cache, RotatingKVCache):
        ordered = cache._temporal_order(whole)
        return ordered[row], ordered.shape[2]
    if isinstance(cache, KVCache):
        return whole[row], cache.offset
    if isinstance(cache, RaggedKVCache):
        return whole[row], cache.lengths[row]
    if isinstance(cache, BatchRotatingKVCache) and cache.rotated:
        return mx.roll(whole[row], -cache._idx, 1), whole.shape[2]
    return whole[row], cache._idx


def _leaves(caches: Sequence[Any]) -> Iterator[Any]:
    """The caches, those inside lists included, in order."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from _leaves(cache.caches)
        else:
            yield cache
