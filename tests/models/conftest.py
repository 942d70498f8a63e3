"""What the tests of sources share: a local hub, a recorder of progress, a fetch in a child process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from osaurus_grpc.models.sources import FetchProgress, fetch
from tests.models.hub_server import Hub, running_hub

CHILD = """
import resource, sys
from pathlib import Path
from osaurus_grpc.errors import OsaurusError
limit = int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from osaurus_grpc.models.sources import fetch
try:
    fetch(sys.argv[1], Path(sys.argv[2]), report=lambda progress: None)
except OsaurusError as error:
    print(type(error).__name__, error.message)
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A local hub that the hub client of this process, and of its children, uses."""
    with running_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        # Retries at once: the waits between them are not what is tested.
        monkeypatch.setattr("osaurus_grpc.models.sources.transfer._RETRY_SECONDS", (0.0,) * 4)
        yield running


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    return tmp_path / "models"


class Recorder:
    """Collects progress reports."""

    def __init__(self) -> None:
        self.reports: list[FetchProgress] = []

    def __call__(self, progress: FetchProgress) -> None:
        self.reports.append(progress)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def fetch_quietly(name: str | Path, models_dir: Path) -> Path:
    return fetch(str(name), models_dir, report=lambda progress: None)


def start_child_fetch(name: str | Path, models_dir: Path, *, file_limit: int = 0) -> subprocess.Popen[str]:
    """Fetch in a child process; file_limit (bytes) is the largest file that it may write, 0 for any."""
    command = [sys.executable, "-c", CHILD, str(name), str(models_dir), str(file_limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def child_fetch_output(name: str | Path, models_dir: Path, *, file_limit: int = 0) -> str:
    """Fetch in a child process and return what it said: an error's type and text, or nothing."""
    with start_child_fetch(name, models_dir, file_limit=file_limit) as child:
        output, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    return output


def leftovers(models_dir: Path) -> list[str]:
    """What lies in the staging area, locks aside."""
    staging = models_dir / ".staging"
    return sorted(str(path.relative_to(staging)) for path in staging.glob("*") if path.name != ".locks")
