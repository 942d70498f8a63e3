"""Serving against mlx-lm by itself. Run it as `python -m tests.benchmarks.serving`.

For each number of streams: mlx-lm alone (stream_generate for one, BatchGenerator for several), then
the product through gRPC and through HTTP, with the same prompts, greedy, again and again in turn;
the table shows medians and the median of the ratios taken turn by turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.load import Run, over_grpc, over_http
from tests.harness.processes import NO_LIMITS, core_process, rest_process

MODEL = "smollm2-135m-instruct"
SUBJECTS = (
    "a dragon who is afraid of the dark", "two sailors on a frozen sea", "a robot that learns to paint",
    "the last library on Earth", "a baker who talks to bread", "a lighthouse without a keeper",
    "a train that never stops", "a garden under the ocean", "a king who lost his name",
    "a clock that runs backwards", "a fox in the big city", "the first winter on Mars",
    "an island that moves", "a violin made of glass", "a mountain that hums", "a letter from the moon",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the turns of one number of streams."""

    streams: int
    baseline_tokens_per_second: float
    grpc_tokens_per_second: float
    http_tokens_per_second: float
    grpc_ratio: float
    http_ratio: float
    baseline_first_token_ms: float
    http_first_token_ms: float
    http_gap_ms: float
    http_gap_p95_ms: float


class Baseline:
    """The baseline process."""

    def __init__(self, model_path: Path) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.baseline", str(model_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._popen.stdout is not None
        if self._popen.stdout.readline().strip() != "ready":
            raise RuntimeError("the baseline did not start")

    def measure(self, prompts: list[list[int]], tokens: int) -> Run:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._popen.stdin.flush()
        result: dict[str, Any] = json.loads(self._popen.stdout.readline())
        return Run(result["seconds"], result["tokens"], result["first_token_seconds"], [])

    def close(self) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait(30)


def token_ids(model_path: Path, prompts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in prompts
    ]


def summary(streams: int, turns: list[tuple[Run, Run, Run]]) -> Row:
    def median(values: list[float]) -> float:
        return statistics.median(values) if values else 0.0

    gaps = sorted(gap for _, _, http in turns for gap in http.gap_seconds)
    return Row(
        streams=streams,
        baseline_tokens_per_second=median([b.tokens_per_second for b, _, _ in turns]),
        grpc_tokens_per_second=median([g.tokens_per_second for _, g, _ in turns]),
        http_tokens_per_second=median([h.tokens_per_second for _, _, h in turns]),
        grpc_ratio=median([g.tokens_per_second / b.tokens_per_second for b, g, _ in turns]),
        http_ratio=median([h.tokens_per_second / b.tokens_per_second for b, _, h in turns]),
        baseline_first_token_ms=1e3 * median([t for b, _, _ in turns for t in b.first_token_seconds]),
        http_first_token_ms=1e3 * median([t for _, _, h in turns for t in h.first_token_seconds]),
        http_gap_ms=1e3 * median(gaps),
        http_gap_p95_ms=1e3 * gaps[int(0.95 * len(gaps))] if gaps else 0.0,
    )


async def measure(models_dir: Path, streams: list[int], tokens: int, turns: int) -> list[Row]:
    rows: list[Row] = []
    # Every turn asks the same again: with the prompt cache on, it would be the cache that is measured.
    flags = (*NO_LIMITS, "--preload-model", MODEL, "--prompt-cache-bytes", "0")
    with core_process(models_dir, *flags) as core, rest_process(core.address) as rest:
        baseline = Baseline(models_dir / MODEL)
        try:
            for count in streams:
                prompts = [f"Write a long story about {SUBJECTS[i % len(SUBJECTS)]}." for i in range(count)]
                ids = token_ids(models_dir / MODEL, prompts)
                results: list[tuple[Run, Run, Run]] = []
                for turn in range(turns + 1):
                    result = (
                        baseline.measure(ids, tokens),
                        await over_grpc(core.address, MODEL, prompts, tokens),
                        await over_http(rest.url, MODEL, prompts, tokens),
                    )
                    if turn:  # the first warms caches and kernels
                        results.append(result)
                rows.append(summary(count, results))
                print(json.dumps(asdict(rows[-1])), file=sys.stderr, flush=True)
        finally:
            baseline.close()
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "| streams | mlx-lm tok/s | gRPC tok/s (ratio) | HTTP tok/s (ratio) | first token mlx-lm / HTTP (ms) "
        "| between tokens, median / p95 (ms) |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.streams} | {r.baseline_tokens_per_second:.1f} "
        f"| {r.grpc_tokens_per_second:.1f} ({r.grpc_ratio:.2f}) "
        f"| {r.http_tokens_per_second:.1f} ({r.http_ratio:.2f}) "
        f"| {r.baseline_first_token_ms:.0f} / {r.http_first_token_ms:.0f} "
        f"| {r.http_gap_ms:.0f} / {r.http_gap_p95_ms:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    from osaurus_grpc.models.sources import fetch

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models-dir", type=Path, default=Path("~/.cache/osaurus-tests/models").expanduser())
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    options.models_dir.mkdir(parents=True, exist_ok=True)
    fetch(MODEL, options.models_dir, report=lambda progress: None)
    rows = asyncio.run(measure(options.models_dir, options.streams, options.tokens, options.turns))
    print(table(rows))


if __name__ == "__main__":
    main()
