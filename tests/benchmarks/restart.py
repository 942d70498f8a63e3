"""First tokens after a restart. Run it as `python -m tests.benchmarks.restart`.

System prompts of about 1,000, 2,000 and 4,000 tokens, each asked a question on a core that does not
know it (cold) and another one on the same core (warm). The core is stopped and started anew over the
same `--prompt-cache-dir`, and asked a third question (restarted). Shown are medians over rounds of
other texts: seconds to the first token, the core's CPU seconds until then, which other programs on
the machine disturb less, their ratios to cold within a round, and how many tokens were found.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from osaurus_grpc.v1 import chat_pb2, inference_service_pb2_grpc, sampling_pb2
from tests.benchmarks import plots
from tests.benchmarks.subjects import MODEL, default_models_dir
from tests.harness.processes import NO_LIMITS, Process, core_process

_SETTLE_SECONDS = 1.0
# Of _system(): what a line comes to.
_LINE_TOKENS = 19
_SUBJECTS = ("tides", "whales", "harbours", "sails", "lanterns", "charts", "anchors", "gulls")
_QUESTIONS = {"cold": "Who are you?", "warm": "What do you know?", "restarted": "What is rule number seven?"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A first token.

    Attributes:
        seconds: Until it came.
        cpu_seconds: Of the core until then.
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Of these, those that were found.
    """

    seconds: float
    cpu_seconds: float
    prompt_tokens: int
    cached_tokens: int


def _system(tokens: int, number: int) -> str:
    """A system prompt of about so many tokens, another one for each number."""
    lines = [
        f"Rule {i}: in case {number} of the {_SUBJECTS[(i * number + i) % 8]} keep the answer short and kind."
        for i in range(tokens // _LINE_TOKENS)
    ]
    return "\n".join(lines)


def _cpu_seconds(core: Process) -> float:
    times = psutil.Process(core.popen.pid).cpu_times()
    return float(times.user + times.system)


async def _ask(core: Process, system: str, question: str) -> Answer:
    messages = [
        chat_pb2.Message(role=role, content=[chat_pb2.ContentPart(text=text)])
        for role, text in ((chat_pb2.ROLE_SYSTEM, system), (chat_pb2.ROLE_USER, question))
    ]
    sampling = sampling_pb2.SamplingParams(temperature=0.0, max_tokens=1)
    request = chat_pb2.ChatRequest(model=MODEL, messages=messages, sampling=sampling)
    async with grpc.aio.insecure_channel(core.address) as channel:
        stub: inference_service_pb2_grpc.InferenceServiceAsyncStub = (
            inference_service_pb2_grpc.InferenceServiceStub(channel)
        )
        await channel.channel_ready()
        before, started = _cpu_seconds(core), time.perf_counter()
        response = await stub.Chat(request, timeout=300)
        answer = Answer(
            time.perf_counter() - started,
            _cpu_seconds(core) - before,
            response.usage.prompt_tokens,
            response.usage.cached_prompt_tokens,
        )
    await _settle(core)
    return answer


async def _settle(core: Process) -> None:
    """Wait until a core has done what it does after an answer, writing files among it."""
    while True:
        before = _cpu_seconds(core)
        await asyncio.sleep(_SETTLE_SECONDS)
        if _cpu_seconds(core) - before < 0.05 * _SETTLE_SECONDS:
            return


async def _warm_up(core: Process) -> None:
    """Have everything done once that a device does only once."""
    for question in ("Warm up.", "Once more."):
        await _ask(core, _system(300, 99), question)


async def _round(number: int, sizes: Sequence[int], flags: tuple[str, ...]) -> dict[int, dict[str, Answer]]:
    """One text of each size: answers by size and state."""
    answers: dict[int, dict[str, Answer]] = {size: {} for size in sizes}
    with tempfile.TemporaryDirectory(prefix="osaurus-restart-") as directory:
        for states in (("cold", "warm"), ("restarted",)):
            all_flags = (*NO_LIMITS, "--preload-model", MODEL, "--prompt-cache-dir", directory, *flags)
            with core_process(default_models_dir(), *all_flags) as core:
                await _warm_up(core)
                for state in states:
                    for i, size in enumerate(sizes):
                        system = _system(size, number * len(sizes) + i)
                        answers[size][state] = await _ask(core, system, _QUESTIONS[state])
    return answers


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the rounds, in one state of one size.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Of these, those that were found.
        seconds: To the first token.
        cpu_seconds: Of the core until then.
        ratio: Of the seconds to those of the same round's cold answer.
        cpu_ratio: The same of CPU seconds.
    """

    prompt_tokens: int
    cached_tokens: int
    seconds: float
    cpu_seconds: float
    ratio: float
    cpu_ratio: float


def _row(rounds: Sequence[dict[str, Answer]], state: str) -> Row:
    answers = [answers[state] for answers in rounds]
    return Row(
        prompt_tokens=answers[0].prompt_tokens,
        cached_tokens=min(answer.cached_tokens for answer in answers),
        seconds=statistics.median(answer.seconds for answer in answers),
        cpu_seconds=statistics.median(answer.cpu_seconds for answer in answers),
        ratio=statistics.median(one[state].seconds / one["cold"].seconds for one in rounds),
        cpu_ratio=statistics.median(one[state].cpu_seconds / one["cold"].cpu_seconds for one in rounds),
    )


def measure(rounds: int, sizes: Sequence[int], flags: tuple[str, ...]) -> dict[int, dict[str, Row]]:
    """Medians by size and state."""
    found = [asyncio.run(_round(number, sizes, flags)) for number in range(rounds)]
    return {
        size: {state: _row([answers[size] for answers in found], state) for state in _QUESTIONS}
        for size in sizes
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="(default %(default)s)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1000, 2000, 4000], help="tokens (default %(default)s)"
    )
    parser.add_argument("--bits", choices=("0", "8", "4"), default="0", help="--prompt-cache-bits")
    parser.add_argument("--plots", type=Path, default=plots.PLOTS)
    options = parser.parse_args()
    found = measure(options.rounds, options.sizes, ("--prompt-cache-bits", options.bits))
    print(
        "| prompt tokens | core | found | first token (s) | CPU (s) | ratio to cold | CPU ratio |\n"
        "|---|---|---|---|---|---|---|"
    )
    for rows in found.values():
        for state, r in rows.items():
            print(
                f"| {r.prompt_tokens} | {state} | {r.cached_tokens} | {r.seconds:.2f} | {r.cpu_seconds:.2f} "
                f"| {r.ratio:.2f} | {r.cpu_ratio:.2f} |"
            )
    plots.lines(
        options.plots / "restart.png",
        title="First token: cold, warm, and after a restart",
        x=("tokens of the prompt", [rows["cold"].prompt_tokens for rows in found.values()]),
        y="seconds",
        series={state: [rows[state].seconds for rows in found.values()] for state in _QUESTIONS},
    )


if __name__ == "__main__":
    main()
