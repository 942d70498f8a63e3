"""What a row costs that joins or leaves a batch. Run it as `python -m tests.benchmarks.rows`.

Caches of SmolLM2-135M's shape with random contents, no model: a row joins others and leaves them
again, in mlx-lm's batch caches and in the engine's, in turns. Measured is CPU time, since what costs
is copying; the table shows medians.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import BatchKVCache, KVCache

from osaurus_grpc.engine import layers
from osaurus_grpc.engine.memory import spare_rows

_LAYERS, _HEADS, _DIM = 30, 3, 64


@dataclass(frozen=True, slots=True)
class Row:
    """CPU milliseconds with so many other rows."""

    others: int
    join: float
    leave: float
    mlx_join: float
    mlx_leave: float


def plain(tokens: int) -> list[KVCache]:
    """Caches of one row, one a layer."""
    caches = []
    for _ in range(_LAYERS):
        cache = KVCache()
        cache.update_and_fetch(*(mx.random.normal((1, _HEADS, tokens, _DIM)) for _ in range(2)))
        caches.append(cache)
    layers.evaluate(caches)
    return caches


def _seconds(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def _ours(others: Sequence[list[KVCache]], joiner: list[KVCache]) -> tuple[float, float]:
    """A row that joins a batch with a free seat, and the first row leaving it, whose seat the last takes."""
    batch = layers.merge(others, 1)
    count = len(others)
    layers.resize(batch, count + spare_rows(count + 1), batch[0].capacity)
    layers.evaluate(batch)

    def join() -> None:
        layers.join(batch, layers.as_batch(joiner), count + 1)
        layers.evaluate(batch)

    def leave() -> None:
        order = layers.arrangement(count + 1, [0])
        if count == 1:
            layers.evaluate(layers.as_single(batch, *order) or [])
        else:
            layers.leave(batch, order)
            layers.evaluate(batch)

    return _seconds(join), _seconds(leave)


def _mlx(others: Sequence[list[KVCache]], joiner: list[KVCache]) -> tuple[float, float]:
    batch = [BatchKVCache.merge(list(layer)) for layer in zip(*others, strict=True)]
    joining = [BatchKVCache.merge([cache]) for cache in joiner]
    layers.evaluate([*batch, *joining])

    def join() -> None:
        for cache, other in zip(batch, joining, strict=True):
            cache.extend(other)
        layers.evaluate(batch)

    def leave() -> None:
        for cache in batch:
            cache.filter(list(range(1, len(others) + 1)))
        layers.evaluate(batch)

    return _seconds(join), _seconds(leave)


def measure_one(others: int, tokens: int, turns: int) -> Row:
    """Medians over some turns, one uncounted before them."""
    rows = [plain(tokens - 8 * i) for i in range(others)]
    joiner = plain(tokens - 100)
    measured: list[tuple[float, ...]] = []
    for _ in range(turns + 1):
        measured.append((*_ours(rows, joiner), *_mlx(rows, joiner)))
    return Row(others, *(1000 * statistics.median(column) for column in zip(*measured[1:], strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    print("| rows there | join: mlx-lm / ours (CPU ms) | ratio | leave: mlx-lm / ours (CPU ms) | ratio |")
    print("|---|---|---|---|---|")
    for others in arguments.rows:
        row: Any = measure_one(others, arguments.tokens, arguments.turns)
        print(
            f"| {row.others} | {row.mlx_join:.1f} / {row.join:.1f} | {row.join / row.mlx_join:.2f} "
            f"| {row.mlx_leave:.1f} / {row.leave:.1f} | {row.leave / row.mlx_leave:.2f} |"
        )


if __name__ == "__main__":
    main()
