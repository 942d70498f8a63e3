from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from osaurus_grpc import __version__
from osaurus_grpc.cli.main import COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {command.name} " in printed for command in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["fly"], ["--fly"]])
def test_wrong_usage_prints_the_usage_and_exits_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "usage: osaurus COMMAND" in captured.err
    assert captured.out == ""


def test_a_misspelt_command_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serv"]) == 2
    assert "there is no command 'serv'; did you mean serve?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["version"], ["--version"], ["-v"]])
def test_version(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"osaurus {__version__}\n"


@pytest.mark.parametrize("name", [command.name for command in COMMANDS if command.name != "version"])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"usage: osaurus {name} " in capsys.readouterr().out
    assert main(["help", name]) == 0
    assert f"usage: osaurus {name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", [command.name for command in COMMANDS if command.name != "version"])
def test_an_unknown_flag_is_wrong_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "x", "y", "--no-such-flag"]) == 2
    assert "no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["status"], ["serve", "--help"], ["run", "--help"], ["stop"]]
)
def test_light_commands_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys; from osaurus_grpc.cli.main import main\n"
        f"main({[*arguments]!r})\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'grpc', 'torch', 'aiohttp'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OSU_MODELS_DIR": str(tmp_path / "models")},
    )
    assert ended.returncode == 0, ended.stderr


def test_output_into_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m osaurus_grpc.cli.main --help | true"
    ended = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in ended.stderr


def test_an_error_that_nobody_expected_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("osaurus_grpc.cli.models.catalog", broken)
    assert main(["list"]) == 1
    assert capsys.readouterr().err.startswith("osaurus: this is a bug: ZeroDivisionError")
