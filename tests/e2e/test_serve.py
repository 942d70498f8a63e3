"""osaurus serve from start to end, with the tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from osaurus_grpc.cli.supervisor import is_healthy
from osaurus_grpc.client import AsyncOsaurus
from osaurus_grpc.v1 import chat_pb2
from tests.e2e.serving import Served, run_command, serving, start, without_privileges
from tests.models.folders import write_model


def chat_over_http(url: str, **fields: object) -> dict[str, object]:
    body = {"model": "tiny-llama", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]} | fields
    request = urllib.request.Request(  # noqa: S310  (our own http URL)
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310  (as above)
        parsed: dict[str, object] = json.load(answer)
    return parsed


def test_it_answers_over_http(tiny_served: Served) -> None:
    assert chat_over_http(tiny_served.http)["model"] == "tiny-llama"


async def test_it_answers_over_grpc(tiny_served: Served) -> None:
    request = chat_pb2.ChatRequest()  # no model: the one that was served is the default
    request.messages.add(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text="Hi")])
    request.sampling.max_tokens = 4
    async with AsyncOsaurus(tiny_served.grpc) as client:
        events = [event async for event in client.chat_stream(request)]
    assert events[0].started.model == "tiny-llama"
    assert not events[0].started.HasField("load_duration")


def test_the_curl_line_works_when_pasted(tiny_served: Served) -> None:
    if shutil.which("curl") is None:
        pytest.skip("this machine has no curl")
    line = next(line.strip() for line in tiny_served.text.splitlines() if line.strip().startswith("curl "))
    answered = subprocess.run(["/bin/sh", "-c", f"{line} -s"], capture_output=True, timeout=120)
    assert json.loads(answered.stdout)["object"] == "chat.completion"


def test_status_ps_and_run_find_it(tiny_served: Served, served_dir: Path) -> None:
    status = run_command(tiny_served.home, "status")
    assert status.returncode == 0
    assert status.stdout.startswith("running\n")
    for known in (tiny_served.http, tiny_served.grpc, str(tiny_served.popen.pid), str(served_dir)):
        assert known in status.stdout
    assert "models loaded     tiny-llama" in status.stdout
    ps = run_command(tiny_served.home, "ps")
    assert ps.returncode == 0
    assert ps.stdout.splitlines()[1].startswith("tiny-llama ")
    before = {process.pid for process in tiny_served.children}
    ran = run_command(
        tiny_served.home,
        "run", "tiny-llama", "Hi", "there", "--max-tokens=4", f"--models-dir={served_dir}",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    assert {process.pid for process in tiny_served.children if process.is_running()} == before


def test_a_second_server_on_the_models_directory_is_refused(tiny_served: Served, served_dir: Path) -> None:
    second = run_command(tiny_served.home, "serve", f"--models-dir={served_dir}", "--port=0", "--grpc-port=0")
    assert second.returncode == 1
    assert tiny_served.http in second.stderr
    assert "osaurus stop" in second.stderr
    assert "Traceback" not in second.stderr
    # The first is not harmed, nor is what it left on disk.
    assert is_healthy(tiny_served.http)
    assert run_command(tiny_served.home, "status").returncode == 0


def test_a_second_server_may_share_the_models_directory(
    tiny_served: Served, served_dir: Path, home: Path
) -> None:
    with serving(home, f"--models-dir={served_dir}", "--share-models-dir") as second:
        assert second.http != tiny_served.http
        assert is_healthy(second.http)
        assert second.signal_and_wait(signal.SIGTERM) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(number: signal.Signals, models_dir: Path, home: Path) -> None:
    with serving(home, "--model=tiny-llama", f"--models-dir={models_dir}") as served:
        assert served.signal_and_wait(number) == 0
        served.assert_no_child_is_left()
        assert not is_healthy(served.http)
        assert "Traceback" not in served.err()
        assert "terminate called" not in served.err()
    assert list((home / "runtime").iterdir()) == []
    assert run_command(home, "status").stdout == "stopped\n"


def test_stop_ends_it_and_says_so(models_dir: Path, home: Path) -> None:
    with serving(home, f"--models-dir={models_dir}") as served:
        stopped = run_command(home, "stop")
        assert (stopped.returncode, stopped.stdout) == (0, "stopped\n")
        assert served.popen.wait(5) == 0
        served.assert_no_child_is_left()


def test_nothing_outlives_a_server_that_was_killed(models_dir: Path, home: Path) -> None:
    with serving(home, f"--models-dir={models_dir}") as served:
        served.popen.kill()
        served.popen.wait()
        served.assert_no_child_is_left()
        # What it left behind is neither shown nor in the way.
        assert run_command(home, "status").stdout == "stopped\n"
        with serving(home, f"--models-dir={models_dir}") as next_one:
            assert is_healthy(next_one.http)


def test_without_a_model_it_serves_and_says_how_to_get_one(tmp_path: Path, home: Path) -> None:
    with serving(home, f"--models-dir={tmp_path / 'new' / 'models'}") as served:
        assert "No model is installed yet" in served.text
        assert "osaurus pull smollm2-135m-instruct" in served.text
        assert (tmp_path / "new" / "models").is_dir()
        # A model that arrives while it runs is there at once.
        source = write_model(tmp_path / "arrived")
        pulled = run_command(home, "pull", str(source), f"--models-dir={tmp_path / 'new' / 'models'}")
        assert pulled.stdout == "arrived\n"
        with urllib.request.urlopen(f"{served.http}/v1/models", timeout=30) as answer:  # noqa: S310  (http)
            assert [model["id"] for model in json.load(answer)["data"]] == ["arrived"]
        assert run_command(home, "ps").stdout == "(no models loaded)\n"


def refused(home: Path, *arguments: str) -> str:
    """Start a server that cannot start, and return what it said."""
    ended = run_command(home, "serve", "--port=0", "--grpc-port=0", "--no-hub-cache", *arguments)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert not list((home / "runtime").glob("*"))
    return ended.stderr


def test_a_wrong_model_is_refused_with_near_names(models_dir: Path, home: Path) -> None:
    told = refused(home, "--model=tiny-lama", f"--models-dir={models_dir}")
    assert "tiny-lama" in told
    assert "Did you mean tiny-llama" in told
    assert "Traceback" not in told


def test_a_model_that_cannot_be_loaded_ends_the_start_with_one_message(tmp_path: Path, home: Path) -> None:
    write_model(tmp_path / "models" / "broken", config={"model_type": "no-such-architecture"})
    told = refused(home, "--model=broken", f"--models-dir={tmp_path / 'models'}", "--log-level=error")
    assert told.count("cannot load the model broken") == 1
    assert "so the server was not started" in told


def test_a_missing_model_is_fetched_first(tiny_dir: Path, tmp_path: Path, home: Path) -> None:
    models_dir = tmp_path / "models"
    with serving(home, f"--model={tiny_dir / 'tiny-llama'}", f"--models-dir={models_dir}") as served:
        assert "Osaurus is ready with tiny-llama" in served.text
        assert chat_over_http(served.http)["model"] == "tiny-llama"
        assert "is not installed; fetching it" in served.err()


def test_a_models_directory_that_is_read_only_is_no_error(models_dir: Path, home: Path) -> None:
    models_dir.chmod(0o555)
    try:
        arguments = ("--model=tiny-llama", f"--models-dir={models_dir}")
        with serving(home, *arguments, prefix=without_privileges()) as served:
            assert chat_over_http(served.http)["model"] == "tiny-llama"
            # The lock holds all the same.
            assert "another server" in refused_beside(home, f"--models-dir={models_dir}")
    finally:
        models_dir.chmod(0o755)


def refused_beside(home: Path, *arguments: str) -> str:
    """Start a second server that cannot start, and return what it said."""
    ended = run_command(home, "serve", "--port=0", "--grpc-port=0", *arguments)
    assert ended.returncode == 1
    return ended.stderr


def test_keys_are_asked_for_and_not_shown_on_a_command_line(models_dir: Path, home: Path) -> None:
    with serving(home, "--api-key=hidden-key", f"--models-dir={models_dir}") as served:
        assert all("hidden-key" not in " ".join(child.cmdline()) for child in served.children)
        with pytest.raises(urllib.error.HTTPError) as raised:
            chat_over_http(served.http)
        raised.value.close()
        assert raised.value.code == 401
        assert "models loaded     unknown" in run_command(home, "status").stdout
        known = run_command(home, "status", env={"OSAURUS_API_KEY": "hidden-key"})
        assert "models loaded     none" in known.stdout
        assert 'Authorization: Bearer $OSAURUS_API_KEY"' in served.text


def test_rm_takes_a_model_from_disk_and_memory(tiny_dir: Path, tmp_path: Path, home: Path) -> None:
    models_dir = tmp_path / "models"
    shutil.copytree(tiny_dir, models_dir)
    with serving(home, "--model=tiny-llama", f"--models-dir={models_dir}"):
        assert "tiny-llama" in run_command(home, "ps").stdout
        removed = run_command(home, "rm", "tiny-llama", f"--models-dir={models_dir}")
        assert removed.returncode == 0, removed.stderr
        assert run_command(home, "ps").stdout == "(no models loaded)\n"
        listed = run_command(home, "list", f"--models-dir={models_dir}")
        assert listed.stdout == "(no models installed)\n"


def test_ctrl_c_while_it_starts_leaves_nothing(models_dir: Path, home: Path) -> None:
    served = start(home, "--model=tiny-llama", f"--models-dir={models_dir}")
    try:
        while "loading" not in served.err():
            assert served.popen.poll() is None
        os.kill(served.popen.pid, signal.SIGINT)
        assert served.popen.wait(60) == 0
    finally:
        assert served.popen.stdout is not None
        served.popen.kill()
        served.popen.stdout.close()
    assert "Traceback" not in served.err()


def test_a_runtime_directory_that_cannot_be_written_is_no_reason_not_to_serve(
    models_dir: Path, home: Path
) -> None:
    (home / "runtime").touch()
    with serving(home, f"--models-dir={models_dir}") as served:
        assert is_healthy(served.http)
        assert "`osaurus status` and `osaurus stop` will not find this server" in served.err()


def test_nohup_outlives_the_terminal(models_dir: Path, home: Path) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as nohup does it
    try:
        with serving(home, f"--models-dir={models_dir}") as served:
            served.popen.send_signal(signal.SIGHUP)
            served.popen.send_signal(signal.SIGHUP)
            assert run_command(home, "status").returncode == 0
            assert is_healthy(served.http)
            assert served.signal_and_wait(signal.SIGTERM) == 0
    finally:
        signal.signal(signal.SIGHUP, previous)
