"""The calls in progress: what is known of each, and ending them when the server drains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(slots=True)
class Call:
    """One call, as its access log line and its metrics will show it.

    Attributes:
        request_id: The caller's x-request-id, or one of ours.
        method: Its name in the contract, for example "ChatStream".
        caller: Tells callers with different keys apart, without telling the key; "" where keys are off.
        model: The listed id of its model, once that is known.
        prompt_tokens: Tokens of its rendered prompt.
        completion_tokens: Tokens generated so far, over all choices.
        arrived: time.perf_counter() of its arrival.
        is_expelled: The drain's time is over and this call was ended by the server.
    """

    request_id: str
    method: str
    caller: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    is_expelled: bool = False


_current: ContextVar[Call] = ContextVar("osaurus_call")


def current() -> Call:
    """The call that this task answers."""
    return _current.get()


class CallsInProgress:
    """Every call that a drain waits for, with the task that answers it."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[object], Call] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    def __len__(self) -> int:
        return len(self._tasks)

    @contextmanager
    def enter(self, call: Call) -> Iterator[None]:
        """Make a call the current task's while inside."""
        task = asyncio.current_task()
        assert task is not None
        token = _current.set(call)
        self._tasks[task] = call
        self._idle.clear()
        try:
            yield
        finally:
            _current.reset(token)
            del self._tasks[task]
            if not self._tasks:
                self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Refuse new calls from now on, and wait for the old ones, so long at most."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return

    async def expel(self, seconds: float) -> None:
        """End the calls that are left, and wait for them to have sent their status."""
        for task, call in self._tasks.items():
            call.is_expelled = True
            task.cancel()
        await self.drain(seconds)
