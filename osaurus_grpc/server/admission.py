"""Which requests a model takes: how many at once, and how many a minute.

The rate is a sliding window over the last minute's admitted requests, so the time a refused caller
is told to wait is exact: until the oldest of them leaves the window. One event loop uses this; there
is no lock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from osaurus_grpc.errors import OverloadedError, RateLimitedError

WINDOW_SECONDS: Final = 60.0
# Weight of the newest request in the mean duration.
_SMOOTHING: Final = 0.2
_SHORTEST_RETRY_SECONDS: Final = 1.0


@dataclass(slots=True)
class _ModelLoad:
    active: int = 0
    admitted: deque[float] = field(default_factory=deque)
    mean_seconds: float = 0.0


class Admission:
    """Concurrency and rate limits, each model on its own.

    Args:
        max_concurrent_requests: A model, running and waiting; 0 is no limit.
        requests_per_minute: A model; 0 is no limit.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        *,
        max_concurrent_requests: int,
        requests_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_concurrent = max_concurrent_requests
        self._per_minute = requests_per_minute
        self._clock = clock
        self._loads: dict[str, _ModelLoad] = {}

    def active(self, model_id: str) -> int:
        """Requests that a model has admitted and not released."""
        load = self._loads.get(model_id)
        return load.active if load else 0

    @contextmanager
    def admit(self, model_id: str) -> Iterator[None]:
        """Hold a place of a model while inside.

        Args:
            model_id: A listed id; one entry is kept for each, so never a name a client made up.

        Raises:
            OverloadedError: The model has as many requests as it may.
            RateLimitedError: It had as many in the last minute as it may.
        """
        load = self._loads.setdefault(model_id, _ModelLoad())
        started = self._clock()
        self._check_concurrency(load)
        self._check_rate(load, started)
        load.active += 1
        try:
            yield
        finally:
            load.active -= 1
            seconds = self._clock() - started
            load.mean_seconds += _SMOOTHING * (seconds - load.mean_seconds)

    def _check_concurrency(self, load: _ModelLoad) -> None:
        if 0 < self._max_concurrent <= load.active:
            # With n places, one falls free about every mean_seconds / n.
            retry = max(load.mean_seconds / self._max_concurrent, _SHORTEST_RETRY_SECONDS)
            raise OverloadedError(
                f"The model already has {load.active} requests, its limit.", retry_after_seconds=retry
            )

    def _check_rate(self, load: _ModelLoad, now: float) -> None:
        if not self._per_minute:
            return
        while load.admitted and now - load.admitted[0] >= WINDOW_SECONDS:
            load.admitted.popleft()
        if len(load.admitted) >= self._per_minute:
            raise RateLimitedError(
                f"The model had {self._per_minute} requests in the last minute, its limit.",
                retry_after_seconds=load.admitted[0] + WINDOW_SECONDS - now,
            )
        load.admitted.append(now)
