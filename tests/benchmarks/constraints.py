"""What constrained decoding costs. Run it as `python -m tests.benchmarks.constraints`.

Eight greedy streams through gRPC, all free, half of them held to a JSON schema, and all of them, in
turn. The constrained rows write a list of objects that never ends within their tokens, so every run
generates the same number of tokens; a row of free streams with the same prompts is the baseline.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from osaurus_grpc.v1 import chat_pb2, inference_service_pb2_grpc, sampling_pb2
from tests.benchmarks import plots
from tests.benchmarks.subjects import MODEL, default_models_dir, prompts
from tests.harness.processes import NO_LIMITS, core_process

_STREAMS = 8
_ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "kind": {"enum": ["person", "place", "thing"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}
_SCHEMA = json.dumps({"type": "array", "items": _ITEM, "minItems": 200})


@dataclass(frozen=True, slots=True)
class Run:
    """One run: tokens, seconds, and the core's CPU seconds."""

    tokens: int
    seconds: float
    cpu_seconds: float


def _request(prompt: str, tokens: int, *, is_constrained: bool) -> chat_pb2.ChatRequest:
    request = chat_pb2.ChatRequest(
        model=MODEL,
        messages=[chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=prompt)])],
        sampling=sampling_pb2.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
    )
    if is_constrained:
        request.response_format.json_schema.schema_json = _SCHEMA
    return request


async def measure(turns: int, tokens: int) -> dict[int, list[Run]]:
    """Runs by the number of constrained streams."""
    found: dict[int, list[Run]] = {0: [], _STREAMS // 2: [], _STREAMS: []}
    flags = (*NO_LIMITS, "--preload-model", MODEL, "--prompt-cache-bytes", "0")
    with core_process(default_models_dir(), *flags) as core:
        process = psutil.Process(core.popen.pid)
        async with grpc.aio.insecure_channel(core.address) as channel:
            stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
            for turn in range(turns + 1):
                for constrained, runs in found.items():
                    requests = [
                        _request(prompt, tokens, is_constrained=i < constrained)
                        for i, prompt in enumerate(prompts(_STREAMS, turn))
                    ]
                    before, started = process.cpu_times(), time.perf_counter()
                    answers = await asyncio.gather(*(stub.Chat(each, timeout=600) for each in requests))
                    seconds, after = time.perf_counter() - started, process.cpu_times()
                    cpu = after.user + after.system - before.user - before.system
                    if turn:  # the first compiles the grammar and warms the kernels
                        runs.append(Run(sum(a.usage.completion_tokens for a in answers), seconds, cpu))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--plots", type=Path, default=plots.PLOTS)
    options = parser.parse_args()
    found = asyncio.run(measure(options.turns, options.tokens))
    free = found[0]
    print("| constrained of 8 | tokens/s | ratio to free | CPU time, ratio to free |\n|---|---|---|---|")
    ratios: dict[str, dict[str, float]] = {}
    for constrained, runs in found.items():
        speed = statistics.median(run.tokens / run.seconds for run in runs)
        ratio = statistics.median(
            (a.tokens / a.seconds) / (b.tokens / b.seconds) for a, b in zip(runs, free, strict=True)
        )
        cpu = statistics.median(
            (a.cpu_seconds / a.tokens) / (b.cpu_seconds / b.tokens) for a, b in zip(runs, free, strict=True)
        )
        print(f"| {constrained} | {speed:.1f} | {ratio:.3f} | {cpu:.3f} |")
        ratios[f"{constrained} of 8"] = {"throughput": ratio, "CPU time": cpu}
    plots.bars(
        options.plots / "constraints.png",
        title="Constrained decoding, ratio to eight free streams",
        y="ratio",
        groups=ratios,
    )


if __name__ == "__main__":
    main()
