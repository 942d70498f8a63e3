"""Open files: as many connections as the system lets there be, and few words when there are no more."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import time

log = logging.getLogger(__name__)

# The second is the most that macOS takes where it says that there is no limit.
_WANTED = (65_536, 10_240)

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_QUIET_SECONDS = 60.0


def raise_limit() -> None:
    """Let this process open as many files as the system allows; shells give 256 on macOS."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    for wanted in _WANTED:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if most <= soft:
            return
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return


class ExhaustionHandler:
    """An event loop's exception handler that tells of connections it cannot accept once a minute.

    asyncio tells a hundred times a second, with a traceback each, which fills logs and the disk.
    """

    def __init__(self) -> None:
        self._told_at: float | None = None

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """Tell of an exception that nobody caught."""
        error = context.get("exception")
        # Only accepting names its socket without a transport.
        is_accepting = "socket" in context and "transport" not in context
        if not (is_accepting and isinstance(error, OSError) and error.errno in _EXHAUSTED):
            loop.default_exception_handler(context)
            return
        now = time.monotonic()
        if self._told_at is None or now - self._told_at >= _QUIET_SECONDS:
            self._told_at = now
            log.error("cannot accept connections errno=%s", errno.errorcode[error.errno])
