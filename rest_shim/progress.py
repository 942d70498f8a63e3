"""The requests in progress: waiting for them when the server stops, and ending those that take too long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from rest_shim.errors import Refusal, draining_refusal

_EXPELLED = web.RequestKey("expelled", bool)


class RequestsInProgress:
    """Every request that a drain waits for, with the task that answers it."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[object], web.Request] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False

    def __len__(self) -> int:
        return len(self._tasks)

    @contextmanager
    def enter(self, request: web.Request) -> Iterator[None]:
        """Count a request in while the current task answers it.

        Raises:
            Refusal: The server is stopping.
        """
        if self._is_draining:
            raise draining_refusal()
        task = asyncio.current_task()
        assert task is not None, "handlers run in tasks"
        self._tasks[task] = request
        self._idle.clear()
        try:
            yield
        finally:
            del self._tasks[task]
            if not self._tasks:
                self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Refuse new requests from now on, and wait for the old ones, so long at most."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return

    async def expel(self, seconds: float) -> None:
        """End the requests that are left, and wait for their clients to have been told."""
        for task, request in self._tasks.items():
            request[_EXPELLED] = True
            task.cancel()
        await self.drain(seconds)


def take_back_expulsion(request: web.BaseRequest) -> Refusal | None:
    """What to tell the client of a request that was cancelled, if the server's end is why.

    The cancellation is taken back then, so that the task can still send it. None where the client left.
    """
    if not request.get(_EXPELLED):
        return None
    task = asyncio.current_task()
    assert task is not None, "handlers run in tasks"
    task.uncancel()
    return draining_refusal()
