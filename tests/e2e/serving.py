"""The osaurus command as a person runs it: real processes, read through their output."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.harness.processes import child_environment

START_SECONDS = 150.0
STOP_SECONDS = 60.0
COMMAND = (sys.executable, "-m", "osaurus_grpc.cli.main")
# Tests share few cores, and none of these is about limits.
QUIET = ("--log-level=warning", "--no-hub-cache", "--max-concurrent-requests=0", "--requests-per-minute=0")


def run_command(
    home: Path,
    *arguments: str,
    stdin: str | None = None,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its home and runtime directory are below home."""
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=child_environment(home, {"OSAURUS_NO_HUB_CACHE": "true", **(env or {})}),
    )


@dataclass(slots=True)
class Served:
    """A running `osaurus serve`.

    Attributes:
        popen: The supervising process.
        home: Its home, for further commands that are to find it.
        out: What it printed so far.
    """

    popen: subprocess.Popen[str]
    home: Path
    log: Path
    out: list[str] = field(default_factory=list)
    children: list[psutil.Process] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Everything it printed on stdout."""
        return "".join(self.out)

    @property
    def http(self) -> str:
        """Base URL of the HTTP server."""
        return self._found(r"Ollama host +(\S+)")

    @property
    def grpc(self) -> str:
        """HOST:PORT of the core."""
        return self._found(r"gRPC address +(\S+)")

    def _found(self, pattern: str) -> str:
        match = re.search(pattern, self.text)
        assert match, f"{pattern} is not in {self.text}"
        return match[1]

    def err(self) -> str:
        """Everything on stderr, its children's messages among it."""
        return self.log.read_text(errors="replace")

    def child(self, module: str) -> psutil.Process:
        """The running child that runs a module."""
        for process in psutil.Process(self.popen.pid).children():
            with contextlib.suppress(psutil.Error):
                if module in process.cmdline():
                    return process
        raise AssertionError(f"no child runs {module}")

    def signal_and_wait(self, number: signal.Signals) -> int:
        """Send a signal and return the exit status."""
        self.popen.send_signal(number)
        return self.popen.wait(STOP_SECONDS)

    def assert_no_child_is_left(self) -> None:
        """Every child that was there when it was ready has ended."""
        _, alive = psutil.wait_procs(self.children, timeout=STOP_SECONDS)
        assert alive == []


def start(
    home: Path, *arguments: str, env: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> Served:
    """Start `osaurus serve` on free ports and return at once."""
    log = home / f"serve-{time.monotonic_ns()}.log"
    with log.open("w") as stderr:
        popen = subprocess.Popen(
            [*prefix, *COMMAND, "serve", "--port=0", "--grpc-port=0", *QUIET, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=child_environment(home, env),
        )
    return Served(popen, home, log)


def end(served: Served) -> None:
    """End it by whatever it takes; its children go with it."""
    if served.popen.poll() is None:
        served.popen.terminate()
        try:
            served.popen.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            served.popen.kill()
            served.popen.wait()
    if served.popen.stdout is not None:
        served.popen.stdout.close()


@contextmanager
def serving(
    home: Path, *arguments: str, env: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> Iterator[Served]:
    """`osaurus serve` on free ports, once it has said that it is ready."""
    served = start(home, *arguments, env=env, prefix=prefix)
    try:
        _wait_until_ready(served)
        yield served
    except BaseException:
        sys.stderr.write(f"--- osaurus serve ---\n{served.text}{served.err()}--- end ---\n")
        raise
    finally:
        end(served)


def _wait_until_ready(served: Served) -> None:
    ready = threading.Event()
    stdout = served.popen.stdout
    assert stdout is not None

    def pump() -> None:
        with contextlib.suppress(ValueError):  # closed below us
            for line in stdout:
                served.out.append(line)
                if line.startswith("Stop with"):
                    ready.set()
        ready.set()

    threading.Thread(target=pump, daemon=True).start()
    assert ready.wait(START_SECONDS), "not ready in time"
    assert "Osaurus is ready" in served.text, "it ended"
    served.children = psutil.Process(served.popen.pid).children(recursive=True)
    assert len(served.children) == 2


def without_privileges() -> tuple[str, ...]:
    """What to put before a command so that file modes bind it, also where the tests run as root."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("the tests run as root, whom file modes do not bind, and setpriv is not here")
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
