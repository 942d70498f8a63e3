from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from osaurus_grpc.cli.process import Child, ChildEndedError, ending_text
from osaurus_grpc.cli.supervisor import is_healthy
from tests.cli import modules


def wait_until_gone(pid: int, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"process {pid} still runs"
            time.sleep(0.05)


async def test_a_child_says_where_it_listens_and_ends_when_asked(tmp_path: Path) -> None:
    child = Child("a child", "well", [], modules.write(tmp_path, well=modules.WELL))
    url = await child.start()
    assert await asyncio.to_thread(is_healthy, url)
    assert child.is_running
    await child.stop(grace_seconds=30)
    assert not child.is_running
    assert await child.wait() == 0


async def test_a_child_that_fails_to_start_is_an_error_with_its_status(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = Child("a child", "failing", [], modules.write(tmp_path, failing=modules.FAILING))
    with pytest.raises(ChildEndedError, match="a child ended with status 1") as raised:
        await child.start()
    assert raised.value.status == 1
    assert capfd.readouterr().err == "failing: the reason\n"
    await child.stop(grace_seconds=1)


async def test_a_quiet_child_is_heard_only_where_it_does_not_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    talking = "import sys\nprint('log line', file=sys.stderr, flush=True)\n" + modules.WELL
    environment = modules.write(tmp_path, talking=talking, failing=modules.FAILING)
    child = Child("a child", "talking", [], environment, is_quiet=True)
    await child.start()
    await child.stop(grace_seconds=30)
    assert capfd.readouterr().err == ""
    child = Child("a child", "failing", [], environment, is_quiet=True)
    with pytest.raises(ChildEndedError):
        await child.start()
    assert capfd.readouterr().err == "failing: the reason\n"
    await child.stop(grace_seconds=30)


async def test_a_child_that_ignores_being_asked_is_killed(tmp_path: Path) -> None:
    child = Child("a child", "deaf", [], modules.write(tmp_path, deaf=modules.DEAF))
    await child.start()
    await child.stop(grace_seconds=0.2)
    assert await child.wait() == -signal.SIGKILL


async def test_a_child_does_not_see_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rest_shim.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    child = Child("the HTTP server", "rest_shim", ["--version-does-not-exist"])
    with pytest.raises(ChildEndedError, match="status 2"):
        await child.start()


def test_children_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    environment = modules.write(tmp_path, deaf=modules.DEAF)
    program = (
        "import asyncio\n"
        "from osaurus_grpc.cli.process import Child\n"
        "async def main():\n"
        "    child = Child('a child', 'deaf', [])\n"
        "    await child.start()\n"
        "    print(child.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=os.environ | environment
    )
    assert parent.stdout is not None
    with parent.stdout as stdout:
        child_pid = int(stdout.readline())
        assert psutil.pid_exists(child_pid)
        parent.kill()
        parent.wait()
        wait_until_gone(child_pid)


@pytest.mark.parametrize(
    ("status", "text"),
    [(0, "ended with status 0"), (3, "ended with status 3"), (-9, "was ended by SIGKILL")],
)
def test_endings_in_words(status: int, text: str) -> None:
    assert ending_text(status) == text
