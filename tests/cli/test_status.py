"""Finding and ending servers, with sleeping processes in their place; the real ones are in tests/e2e."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from osaurus_grpc.cli import runtime
from osaurus_grpc.cli.main import main

DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
)
WILLING = "import time; print(flush=True); time.sleep(600)"


@contextmanager
def recorded(models_dir: Path, program: str = WILLING) -> Iterator[subprocess.Popen[bytes]]:
    models_dir.mkdir()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as stdout:
        stdout.readline()
        runtime.record(
            runtime.RunningServer(
                pid=process.pid,
                http=f"http://127.0.0.1:{process.pid}",
                grpc="127.0.0.1:9",
                models_dir=models_dir,
                started=runtime.now(),
            )
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_a_server_that_does_not_answer_is_shown_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorded(tmp_path / "one") as one:
        assert main(["status"]) == 0
        shown = capsys.readouterr().out
        assert f"http://127.0.0.1:{one.pid}" in shown
        assert "unknown: The server at 127.0.0.1:9 cannot be reached" in shown


def test_of_several_servers_one_must_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorded(tmp_path / "one") as one, recorded(tmp_path / "two") as two:
        assert main(["stop"]) == 1
        told = capsys.readouterr().err
        assert str(tmp_path / "one") in told
        assert str(tmp_path / "two") in told
        assert main(["stop", f"--models-dir={tmp_path / 'two'}"]) == 0
        assert two.wait(10) == -15
        assert one.poll() is None
        assert main(["stop"]) == 0
        assert one.wait(10) == -15
    assert capsys.readouterr().out == "stopped\nstopped\n"


def test_all_servers_can_be_stopped_at_once(tmp_path: Path) -> None:
    with recorded(tmp_path / "one") as one, recorded(tmp_path / "two") as two:
        assert main(["stop", "--all"]) == 0
        assert (one.wait(10), two.wait(10)) == (-15, -15)


def test_a_server_that_does_not_end_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorded(tmp_path / "one", DEAF) as one:
        assert main(["stop", "--timeout-seconds=0.3"]) == 1
        assert f"did not end within 0.3 s (process {one.pid})" in capsys.readouterr().err
