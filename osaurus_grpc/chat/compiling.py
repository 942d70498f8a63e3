"""The threads that compile grammars: in two lanes, and nobody waits in them without an end.

Compiling cannot be interrupted. Its work is bounded, and so is what one waits for it: large grammars
have a thread of their own, so small ones pass them by; a lane takes so many and no more; what has not
begun after a while is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import stack_size
from typing import Final, TypeVar

from osaurus_grpc.errors import OverloadedError

__all__ = ["CompilingThreads"]

# Schemas of usual answers and tools are smaller.
SMALL_CHARACTERS: Final = 8_192
MAX_IN_LANE: Final = 32
PATIENCE_SECONDS: Final = 15.0

# The longest chain of references that fits grammar.MAX_GRAMMAR_CHARACTERS takes less than a half of it.
# Only what is used of it becomes memory.
_STACK_BYTES: Final = 512 * 1024**2
_RETRY_SECONDS: Final = 2.0

_Result = TypeVar("_Result")


class CompilingThreads:
    """Two threads with large stacks. Used on an event loop.

    Args:
        patience_seconds: So long work waits for its thread at most.
    """

    def __init__(self, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._patience_seconds = patience_seconds
        self._small, self._any = (_Lane(name) for name in ("small", "any"))
        _start_deep(self._small.executor, self._any.executor)

    async def run(self, work: Callable[[], _Result], *, size: int) -> _Result:
        """Do something in one of the threads.

        Args:
            work: What to do.
            size: Characters of what is compiled; large ones keep to one thread.

        Raises:
            OverloadedError: Too much is waiting, or nothing was begun of it in time.
        """
        lane = self._any
        if size <= SMALL_CHARACTERS and self._small.count <= self._any.count:
            lane = self._small
        if lane.count >= MAX_IN_LANE:
            raise OverloadedError("Too many grammars are being compiled.", retry_after_seconds=_RETRY_SECONDS)
        job = lane.executor.submit(work)
        lane.count += 1
        result = asyncio.wrap_future(job)
        try:
            await asyncio.wait([result], timeout=self._patience_seconds)
            # Once begun, its own limits end it.
            if not result.done() and job.cancel():
                raise OverloadedError(
                    f"The grammars of other requests took more than {self._patience_seconds:g} seconds.",
                    retry_after_seconds=_RETRY_SECONDS,
                )
            return await result
        finally:
            lane.count -= 1
            # Of a caller that left, what has not begun is not wanted either.
            result.cancel()

    def close(self) -> None:
        """End the threads; what is being compiled is not waited for."""
        for lane in (self._small, self._any):
            lane.executor.shutdown(wait=False, cancel_futures=True)


class _Lane:
    """A thread, and how much it has to do."""

    def __init__(self, name: str) -> None:
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=f"grammar-{name}")
        self.count = 0


def _start_deep(*executors: ThreadPoolExecutor) -> None:
    """Start the executors' threads, with large stacks."""
    # Said for the whole process: threads that others start meanwhile have such a stack, too.
    usual = stack_size(_STACK_BYTES)
    try:
        # A pool starts its thread with the first work.
        wait([executor.submit(bool) for executor in executors])
    finally:
        stack_size(usual)
