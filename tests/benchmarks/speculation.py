"""One stream with guesses and without. Run it as `python -m tests.benchmarks.speculation`.

Greedy answers to prompts of two kinds: to repeat a text with a small change, which copies most of its
input, and to write a story, which copies nothing. Two cores, one of which guesses, get the same prompts
in turn: by prompt lookup, and with draft models of different cost and agreement (pairs.py), or with
`--target` and `--draft` of a `--models-dir`. Shown are medians: tokens a second between the first token
and the last, their ratio within a turn, the ratio of the cores' CPU seconds, which other programs on
the machine disturb less, and how many guessed tokens were accepted.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from osaurus_grpc.v1 import chat_pb2, inference_service_pb2_grpc, sampling_pb2
from tests.benchmarks import pairs, plots
from tests.benchmarks.subjects import MODEL, default_models_dir, prompts
from tests.harness.processes import NO_LIMITS, Process, core_process
from tests.server.test_metrics import free_port

_ITEMS = ("apples", "lamp oil", "copper wire", "blue paint", "rope", "salted fish", "candles", "barley")
_TOWNS = ("Aberdeen", "Bergen", "Cadiz", "Danzig", "Esbjerg", "Faro", "Genoa", "Hull")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of prompt."""

    name: str
    prompts: list[str]


def _ledger(number: int) -> str:
    """A prompt whose answer repeats it."""
    lines = [
        f"{i + 1}. On day {number + i} the ship from {_TOWNS[(number + i) % 8]} brought "
        f"{10 + 3 * i + number} crates of {_ITEMS[(3 * number + i) % 8]} to the harbour."
        for i in range(8)
    ]
    return "Copy this list exactly, line by line:\n\n" + "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Way:
    """A way of guessing.

    Attributes:
        name: What it is called.
        models_dir: Where the models are.
        model: The one that answers.
        flags: What has a core guess.
    """

    name: str
    models_dir: Path
    model: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One answer."""

    tokens_per_second: float
    cpu_seconds: float
    text: str


class Subject:
    """A core under test."""

    def __init__(self, core: Process, metrics_port: int, model: str) -> None:
        self._model = model
        self._address = core.address
        self._process = psutil.Process(core.popen.pid)
        self._metrics_port = metrics_port

    def _cpu_seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    async def answer(self, prompt: str, tokens: int) -> Run:
        message = chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=prompt)])
        sampling = sampling_pb2.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        request = chat_pb2.ChatStreamRequest(
            chat=chat_pb2.ChatRequest(model=self._model, messages=[message], sampling=sampling)
        )
        parts: list[str] = []
        first = last = first_cpu = 0.0
        first_tokens = 0
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub: inference_service_pb2_grpc.InferenceServiceAsyncStub = (
                inference_service_pb2_grpc.InferenceServiceStub(channel)
            )
            async for event in stub.ChatStream(request, timeout=900):
                if event.HasField("content"):
                    last = time.perf_counter()
                    parts.append(event.content.text)
                    if not first:
                        first, first_cpu, first_tokens = last, self._cpu_seconds(), 1
        return Run((tokens - first_tokens) / (last - first), self._cpu_seconds() - first_cpu, "".join(parts))

    def guessed(self) -> tuple[float, float]:
        """Tokens drafted and accepted since the start."""
        url = f"http://127.0.0.1:{self._metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        drafted, accepted = (
            float(found[1])
            if (found := re.search(rf"^osaurus_{name}_tokens_total (\S+)", text, re.M))
            else 0.0
            for name in ("drafted", "accepted")
        )
        return drafted, accepted


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of one kind."""

    kind: str
    plain: float
    guessing: float
    ratio: float
    cpu_ratio: float
    drafted: float
    accepted: float
    same: int
    answers: int


async def _measure_kind(kind: Kind, plain: Subject, guessing: Subject, tokens: int) -> Row:
    before = guessing.guessed()
    turns = []
    for i, prompt in enumerate(kind.prompts):
        # Whoever goes first has no advantage over all.
        if i % 2:
            b = await guessing.answer(prompt, tokens)
            a = await plain.answer(prompt, tokens)
        else:
            a = await plain.answer(prompt, tokens)
            b = await guessing.answer(prompt, tokens)
        turns.append((a, b))
    after = guessing.guessed()
    return Row(
        kind=kind.name,
        plain=statistics.median(a.tokens_per_second for a, _ in turns),
        guessing=statistics.median(b.tokens_per_second for _, b in turns),
        ratio=statistics.median(b.tokens_per_second / a.tokens_per_second for a, b in turns),
        cpu_ratio=statistics.median(b.cpu_seconds / a.cpu_seconds for a, b in turns),
        drafted=after[0] - before[0],
        accepted=after[1] - before[1],
        same=sum(a.text == b.text for a, b in turns),
        answers=len(turns),
    )


async def measure(way: Way, kinds: Sequence[Kind], tokens: int) -> list[Row]:
    """One row a kind."""
    ports = free_port(), free_port()
    # Beside each other they might find memory for different dtypes.
    same = ("--dtype", "float32", "--prompt-cache-bytes", "0")
    flags = (*NO_LIMITS, "--preload-model", way.model, *same, "--metrics-port")
    with (
        core_process(way.models_dir, *flags, str(ports[0])) as plain_core,
        core_process(way.models_dir, *flags, str(ports[1]), *way.flags) as guessing_core,
    ):
        plain = Subject(plain_core, ports[0], way.model)
        guessing = Subject(guessing_core, ports[1], way.model)
        for subject in (plain, guessing):
            await subject.answer("Warm up: one two three, one two three.", 24)
        return [await _measure_kind(kind, plain, guessing, tokens) for kind in kinds]


def _lookups(counts: Sequence[int]) -> list[Way]:
    return [
        Way(f"lookup of {count}", default_models_dir(), MODEL, ("--prompt-lookup-tokens", str(count)))
        for count in counts
    ]


def _made_pairs() -> list[Way]:
    """Draft models that cost as much as the model, and a third of it, with more and less agreement."""
    folder, large = pairs.models_dir(), pairs.deep(3)
    fair, poor = pairs.shallow(4, 4), pairs.shallow(10, 4)
    return [
        Way("draft of the same size", folder, pairs.deep(1), ("--draft-model", MODEL)),
        Way("a third, all right", folder, large, ("--draft-model", MODEL)),
        Way("a third, fair", folder, large, ("--draft-model", fair)),
        Way("a third, poor", folder, large, ("--draft-model", poor)),
    ]


def _ways(options: argparse.Namespace) -> list[Way]:
    if options.draft:
        flags = ("--draft-model", options.draft)
        return [Way(f"{options.draft} for {options.target}", options.models_dir, options.target, flags)]
    ways = _lookups(options.lookup) if "lookup" in options.ways else []
    return ways + (_made_pairs() if "drafts" in options.ways else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=2, help="prompts of each kind (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (default %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=("lookup", "drafts"), default=["lookup", "drafts"])
    parser.add_argument("--lookup", type=int, nargs="+", default=[8], help="--prompt-lookup-tokens")
    parser.add_argument("--models-dir", type=Path, help="of --target and --draft")
    parser.add_argument("--target", default="", help="a model to measure with --draft, in place of all else")
    parser.add_argument("--draft", default="", help="a model of its vocabulary")
    parser.add_argument("--plots", type=Path, default=plots.PLOTS)
    options = parser.parse_args()
    kinds = [
        Kind("copies its prompt", [_ledger(i) for i in range(options.turns)]),
        Kind("free text", prompts(options.turns, 0)),
    ]
    print(
        "| guesses | answer | plain tok/s | with guesses tok/s | ratio | CPU ratio "
        "| guessed | accepted | same text |\n|---|---|---|---|---|---|---|---|---|"
    )
    groups: dict[str, dict[str, float]] = {}
    for way in _ways(options):
        # What a draft model is good for does not hang on copying.
        asked = kinds if "lookup" in way.name else kinds[1:]
        for r in asyncio.run(measure(way, asked, options.tokens)):
            share = r.accepted / r.drafted if r.drafted else 0.0
            print(
                f"| {way.name} | {r.kind} | {r.plain:.1f} | {r.guessing:.1f} | {r.ratio:.2f} "
                f"| {r.cpu_ratio:.2f} | {r.drafted:.0f} | {100 * share:.0f} % | {r.same} of {r.answers} |",
                flush=True,
            )
            groups.setdefault(way.name, {})[r.kind] = r.ratio
    plots.bars(
        options.plots / "speculation.png",
        title="One stream with guesses",
        y="tokens a second, in plain ones",
        groups=groups,
    )


if __name__ == "__main__":
    main()
