"""The caches of a batch, one object a layer: alone, merged, joined, cut.

One row has mlx-lm's plain caches: no mask, no padding, and it is what a finished conversation can
leave for its next turn. Several rows have mlx-lm's batch caches, left-padded to one length.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import BatchKVCache, CacheList, KVCache

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
        more = -(-tokens // KVCache.step) * KVCache.step - cache.keys.shape[2]
        padding = [(0, 0), (0, 0), (0, more), (0, 0)]
        cache.keys, cache.values = mx.pad(cache.keys, padding), mx.pad(cache.values, padding)


def as_batch(caches: Sequence[Any]) -> list[Any]:
    """Batch caches of one row; plain ones are handed over without a copy."""
    return [_as_batch(cache) for cache in caches]


def _as_batch(cache: Any) -> Any:
    if isinstance(cache, CacheList):
        return CacheList(*(_as_batch(child) for child in cache.caches))
    if hasattr(cache, "extend"):
        return cache
    if isinstance(cache, KVCache) and cache.keys is not None:
        batch = BatchKVCache([0])
        batch.state = cache.keys, cache.values, mx.array([cache.offset]), batch.left_padding, cache.offset
        return batch
    return cache.merge([cache])


def as_single(caches: Sequence[Any], *, copies: bool = False) -> list[Any]:
    """Plain caches of a batch's only row where that needs no copy, or may copy; else the same ones."""
    if not all(type(cache) is BatchKVCache and cache.keys is not None for cache in caches):
        return list(caches)
    padding = int(caches[0].left_padding.item())
    if padding and not copies:
        return list(caches)
    singles = []
    for cache in caches:
        single = KVCache()
        keys, values = cache.keys, cache.values
        if padding:
            keys, values = (mx.contiguous(array[:, :, padding : cache._idx]) for array in (keys, values))
        single.state = keys, values, cache._idx - padding
        singles.append(single)
    return singles


def merge(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """Batch caches of several rows that have their own; copies them."""
    return [layer[0].merge(list(layer)) for layer in zip(*rows, strict=True)]


def prepare(caches: Sequence[Any], lengths: Sequence[int]) -> None:
    """Tell batch caches how many tokens of the next pass are each row's; the rest is right padding."""
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    if any(padding):
        for cache in caches:
            cache.prepare(lengths=list(lengths), right_padding=padding)


def finalize(caches: Sequence[Any], lengths: Sequence[int]) -> None:
    """Turn the right padding of the last pass into left padding."""
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    for cache in caches:
        if type(cache) is not BatchKVCache:
            cache.finalize()  # also without padding: recurrent caches would count it down for ever
        elif any(padding):
            # mlx-lm rolls each row by a gather over all its elements; a row is shifted as a whole here.
            cache.keys = _shifted(cache.keys, padding, cache._idx)
            cache.values = _shifted(cache.values, padding, cache._idx)
            shift = mx.array(padding)
            cache.offset = cache.offset - shift
            cache.left_padding = cache.left_padding + shift
            cache._right_padding = None


def _shifted(state: mx.array, padding: Sequence[int], length: int) -> mx.array:
    """Rows moved right by their padding, shape (rows, heads, capacity, dim); length is filled."""
    rows = []
    for row, shift in enumerate(padding):
        moved = state[row : row + 1, :, : length - shift]
        rows.append(mx.pad(moved, [(0, 0), (0, 0), (shift, 0), (0, 0)]) if shift else moved)
    return mx.concatenate(rows, axis=0)
