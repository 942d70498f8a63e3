"""What a decode step costs. Run it as `python -m tests.benchmarks.steps`.

The engine's batch against mlx-lm's BatchGenerator in one process, on the same prompts, greedy, in turns.
Measured is CPU time from the moment when all rows decode, so that what else the machine does weighs little.
"""

from __future__ import annotations

from tests.benchmarks.baseline import load  # isort: skip  # first: it loads the BLAS before MLX

import argparse
import statistics
import time
from typing import Any

from mlx_lm.generate import BatchGenerator

from osaurus_grpc.engine.batch import Batch
from osaurus_grpc.engine.sampling import RowSampler
from osaurus_grpc.engine.types import SamplingParams
from osaurus_grpc.models import cpu_kernels
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=int, default=25)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    path = default_models_dir() / MODEL
    model = load(path)
    cpu_kernels.install()
    print("| rows | BatchGenerator (CPU ms a step) | ours | ratio |")
    print("|---|---|---|---|")
    for rows in arguments.rows:
        measured = []
        for turn in range(arguments.turns):
            asked = token_ids(path, prompts(rows, turn))
            measured.append(
                (mlx_step(model, asked, arguments.tokens), engine_step(model, asked, arguments.tokens))
            )
        theirs, ours = (statistics.median(column) for column in zip(*measured, strict=True))
        ratio = statistics.median(own / other for other, own in measured)
        print(f"| {rows} | {1000 * theirs:.0f} | {1000 * ours:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
