"""ChatStream from Python and from Go, side by side. Run it as `python -m tests.benchmarks.clients`.

Streams of a tiny random-weight model against one core, from `AsyncOsaurus` and from tests/interop/go:
events a second, when they come, and what an event costs the client. Both ask for the same in turns. On
a machine of few cores the core, which shares them with its client, bounds the rate; the CPU time an
event costs is the client's own.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from osaurus_grpc.client import AsyncOsaurus, TextDelta
from tests.benchmarks import plots
from tests.benchmarks.subjects import MODEL, default_models_dir, prompts
from tests.harness import tiny
from tests.harness.processes import NO_LIMITS, core_process
from tests.interop.clients import CLIENTS

_TINY = "tiny-llama"
_GO_STOP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Round:
    """So many streams at once.

    Attributes:
        seconds: From the first request to the last event.
        first_seconds: Till its first content event, a stream each, from the first request.
        gap_seconds: Between neighbouring content events of a stream, over all streams.
        cpu_seconds: User and system time of the client's process.
    """

    seconds: float
    first_seconds: list[float]
    gap_seconds: list[float]
    cpu_seconds: float

    @property
    def events(self) -> int:
        """Content events over all streams."""
        return len(self.first_seconds) + len(self.gap_seconds)

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.seconds

    @property
    def cost(self) -> float:
        """The client's CPU time an event, in microseconds."""
        return 1e6 * self.cpu_seconds / self.events


Ask = Callable[[list[str]], Awaitable[Round]]


async def _python(client: AsyncOsaurus, asked: list[str], tokens: int) -> Round:
    async def arrivals(prompt: str) -> list[float]:
        times = []
        async with client.stream(
            prompt, model=_TINY, temperature=0.0, max_tokens=tokens, ignore_eos=True
        ) as answer:
            async for event in answer:
                if isinstance(event, TextDelta):
                    times.append(time.perf_counter() - started)
        return times

    before, started = time.process_time(), time.perf_counter()
    streams = await asyncio.gather(*(arrivals(prompt) for prompt in asked))
    seconds, cpu = time.perf_counter() - started, time.process_time() - before
    gaps = [b - a for times in streams for a, b in itertools.pairwise(times)]
    return Round(seconds, [times[0] for times in streams], gaps, cpu)


@contextmanager
def _go(program: Path, address: str, streams: int, tokens: int) -> Iterator[Ask]:
    """The Go client as a child that runs a round for each line it is given."""
    with subprocess.Popen(
        [str(program), address, "bench", str(streams), str(tokens)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin
        assert child.stdout
        stdin, stdout = child.stdin, child.stdout

        def ask(asked: list[str]) -> Round:
            stdin.write(json.dumps(asked) + "\n")
            stdin.flush()
            line = stdout.readline()
            if not line:
                raise RuntimeError("the Go client ended; what went wrong is above")
            figures: dict[str, Any] = json.loads(line)
            return Round(**figures)

        try:
            yield lambda asked: asyncio.to_thread(ask, asked)
            stdin.close()
            child.wait(_GO_STOP_SECONDS)
        finally:
            child.kill()


async def _compare(
    address: str, program: Path, streams: int, tokens: int, rounds: int
) -> dict[str, list[Round]]:
    """Rounds of both, taken in turns; one before them warms up."""
    found: dict[str, list[Round]] = {"Python": [], "Go": []}
    async with AsyncOsaurus(address) as client:
        with _go(program, address, streams, tokens) as go:
            for turn in range(rounds + 1):
                asked = prompts(streams, turn)
                for name, one in (
                    ("Python", await _python(client, asked, tokens)),
                    ("Go", await go(asked)),
                ):
                    if turn:
                        found[name].append(one)
    return found


def measure(counts: list[int], tokens: int, rounds: int) -> dict[str, list[list[Round]]]:
    """Client to its rounds for each number of streams."""
    cache = Path("~/.cache/osaurus-tests/interop").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    program = next(client for client in CLIENTS if client.language == "go").built(cache) / "client"
    found: dict[str, list[list[Round]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models_dir = Path(folder)
        tiny.build(models_dir / _TINY, default_models_dir() / MODEL, vocab_size=None)
        flags = ("--preload-model", _TINY, "--max-batch-size", str(max(counts)))
        with core_process(models_dir, *NO_LIMITS, *flags) as core:
            for streams in counts:
                each = asyncio.run(_compare(core.address, program, streams, tokens, rounds))
                for name, taken in each.items():
                    found.setdefault(name, []).append(taken)
    return found


def _row(name: str, streams: int, taken: list[Round]) -> str:
    gaps = [gap for one in taken for gap in one.gap_seconds]
    first = median(each for one in taken for each in one.first_seconds)
    times = f"{1e3 * first:.0f} | {1e3 * median(gaps):.1f} / {1e3 * quantiles(gaps, n=20)[-1]:.1f}"
    rate, cost = median(one.rate for one in taken), median(one.cost for one in taken)
    return f"| {streams} | {name} | {rate:.0f} | {times} | {cost:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=200, help="of an answer; at least 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plots", type=Path, default=plots.PLOTS)
    options = parser.parse_args()
    found = measure(options.streams, options.tokens, options.rounds)
    print("| streams | client | events/s | first event (ms) | between events, median / p95 (ms) |", end="")
    print(" CPU an event at the client (µs) |\n|---|---|---|---|---|---|")
    for i, streams in enumerate(options.streams):
        for name in found:
            print(_row(name, streams, found[name][i]))
    x = ("streams", options.streams)
    plots.lines(
        options.plots / "clients-events.png",
        title="ChatStream of a tiny model, by client",
        x=x,
        y="events/s",
        series={name: [median(one.rate for one in taken) for taken in rows] for name, rows in found.items()},
    )
    plots.lines(
        options.plots / "clients-cpu.png",
        title="What an event of ChatStream costs the client",
        x=x,
        y="CPU an event (µs)",
        series={name: [median(one.cost for one in taken) for taken in rows] for name, rows in found.items()},
    )


if __name__ == "__main__":
    main()
