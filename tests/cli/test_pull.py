"""Interrupting a fetch, and how progress looks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from osaurus_grpc.cli.main import main
from osaurus_grpc.cli.pull import ProgressDisplay
from osaurus_grpc.models import sources
from osaurus_grpc.models.sources import FetchCancelledError, FetchProgress


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_fetch_in_order(
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The source is a fake: it is as slow as the test needs it, which no real one can be made to be."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def endless(
        name: str,
        models_dir: Path,
        *,
        report: Callable[[FetchProgress], None],
        cancelled: threading.Event | None = None,
    ) -> Path:
        assert cancelled is not None
        report(FetchProgress("fetching", "weights", 1, 10))
        os.kill(os.getpid(), number)
        assert cancelled.wait(60)
        raise FetchCancelledError

    monkeypatch.setattr(sources, "fetch", endless)
    assert main(["pull", "some/model", f"--models-dir={tmp_path}"]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "interrupted; the same command goes on from here" in captured.err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_where_nobody_watches_each_step_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay()
    for done in (0, 50_000_000, 92_900_000):
        display(FetchProgress("fetching", "model.safetensors", done, 92_900_000))
        display(FetchProgress("fetching", "tokenizer.json"))
    display(FetchProgress("converting"))
    display.close()
    assert capsys.readouterr().err.splitlines() == [
        "osaurus: fetching model.safetensors (92.9 MB)",
        "osaurus: fetching tokenizer.json",
        "osaurus: converting",
    ]


def test_in_a_terminal_there_is_a_bar_for_each_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    display = ProgressDisplay()
    display(FetchProgress("fetching", "model.safetensors"))  # the size is not known at first
    for done in (0, 50_000_000, 92_900_000, 92_900_000):
        display(FetchProgress("fetching", "model.safetensors", done, 92_900_000))
        display(FetchProgress("fetching", "tokenizer.json", done // 100, 929_000))
    display(FetchProgress("converting"))
    display.close()
    told = capsys.readouterr().err
    assert "fetching model.safetensors: 100%" in told
    assert told.count("92.9M/92.9M") == 1
    assert told.count("929k/929k") == 1
    assert "converting" in told
