from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from osaurus_grpc import settings as core_module
from osaurus_grpc.cli.main import main
from osaurus_grpc.cli.serve import curl_line, read_plan
from rest_shim import settings as rest_module


def test_each_process_gets_its_own_flags_as_they_were_written(tmp_path: Path) -> None:
    plan = read_plan(
        [
            "--port=8081",
            "--grpc-port",
            "9001",
            f"--models-dir={tmp_path}",
            "--alias=a=b",
            "--alias=c=d",
            "--keep-alive-seconds=-1",
            "--no-hub-cache",
            "--allowed-origin=https://one.example",
            "--max-body-bytes=1000",
        ]
    )
    assert plan.core_arguments == (
        "--grpc-port=9001",
        f"--models-dir={tmp_path}",
        "--no-hub-cache",
        "--alias=a=b",
        "--alias=c=d",
        "--keep-alive-seconds=-1",
    )
    assert plan.rest_arguments == (
        "--port=8081",
        "--allowed-origin=https://one.example",
        "--max-body-bytes=1000",
    )
    assert core_module.read(plan.core_arguments) == plan.core
    assert rest_module.read(plan.rest_arguments) == plan.rest
    assert plan.core.aliases == (("a", "b"), ("c", "d"))


def test_flags_of_both_processes_go_to_both() -> None:
    plan = read_plan(["--host=127.0.0.2", "--log-level=debug", "--drain-seconds=3", "--insecure-expose"])
    assert sorted(plan.core_arguments) == sorted(plan.rest_arguments)
    assert len(plan.core_arguments) == 4
    assert plan.core.host == plan.rest.host == "127.0.0.2"
    assert plan.core.drain_seconds == plan.rest.drain_seconds == 3


def test_nothing_given_is_nothing_passed_on() -> None:
    plan = read_plan([])
    assert plan.core_arguments == plan.rest_arguments == ()
    assert plan.rest.port == 1337
    assert plan.core.grpc_port == 50051


def test_the_environment_and_the_file_are_left_to_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OSU_PORT", "8082")
    monkeypatch.setenv("OSAURUS_MAX_BATCH_SIZE", "3")
    file = tmp_path / "settings.toml"
    file.write_text('[core]\nhost = "127.0.0.3"\nmax-batch-size = 4\n[rest]\nhost = "127.0.0.4"\n')
    plan = read_plan([f"--config={file}"])
    assert plan.core_arguments == plan.rest_arguments == (f"--config={file}",)
    assert (plan.core.host, plan.rest.host) == ("127.0.0.3", "127.0.0.4")
    assert (plan.core.max_batch_size, plan.rest.port) == (3, 8082)


def test_keys_are_not_on_a_command_line() -> None:
    plan = read_plan(["--api-key=first-key", "--api-key=second-key"])
    assert plan.core.api_keys == ("first-key", "second-key")
    assert not any("key" in text for text in plan.core_arguments + plan.rest_arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port=high"], "--port"),
        (["--port=65536"], "--port"),
        (["--grpc-port=-1"], "--grpc-port"),
        (["--alias=nonsense"], "--alias"),
        (["--dtype=int8"], "--dtype"),
        (["--core=127.0.0.1:1"], "--core"),
        (["leftover"], "leftover"),
    ],
)
def test_wrong_flags_are_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "HTTP port (default 1337)" in printed
    assert "gRPC port (default 50051)" in printed
    assert "SUPPRESS" not in printed


@pytest.mark.parametrize(("flag", "kind"), [("--port", "HTTP"), ("--grpc-port", "gRPC")])
def test_a_taken_port_is_named_before_a_model_is_fetched(
    flag: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "--grpc-port" if flag == "--port" else "--port"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = [f"{flag}={port}", f"{other}=0", f"--models-dir={tmp_path}", "--model=no/such-model"]
        assert main(["serve", *arguments]) == 1
    told = capsys.readouterr().err
    assert told == f"osaurus: the {kind} port {port} on 127.0.0.1 is taken; choose another with {flag}.\n"


def test_one_port_for_both_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert main(["serve", f"--port={port}", f"--grpc-port={port}", f"--models-dir={tmp_path}"]) == 1
    assert "cannot share port" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])  # noqa: S104  (refused, not bound)
def test_an_open_address_needs_a_key(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", f"--host={host}", f"--models-dir={tmp_path}", "--port=0", "--grpc-port=0"]) == 1
    assert "OSAURUS_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_foreign_address_is_named(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--host={host}", f"--models-dir={tmp_path}", "--port=0", "--grpc-port=0"]
    assert main(["serve", *arguments, "--insecure-expose"]) == 1
    assert f"{host} is not an address of this machine" in capsys.readouterr().err


def test_a_models_directory_that_is_a_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["serve", f"--models-dir={tmp_path / 'file'}"]) == 1
    assert "--models-dir" in capsys.readouterr().err


def test_the_curl_line_is_quoted_for_a_shell() -> None:
    line = curl_line("http://127.0.0.1:1", "it's", needs_key=False)
    body = line.partition(" -d ")[2]
    assert body.startswith("'")
    assert json.loads(body[1:-1].replace("'\\''", "'"))["model"] == "it's"
    assert "Authorization" not in line
    assert "$OSAURUS_API_KEY" in curl_line("http://127.0.0.1:1", "m", needs_key=True)
