"""What sampling adds to a decode step. Run it as `python -m tests.benchmarks.sampling`.

Rows of one kind, then all kinds together, are sampled from logits as wide as SmolLM2's vocabulary. Shown:
CPU time of a step, and its ratio to a step of the same number of greedy rows, measured in turn with it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from osaurus_grpc.engine.sampling import BatchSampler, RowSampler
from osaurus_grpc.engine.types import SamplingParams
from osaurus_grpc.models.platform import mx

VOCAB = 49_152
_PROMPT = list(range(100, 356))
_STEPS = 20
_TURNS = 7

_GREEDY = SamplingParams(temperature=0.0)
_REPETITION = SamplingParams(temperature=0.0, repetition_penalty=1.1)
_COUNTED = SamplingParams(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.5)
_BIAS = SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(range(300), -1.0))
_NUCLEUS = SamplingParams(temperature=0.8, top_p=0.95, seed=1)

# Settings, and how many alternatives are reported.
KINDS: dict[str, list[tuple[SamplingParams, int | None]]] = {
    "greedy": [(_GREEDY, None)],
    "repetition penalty": [(_REPETITION, None)],
    "presence and frequency penalty": [(_COUNTED, None)],
    "bias of 300 tokens": [(_BIAS, None)],
    "log-probabilities, top 5": [(_GREEDY, 5)],
    "top_p": [(_NUCLEUS, None)],
    "each of these in turn": [
        (_GREEDY, None), (_REPETITION, None), (_COUNTED, None), (_BIAS, None), (_GREEDY, 5), (_NUCLEUS, None),
    ],
}  # fmt: skip


def stepper(kind: Sequence[tuple[SamplingParams, int | None]], rows: int) -> Callable[[], None]:
    """A function that runs a step of so many rows and reads what it gives."""
    samplers = [
        RowSampler(params, _PROMPT, (), top_logprobs=top, seed=i, vocab_size=VOCAB)
        for i, (params, top) in enumerate(kind[i % len(kind)] for i in range(rows))
    ]
    batch = BatchSampler()
    logits = (np.random.default_rng(0).standard_normal((rows, VOCAB)) * 3).astype(np.float32)
    fed = [5] * rows

    def step() -> None:
        nonlocal fed
        tokens, details = batch.sample(samplers, mx.array(fed), mx.array(logits))
        fed = tokens.tolist()
        for detail, token_id in zip(details, fed, strict=True):
            if detail is not None:
                detail.token(token_id)

    return step


def _cpu_ms(step: Callable[[], None]) -> float:
    started = time.process_time()
    for _ in range(_STEPS):
        step()
    return 1e3 * (time.process_time() - started) / _STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8, help="of the batch (default %(default)s)")
    rows = parser.parse_args().rows
    steppers = {name: stepper(kind, rows) for name, kind in KINDS.items()}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(_TURNS):
        for name, step in steppers.items():
            times[name].append(_cpu_ms(step))
    greedy = times["greedy"]
    print(f"| {rows} rows | CPU of a step (ms) | to greedy |\n|---|---|---|")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, greedy, strict=True))
        print(f"| {name} | {statistics.median(values):.2f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
