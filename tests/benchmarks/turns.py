"""Turn latency over a conversation. Run it as `python -m tests.benchmarks.turns`.

One chat of 20 turns in each client style (the whole history each time; a session that gets only the
new turn), against mlx_lm.server with the whole history, all in turn within one run. At some turns the
same request goes to a core without a prompt cache as well: what the turn costs cold. At the end a
prompt of about 1,500 tokens: cold, the same again, and one turn more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tests.benchmarks import plots
from tests.benchmarks.peer import mlx_lm_server
from tests.benchmarks.subjects import MODEL, default_models_dir, float32_copy
from tests.harness.processes import NO_LIMITS, core_process, rest_process

Message = dict[str, str]

_COLD_TURNS = frozenset({1, 2, 5, 10, 15, 20})
_ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered turn."""

    first_token_seconds: float
    text: str
    prompt_tokens: int
    cached_tokens: int


async def ask(url: str, model: str, messages: list[Message], **fields: Any) -> Answer:
    """One greedy streamed chat completion."""
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": _ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    first, text, usage = 0.0, "", {}
    started = time.perf_counter()
    async with aiohttp.ClientSession(url) as http, http.post("/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk["choices"] and (content := chunk["choices"][0]["delta"].get("content")):
                first = first or time.perf_counter() - started
                text += content
            usage = chunk.get("usage") or usage
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Answer(first, text, usage["prompt_tokens"], cached)


class Conversation:
    """A chat with one server in one client style."""

    def __init__(self, url: str, model: str, topic: str, *, session: str = "") -> None:
        self._url, self._model, self._session = url, model, session
        self._topic = topic
        self.messages: list[Message] = []
        self.answers: list[Answer] = []

    async def turn(self) -> Answer:
        said = f"Tell me fact number {len(self.answers) + 1} about {self._topic}, in a few words please."
        new = [{"role": "user", "content": said}]
        self.messages += new
        if self._session:
            answer = await ask(self._url, self._model, new, session_id=self._session)
        else:
            answer = await ask(self._url, self._model, self.messages)
        self.messages = [*self.messages, {"role": "assistant", "content": answer.text}]
        self.answers.append(answer)
        return answer


@dataclass(frozen=True, slots=True)
class Turn:
    """First-token seconds of one turn; None where it was not measured."""

    prompt_tokens: int
    history: float
    session: float
    peer: float
    cold: float | None


@dataclass(frozen=True, slots=True)
class Long:
    """First-token seconds of a long prompt."""

    cold: float
    again: float
    next_turn: float


async def converse(ours: str, peer: str, cold: str, peer_model: str, turns: int) -> list[Turn]:
    history = Conversation(ours, MODEL, "the sea")
    session = Conversation(ours, MODEL, "the moon", session="benchmark")
    other = Conversation(peer, peer_model, "the sea")
    rows: list[Turn] = []
    for number in range(1, turns + 1):
        a, b, c = await history.turn(), await session.turn(), await other.turn()
        alone = None
        if number in _COLD_TURNS:
            asked = history.messages[:-1]
            alone = (await ask(cold, MODEL, asked)).first_token_seconds
        rows.append(
            Turn(a.prompt_tokens, a.first_token_seconds, b.first_token_seconds, c.first_token_seconds, alone)
        )
        print(number, rows[-1], a.cached_tokens, b.cached_tokens, c.cached_tokens, file=sys.stderr)
    return rows


async def long_prompt(url: str, model: str) -> Long:
    text = "The quick brown fox jumps over the lazy dog. " * 140
    messages = [{"role": "user", "content": f"{text} How many animals?"}]
    cold = await ask(url, model, messages)
    again = statistics.median([(await ask(url, model, messages)).first_token_seconds for _ in range(3)])
    messages += [{"role": "assistant", "content": cold.text}, {"role": "user", "content": "And which ones?"}]
    return Long(cold.first_token_seconds, again, (await ask(url, model, messages)).first_token_seconds)


async def measure(turns: int) -> tuple[list[Turn], dict[str, Long]]:
    models_dir = default_models_dir()
    copy = float32_copy(models_dir)
    flags = (*NO_LIMITS, "--preload-model", MODEL)
    with (
        core_process(models_dir, *flags) as warm_core,
        rest_process(warm_core.address) as warm,
        core_process(models_dir, *flags, "--prompt-cache-bytes", "0") as cold_core,
        rest_process(cold_core.address) as cold,
        mlx_lm_server(copy) as peer,
    ):
        for url, model in ((warm.url, MODEL), (cold.url, MODEL), (peer, str(copy))):
            await ask(url, model, [{"role": "user", "content": "Warm up."}])
        rows = await converse(warm.url, peer, cold.url, str(copy), turns)
        longs = {
            "ours": await long_prompt(warm.url, MODEL),
            "mlx_lm.server": await long_prompt(peer, str(copy)),
        }
    return rows, longs


def table(rows: list[Turn], longs: dict[str, Long]) -> str:
    lines = [
        "| turn | prompt tokens | whole history (s) | session (s) | mlx_lm.server (s) | cold (s) |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {i} | {r.prompt_tokens} | {r.history:.2f} | {r.session:.2f} | {r.peer:.2f} "
        f"| {'' if r.cold is None else f'{r.cold:.2f}'} |"
        for i, r in enumerate(rows, 1)
    ]
    if len(rows) > 2:
        last, second = rows[-1], rows[1]
        lines += [
            "",
            f"Turn {len(rows)} / turn 2: whole history {last.history / second.history:.2f}, "
            f"session {last.session / second.session:.2f}, mlx_lm.server {last.peer / second.peer:.2f}.",
        ]
    lines += [
        "",
        "| 1,435-token prompt | cold (s) | same again (s) | one more turn (s) |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {r.cold:.2f} | {r.again:.2f} | {r.next_turn:.2f} |" for name, r in longs.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--plots", type=Path, default=plots.PLOTS)
    options = parser.parse_args()
    rows, longs = asyncio.run(measure(options.turns))
    plots.lines(
        options.plots / "turns.png",
        title="Time to first token over a conversation",
        x=("turn", list(range(1, len(rows) + 1))),
        y="seconds",
        series={
            "ours, whole history": [r.history for r in rows],
            "ours, session": [r.session for r in rows],
            "mlx_lm.server": [r.peer for r in rows],
            "ours, no cache": [r.cold for r in rows],
        },
    )
    print(table(rows, longs))


if __name__ == "__main__":
    main()
