"""Environments of real clients: a virtual environment or a node_modules folder, kept between runs.

Each folder beside this file that holds a requirements.txt or a package.json is a client; its other
files are cases for that client's own test runner (pytest, node --test), which reports as JUnit XML.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from filelock import FileLock

_HERE = Path(__file__).parent
_MANIFESTS = ("requirements.txt", "package.json")
_LOCK_SECONDS = 600
_INSTALL_SECONDS = 420
_RUN_SECONDS = 420


class ClientFailedError(Exception):
    """A client could not be installed, or its runner ended without a report; the text says what it said."""


@dataclass(frozen=True, slots=True)
class Case:
    """What came of one case.

    Attributes:
        name: As its file calls it.
        outcome: "passed", "failed", or "expected": it fails, as its file says it does.
        reason: Why it failed or is expected to.
    """

    name: str
    outcome: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Client:
    """A client: a folder beside this file."""

    folder: Path

    @property
    def name(self) -> str:
        """What CLIENT_SUITES calls it."""
        return self.folder.name

    @property
    def is_python(self) -> bool:
        """Whether its environment is a virtual one; otherwise it is a node_modules folder."""
        return (self.folder / "requirements.txt").exists()

    def environment(self, cache: Path) -> Path:
        """Its environment's folder, installed on first use and whenever its manifest changed."""
        manifest = self.folder / ("requirements.txt" if self.is_python else "package.json")
        version = hashlib.sha256(manifest.read_bytes() + sys.version.encode()).hexdigest()[:12]
        path = cache / f"{self.name}-{version}"
        with FileLock(cache / f"{self.name}.lock", timeout=_LOCK_SECONDS):
            if not (path / "installed").exists():
                for old in cache.glob(f"{self.name}-" + "[0-9a-f]" * 12):
                    shutil.rmtree(old)
                path.mkdir()
                shutil.copy(manifest, path)
                (_install_python if self.is_python else _install_node)(path)
                (path / "installed").touch()
        return path

    def run(self, cache: Path, settings: Mapping[str, str]) -> list[Case]:
        """Run its cases.

        Args:
            cache: Where environments are kept.
            settings: Environment variables that tell the cases where the server is.

        Raises:
            ClientFailedError: It could not be installed or run.
        """
        environment = self.environment(cache)
        with tempfile.TemporaryDirectory(dir=environment, prefix="run-") as scratch:
            # Node finds packages from where a script lies.
            cases = Path(scratch) / "cases"
            ignored = shutil.ignore_patterns(*_MANIFESTS, "__pycache__")
            shutil.copytree(self.folder, cases, ignore=ignored)
            shutil.copy(_HERE / "runner.ini", cases / "pytest.ini")
            report = Path(scratch) / "report.xml"
            command = self._command(environment, cases, report)
            # What is imported of a client is compiled then, and kept: less than all that is installed.
            dropped = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
            kept = {name: value for name, value in os.environ.items() if name not in dropped}
            env = {**kept, **settings, "HOME": scratch}
            said = _run(command, cases, _RUN_SECONDS, env)
            try:
                found = _cases(report)
            except (OSError, ElementTree.ParseError):
                found = []
        if not found or (said.returncode and not any(case.outcome == "failed" for case in found)):
            raise ClientFailedError(f"its runner ended with status {said.returncode}:\n{said.stdout}")
        return found

    def _command(self, environment: Path, cases: Path, report: Path) -> list[str]:
        if self.is_python:
            scripts = sorted(str(path) for path in cases.glob("cases*.py"))
            options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            return [str(environment / "bin" / "python"), "-m", "pytest", *options, *scripts]
        scripts = sorted(str(path) for path in cases.glob("cases*.mjs"))
        options = ["--test-reporter=junit", f"--test-reporter-destination={report}"]
        return ["node", "--test", *options, *scripts]


def clients() -> list[Client]:
    """All of them, by name."""
    folders = {path.parent for manifest in _MANIFESTS for path in _HERE.glob(f"*/{manifest}")}
    return [Client(folder) for folder in sorted(folders)]


def _install_python(path: Path) -> None:
    # This environment's pip installs, with the settings of whoever runs the tests.
    _checked([sys.executable, "-m", "venv", "--without-pip", str(path)], path)
    python = str(path / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    _checked([*pip, "-r", "requirements.txt"], path)


def _install_node(path: Path) -> None:
    _checked(["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"], path)


def _checked(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise ClientFailedError(f"{command[0]} is not installed")
    said = _run(command, folder, _INSTALL_SECONDS, os.environ)
    if said.returncode:
        raise ClientFailedError(f"{' '.join(command)} ended with status {said.returncode}:\n{said.stdout}")


def _run(
    command: list[str], folder: Path, seconds: float, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=env,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def _cases(report: Path) -> list[Case]:
    # Our own runners wrote it.
    return [_case(element) for element in ElementTree.parse(report).getroot().iter("testcase")]  # noqa: S314


def _case(element: ElementTree.Element) -> Case:
    # pytest says which class of which file; the files are all called "cases".
    place = element.get("classname", "").rpartition(".")[2]
    name = "::".join(part for part in (place, element.get("name", "")) if part not in ("", "cases", "test"))
    failure = element.find("failure")
    if failure is None:
        failure = element.find("error")
    skipped = element.find("skipped")
    if skipped is not None and skipped.get("type") in ("pytest.xfail", "todo"):
        # Node reports a todo that passes in the same way, but without its failure.
        if skipped.get("type") == "todo" and failure is None:
            return Case(name, "failed", "it passes, though it is expected to fail")
        return Case(name, "expected", skipped.get("message", ""))
    if failure is not None:
        return Case(name, "failed", "\n".join(filter(None, (failure.get("message"), failure.text))))
    if skipped is not None:
        return Case(name, "skipped", skipped.get("message", ""))
    return Case(name, "passed")
