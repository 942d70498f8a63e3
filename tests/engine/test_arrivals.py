"""When requests that arrive together, or while others run, have their prompts processed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from osaurus_grpc.engine import scheduler
from osaurus_grpc.engine.arrivals import Arrival
from osaurus_grpc.engine.engine import Engine

from .conftest import answer, request, running_engine, token_ids, until
from .test_engine import Faulty

PROMPTS = [(1, 2, 3 + i, 7, 9) for i in range(3)]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the model's inputs, in order; whoever waits for others waits until they are there."""
    monkeypatch.setattr(scheduler, "_GATHERING_SHARE", 1e9)
    return []


def recording(passes: list[tuple[int, int]]) -> Callable[[Any], Any]:
    def note(_: int, inputs: Any) -> bool:
        passes.append(inputs.shape)
        return False

    return lambda model: Faulty(model, note)


async def warm_up(engine: Engine) -> None:
    """Let the engine learn what a pass takes; nobody waits before it knows."""
    await answer(engine, request(prompt=(5,) * 200, max_tokens=6))


async def test_announced_requests_share_a_pass(passes: list[tuple[int, int]]) -> None:
    async with running_engine(wrap=recording(passes)) as engine:
        alone = [await answer(engine, request(prompt=prompt)) for prompt in PROMPTS]
        await warm_up(engine)
        passes.clear()
        with engine.expecting(1) as first, engine.expecting(2) as others:
            early = asyncio.create_task(_answer(engine, PROMPTS[0], first))
            await until(lambda: engine.stats().waiting == 1)
            later = [asyncio.create_task(_answer(engine, prompt, others)) for prompt in PROMPTS[1:]]
            assert await asyncio.gather(early, *later) == alone
    assert passes[0] == (3, 5)


async def test_nobody_waits_who_comes_alone(passes: list[tuple[int, int]]) -> None:
    async with running_engine(wrap=recording(passes)) as engine:
        await warm_up(engine)
        passes.clear()
        with engine.expecting(1) as arrival:
            await _answer(engine, PROMPTS[0], arrival)
    assert passes[0] == (1, 5)


@pytest.mark.parametrize("how", ["refused", "delayed"])
async def test_who_does_not_come_is_not_waited_for(passes: list[tuple[int, int]], how: str) -> None:
    async with running_engine(wrap=recording(passes)) as engine:
        await warm_up(engine)
        passes.clear()
        with engine.expecting(1) as first:
            with engine.expecting(4) as other:
                early = asyncio.create_task(_answer(engine, PROMPTS[0], first))
                await until(lambda: engine.stats().waiting == 1)
                if how == "delayed":
                    other.delayed()
                    await early
            await early
        assert passes[0] == (1, 5)
        # Nor later: what was announced is forgotten.
        await answer(engine, request(prompt=PROMPTS[1]))


async def test_running_streams_wait_for_nobody(passes: list[tuple[int, int]]) -> None:
    async with running_engine(wrap=recording(passes)) as engine:
        await warm_up(engine)
        with engine.expecting(1) as announced:
            running = asyncio.create_task(_answer(engine, PROMPTS[0], announced, max_tokens=100_000))
            await until(lambda: engine.stats().running == 1)
            with engine.expecting(1):  # and never submitted
                assert len(await answer(engine, request(prompt=PROMPTS[1], max_tokens=4))) == 4
                assert engine.stats().running == 1
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_what_arrives_during_a_decode_step_is_prefilled_in_it() -> None:
    """Its prompt goes through before the running sequence's next token does."""
    passes: list[tuple[int, int]] = []
    arrived: list[asyncio.Task[list[int]]] = []
    loop = asyncio.get_running_loop()

    def arrive(_: int, inputs: Any) -> bool:
        passes.append(inputs.shape)
        if len(passes) == 8:
            loop.call_soon_threadsafe(submit)
            deadline = time.monotonic() + 30
            while not engine.stats().waiting and time.monotonic() < deadline:
                time.sleep(0.001)  # the event loop goes on in its own thread
        return False

    def submit() -> None:
        arrived.append(loop.create_task(answer(engine, request(prompt=PROMPTS[0], max_tokens=3))))

    async with running_engine(wrap=lambda model: Faulty(model, arrive)) as engine:
        await answer(engine, request(max_tokens=20))
        assert len(await arrived[0]) == 3
    assert passes[7:9] == [(1, 1), (1, 5)]


async def _answer(
    engine: Engine, prompt: tuple[int, ...], arrival: Arrival, max_tokens: int = 12
) -> list[int]:
    asked = request(prompt=prompt, max_tokens=max_tokens)
    async with asyncio.timeout(60):
        return token_ids([event async for event in engine.generate(asked, arrival)])
