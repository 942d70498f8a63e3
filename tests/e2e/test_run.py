"""osaurus run, without a server and in a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.e2e.serving import COMMAND, run_command
from tests.harness.processes import child_environment
from tests.models.folders import write_model

TERMINAL_SECONDS = 120.0


def test_one_question_without_a_server(models_dir: Path, home: Path) -> None:
    ran = run_command(home, "run", "tiny-llama", "--max-tokens=5", f"--models-dir={models_dir}", "Hi")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("\n")
    assert ran.stdout.strip()
    assert "longest length" in ran.stderr
    again = run_command(
        home, "run", "tiny-llama", "Hi", "--seed=7", "--max-tokens=5", f"--models-dir={models_dir}"
    )
    same = run_command(
        home, "run", "tiny-llama", "--seed=7", "--max-tokens=5", f"--models-dir={models_dir}", stdin="Hi\n"
    )
    assert again.stdout == same.stdout


def test_no_prompt_is_an_error(models_dir: Path, home: Path) -> None:
    ran = run_command(home, "run", "tiny-llama", f"--models-dir={models_dir}", stdin="  \n")
    assert ran.returncode == 1
    assert "there is no prompt" in ran.stderr


def test_a_wrong_value_is_the_servers_error_in_one_line(models_dir: Path, home: Path) -> None:
    ran = run_command(home, "run", "tiny-llama", "Hi", "--temperature=9", f"--models-dir={models_dir}")
    assert ran.returncode == 1
    assert "temperature" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path, home: Path) -> None:
    write_model(tmp_path / "models" / "broken", config={"model_type": "no-such-architecture"})
    ran = run_command(home, "run", "broken", "Hi", f"--models-dir={tmp_path / 'models'}")
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert "no-such-architecture" in ran.stderr


class Terminal:
    """A command that believes to talk to a person."""

    def __init__(self, popen: subprocess.Popen[bytes], descriptor: int) -> None:
        self.popen = popen
        self._descriptor = descriptor
        self._text = ""

    def read_until(self, wanted: str) -> str:
        """What it printed, up to and with the wanted text."""
        deadline = time.monotonic() + TERMINAL_SECONDS
        while wanted not in self._text:
            left = max(deadline - time.monotonic(), 0)
            assert select.select([self._descriptor], [], [], left)[0], self._text
            try:
                self._text += os.read(self._descriptor, 4096).decode(errors="replace")
            except OSError as error:  # Linux's way of saying that the other side has closed
                raise AssertionError(f"it ended: {self._text}") from error
        before, _, self._text = self._text.partition(wanted)
        return before + wanted

    def interrupt_until(self, wanted: str) -> None:
        """Press Ctrl-C until it answers: between the prompt and the wait for a line, one is not seen."""
        deadline = time.monotonic() + TERMINAL_SECONDS
        while not select.select([self._descriptor], [], [], 1)[0]:
            assert time.monotonic() < deadline
            self.popen.send_signal(signal.SIGINT)
        self.read_until(wanted)

    def write(self, text: str) -> None:
        """Type something."""
        os.write(self._descriptor, text.encode())


@contextmanager
def terminal(home: Path, *arguments: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    popen = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=child_environment(home, {"OSAURUS_NO_HUB_CACHE": "true", "TERM": "dumb"}),
    )
    os.close(theirs)
    try:
        yield Terminal(popen, ours)
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait(30)
        os.close(ours)


def test_a_chat_in_a_terminal(endless_models_dir: Path, home: Path) -> None:
    with terminal(
        home,
        "run",
        "tiny-llama",
        "--temperature=0",
        "--max-tokens=100000",
        f"--models-dir={endless_models_dir}",
    ) as chat:
        chat.read_until("Ctrl-C stops an answer.")
        chat.read_until(">>> ")
        chat.write("Hello\n")
        chat.read_until("Hello\r\n")
        chat.read_until(" ")  # the answer has begun
        chat.popen.send_signal(signal.SIGINT)
        chat.read_until("stopped.")
        chat.read_until(">>> ")
        chat.write("/clear\n")
        chat.read_until(">>> ")
        core = psutil.Process(chat.popen.pid).children()
        assert len(core) == 1
        chat.write("/bye\n")
        assert chat.popen.wait(60) == 0
        _, alive = psutil.wait_procs(core, timeout=30)
        assert alive == []


def test_ctrl_d_ends_a_chat(models_dir: Path, home: Path) -> None:
    with terminal(home, "run", "tiny-llama", f"--models-dir={models_dir}") as chat:
        chat.read_until(">>> ")
        chat.interrupt_until("/bye or Ctrl-D")  # at the prompt it ends nothing
        chat.read_until(">>> ")
        chat.write("\x04")
        assert chat.popen.wait(60) == 0


def test_the_private_core_ends_with_a_killed_command(models_dir: Path, home: Path) -> None:
    with terminal(home, "run", "tiny-llama", f"--models-dir={models_dir}") as chat:
        chat.read_until(">>> ")
        core = psutil.Process(chat.popen.pid).children()
        chat.popen.kill()
        with contextlib.suppress(psutil.NoSuchProcess):
            _, alive = psutil.wait_procs(core, timeout=30)
            assert alive == []


def test_doctor_measures_the_installed_model(models_dir: Path, home: Path) -> None:
    ran = run_command(home, "doctor", f"--models-dir={models_dir}")
    assert ran.returncode == 0, ran.stderr
    for said in ("device", "weights", "mlx-lm", "grpcio", "GFLOP/s", "tiny-llama", "ms a token"):
        assert said in ran.stdout


def test_doctor_without_a_model_measures_what_it_can(tmp_path: Path, home: Path) -> None:
    ran = run_command(home, "doctor", f"--models-dir={tmp_path}")
    assert ran.returncode == 0, ran.stderr
    assert "GFLOP/s" in ran.stdout
    assert "osaurus pull" in ran.stderr
