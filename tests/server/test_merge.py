"""Merging the streams of several choices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest

from osaurus_grpc.engine.types import EngineEvent, PrefillProgress
from osaurus_grpc.errors import EngineError
from osaurus_grpc.server.merge import merged

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Source:
    """A stream of numbered events that knows whether it was closed."""

    def __init__(self, length: int, failure: Exception | None = None) -> None:
        self.length = length
        self.failure = failure
        self.is_closed = False
        self.given = 0

    async def stream(self) -> AsyncGenerator[EngineEvent, None]:
        try:
            for number in range(self.length):
                await asyncio.sleep(0)
                self.given += 1
                yield PrefillProgress(number, self.length)
            if self.failure:
                raise self.failure
        finally:
            self.is_closed = True


async def collect(
    sources: list[Source], is_finished: Callable[[int], bool] = lambda _: False
) -> list[list[int]]:
    seen: list[list[int]] = [[] for _ in sources]
    async for index, event in merged([source.stream() for source in sources], is_finished):
        assert isinstance(event, PrefillProgress)
        seen[index].append(event.processed)
    return seen


@pytest.mark.parametrize("lengths", [[0], [5], [3, 0, 7], [1] * 16])
async def test_every_event_arrives_once_in_order(lengths: list[int]) -> None:
    sources = [Source(length) for length in lengths]

    assert await collect(sources) == [list(range(length)) for length in lengths]
    assert all(source.is_closed for source in sources)


@pytest.mark.parametrize("count", [1, 3])
async def test_a_failure_closes_the_others(count: int) -> None:
    sources = [Source(2, EngineError()), *(Source(10_000) for _ in range(count - 1))]

    with pytest.raises(EngineError):
        await collect(sources)

    assert all(source.is_closed for source in sources)


@pytest.mark.parametrize("count", [1, 3])
async def test_leaving_closes_all(count: int) -> None:
    sources = [Source(10_000) for _ in range(count)]
    stream = merged([source.stream() for source in sources], lambda _: False)
    for _ in range(3 * count):
        await anext(stream)

    await stream.aclose()

    assert all(source.is_closed for source in sources)
    assert all(source.given < 10_000 for source in sources)


async def test_a_finished_choice_is_closed_while_the_others_go_on() -> None:
    sources = [Source(10_000), Source(5)]
    seen: list[list[int]] = [[], []]
    async for index, event in merged([s.stream() for s in sources], lambda i: i == 0 and len(seen[0]) >= 2):
        assert isinstance(event, PrefillProgress)
        seen[index].append(event.processed)

    assert seen == [[0, 1], [0, 1, 2, 3, 4]]
    assert all(source.is_closed for source in sources)
    assert sources[0].given < 100


async def test_a_slow_reader_is_waited_for() -> None:
    sources = [Source(10_000), Source(10_000)]
    stream = merged([source.stream() for source in sources], lambda _: False)
    await anext(stream)
    for _ in range(200):
        await asyncio.sleep(0)

    # Not read ahead: what is not asked for stays with the engine, which makes one event of it.
    assert all(source.given <= 3 for source in sources)
    await stream.aclose()
