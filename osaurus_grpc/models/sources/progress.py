"""Reporting how far a fetch is, and stopping it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_REPORT_INTERVAL_SECONDS = 0.1
_POLL_SECONDS = 0.1


class FetchCancelledError(Exception):
    """The caller cancelled the fetch. Never shown to a client: it is the client who cancelled."""


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far a fetch is.

    Attributes:
        status: What is being done, for people.
        file: The file it is about, or "".
        completed_bytes: Done of that file or, without one, in all.
        total_bytes: To do, or 0 where that is not known.
    """

    status: str
    file: str = ""
    completed_bytes: int = 0
    total_bytes: int = 0


class Progress:
    """Passes on reports, a few a second for each file, and notices cancellation.

    Args:
        report: Called with every report, by one thread at a time.
        cancelled: Any of these ends the fetch when it is set.
    """

    def __init__(self, report: Callable[[FetchProgress], None], *cancelled: threading.Event | None) -> None:
        self._report = report
        self._cancelled = tuple(event for event in cancelled if event is not None)
        self._lock = threading.Lock()
        self._reported: tuple[str, str, float] = ("", "", 0.0)

    def linked(self, cancelled: threading.Event) -> Progress:
        """The same reports, with one more way to cancel."""
        return Progress(self._report, *self._cancelled, cancelled)

    def check(self) -> None:
        """Raise FetchCancelledError where the fetch is cancelled."""
        if any(event.is_set() for event in self._cancelled):
            raise FetchCancelledError

    def wait(self, seconds: float) -> None:
        """Sleep; raise FetchCancelledError soon after the fetch is cancelled."""
        end = time.monotonic() + seconds
        self.check()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))
            self.check()

    def show(self, status: str, file: str = "", completed_bytes: int = 0, total_bytes: int = 0) -> None:
        """Report; also a point where cancellation is noticed."""
        self.check()
        with self._lock:
            now = time.monotonic()
            is_same = self._reported[:2] == (status, file)
            is_end = completed_bytes == total_bytes
            if is_same and not is_end and now - self._reported[2] < _REPORT_INTERVAL_SECONDS:
                return
            self._reported = (status, file, now)
            self._report(FetchProgress(status, file, completed_bytes, total_bytes))
