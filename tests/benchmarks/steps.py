"""What a decode step costs. Run it as `python -m tests.benchmarks.steps`.

The engine's batch against mlx-lm's BatchGenerator in one process, on the same prompts, greedy, in turns.
Measured is CPU time from the moment when all rows decode, so that what else the machine does weighs little.
The engine's is measured with the weights read as they were published (models/short_weights.py), and as
float32 like mlx-lm's.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import blas, mx, plan_weights  # isort: skip  # first: it loads the BLAS

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import dequantize_model, load_model

from osaurus_grpc.engine.batch import Batch
from osaurus_grpc.engine.sampling import RowSampler
from osaurus_grpc.engine.types import SamplingParams
from osaurus_grpc.models import cpu_kernels
from osaurus_grpc.models.short_weights import ShortWeights, matrices, quantized_modules
from tests.benchmarks.subjects import MODEL, default_models_dir, prompts, token_ids

_GREEDY = SamplingParams(temperature=0.0)
_ALL_PROMPTS = 2**20


def engine_step(model: Any, asked: list[list[int]], tokens: int) -> float:
    """CPU seconds of a step of the engine's batch."""
    batch = Batch(model, (), len(asked))
    try:
        for prompt in asked:
            sampler = RowSampler(
                _GREEDY, prompt, (), top_logprobs=None, seed=0, vocab_size=model.args.vocab_size
            )
            batch.insert(prompt, tokens, sampler)
        while batch.decoding < len(asked):
            batch.step(_ALL_PROMPTS)
        batch.step(1)
        started, steps = time.process_time(), 0
        while len(batch):
            batch.step(1)
            steps += 1
        return (time.process_time() - started) / steps
    finally:
        batch.close()


def mlx_step(model: Any, asked: list[list[int]], tokens: int) -> float:
    """CPU seconds of a step of BatchGenerator, on the same attention, SwiGLU and products of few rows."""
    generator = BatchGenerator(model, max_tokens=tokens, stop_tokens=None)
    try:
        left = set(generator.insert(asked))
        decoding: set[int] = set()
        while len(decoding) < len(asked):
            decoding.update(response.uid for response in generator.next_generated())
        started, steps = time.process_time(), 0
        while left:
            done = {r.uid for r in generator.next_generated() if r.finish_reason is not None}
            left -= done
            steps += 1
        return (time.process_time() - started) / steps
    finally:
        generator.close()


class Weights:
    """A model, and what its float32 weights were made of."""

    def __init__(self, path: Path) -> None:
        self.model, _ = load_model(path, lazy=True)
        plan = plan_weights(1, "auto")
        if plan.dtype is not None:
            self.model.set_dtype(plan.dtype)
        self._quantized = quantized_modules(self.model)
        if plan.is_dequantized:
            self.model = dequantize_model(self.model)
        mx.eval(self.model.parameters())
        self._held = ShortWeights(blas.kernels) if blas.kernels is not None else None

    def read_short(self) -> None:
        """From now on, where that can be."""
        if self._held is not None:
            for path, weight in matrices(self.model):
                self._held.add(weight, self._quantized.get(path))

    def read_float32(self) -> None:
        """From now on."""
        if self._held is not None:
            self._held.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=int, default=25)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    path = default_models_dir() / MODEL
    weights = Weights(path)
    cpu_kernels.install()
    print(
        "| rows | BatchGenerator (CPU ms a step) | ours, float32 weights | ours | ratios to BatchGenerator |"
    )
    print("|---|---|---|---|---|")
    for rows in arguments.rows:
        measured = []
        for turn in range(arguments.turns):
            asked = token_ids(path, prompts(rows, turn))
            weights.read_float32()
            theirs = mlx_step(weights.model, asked, arguments.tokens)
            wide = engine_step(weights.model, asked, arguments.tokens)
            weights.read_short()
            measured.append((theirs, wide, engine_step(weights.model, asked, arguments.tokens)))
        theirs, wide, ours = (statistics.median(column) for column in zip(*measured, strict=True))
        ratios = [statistics.median(each[i] / each[0] for each in measured) for i in (1, 2)]
        print(
            f"| {rows} | {1000 * theirs:.0f} | {1000 * wide:.0f} | {1000 * ours:.0f} | "
            f"{ratios[0]:.2f}, {ratios[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
