"""The foreign clients: how each is built and run."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CASES = ("list_models", "chat", "stream", "cancel", "deadline", "tool_call", "rich_error", "health")

_BUILD_SECONDS = 1200
_RUN_SECONDS = 240
_TRIES = 3
_PAUSE_SECONDS = 5


class ClientFailedError(Exception):
    """A client did not build, or did not say how its cases went; the text is its output."""


@dataclass(frozen=True, slots=True)
class ForeignClient:
    """A client in another language.

    Attributes:
        language: The folder's name below tests/interop.
        tools: Programs it needs.
        build: The script in its folder that builds it; run with the folder of the sources and the
            folder to build in.
        run: The program, relative to the folder it was built in, with its first arguments.
    """

    language: str
    tools: tuple[str, ...]
    run: tuple[str, ...]
    build: str = "build.sh"

    def missing_tools(self) -> list[str]:
        """What it needs and this machine does not have."""
        return [tool for tool in self.tools if shutil.which(tool) is None]

    def built(self, cache: Path) -> Path:
        """The folder it is built in; built where its sources or the protos changed.

        Raises:
            ClientFailedError: It does not build.
        """
        target = cache / f"{self.language}-{self._version()}"
        with FileLock(cache / f"{self.language}.lock", timeout=_BUILD_SECONDS):
            if not (target / ".built").exists():
                target.mkdir(parents=True, exist_ok=True)
                script = HERE / self.language / self.build
                _patiently(["bash", str(script), str(HERE / self.language), str(target)])
                (target / ".built").touch()
        return target

    def results(self, built: Path, address: str) -> dict[str, str]:
        """Case to what went wrong, "" for those that passed.

        Raises:
            ClientFailedError: It died, or hung.
        """
        program = [str(built / self.run[0]) if "/" in self.run[0] else self.run[0], *self.run[1:]]
        text = _output([*program, address], _RUN_SECONDS, cwd=built, is_checked=False)
        found: dict[str, str] = {}
        for line in text.splitlines():
            verdict, _, rest = line.partition(" ")
            case, _, detail = rest.partition(": ")
            if verdict in {"ok", "failed"} and case in CASES:
                found[case] = "" if verdict == "ok" else detail or "failed"
        if not found:
            raise ClientFailedError(text)
        return {case: found.get(case, "not reported") for case in CASES}

    def _version(self) -> str:
        digest = hashlib.sha256()
        for folder in (HERE / self.language, HERE / "protos", ROOT / "protos" / "osaurus"):
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
        return digest.hexdigest()[:12]


def _patiently(command: Sequence[str]) -> None:
    """Build; what is fetched for it may not come at the first try."""
    for _ in range(_TRIES - 1):
        try:
            _output(command, _BUILD_SECONDS)
        except ClientFailedError:
            time.sleep(_PAUSE_SECONDS)
        else:
            return
    _output(command, _BUILD_SECONDS)


def _output(
    command: Sequence[str], seconds: float, *, cwd: Path | None = None, is_checked: bool = True
) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
            env={**os.environ, "OSAURUS_REPOSITORY": str(ROOT)},
        )
    except subprocess.TimeoutExpired as error:
        raise ClientFailedError(f"no end after {seconds:.0f} s: {error.output!r}") from error
    if is_checked and done.returncode:
        raise ClientFailedError(done.stdout)
    return done.stdout


CLIENTS = (
    ForeignClient("go", ("go", "buf"), ("./client",)),
    ForeignClient("typescript", ("node", "npm", "buf"), ("node", "client.js")),
    ForeignClient("java", ("java", "mvn"), ("java", "-jar", "target/client.jar")),
    ForeignClient("rust", ("cargo",), ("./client",)),
    ForeignClient("cpp", ("g++", "cmake", "protoc", "grpc_cpp_plugin"), ("./client",)),
)
