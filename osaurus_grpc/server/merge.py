"""The event streams of a request's choices, as one.

A choice's next event is asked for only when its last one was taken, so whatever the engine has
queued meanwhile arrives as one event. Nothing waits on a timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeAlias

from osaurus_grpc.engine.types import EngineEvent

EventStream: TypeAlias = AsyncGenerator[EngineEvent, None]
# None: the stream ended. An exception: it failed.
_Arrival: TypeAlias = "tuple[int, EngineEvent | Exception | None]"


async def merged(
    streams: Sequence[EventStream], is_finished: Callable[[int], bool]
) -> AsyncGenerator[tuple[int, EngineEvent], None]:
    """Events of several streams with the index of theirs, until all have ended.

    Closes every stream before it returns, however it ends.

    Args:
        streams: At least one.
        is_finished: Asked after each event; a stream that is finished is closed at once.

    Raises:
        Exception: What a stream raises; the others are closed.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for event in stream:
                yield 0, event
                if is_finished(0):
                    return
        return

    # One place: a pump holds one event at most, and the engine gathers the rest.
    arrivals: asyncio.Queue[_Arrival] = asyncio.Queue(maxsize=1)
    pumps = [asyncio.create_task(_pump(i, stream, arrivals)) for i, stream in enumerate(streams)]
    running = set(range(len(streams)))
    try:
        while running:
            index, arrival = await arrivals.get()
            if index not in running:
                continue
            if arrival is None:
                running.discard(index)
            elif isinstance(arrival, Exception):
                raise arrival
            else:
                yield index, arrival
                if is_finished(index):
                    running.discard(index)
                    pumps[index].cancel()
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        # A pump that was cancelled before its first step has not touched its stream.
        for stream in streams:
            await stream.aclose()


async def _pump(index: int, stream: EventStream, arrivals: asyncio.Queue[_Arrival]) -> None:
    try:
        async with aclosing(stream):
            async for event in stream:
                await arrivals.put((index, event))
    except Exception as error:  # noqa: BLE001 - handed to the reader, which raises it
        await arrivals.put((index, error))
    else:
        await arrivals.put((index, None))
