"""Memory of idle sessions and of running requests. Run it as `python -m tests.benchmarks.memory`.

The arithmetic minimum of a request is its tokens times the bytes of their keys and values (2 × layers
× KV heads × head dimension × bytes of an element). Measured is what the core's resident set grows by
for each request that runs, and for each session that is idle afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from osaurus_grpc.v1 import chat_pb2, inference_service_pb2_grpc, sampling_pb2
from tests.benchmarks import plots
from tests.benchmarks.subjects import MODEL, default_models_dir
from tests.harness.processes import NO_LIMITS, Process, core_process

_MIB = 2**20
_FLOAT32_BYTES = 4
_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Row:
    """Bytes for each of so many requests."""

    requests: int
    tokens: int
    minimum: float
    running: float
    idle: float


def token_bytes(model_folder: Path) -> int:
    """Bytes of one token's keys and values."""
    config = json.loads((model_folder / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * _FLOAT32_BYTES)


def _resident(core: Process) -> int:
    return int(psutil.Process(core.popen.pid).memory_info().rss)


async def measure_one(count: int, words: int, tokens: int) -> Row:
    models_dir = default_models_dir()
    flags = (*NO_LIMITS, "--preload-model", MODEL, "--max-batch-size", str(count))
    with core_process(models_dir, *flags) as core:
        async with grpc.aio.insecure_channel(core.address) as channel:
            stub = inference_service_pb2_grpc.InferenceServiceStub(channel)

            async def one(number: int, size: int) -> int:
                text = f"Tale {number}: " + f"word{number} " * size
                message = chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=text)])
                sampling = sampling_pb2.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
                answer = await stub.Chat(
                    chat_pb2.ChatRequest(
                        model=MODEL, messages=[message], sampling=sampling, session_id=f"session-{number}"
                    ),
                    timeout=900,
                )
                return int(answer.usage.prompt_tokens + answer.usage.completion_tokens)

            await one(10_000, 4)
            base = peak = _resident(core)
            work = asyncio.gather(*(one(i, words) for i in range(count)))
            while not work.done():
                await asyncio.wait([work], timeout=_SAMPLE_SECONDS)
                peak = max(peak, _resident(core))
            sizes = await work
            await asyncio.sleep(1.0)
            idle = _resident(core)
    total = sum(sizes)
    return Row(
        requests=count,
        tokens=total // count,
        minimum=total * token_bytes(models_dir / MODEL) / count,
        running=(peak - base) / count,
        idle=(idle - base) / count,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--words", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--plots", type=Path, default=plots.PLOTS)
    options = parser.parse_args()
    rows = [asyncio.run(measure_one(n, options.words, options.tokens)) for n in options.requests]
    print(
        "| requests at once | tokens each | minimum each (MiB) | running, each (MiB) "
        "| idle session, each (MiB) |"
        "\n|---|---|---|---|---|"
    )
    for r in rows:
        print(
            f"| {r.requests} | {r.tokens} | {r.minimum / _MIB:.1f} "
            f"| {r.running / _MIB:.1f} ({r.running / r.minimum:.1f}×) "
            f"| {r.idle / _MIB:.1f} ({r.idle / r.minimum:.1f}×) |"
        )
    plots.bars(
        options.plots / "memory.png",
        title="Memory of a request",
        y="MiB each",
        groups={
            f"{r.requests} × {r.tokens} tokens": {
                "arithmetic minimum": r.minimum / _MIB,
                "running": r.running / _MIB,
                "idle session": r.idle / _MIB,
            }
            for r in rows
        },
    )


if __name__ == "__main__":
    main()
