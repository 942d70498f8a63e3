"""mlx_lm.server as a peer: a process of its own, with the product's BLAS and float32 weights.

As a script it is the server itself: `python -m tests.benchmarks.peer MODEL_FOLDER PORT`.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.subjects import stock_environment

_START_SECONDS = 120.0


@contextmanager
def mlx_lm_server(model_folder: Path) -> Iterator[str]:
    """A running server; gives its base URL. Clients name the model by its folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    popen = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.peer", str(model_folder), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=stock_environment(),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(popen, url)
        yield url
    finally:
        popen.terminate()
        try:
            popen.wait(20)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait(20)


def _wait(popen: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if popen.poll() is not None:
            raise RuntimeError(f"mlx_lm.server ended with status {popen.returncode}")
        with contextlib.suppress(urllib.error.URLError, TimeoutError, ConnectionError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()  # noqa: S310 - our own http URL
            return
        time.sleep(0.2)
    raise RuntimeError("mlx_lm.server did not start in time")


def main() -> None:
    from osaurus_grpc.models import platform  # first: it loads the BLAS before MLX

    assert platform.mx
    from mlx_lm import server

    model, port = sys.argv[1:]
    sys.argv = ["mlx_lm.server", "--model", model, "--port", port, "--log-level", "ERROR"]
    server.main()


if __name__ == "__main__":
    main()
