"""Requests that are being readied: known before they are submitted, and waited for a little.

Of four requests that a gateway sends at once the first is tokenized some milliseconds before the last.
A pass begun for it alone is one that the other three have to sit through, and they then need a pass of
their own. So the MLX thread, before it begins with an empty batch, waits for requests that it knows to
be on their way, no longer than a small share of what the pass will take. A request that comes by itself
waits for nobody.

Counted on the event loop; the MLX thread reads the count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Arrival:
    """A request that is being readied, as so many sequences.

    Args:
        arrivals: What it is counted in.
        count: Sequences it will submit.
    """

    def __init__(self, arrivals: Arrivals, count: int) -> None:
        self._arrivals = arrivals
        self._left = count
        arrivals.count += count

    def submitted(self) -> None:
        """One of its sequences is handed over; called right before that."""
        if self._left:
            self._left -= 1
            self._arrivals.count -= 1

    def delayed(self) -> None:
        """It will take long, or comes to nothing: nobody is to wait for it."""
        if self._left:
            self._arrivals.count -= self._left
            self._left = 0
            self._arrivals.wake()


class Arrivals:
    """All of them.

    Args:
        wake: Ends the wait of the MLX thread for something to do.

    Attributes:
        count: Sequences on their way.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.count = 0
        self.wake = wake

    @contextmanager
    def expect(self, count: int) -> Iterator[Arrival]:
        """Announce a request of so many sequences; at the end of the block none of it is on its way."""
        arrival = Arrival(self, count)
        try:
            yield arrival
        finally:
            arrival.delayed()
