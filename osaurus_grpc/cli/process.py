"""One child process of ours: started by spawn, told from its first line to be up, ended for certain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence

# Between the start of a child and the line that says it listens: imports, on a busy machine.
START_SECONDS = 180.0
KILL_SECONDS = 10.0
_LISTENING = " listening on "


class ChildEndedError(Exception):
    """A child ended before it was up. What it had to say is on stderr.

    Args:
        name: The child's name, for people.
        status: Its exit status; negative is the signal that ended it.
    """

    def __init__(self, name: str, status: int) -> None:
        super().__init__(f"{name} {ending_text(status)}")
        self.name = name
        self.status = status


def ending_text(status: int) -> str:
    """How a process ended, for people, from its exit status."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


class Child:
    """A Python module that runs as a child and ends with this process.

    It has a session of its own, so that Ctrl-C in the terminal reaches this process alone, which
    then ends its children in order. Its stderr is ours, or, where it is quiet, shown only if it does
    not start.

    Args:
        name: For people, for example "the core".
        module: Run as python -m MODULE.
        arguments: Its command line.
        environment: Added to this process's environment; for what the command line must not show.
        is_quiet: Keep its logs to ourselves.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        is_quiet: bool = False,
    ) -> None:
        self.name = name
        self.arguments = list(arguments)
        self._module = module
        self._environment = dict(environment or {})
        self._log = tempfile.TemporaryFile() if is_quiet else None  # noqa: SIM115  (goes with this object)
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """Process number of the child; 0 before its first start."""
        return self._process.pid if self._process else 0

    async def spawn(self) -> None:
        """Start it and return at once."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the current directory holds no modules of ours
            "-m",
            "osaurus_grpc.cli.lifeline",
            self._module,
            *self.arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._log,
            env=os.environ | self._environment,
            start_new_session=True,
        )

    async def start(self) -> str:
        """Start it and wait until it listens.

        Returns:
            The address it printed: what follows "listening on" on its first such line.

        Raises:
            ChildEndedError: It ended instead.
            TimeoutError: It did neither; it still runs.
        """
        await self.spawn()
        async with asyncio.timeout(START_SECONDS):
            address = await self._read_address()
        self._output = asyncio.create_task(self._forward_output())
        return address

    def _stdout(self) -> asyncio.StreamReader:
        assert self._process is not None, "spawned"
        assert self._process.stdout is not None, "a pipe"
        return self._process.stdout

    async def _read_address(self) -> str:
        while line := await self._stdout().readline():
            _, separator, address = line.decode(errors="replace").partition(_LISTENING)
            if separator:
                return address.strip()
        status = await self.wait()
        if self._log is not None:
            self._log.seek(0)
            sys.stderr.write(self._log.read().decode(errors="replace"))
        raise ChildEndedError(self.name, status)

    async def _forward_output(self) -> None:
        """Keep the pipe empty, or the child would block; its logs are on stderr."""
        stdout = self._stdout()
        while chunk := await stdout.read(65536):
            with contextlib.suppress(OSError):  # whoever read our stderr may have gone
                sys.stderr.write(chunk.decode(errors="replace"))

    async def output(self) -> str:
        """All that it writes to stdout, for a child that was spawned and ends by itself."""
        return (await self._stdout().read()).decode(errors="replace")

    async def wait(self) -> int:
        """Wait for its end and return its exit status; negative is a signal."""
        assert self._process is not None, "spawned"
        return await self._process.wait()

    async def stop(self, grace_seconds: float) -> None:
        """Ask it to end, wait, and end it by force where it does not."""
        if self._process is not None and self._process.returncode is None:
            self._signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_seconds):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
                async with asyncio.timeout(KILL_SECONDS):
                    await self._process.wait()
        if self._output is not None:
            self._output.cancel()
            self._output = None
        if self._log is not None:
            self._log.close()

    def kill(self) -> None:
        """End it, and whatever it started, now."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number is signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)
