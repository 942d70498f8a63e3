"""Who waits for whom where grammars are compiled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from threading import Event

import pytest

from osaurus_grpc.chat.compiling import MAX_IN_LANE, PATIENCE_SECONDS, SMALL_CHARACTERS, CompilingThreads
from osaurus_grpc.errors import OverloadedError

LARGE = SMALL_CHARACTERS + 1


@pytest.fixture
def gate() -> Iterator[Event]:
    made = Event()
    yield made
    made.set()


async def test_small_work_passes_large_work_by(gate: Event) -> None:
    threads = CompilingThreads()
    large = [asyncio.ensure_future(threads.run(gate.wait, size=LARGE)) for _ in range(MAX_IN_LANE)]
    await asyncio.sleep(0)
    assert [await threads.run(lambda: "done", size=1) for _ in range(3)] == ["done"] * 3
    with pytest.raises(OverloadedError, match="Too many grammars"):
        await threads.run(gate.wait, size=LARGE)
    assert not any(work.done() for work in large)
    gate.set()
    assert all(await asyncio.gather(*large))
    threads.close()


async def test_small_work_uses_both_threads(gate: Event) -> None:
    threads = CompilingThreads()
    first = asyncio.ensure_future(threads.run(gate.wait, size=1))
    await asyncio.sleep(0)
    assert await threads.run(lambda: "done", size=1) == "done"
    gate.set()
    assert await first
    threads.close()


async def test_waiting_has_an_end(gate: Event) -> None:
    threads = CompilingThreads()
    entered = Event()

    def hold() -> bool:
        entered.set()
        return gate.wait()

    running = asyncio.ensure_future(threads.run(hold, size=LARGE))
    await asyncio.to_thread(entered.wait)
    begun: list[int] = []
    threads._patience_seconds = 0.01
    with pytest.raises(OverloadedError, match="other requests took more than") as raised:
        await threads.run(lambda: begun.append(1), size=LARGE)
    threads._patience_seconds = PATIENCE_SECONDS
    assert raised.value.retry_after_seconds
    # What has begun is waited for however long it takes.
    assert not running.done()
    gate.set()
    assert await running
    assert await threads.run(lambda: "done", size=LARGE) == "done"
    assert not begun
    threads.close()


async def test_work_of_a_caller_that_left_is_not_begun(gate: Event) -> None:
    threads = CompilingThreads()
    running = asyncio.ensure_future(threads.run(gate.wait, size=LARGE))
    begun: list[int] = []
    left = asyncio.ensure_future(threads.run(lambda: begun.append(1), size=LARGE))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    gate.set()
    assert await running
    await threads.run(bool, size=LARGE)
    assert not begun
    threads.close()
