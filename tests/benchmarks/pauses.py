"""Pauses of running streams while a long prompt arrives. Run it as `python -m tests.benchmarks.pauses`.

Four streams decode; then a prompt of about 4,000 tokens joins. Shown: the time between two tokens of
a running stream before it came and while it is prefilled, in decode steps, and what the prefill takes
beside the streams, alone, and alone in one chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from osaurus_grpc.v1 import chat_pb2, inference_service_pb2_grpc, sampling_pb2
from tests.benchmarks import plots
from tests.benchmarks.subjects import MODEL, default_models_dir, prompts
from tests.harness.processes import NO_LIMITS, core_process

_STREAMS = 4
_SETTLE_TOKENS = 30


@dataclass(slots=True)
class Stream:
    """When the content events of one stream came."""

    times: list[float] = field(default_factory=list)
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    def content(self) -> None:
        """A content event came."""
        self.times.append(time.perf_counter())
        if len(self.times) >= _SETTLE_TOKENS:
            self.settled.set()

    def gaps(self, since: float, until: float) -> list[float]:
        """Seconds between neighbouring events of a period."""
        inside = [t for t in self.times if since <= t <= until]
        return [b - a for a, b in itertools.pairwise(inside)]


def _request(prompt: str, max_tokens: int) -> chat_pb2.ChatStreamRequest:
    message = chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=prompt)])
    sampling = sampling_pb2.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return chat_pb2.ChatStreamRequest(
        chat=chat_pb2.ChatRequest(model=MODEL, messages=[message], sampling=sampling)
    )


async def _read(
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub,
    request: chat_pb2.ChatStreamRequest,
    to: Stream,
) -> None:
    call = stub.ChatStream(request, timeout=900)
    try:
        async for event in call:
            if event.HasField("content"):
                to.content()
    finally:
        call.cancel()


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds; gaps of all streams together."""

    before: list[float]
    during: list[float]
    prefill: float
    prefill_alone: float


def _long_prompt(words: int, salt: str) -> str:
    return f"{salt}. " + "The quick brown fox jumps over the lazy dog. " * (words // 9)


async def _first_token(
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub, prompt: str
) -> tuple[float, float]:
    """When it was asked and when its first token came."""
    stream = Stream()
    started = time.perf_counter()
    await _read(stub, _request(prompt, 1), stream)
    return started, stream.times[0]


async def measure_one(flags: tuple[str, ...], words: int, *, alone_only: bool = False) -> Result:
    with core_process(
        default_models_dir(), *NO_LIMITS, "--preload-model", MODEL, "--prompt-cache-bytes", "0", *flags
    ) as core:
        async with grpc.aio.insecure_channel(core.address) as channel:
            stub: inference_service_pb2_grpc.InferenceServiceAsyncStub = (
                inference_service_pb2_grpc.InferenceServiceStub(channel)
            )
            await _first_token(stub, "Warm up.")
            started, first = await _first_token(stub, _long_prompt(words, "Alone"))
            if alone_only:
                return Result([], [], 0.0, first - started)
            streams = [Stream() for _ in range(_STREAMS)]
            tasks = [
                asyncio.create_task(_read(stub, _request(prompt, 4000), stream))
                for prompt, stream in zip(prompts(_STREAMS, 0), streams, strict=True)
            ]
            try:
                await asyncio.gather(*(stream.settled.wait() for stream in streams))
                settled = max(s.times[3] for s in streams)
                arrived, prefilled = await _first_token(stub, _long_prompt(words, "Beside others"))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    return Result(
        before=[g for s in streams for g in s.gaps(settled, arrived)],
        during=[g for s in streams for g in s.gaps(arrived, prefilled)],
        prefill=prefilled - arrived,
        prefill_alone=first - started,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--words", type=int, default=3600, help="of the long prompt (default %(default)s)")
    parser.add_argument("--plots", type=Path, default=plots.PLOTS)
    options = parser.parse_args()
    result = asyncio.run(measure_one((), options.words))
    whole = asyncio.run(
        measure_one(("--prefill-chunk-tokens", "8192"), options.words, alone_only=True)
    ).prefill_alone
    step = statistics.median(result.before)
    during = sorted(result.during)
    p95 = during[int(0.95 * len(during))]
    print(
        "| decode step before (ms) | pause while prefilling, median / p95 / longest (ms) | in decode steps "
        "| prefill beside streams / alone / alone in one chunk (s) |\n|---|---|---|---|\n"
        f"| {1e3 * step:.0f} "
        f"| {1e3 * statistics.median(during):.0f} / {1e3 * p95:.0f} / {1e3 * during[-1]:.0f} "
        f"| {statistics.median(during) / step:.1f} / {p95 / step:.1f} / {during[-1] / step:.1f} "
        f"| {result.prefill:.1f} / {result.prefill_alone:.1f} / {whole:.1f} |"
    )
    plots.lines(
        options.plots / "pauses.png",
        title="Time between tokens of running streams",
        x=("percentile", list(range(0, 101, 5))),
        y="milliseconds",
        series={
            "before": _percentiles(result.before),
            "while a 4k prompt is prefilled": _percentiles(result.during),
        },
    )


def _percentiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [1e3 * ordered[min(len(ordered) - 1, p * len(ordered) // 100)] for p in range(0, 101, 5)]


if __name__ == "__main__":
    main()
