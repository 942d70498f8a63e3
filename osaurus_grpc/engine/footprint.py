"""What a sequence's KV caches take, read off the caches that the model itself makes."""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Iterable, Iterator
from typing import Any

from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, RotatingKVCache, make_prompt_cache

from osaurus_grpc.engine.memory import KVFootprint


def measure(model: Any) -> KVFootprint:
    """The footprint of an mlx-lm model's sequences. On the MLX thread.

    One token is run through the model without being evaluated: the shapes and dtypes of all caches
    are known then, whatever the architecture, and nothing is computed.
    """
    caches = make_prompt_cache(model)
    model(mx.array([[0]]), cache=caches)
    token_bytes = state_bytes = 0
    windows: dict[int, int] = {}
    for cache in _leaves(caches):
        match cache:
            case ArraysCache():
                state_bytes += _nbytes(cache.state)
            case RotatingKVCache():
                windows[cache.max_size] = windows.get(cache.max_size, 0) + _token_bytes(cache)
            case _:
                token_bytes += _token_bytes(cache)
    return KVFootprint(token_bytes, tuple(sorted(windows.items())), state_bytes)


def _leaves(caches: Iterable[Any]) -> Iterator[Any]:
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from _leaves(cache.caches)
        else:
            yield cache


def _nbytes(state: Any) -> int:
    # MLX's stub leaves open what the flattened tree is.
    leaves: Any = tree_flatten(state)
    return sum(int(array.nbytes) for _, array in leaves if isinstance(array, mx.array))


def _token_bytes(cache: Any) -> int:
    """Of each token in a cache of keys and values, whose third axis are the tokens."""
    if cache.keys is None:
        return 0
    return sum(int(array.nbytes) // int(array.shape[2]) for array in (cache.keys, cache.values))
