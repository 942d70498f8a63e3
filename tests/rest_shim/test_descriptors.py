"""What happens when no more files can be opened."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import sys
import urllib.request
from typing import Any

import pytest

from rest_shim import descriptors
from rest_shim.descriptors import ExhaustionHandler, raise_limit
from tests.harness.processes import rest_process

# Nothing listens there: the shim starts without a core.
NO_CORE = "127.0.0.1:9"


class Limits:
    """Stands for the system's."""

    def __init__(self, soft: int, hard: int, most: int = 2**62) -> None:
        self.now = (soft, hard)
        self._most = most

    def get(self, which: int) -> tuple[int, int]:
        assert which == resource.RLIMIT_NOFILE
        return self.now

    def set(self, which: int, wanted: tuple[int, int]) -> None:
        assert which == resource.RLIMIT_NOFILE
        if wanted[0] > self._most:
            raise ValueError("current limit exceeds maximum limit")
        self.now = wanted


@pytest.mark.parametrize(
    ("limits", "soft"),
    [
        (Limits(256, 4_096), 4_096),
        (Limits(256, 2**20), 65_536),
        (Limits(256, resource.RLIM_INFINITY), 65_536),
        (Limits(256, resource.RLIM_INFINITY, most=10_240), 10_240),
        (Limits(256, resource.RLIM_INFINITY, most=256), 256),
        (Limits(256, 256), 256),
        (Limits(2**20, 2**20), 2**20),
        (Limits(resource.RLIM_INFINITY, resource.RLIM_INFINITY), resource.RLIM_INFINITY),
    ],
)
def test_as_many_files_as_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, limits: Limits, soft: int
) -> None:
    hard = limits.now[1]
    monkeypatch.setattr(descriptors.resource, "getrlimit", limits.get)
    monkeypatch.setattr(descriptors.resource, "setrlimit", limits.set)
    raise_limit()
    assert limits.now == (soft, hard)


def accept_failure(number: int = errno.EMFILE) -> dict[str, Any]:
    """As asyncio tells of it."""
    message = "socket.accept() out of system resource"
    return {"message": message, "exception": OSError(number, "x"), "socket": object()}


async def test_that_there_are_no_more_is_told_once_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    handler, loop = ExhaustionHandler(), asyncio.get_running_loop()
    for number in (errno.EMFILE, errno.ENFILE, errno.EMFILE):
        handler(loop, accept_failure(number))
    assert caplog.messages == ["cannot accept connections errno=EMFILE"]
    monkeypatch.setattr(descriptors, "_QUIET_SECONDS", 0.0)
    handler(loop, accept_failure(errno.ENFILE))
    assert caplog.messages[1:] == ["cannot accept connections errno=ENFILE"]


@pytest.mark.parametrize(
    "context",
    [
        {"message": "a", "exception": ValueError("x")},
        {"message": "a", "exception": OSError(errno.EMFILE, "x")},
        {"message": "a", "exception": OSError(errno.EMFILE, "x"), "socket": object(), "transport": object()},
        accept_failure(errno.EINVAL),
        {"message": "a"},
    ],
)
async def test_everything_else_is_told_as_ever(
    caplog: pytest.LogCaptureFixture, context: dict[str, Any]
) -> None:
    caplog.set_level(logging.WARNING)
    handler, loop = ExhaustionHandler(), asyncio.get_running_loop()
    for _ in range(2):
        handler(loop, context)
    assert [record.name for record in caplog.records] == ["asyncio", "asyncio"]


@pytest.mark.skipif(sys.platform != "linux", reason="only there a limit can be set for another process")
def test_a_server_without_files_recovers_and_its_log_stays_short() -> None:
    with rest_process(NO_CORE, until_serving=False) as process, contextlib.ExitStack() as clients:
        _, hard = resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE, (40, hard))
        host, port = process.address.rsplit(":", 1)
        for _ in range(80):
            clients.enter_context(socket.create_connection((host, int(port))))
        while "cannot accept connections" not in process.log():
            assert process.popen.poll() is None
        clients.close()
        with urllib.request.urlopen(f"{process.url}/", timeout=30) as response:  # noqa: S310 - our own http URL
            assert response.read() == b"Osaurus is running"
        log = process.log()
    assert log.count("cannot accept connections") == 1
    assert "Traceback" not in log
