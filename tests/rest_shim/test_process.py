"""The shim as a child process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.harness.processes import START_SECONDS, child_environment, rest_process

# Nothing listens there: the shim starts without a core.
NO_CORE = "127.0.0.1:9"


def run(home: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rest_shim", *flags],
        capture_output=True, text=True, timeout=START_SECONDS, check=False, env=child_environment(home),
    )  # fmt: skip


def test_it_says_where_it_listens_and_stops_on_sigterm() -> None:
    with rest_process(NO_CORE, until_serving=False) as process:
        with urllib.request.urlopen(f"{process.url}/", timeout=60) as response:  # noqa: S310 - our own http URL
            assert response.read() == b"Osaurus is running"
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "Traceback" not in process.log()


def test_it_stops_on_ctrl_c_without_a_traceback() -> None:
    with rest_process(NO_CORE, until_serving=False) as process:
        process.popen.send_signal(signal.SIGINT)
        assert process.wait() == 0
        assert "Traceback" not in process.log()


def test_the_log_has_no_prompt_and_no_key() -> None:
    with rest_process(NO_CORE, "--log-level", "debug", until_serving=False) as process:
        body = b'{"model": "m", "messages": [{"role": "user", "content": "my prompt"}]}'
        request = urllib.request.Request(  # noqa: S310 - our own http URL
            f"{process.url}/v1/chat/completions?q=my-query",
            data=body,
            headers={"Authorization": "Bearer my-key"},
        )
        try:
            urllib.request.urlopen(request, timeout=20)  # noqa: S310 - our own http URL
        except urllib.error.HTTPError as error:
            assert error.code == 503  # noqa: PT017 - the error is the answer
            error.close()
        log = process.log()
    assert "route=/chat/completions status=503" in log
    assert not any(secret in log for secret in ("my prompt", "my-key", "my-query"))


def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tmp_path, "--port", str(port), "--core", NO_CORE)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (f"osaurus-rest: port {port} on 127.0.0.1 is taken; choose another with --port\n")


def test_a_second_shim_does_not_share_the_port(tmp_path: Path) -> None:
    with rest_process(NO_CORE, until_serving=False) as process:
        done = run(tmp_path, "--port", process.address.rpartition(":")[2], "--core", NO_CORE)
    assert done.returncode == 1
    assert "is taken" in done.stderr


def test_an_address_that_is_not_ours_is_one_clear_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--host", "192.0.2.1", "--port", "0", "--core", NO_CORE, "--insecure-expose")
    assert done.returncode == 1
    assert done.stderr.startswith("osaurus-rest: cannot listen on 192.0.2.1 port 0: ")
    assert len(done.stderr.splitlines()) == 1
