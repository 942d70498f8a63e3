"""Whatever is kept, cut back, dropped or shared: reuse changes no token of a greedy answer.

Hypothesis draws whole histories: conversations that go on, are edited in the middle, branch off, ask
the same again; beside each other, beside requests that are cancelled at any stage, over stores of
which some hold next to nothing, and over restarts. Every answer is compared with that of an engine that
keeps nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from osaurus_grpc.engine import persistence
from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.prefix_disk import PrefixDisk
from osaurus_grpc.engine.prefix_files import PrefixFiles
from osaurus_grpc.engine.token_chain import BLOCK_TOKENS
from osaurus_grpc.engine.types import PrefillProgress, PrefillStarted, TokensGenerated

from .conftest import VOCAB, answer, collect, request, running_engine, sharpened, tiny_model, token_ids

KINDS = ("llama", "gemma3", "gpt_oss", "mamba2", "qwen3_next", "falcon_h1", "deepseek_v32")
STORE_BYTES = (20_000, 100_000, 2**26)  # some blocks of a beginning; a conversation; everything
SYSTEMS = (
    tuple((7 * i + 3) % VOCAB for i in range(48)),
    tuple((11 * i + 5) % VOCAB for i in range(83)),
)


@dataclass(frozen=True)
class Turn:
    """What a conversation does next.

    Attributes:
        words: New tokens.
        cut: Drop so many of the prompt's last tokens before: 0 goes on after the answer.
        length: Tokens to generate.
        cancelled: None, or after how many events the client leaves; the conversation then goes on as if
            the turn had never been.
    """

    words: tuple[int, ...]
    cut: int
    length: int
    cancelled: int | None


# Few phrases, of a block's length too, so that equal blocks turn up after different beginnings.
PHRASES = tuple(
    tuple((factor * i + 9) % VOCAB for i in range(length))
    for factor, length in ((2, 16), (5, 32), (3, 7), (1, 1))
)
words = st.lists(st.sampled_from(PHRASES), min_size=1, max_size=3).map(lambda said: sum(said, ()))
turns = st.builds(
    Turn,
    words=words,
    cut=st.sampled_from((0, 0, 0, 1, 15, 16, 17, 60)),
    length=st.sampled_from((1, 2, 14, 17, 33)),
    cancelled=st.sampled_from((None, None, None, None, 1, 2, 4)),
)
conversations = st.tuples(st.sampled_from(SYSTEMS), st.booleans(), st.lists(turns, min_size=2, max_size=4))
histories = st.lists(conversations, min_size=2, max_size=5)


class Engines:
    """One engine that keeps nothing, and one for each size of store; each remembers its past."""

    def __init__(self, plain: Engine, keeping: dict[int, Engine]) -> None:
        self.plain = plain
        self.keeping = keeping
        self.reused = 0

    async def converse(
        self, engine: Engine, system: tuple[int, ...], is_stable: bool, history: list[Turn]
    ) -> None:
        prompt = system
        for turn in history:
            prompt = (prompt[: -turn.cut] if turn.cut else prompt) + turn.words
            asked = request(
                prompt=prompt,
                max_tokens=turn.length,
                stable_prefix_tokens=min(len(system), len(prompt)) if is_stable else 0,
            )
            if turn.cancelled is not None:
                await leave(engine, asked, turn.cancelled)
                continue
            events = await collect(engine, asked)
            said = token_ids(events)
            assert said == await answer(self.plain, asked)
            assert isinstance(events[0], PrefillStarted)
            assert events[0].cached_tokens < len(prompt)
            self.reused += events[0].cached_tokens
            prompt += tuple(said)


async def leave(engine: Engine, asked: Any, after: int) -> None:
    """Read so many events and go."""
    async with asyncio.timeout(60), aclosing(engine.generate(asked)) as events:
        async for event in events:
            after -= isinstance(event, PrefillProgress | TokensGenerated)
            if after <= 0:
                break


@pytest.fixture(params=KINDS)
async def engines(request: pytest.FixtureRequest) -> AsyncIterator[Engines]:
    async with AsyncExitStack() as stack:

        async def start(size: int) -> Engine:
            return await stack.enter_async_context(
                running_engine(
                    kind=request.param, wrap=sharpened, prompt_cache_bytes=size, prefill_chunk_tokens=48
                )
            )

        engines = Engines(await start(0), {size: await start(size) for size in STORE_BYTES})
        yield engines
        assert engines.reused > 100


# Shrinking would replay histories against engines that remember them.
@settings(max_examples=4, phases=(Phase.explicit, Phase.generate), derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
@given(history=histories, size=st.sampled_from(STORE_BYTES))
async def test_reuse_changes_no_token(engines: Engines, history: list[Any], size: int) -> None:
    async with asyncio.timeout(120):
        await asyncio.gather(*(engines.converse(engines.keeping[size], *one) for one in history))


@pytest.fixture(params=("llama", "gemma3", "qwen3_next"))
async def restarting(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Engines]:
    """An engine that keeps beginnings on the disk, in short runs and little room."""
    monkeypatch.setattr(persistence, "RUN_BLOCKS", 2)
    monkeypatch.setattr(persistence, "RUN_TOKENS", 2 * BLOCK_TOKENS)
    kind: dict[str, Any] = {"kind": request.param, "wrap": sharpened, "prefill_chunk_tokens": 48}
    found: list[bool] = []
    read = PrefixFiles.read

    def watched(self: PrefixFiles, *args: Any) -> Any:
        arrays = read(self, *args)
        found.append(arrays is not None)
        return arrays

    monkeypatch.setattr(PrefixFiles, "read", watched)
    disk = PrefixDisk(PrefixFiles(tmp_path, 2**20))
    kept = {"prompt_cache_bytes": 2**26, "prefix_disk": disk, "identity": "weights"}
    async with running_engine(**kind) as plain, running_engine(**kind, **kept) as engine:
        yield Engines(plain, {0: engine})
        assert sum(found) > 3


async def restart(engine: Engine, kind: str) -> None:
    """Forget all but the disk."""
    await engine.detach("tiny")
    model = await engine.call(lambda: sharpened(tiny_model(kind)))
    await engine.attach("tiny", model, (), VOCAB, identity="weights")


@settings(max_examples=2, phases=(Phase.explicit, Phase.generate), derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
@given(history=histories)
async def test_reuse_from_the_disk_changes_no_token(
    restarting: Engines, request: pytest.FixtureRequest, history: list[Any]
) -> None:
    engine = restarting.keeping[0]
    async with asyncio.timeout(120):
        for conversations in (history[: len(history) // 2], history):
            await asyncio.gather(*(restarting.converse(engine, *one) for one in conversations))
            await restart(engine, request.node.callspec.params["restarting"])
