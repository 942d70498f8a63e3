"""Throughput: streams side by side against mlx-lm. Run it as `python -m tests.benchmarks.serving`.

For each number of streams, and for greedy and mixed samplers: mlx-lm by itself (stream_generate for
one stream, BatchGenerator for several), then the product through gRPC and HTTP, then mlx_lm.server,
with the same prompts, again and again in turn. The table shows medians of the ratios taken turn by
turn: ours to BatchGenerator, and ours through HTTP to mlx_lm.server.
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

from tests.benchmarks import plots
from tests.benchmarks.load import Run, Sampler, over_grpc, over_http, samplers
from tests.benchmarks.peer import mlx_lm_server
from tests.benchmarks.subjects import (
    MODEL,
    default_models_dir,
    float32_copy,
    prompts,
    stock_environment,
    token_ids,
)
from tests.harness.processes import NO_LIMITS, core_process, rest_process


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the turns of one number of streams."""

    streams: int
    mixed: bool
    baseline_tokens_per_second: float
    grpc_tokens_per_second: float
    http_tokens_per_second: float
    peer_tokens_per_second: float
    grpc_ratio: float
    http_ratio: float
    peer_ratio: float
    baseline_first_token_ms: float
    http_first_token_ms: float
    peer_first_token_ms: float
    http_gap_ms: float
    http_gap_p95_ms: float


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn's runs."""

    baseline: Run
    grpc: Run
    http: Run
    peer: Run


class Baseline:
    """The baseline process."""

    def __init__(self, model_path: Path) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.baseline", str(model_path)],
            env=stock_environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._popen.stdout is not None
        if self._popen.stdout.readline().strip() != "ready":
            raise RuntimeError("the baseline did not start")

    def measure(self, prompts: list[list[int]], tokens: int, settings: list[Sampler]) -> Run:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        asked = {
            "prompts": prompts,
            "tokens": tokens,
            "samplers": [
                {"temp": s.temperature, "top_p": s.top_p, "top_k": s.top_k, "min_p": s.min_p}
                for s in settings
            ],
        }
        self._popen.stdin.write(json.dumps(asked) + "\n")
        self._popen.stdin.flush()
        result: dict[str, Any] = json.loads(self._popen.stdout.readline())
        return Run(result["seconds"], result["tokens"], result["first_token_seconds"], [])

    def close(self) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait(30)


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def summary(streams: int, turns: list[Turn], *, mixed: bool) -> Row:
    gaps = sorted(gap for turn in turns for gap in turn.http.gap_seconds)
    return Row(
        streams=streams,
        mixed=mixed,
        baseline_tokens_per_second=_median([t.baseline.tokens_per_second for t in turns]),
        grpc_tokens_per_second=_median([t.grpc.tokens_per_second for t in turns]),
        http_tokens_per_second=_median([t.http.tokens_per_second for t in turns]),
        peer_tokens_per_second=_median([t.peer.tokens_per_second for t in turns]),
        grpc_ratio=_median([t.grpc.tokens_per_second / t.baseline.tokens_per_second for t in turns]),
        http_ratio=_median([t.http.tokens_per_second / t.baseline.tokens_per_second for t in turns]),
        peer_ratio=_median([t.http.tokens_per_second / t.peer.tokens_per_second for t in turns]),
        baseline_first_token_ms=1e3 * _median([s for t in turns for s in t.baseline.first_token_seconds]),
        http_first_token_ms=1e3 * _median([s for t in turns for s in t.http.first_token_seconds]),
        peer_first_token_ms=1e3 * _median([s for t in turns for s in t.peer.first_token_seconds]),
        http_gap_ms=1e3 * _median(gaps),
        http_gap_p95_ms=1e3 * gaps[int(0.95 * len(gaps))] if gaps else 0.0,
    )


async def measure(streams: list[int], tokens: int, turns: int) -> list[Row]:
    models_dir = default_models_dir()
    copy = float32_copy(models_dir)
    rows: list[Row] = []
    # What is measured is decoding; turns.py measures what the prompt cache is worth.
    flags = (*NO_LIMITS, "--preload-model", MODEL, "--prompt-cache-bytes", "0")
    with (
        core_process(models_dir, *flags) as core,
        rest_process(core.address) as rest,
        mlx_lm_server(copy) as peer,
    ):
        baseline = Baseline(models_dir / MODEL)
        try:
            for mixed in (False, True):
                for count in streams:
                    if mixed and count == 1:
                        continue  # one row mixes with nothing
                    results: list[Turn] = []
                    for turn in range(turns + 1):
                        settings = samplers(count, mixed=mixed)
                        asked = prompts(count, turn)
                        ids = token_ids(models_dir / MODEL, asked)
                        result = Turn(
                            baseline.measure(ids, tokens, settings),
                            await over_grpc(core.address, MODEL, asked, tokens, settings),
                            await over_http(rest.url, MODEL, asked, tokens, settings),
                            await over_http(peer, str(copy), asked, tokens, settings),
                        )
                        if turn:  # the first warms caches and kernels
                            results.append(result)
                    rows.append(summary(count, results, mixed=mixed))
                    print(json.dumps(asdict(rows[-1])), file=sys.stderr, flush=True)
        finally:
            baseline.close()
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "| streams | samplers | mlx-lm tok/s | gRPC tok/s (ratio) | HTTP tok/s (ratio) "
        "| mlx_lm.server tok/s | ours / mlx_lm.server | first token mlx-lm / ours / mlx_lm.server (ms) "
        "| between tokens, median / p95 (ms) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.streams} | {'mixed' if r.mixed else 'greedy'} | {r.baseline_tokens_per_second:.1f} "
        f"| {r.grpc_tokens_per_second:.1f} ({r.grpc_ratio:.2f}) "
        f"| {r.http_tokens_per_second:.1f} ({r.http_ratio:.2f}) "
        f"| {r.peer_tokens_per_second:.1f} | {r.peer_ratio:.2f} "
        f"| {r.baseline_first_token_ms:.0f} / {r.http_first_token_ms:.0f} / {r.peer_first_token_ms:.0f} "
        f"| {r.http_gap_ms:.0f} / {r.http_gap_p95_ms:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def plot(rows: list[Row], folder: Path) -> None:
    for mixed in (False, True):
        chosen = [r for r in rows if r.mixed == mixed]
        if not chosen:
            continue
        kind = "mixed" if mixed else "greedy"
        plots.lines(
            folder / f"throughput-{kind}.png",
            title=f"Aggregate throughput, {kind} samplers",
            x=("streams", [r.streams for r in chosen]),
            y="tokens/s",
            series={
                "mlx-lm in process": [r.baseline_tokens_per_second for r in chosen],
                "ours, gRPC": [r.grpc_tokens_per_second for r in chosen],
                "ours, HTTP": [r.http_tokens_per_second for r in chosen],
                "mlx_lm.server": [r.peer_tokens_per_second for r in chosen],
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--plots", type=Path, default=plots.PLOTS)
    options = parser.parse_args()
    rows = asyncio.run(measure(options.streams, options.tokens, options.turns))
    plot(rows, options.plots)
    print(table(rows))


if __name__ == "__main__":
    main()
