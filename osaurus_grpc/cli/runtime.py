"""What running servers leave on disk: a file with their addresses.

`osaurus status`, `stop`, `ps` and `run` find servers by the files serve-PID.json in the runtime
directory. A file outlives a server that was killed, so a reader checks that its process is alive
and is no older process number given to another program, and removes what is stale.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from osaurus_grpc.settings import default_runtime_dir

# A process starts before the server in it says so; clocks are read with this much slack.
_CLOCK_SLACK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that `osaurus serve` runs on this machine.

    Attributes:
        pid: Of the supervising process; SIGTERM there stops everything.
        http: Base URL, for example "http://127.0.0.1:1337".
        grpc: "HOST:PORT".
        models_dir: Absolute.
        started: When it was ready, UTC.
    """

    pid: int
    http: str
    grpc: str
    models_dir: Path
    started: datetime

    def to_json(self) -> str:
        """The runtime file's text."""
        return json.dumps(
            {
                "pid": self.pid,
                "http": self.http,
                "grpc": self.grpc,
                "models_dir": str(self.models_dir),
                "started": self.started.isoformat(),
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str) -> RunningServer:
        """Read a runtime file. ValueError, KeyError or TypeError where it is not one."""
        values = json.loads(text)
        return cls(
            pid=int(values["pid"]),
            http=str(values["http"]),
            grpc=str(values["grpc"]),
            models_dir=Path(values["models_dir"]),
            started=datetime.fromisoformat(values["started"]),
        )

    def is_alive(self) -> bool:
        """Whether the process that wrote the file still runs."""
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return process.create_time() <= self.started.timestamp() + _CLOCK_SLACK_SECONDS
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True


def _file(pid: int) -> Path:
    return default_runtime_dir() / f"serve-{pid}.json"


def record(server: RunningServer) -> None:
    """Write a server's runtime file, whole or not at all. OSError where that is impossible."""
    target = _file(server.pid)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".serve-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(server.to_json())
        Path(temporary).replace(target)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def forget(pid: int) -> None:
    """Remove a server's runtime file, if there is one."""
    with contextlib.suppress(OSError):
        _file(pid).unlink(missing_ok=True)


def now() -> datetime:
    """This moment, as runtime files have it."""
    return datetime.now(UTC)


def running_servers(models_dir: Path | None = None) -> list[RunningServer]:
    """The servers that run, oldest first; with models_dir, those that use that directory.

    Files of servers that are gone are removed on the way.
    """
    found = []
    for path in sorted(default_runtime_dir().glob("serve-*.json")):
        try:
            server = RunningServer.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not server.is_alive():
            forget(server.pid)
        elif models_dir is None or _same_directory(server.models_dir, models_dir):
            found.append(server)
    return sorted(found, key=lambda server: server.started)


def _same_directory(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one == other
