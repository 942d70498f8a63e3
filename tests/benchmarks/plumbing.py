"""Plumbing alone: what an event costs. Run it as `python -m tests.benchmarks.plumbing`.

Streams of a tiny random-weight model, so that the model costs next to nothing: events a second at the
client, and the CPU time an event takes in the core and in the shim, through gRPC and through SSE.
The core's share holds the tiny model's step; its row "engine" is that step alone, in process.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmarks import plots
from tests.benchmarks.load import GREEDY, Run, over_grpc, over_http
from tests.benchmarks.subjects import MODEL, default_models_dir, prompts
from tests.harness import tiny
from tests.harness.processes import NO_LIMITS, Process, core_process, rest_process

_TINY = "tiny-llama"


@dataclass(frozen=True, slots=True)
class Row:
    """One way in."""

    way: str
    events_per_second: float
    tokens_per_second: float
    core_us: float
    shim_us: float
    client_us: float


def _cpu(process: Process) -> float:
    times = psutil.Process(process.popen.pid).cpu_times()
    return times.user + times.system


async def _engine(models_dir: Path, streams: int, tokens: int) -> tuple[int, float]:
    """Tokens, and CPU seconds, of the engine without a server around it."""
    from osaurus_grpc.engine.engine import Engine
    from osaurus_grpc.engine.types import GenerationRequest, SamplingParams, TokensGenerated
    from osaurus_grpc.models.catalog import Catalog
    from osaurus_grpc.models.residency import Residency

    engine = Engine(max_batch_size=streams, max_waiting_requests=streams, prefill_chunk_tokens=512)
    await engine.start()
    residency = Residency(engine, max_loaded_models=1, keep_alive_seconds=-1, dtype="auto")
    try:
        entry = Catalog(models_dir).find(_TINY)
        async with residency.lease(entry) as lease:

            async def one(number: int) -> int:
                prompt = tuple(range(100 + number, 140 + number))
                request = GenerationRequest(
                    f"{number}", entry.id, prompt, tokens, SamplingParams(temperature=0.0), ignore_eos=True
                )
                return sum(
                    [len(e.tokens) async for e in engine.generate(request) if isinstance(e, TokensGenerated)]
                )

            assert lease.model
            await asyncio.gather(*(one(i) for i in range(streams)))
            before = time.process_time()
            counts = await asyncio.gather(*(one(i) for i in range(streams)))
            return sum(counts), time.process_time() - before
    finally:
        await residency.close()
        await engine.stop()


async def measure(streams: int, tokens: int) -> list[Row]:
    source = default_models_dir() / MODEL
    with tempfile.TemporaryDirectory() as folder:
        models_dir = Path(folder)
        tiny.build(models_dir / _TINY, source, vocab_size=None)
        flags = (*NO_LIMITS, "--preload-model", _TINY, "--max-batch-size", str(streams))
        count, seconds = await _engine(models_dir, streams, tokens)
        rows = [Row("engine", 0.0, 0.0, 1e6 * seconds / count, 0.0, 0.0)]
        with core_process(models_dir, *flags) as core, rest_process(core.address) as rest:

            async def one(way: str) -> tuple[Run, float, float, float]:
                before = _cpu(core), _cpu(rest), time.process_time()
                asked, settings = prompts(streams, 0), [GREEDY] * streams
                if way == "gRPC":
                    run = await over_grpc(core.address, _TINY, asked, tokens, settings)
                else:
                    run = await over_http(rest.url, _TINY, asked, tokens, settings)
                return run, _cpu(core) - before[0], _cpu(rest) - before[1], time.process_time() - before[2]

            for way in ("gRPC", "SSE"):
                await one(way)  # warms caches
                run, in_core, in_shim, in_client = await one(way)
                rows.append(
                    Row(
                        way,
                        run.events / run.seconds,
                        run.tokens_per_second,
                        1e6 * in_core / run.events,
                        1e6 * in_shim / run.events,
                        1e6 * in_client / run.events,
                    )
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--plots", type=Path, default=plots.PLOTS)
    options = parser.parse_args()
    rows = asyncio.run(measure(options.streams, options.tokens))
    print("| way | events/s | tokens/s | CPU an event: core / shim / client (µs) |\n|---|---|---|---|")
    for r in rows:
        rates = f"{r.events_per_second:.0f} | {r.tokens_per_second:.0f}" if r.events_per_second else "– | –"
        print(f"| {r.way} | {rates} | {r.core_us:.0f} / {r.shim_us:.0f} / {r.client_us:.0f} |")
    plots.bars(
        options.plots / "plumbing.png",
        title=f"CPU time an event, {options.streams} streams of a tiny model",
        y="microseconds",
        groups={r.way: {"core": r.core_us, "shim": r.shim_us, "client": r.client_us} for r in rows},
    )


if __name__ == "__main__":
    main()
