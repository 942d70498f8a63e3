"""Keys and values of rows of different lengths, each from its first place on, joined and left in place.

mlx-lm's batch cache aligns its rows to the right, so that all of them write their next token at the
same place; a longer row that joins moves all others, and any row that joins or leaves copies all of
them. Here every row begins at place 0 and writes where it ends: one scatter a layer instead of one
slice. A row that joins is written into a free seat, a row that leaves is overwritten by the last one,
and what lies behind a row's end is masked. MLX writes into a buffer in place where nobody else holds
it, so the cost is that of the row and not of the batch.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from mlx_lm.models.cache import KVCache

from osaurus_grpc.models.cpu_kernels import share_offset

STEP: int = KVCache.step


def rounded(tokens: int) -> int:
    """Places that hold so many tokens, in steps."""
    return -(-tokens // STEP) * STEP


class Lengths:
    """Tokens in each row of a batch at one time, and what follows from them; made once for all layers."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = list(rows)
        self.longest = max(self.rows, default=0)
        self.offset = mx.array(self.rows, dtype=mx.int32)
        share_offset(self.offset)
        self._places: dict[tuple[int, int, int], mx.array] = {}
        self._masks: dict[tuple[int, int | None], mx.array] = {}

    def places(self, heads: int, capacity: int, count: int) -> mx.array:
        """Where the next tokens lie in a buffer (seats, heads, capacity, dim), flat but for dim.

        Args:
            heads: Of the buffer.
            capacity: Of the buffer.
            count: Tokens to be written to each row.

        Returns:
            int32, shape (rows * heads * count,).
        """
        key = heads, capacity, count
        if key not in self._places:
            first = np.arange(len(self.rows) * heads) * capacity + np.repeat(self.rows, heads)
            places = first[:, None] + np.arange(count)
            self._places[key] = mx.array(places.reshape(-1).astype(np.int32))
        return self._places[key]

    def mask(self, count: int, window: int | None, *, returns_array: bool) -> mx.array | str | None:
        """What the next tokens of each row see, themselves included.

        Args:
            count: Tokens fed to each row.
            window: The last tokens that are seen, or None for all.
            returns_array: Whether a mask that can be said in a word must be an array.

        Returns:
            bool, shape (rows, 1, count, longest + count); None where everything is seen; "causal".
        """
        is_even = self.longest == min(self.rows, default=0)
        if is_even and not returns_array and (window is None or self.longest + count <= window):
            return None if count == 1 else "causal"
        key = count, window
        if key not in self._masks:
            places = mx.arange(self.longest + count)
            last = (self.offset[:, None] + mx.arange(count))[:, None, :, None]
            mask = places <= last
            self._masks[key] = mask if window is None else mask & (places > last - window)
        return self._masks[key]


class RowLengths:
    """The lengths of a batch's rows, told by how much was written since the rows changed.

    The layers of a model are written one after the other, so two times are in use at once.

    Args:
        rows: Tokens in each row.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = list(rows)
        self._times: dict[int, Lengths] = {}

    def at(self, written: int) -> Lengths:
        """The lengths after so many more tokens in each row."""
        if written not in self._times:
            if len(self._times) > 2:
                del self._times[min(self._times)]
            self._times[written] = Lengths([length + written for length in self._rows])
        return self._times[written]


class RaggedKVCache:
    """One layer's cache of a batch; stands where mlx-lm's models expect a BatchKVCache.

    Args:
        lengths: Shared by all layers.
        keys: Shape (seats, kv_heads, capacity, dim); the rows have the first seats. None where the
            layer has not been used yet.
        values: Shape (seats, kv_heads, capacity, value_dim), as keys.
    """

    def __init__(
        self, lengths: RowLengths, keys: mx.array | None = None, values: mx.array | None = None
    ) -> None:
        self.keys = keys
        self.values = values
        self._lengths = lengths
        self._written = 0

    # What mlx-lm's models ask for.

    @property
    def offset(self) -> mx.array:
        """Tokens in each row, int32, shape (rows,)."""
        return self._now.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the next tokens of each row.

        Args:
            keys: Shape (rows, kv_heads, count, dim).
            values: Shape (rows, kv_heads, count, value_dim).

        Returns:
            Those of all tokens, up to the end of the longest row.
        """
        now = self._now
        rows, heads, count, _ = keys.shape
        longest = now.longest + count
        if self.keys is None:
            capacity = rounded(longest)
            self.keys = mx.zeros((rows, heads, capacity, keys.shape[3]), keys.dtype)
            self.values = mx.zeros((rows, values.shape[1], capacity, values.shape[3]), values.dtype)
        elif longest > self.capacity:
            self.resize(self.seats, rounded(longest))
        self.keys = _written(self.keys, now, keys)
        self.values = _written(cast("mx.array", self.values), now, values)
        self._written += count
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Those of all tokens, up to the end of the longest row."""
        now = self._now
        rows = len(now.rows)
        keys, values = cast("mx.array", self.keys), cast("mx.array", self.values)
        return keys[:rows, :, : now.longest], values[:rows, :, : now.longest]

    def make_mask(
        self, count: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask of the next pass, see Lengths.mask()."""
        return self._now.mask(count, window_size, returns_array=return_array)

    def is_trimmable(self) -> bool:
        """Whether tokens can be cut off; they can."""
        return True

    def trim(self, count: int) -> int:
        """Cut off the last tokens of each row; returns how many."""
        count = min(count, *self.lengths)
        self._written -= count
        return count

    def empty(self) -> bool:
        """Whether the layer has not been used yet."""
        return self.keys is None

    def size(self) -> int:
        """Tokens in the longest row."""
        return self._now.longest

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        """Keys and values, to be evaluated."""
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        """Bytes held, free seats and places included."""
        return 0 if self.keys is None or self.values is None else int(self.keys.nbytes + self.values.nbytes)

    # What a batch asks for.

    @property
    def _now(self) -> Lengths:
        return self._lengths.at(self._written)

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        return self._now.rows

    @property
    def seats(self) -> int:
        """Rows that there is room for."""
        return 0 if self.keys is None else int(self.keys.shape[0])

    @property
    def capacity(self) -> int:
        """Tokens that each row has room for."""
        return 0 if self.keys is None else int(self.keys.shape[2])

    def row(self, index: int) -> tuple[mx.array, mx.array]:
        """Keys and values of one row, shape (1, kv_heads, length, dim), of a layer that was used."""
        assert self.keys is not None
        assert self.values is not None
        length = self.lengths[index]
        return self.keys[index : index + 1, :, :length], self.values[index : index + 1, :, :length]

    def renew(self, lengths: RowLengths) -> None:
        """Take over the lengths of rows that changed."""
        self._lengths, self._written = lengths, 0

    def resize(self, seats: int, capacity: int) -> None:
        """Copy the rows into buffers of another size, no smaller than they are."""
        rows, places = len(self.lengths), min(capacity, self.capacity)
        if self.keys is not None and self.values is not None:
            self.keys = _resized(self.keys[:rows, :, :places], seats, capacity)
            self.values = _resized(self.values[:rows, :, :places], seats, capacity)

    def put(self, seat: int, keys: mx.array, values: mx.array) -> None:
        """Write a row into a seat, in place where nobody else holds the buffers.

        Args:
            seat: A free one.
            keys: Shape (1, kv_heads, tokens, dim), of another cache.
            values: Shape (1, kv_heads, tokens, value_dim).
        """
        assert self.keys is not None
        assert self.values is not None
        tokens = keys.shape[2]
        self.keys[seat : seat + 1, :, :tokens] = keys
        self.values[seat : seat + 1, :, :tokens] = values


def _written(buffer: mx.array, now: Lengths, new: mx.array) -> mx.array:
    """A buffer with the next tokens of each row."""
    _, heads, capacity, dim = buffer.shape
    flat = buffer.reshape(-1, dim)
    flat[now.places(heads, capacity, new.shape[2])] = new.reshape(-1, dim)
    return flat.reshape(buffer.shape)


def _resized(rows: mx.array, seats: int, capacity: int) -> mx.array:
    return mx.pad(rows, [(0, seats - rows.shape[0]), (0, 0), (0, capacity - rows.shape[2]), (0, 0)])


def lengths_of(caches: Sequence[Any]) -> list[int]:
    """Tokens in each row of a batch; none where no layer tells."""
    return next((cache.lengths for cache in caches if isinstance(cache, RaggedKVCache) and cache.seats), [])
