"""The caches of a batch, one object a layer: alone, merged, joined, left.

One row has mlx-lm's plain caches: no mask, no padding, and it is what a finished conversation can
leave for its next turn. Several rows have ragged caches where mlx-lm has plain ones, and mlx-lm's
batch caches in all other layers.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

import math
from collections.abc import Iterable, Sequence
from typing import Any

from mlx_lm.models.cache import CacheList, KVCache

from osaurus_grpc.engine.ragged_cache import RaggedKVCache, RowLengths, lengths_of, rounded

# Caches computed at once; smaller ones wait for whoever needs them.
_TURN_BYTES = 32 * 2**20


def evaluate(caches: Sequence[Any]) -> None:
    """Compute what the caches hold."""
    mx.eval([cache.state for cache in caches])


def evaluate_in_turn(caches: Sequence[Any]) -> None:
    """Compute what was joined or cut some layers at a time, where the caches are large.

    All at once, what they were and what they become would be in memory together.
    """
    pending, size = [], 0
    for cache in caches:
        pending.append(cache.state)
        size += int(cache.nbytes)
        if size >= _TURN_BYTES:
            mx.eval(pending)
            pending, size = [], 0


def is_plain(caches: Sequence[Any]) -> bool:
    """Whether every layer keeps all keys and values of one row, so that it can be cut anywhere."""
    return bool(caches) and all(isinstance(cache, KVCache) for cache in caches)


def reserve(caches: Sequence[Any], tokens: int) -> None:
    """Make room for so many tokens in plain caches, once rather than chunk by chunk."""
    for cache in caches:
        if not isinstance(cache, KVCache) or cache.keys is None or cache.keys.shape[2] >= tokens:
            continue
        padding = [(0, 0), (0, 0), (0, rounded(tokens) - cache.keys.shape[2]), (0, 0)]
        cache.keys, cache.values = mx.pad(cache.keys, padding), mx.pad(cache.values, padding)


def as_batch(caches: Sequence[Any]) -> list[Any]:
    """Batch caches of one row; plain ones are handed over without a copy."""
    lengths = _plain_lengths([caches])
    return [
        RaggedKVCache(lengths, cache.keys, cache.values) if type(cache) is KVCache else _as_batch(cache)
        for cache in caches
    ]


def _as_batch(cache: Any) -> Any:
    if isinstance(cache, CacheList):
        return CacheList(*(_as_batch(child) for child in cache.caches))
    return cache if isinstance(cache, RaggedKVCache) or hasattr(cache, "extend") else cache.merge([cache])


def merge(rows: Sequence[Sequence[Any]], room: int) -> list[Any]:
    """Batch caches of several rows that have their own; copies them.

    Args:
        rows: Of each row one a layer.
        room: Tokens that each row will gain at once.
    """
    lengths = _plain_lengths(rows)
    capacity = rounded(lengths.at(0).longest + room + 1)
    return [
        _merged(layer, lengths, capacity) if type(layer[0]) is KVCache else layer[0].merge(list(layer))
        for layer in zip(*rows, strict=True)
    ]


def _plain_lengths(rows: Iterable[Sequence[Any]]) -> RowLengths:
    """How long rows are that have caches of their own, as their plain ones tell."""
    return RowLengths(
        [max((cache.offset for cache in row if type(cache) is KVCache), default=0) for row in rows]
    )


def _merged(layer: Sequence[KVCache], lengths: RowLengths, capacity: int) -> RaggedKVCache:
    """One layer of several rows."""
    filled = next((cache for cache in layer if cache.keys is not None), None)
    if filled is None:
        return RaggedKVCache(lengths)
    buffers = [
        mx.zeros((len(layer), array.shape[1], capacity, array.shape[3]), array.dtype)
        for array in (filled.keys, filled.values)
    ]
    merged = RaggedKVCache(lengths, *buffers)
    for seat, cache in enumerate(layer):
        if cache.keys is not None:
            merged.put(seat, cache.keys[:, :, : cache.offset], cache.values[:, :, : cache.offset])
    return merged


def prepare(caches: Sequence[Any], lengths: Sequence[int]) -> None:
    """Tell batch caches how many tokens of the next pass are each row's; the rest is right padding."""
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    if any(padding):
        for cache in caches:
            if not isinstance(cache, RaggedKVCache):
                cache.prepare(lengths=list(lengths), right_padding=padding)


def finalize(caches: Sequence[Any], lengths: Sequence[int]) -> None:
    """Forget the right padding of the last pass; mlx-lm's caches turn it into left padding."""
    longest = max(lengths)
    told = lengths_of(caches)
    renewed = RowLengths(
        [total - (longest - length) for total, length in zip(told, lengths, strict=True)] if told else []
    )
    for cache in caches:
        if not isinstance(cache, RaggedKVCache):
            cache.finalize()  # also without padding: recurrent caches would count it down for ever
        elif longest != min(lengths):
            cache.renew(renewed)


def join(mine: Sequence[Any], theirs: Sequence[Any], seats: int) -> None:
    """Add the rows of other batch caches, after one's own.

    Args:
        mine: One a layer; changed.
        theirs: One a layer; used up.
        seats: Rows to make room for where there is none for these; at least as many as there will be.
    """
    own = lengths_of(mine)
    rows = [*own, *lengths_of(theirs)]
    lengths = RowLengths(rows)
    is_copied = False
    for cache, other in zip(mine, theirs, strict=True):
        if not isinstance(cache, RaggedKVCache):
            cache.extend(other)
            is_copied = True
            continue
        if cache.keys is not None:
            longest = lengths.at(0).longest
            if cache.seats < len(rows) or cache.capacity < longest:
                is_copied = True
                cache.resize(
                    seats if cache.seats < len(rows) else cache.seats,
                    max(cache.capacity, rounded(longest + 1)),
                )
            for i in range(len(rows) - len(own)):
                cache.put(len(own) + i, *other.row(i))
        cache.renew(lengths)
    if is_copied:
        evaluate_in_turn(mine)


def make_way(caches: Sequence[Any], share: float, seats: int, tokens: int) -> None:
    """Make room for a row that will join, in some of the layers that have none for it yet.

    Args:
        caches: Batch caches, one a layer.
        share: Of those layers; more than 0.
        seats: Rows to make room for where there is none for it.
        tokens: That the row will have.
    """
    capacity = rounded(tokens + 1)
    small = [
        cache
        for cache in caches
        if isinstance(cache, RaggedKVCache)
        and cache.seats
        and (cache.seats <= len(cache.lengths) or cache.capacity < capacity)
    ]
    for cache in small[: math.ceil(share * len(small))]:
        is_full = cache.seats <= len(cache.lengths)
        cache.resize(seats if is_full else cache.seats, max(cache.capacity, capacity))
        mx.eval(cache.state)


def leave(caches: Sequence[Any], order: Sequence[int]) -> None:
    """Let rows out of batch caches.

    Args:
        caches: One a layer.
        order: Which row each seat has afterwards, as arrangement() gives it.
    """
    rows = lengths_of(caches)
    lengths = RowLengths([rows[index] for index in order] if rows else [])
    ragged = [cache for cache in caches if isinstance(cache, RaggedKVCache)]
    moves = [(index, seat) for seat, index in enumerate(order) if index != seat]
    for cache in ragged:
        for index, seat in moves if cache.keys is not None else ():
            # A buffer is written to in place only where no view of it is waiting to be read. Layer by
            # layer, so that the memory of one copy serves the next.
            keys, values = (mx.contiguous(array) for array in cache.row(index))
            mx.eval(keys, values)
            cache.put(seat, keys, values)
            del keys, values
            mx.eval(cache.state)
    for cache in ragged:
        cache.renew(lengths)
    others = [cache for cache in caches if not isinstance(cache, RaggedKVCache)]
    for cache in others:
        cache.filter(list(order))
    evaluate_in_turn(others)


def arrangement(count: int, leaving: Iterable[int]) -> list[int]:
    """Which of so many rows each seat has when some left: the last ones take the seats that are free."""
    gone = set(leaving)
    kept = count - len(gone)
    movers = (index for index in range(count - 1, kept - 1, -1) if index not in gone)
    return [next(movers) if index in gone else index for index in range(kept)]


def places(caches: Sequence[Any]) -> tuple[int, int]:
    """Seats that ragged caches have, and places a seat; (0, 0) where there are none."""
    return next(
        (
            (cache.seats, cache.capacity)
            for cache in caches
            if isinstance(cache, RaggedKVCache) and cache.seats
        ),
        (0, 0),
    )


def resize(caches: Sequence[Any], seats: int, capacity: int) -> None:
    """Copy ragged caches into buffers of another size."""
    for cache in caches:
        if isinstance(cache, RaggedKVCache):
            cache.resize(seats, capacity)
    evaluate_in_turn(caches)


def as_single(caches: Sequence[Any], index: int) -> list[Any] | None:
    """Plain caches of one of a batch's rows, which copies it; None where other layers forbid that."""
    if not all(isinstance(cache, RaggedKVCache) for cache in caches):
        return None
    singles = []
    for cache in caches:
        single = KVCache()
        if cache.keys is not None:
            length = cache.lengths[index]
            places = min(cache.capacity, rounded(length + 1))
            keys, values = (array[index : index + 1, :, :places] for array in (cache.keys, cache.values))
            single.state = mx.contiguous(keys), mx.contiguous(values), length
        singles.append(single)
    evaluate_in_turn(singles)
    return singles
