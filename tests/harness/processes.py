"""The product's two processes as tests start them: real children on ports the system chooses."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_SECONDS = 120.0
STOP_SECONDS = 90.0
_POLL_SECONDS = 0.05
_OUR_ENVIRONMENT = ("OSAURUS_", "OSU_")

# Flags for tests that are not about limits. The last of a repeated flag wins, so a test may add its own.
NO_LIMITS = ("--max-concurrent-requests", "0", "--requests-per-minute", "0")


class ProcessFailedError(Exception):
    """A child did not come up, or ended too early; the text holds its log."""


@dataclass(slots=True)
class Process:
    """A running child.

    Attributes:
        address: What its listening line says, without a scheme: "127.0.0.1:PORT".
        popen: The child itself.
        log_path: Where its stderr goes.
    """

    address: str
    popen: subprocess.Popen[str]
    log_path: Path

    @property
    def url(self) -> str:
        """Its base URL, for a child that speaks HTTP."""
        return f"http://{self.address}"

    def log(self) -> str:
        """What it wrote to stderr so far."""
        return self.log_path.read_text(errors="replace")

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Its exit status, once it has ended by itself."""
        return self.popen.wait(seconds)


def child_environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of ours, and with a home that holds none either."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_OUR_ENVIRONMENT)}
    # The tests share few cores.
    kept.setdefault("MKL_NUM_THREADS", "1")
    return {**kept, "HOME": str(home), "OSAURUS_RUNTIME_DIR": str(home / "runtime"), **(extra or {})}


def _listening_address(popen: subprocess.Popen[str], prefix: str, deadline: float) -> str:
    lines: queue.Queue[str | None] = queue.Queue()
    assert popen.stdout is not None
    stdout = popen.stdout

    def pump() -> None:
        with contextlib.suppress(ValueError):  # the file is closed below us when the child is killed
            for line in stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            raise ProcessFailedError("it printed no listening line in time") from None
        if line is None:
            raise ProcessFailedError("it ended before it listened")
        if line.startswith(prefix):
            return line.removeprefix(prefix).strip().removeprefix("http://")


@contextmanager
def _child(
    module: str, arguments: Sequence[str], prefix: str, env: Mapping[str, str] | None
) -> Iterator[Process]:
    with tempfile.TemporaryDirectory(prefix="osaurus-test-") as folder:
        home = Path(folder)
        log_path = home / "stderr.log"
        with log_path.open("w") as log:
            popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=child_environment(home, env),
            )
        process = Process(address="", popen=popen, log_path=log_path)
        try:
            process.address = _listening_address(popen, prefix, time.monotonic() + START_SECONDS)
            yield process
        except BaseException:
            sys.stderr.write(f"--- log of {module} ---\n{process.log()}--- end ---\n")
            raise
        finally:
            _end(popen)


def _end(popen: subprocess.Popen[str]) -> None:
    if popen.poll() is None:
        popen.terminate()
        try:
            popen.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait(STOP_SECONDS)
    if popen.stdout is not None:
        popen.stdout.close()


def wait_for_serving(process: Process, seconds: float = START_SECONDS) -> None:
    """Return once the core's health says SERVING.

    Raises:
        ProcessFailedError: It ended, or did not say so in time.
    """
    deadline = time.monotonic() + seconds
    with grpc.insecure_channel(process.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline:
            if process.popen.poll() is not None:
                raise ProcessFailedError(f"it ended with status {process.popen.returncode}\n{process.log()}")
            with contextlib.suppress(grpc.RpcError):
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(_POLL_SECONDS)
    raise ProcessFailedError("its health did not say SERVING in time")


@contextmanager
def core_process(
    models_dir: Path, *flags: str, env: Mapping[str, str] | None = None, until_serving: bool = True
) -> Iterator[Process]:
    """A gRPC core, limits as by default.

    Args:
        models_dir: Its models, which other cores may use too; the Hugging Face cache is left out.
        flags: Further flags of osaurus-core.
        env: Further environment variables.
        until_serving: Wait for its health to say SERVING, and not only for it to listen.
    """
    shared = ("--share-models-dir", "--no-hub-cache")
    arguments = ("--grpc-port", "0", "--models-dir", str(models_dir), *shared, *flags)
    with _child("osaurus_grpc", arguments, "osaurus-core listening on ", env) as process:
        if until_serving:
            wait_for_serving(process)
        yield process


@contextmanager
def rest_process(
    core_address: str, *flags: str, env: Mapping[str, str] | None = None, until_serving: bool = True
) -> Iterator[Process]:
    """An HTTP shim in front of a core.

    Args:
        core_address: The core's HOST:PORT.
        flags: Further flags of osaurus-rest.
        env: Further environment variables.
        until_serving: Wait for /health to answer 200, which asks the core.
    """
    arguments = ("--port", "0", "--core", core_address, *flags)
    with _child("rest_shim", arguments, "osaurus-rest listening on ", env) as process:
        if until_serving:
            _wait_for_health(process)
        yield process


def _wait_for_health(process: Process, seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.popen.poll() is not None:
            raise ProcessFailedError(f"it ended with status {process.popen.returncode}\n{process.log()}")
        try:
            urllib.request.urlopen(f"{process.url}/health", timeout=30).close()  # noqa: S310 - our own http URL
        except (urllib.error.URLError, TimeoutError):
            time.sleep(_POLL_SECONDS)
        else:
            return
    raise ProcessFailedError("its /health did not answer in time")
