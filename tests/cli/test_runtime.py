from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from osaurus_grpc.cli import runtime
from osaurus_grpc.cli.runtime import RunningServer
from osaurus_grpc.models.ownership import ModelsDirInUseError, models_dir_lock


def server(models_dir: Path, pid: int | None = None, started: datetime | None = None) -> RunningServer:
    return RunningServer(
        pid=os.getpid() if pid is None else pid,
        http="http://127.0.0.1:4321",
        grpc="127.0.0.1:4322",
        models_dir=models_dir,
        started=started or runtime.now(),
    )


def test_a_recorded_server_is_found_until_it_is_forgotten(tmp_path: Path, runtime_dir: Path) -> None:
    running = server(tmp_path)
    runtime.record(running)
    assert runtime.running_servers() == [running]
    assert set(json.loads(next(runtime_dir.glob("*.json")).read_text())) == {
        "pid",
        "http",
        "grpc",
        "models_dir",
        "started",
    }
    runtime.forget(os.getpid())
    assert runtime.running_servers() == []
    assert list(runtime_dir.iterdir()) == []


def test_servers_are_found_by_their_models_directory(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "models")
    runtime.record(server(tmp_path / "models"))
    assert len(runtime.running_servers(tmp_path / "link")) == 1
    assert runtime.running_servers(tmp_path / "other") == []


def test_a_file_of_a_process_that_is_gone_is_removed(tmp_path: Path, runtime_dir: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    runtime.record(server(tmp_path, pid=child.pid))
    assert runtime.running_servers() == []
    assert list(runtime_dir.iterdir()) == []


def test_a_file_of_a_process_not_yet_reaped_is_removed(tmp_path: Path, runtime_dir: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout as stdout:
        stdout.read()  # returns at the child's end, which leaves a zombie
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    runtime.record(server(tmp_path, pid=child.pid))
    assert runtime.running_servers() == []
    child.wait()


def test_a_process_number_that_was_given_to_another_program_does_not_count(tmp_path: Path) -> None:
    runtime.record(server(tmp_path, started=datetime.now(UTC) - timedelta(days=400)))
    assert runtime.running_servers() == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": "x"}'])
def test_a_file_that_is_none_of_ours_is_passed_over(text: str, tmp_path: Path, runtime_dir: Path) -> None:
    runtime.record(server(tmp_path))
    (runtime_dir / "serve-1.json").write_text(text)
    assert len(runtime.running_servers()) == 1


def test_the_lock_is_exclusive_until_it_is_released(tmp_path: Path) -> None:
    with (
        models_dir_lock(tmp_path, is_shared=False),
        pytest.raises(ModelsDirInUseError),
        models_dir_lock(tmp_path, is_shared=False),
    ):
        pass
    with models_dir_lock(tmp_path, is_shared=False):
        pass


def test_a_server_that_shares_starts_in_any_case(tmp_path: Path) -> None:
    with models_dir_lock(tmp_path, is_shared=False), models_dir_lock(tmp_path, is_shared=True):
        pass


def test_a_server_that_does_not_share_meets_those_that_do(tmp_path: Path) -> None:
    with (
        models_dir_lock(tmp_path, is_shared=True),
        models_dir_lock(tmp_path, is_shared=True),
        pytest.raises(ModelsDirInUseError),
        models_dir_lock(tmp_path, is_shared=False),
    ):
        pass


def test_the_lock_needs_no_right_to_write_and_leaves_no_file(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with models_dir_lock(tmp_path, is_shared=False):
            assert list(tmp_path.iterdir()) == []
    finally:
        tmp_path.chmod(0o755)


def test_the_lock_goes_with_a_killed_process(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from osaurus_grpc.models.ownership import models_dir_lock\n"
        "with models_dir_lock(Path(sys.argv[1]), is_shared=False):\n    print('held', flush=True)\n"
        "    time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    try:
        with holder.stdout as stdout:
            assert stdout.readline() == b"held\n"
            with pytest.raises(ModelsDirInUseError), models_dir_lock(tmp_path, is_shared=False):
                pass
    finally:
        holder.kill()
        holder.wait()
    with models_dir_lock(tmp_path, is_shared=False):
        pass
