"""Keeps the core and the shim running: starts them, starts one again that dies, ends both in order."""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from osaurus_grpc.cli.output import note
from osaurus_grpc.cli.process import Child, ChildEndedError, ending_text

# Loading a model from a slow disk.
READY_SECONDS = 900.0
_HEALTH_SECONDS = 3.0
# Between two looks at a server that starts: soon at first, seldom when a large model loads.
_FIRST_INTERVAL_SECONDS = 0.1
_MAX_INTERVAL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a process that died is started again, and when that makes no sense any more.

    Attributes:
        first_delay_seconds: Before the first restart; doubled for each quick ending after that.
        max_delay_seconds: Upper bound of the delay.
        quick_seconds: A process that lived shorter ended quickly.
        max_quick_endings: So many in a row are tried again.
    """

    first_delay_seconds: float = 0.5
    max_delay_seconds: float = 8.0
    quick_seconds: float = 30.0
    max_quick_endings: int = 5

    def delay_seconds(self, quick_endings: int) -> float:
        """The delay before the next start, after so many quick endings in a row."""
        doubled = self.first_delay_seconds * 2.0 ** max(0, quick_endings - 1)
        return float(min(doubled, self.max_delay_seconds))


class GivingUpError(Exception):
    """A process dies again and again."""


class NotReadyError(Exception):
    """The server did not become healthy in time."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a client on this machine finds the server: a base URL, and HOST:PORT."""

    http: str
    grpc: str


class Supervisor:
    """The two processes of one server.

    Args:
        core: The gRPC core; its flag --grpc-port is set once its port is known.
        shim: The HTTP server; its flags --core and --port are set here.
        core_grace_seconds: What the core gets to end its calls.
        shim_grace_seconds: What the shim gets to end its requests.
        policy: Of restarts.
    """

    def __init__(
        self,
        core: Child,
        shim: Child,
        *,
        core_grace_seconds: float,
        shim_grace_seconds: float,
        policy: RestartPolicy | None = None,
    ) -> None:
        self._core = core
        self._shim = shim
        self._core_grace_seconds = core_grace_seconds
        self._shim_grace_seconds = shim_grace_seconds
        self._policy = policy or RestartPolicy()

    async def start(self) -> Addresses:
        """Start both and wait until they answer. Ports that the system chose are kept from then on.

        Raises:
            ChildEndedError: One of them ended instead; what it had to say is on stderr.
            NotReadyError: They run but do not answer.
        """
        try:
            grpc = local_address(await self._core.start())
            self._core.arguments.append(f"--grpc-port={_port(grpc)}")
            self._shim.arguments.append(f"--core={grpc}")
            http_url = local_url(await self._shim.start())
            self._shim.arguments.append(f"--port={_port(http_url)}")
            await self._until_healthy(http_url)
        except TimeoutError:
            raise NotReadyError("The server did not start in time.") from None
        return Addresses(http=http_url, grpc=grpc)

    async def _until_healthy(self, url: str) -> None:
        """Poll the shim's /health, which asks the core, until all is well or one of them ends."""
        healthy = asyncio.create_task(_poll_health(url))
        endings = {asyncio.create_task(child.wait()): child for child in (self._core, self._shim)}
        try:
            await asyncio.wait(
                (healthy, *endings), timeout=READY_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            for ending, child in endings.items():
                if ending.done():
                    raise ChildEndedError(child.name, ending.result())
            if not healthy.done():
                raise TimeoutError
            healthy.result()
        finally:
            await _cancel((healthy, *endings))

    async def watch(self) -> None:
        """Start what dies again, until cancelled.

        Raises:
            GivingUpError: One of the two died too often in too short a time.
        """
        keepers = [asyncio.create_task(self._keep(child)) for child in (self._core, self._shim)]
        try:
            done, _ = await asyncio.wait(keepers, return_when=asyncio.FIRST_COMPLETED)
            for keeper in done:
                keeper.result()
        finally:
            await _cancel(keepers)

    async def _keep(self, child: Child) -> None:
        """Wait for a child's end and start it again, over and over."""
        quick_endings = 0
        started = time.monotonic()
        while True:
            status = await child.wait()
            is_quick = time.monotonic() - started < self._policy.quick_seconds
            quick_endings = quick_endings + 1 if is_quick else 0
            if quick_endings > self._policy.max_quick_endings:
                raise GivingUpError(
                    f"{child.name} {ending_text(status)}, for the {quick_endings}th time in a row soon "
                    "after its start. Its messages above say why."
                )
            delay = self._policy.delay_seconds(quick_endings)
            note(f"{child.name} {ending_text(status)}; starting it again in {delay:g} s.")
            await asyncio.sleep(delay)
            started = time.monotonic()
            try:
                await child.start()
            except ChildEndedError:
                continue  # the next wait() returns at once, and this ending counts
            except TimeoutError:
                child.kill()
                continue
            note(f"{child.name} runs again.")

    async def stop(self) -> None:
        """End the shim, then the core; each may finish what it answers, within its grace."""
        await self._shim.stop(self._shim_grace_seconds)
        await self._core.stop(self._core_grace_seconds)

    def kill(self) -> None:
        """End both now."""
        self._shim.kill()
        self._core.kill()


async def _cancel(tasks: Sequence[asyncio.Task[None] | asyncio.Task[int]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def local_address(address: str) -> str:
    """HOST:PORT as a client on this machine reaches it: a wildcard becomes the loopback address."""
    host, _, port = address.rpartition(":")
    match host.strip("[]"):
        case "0.0.0.0":  # noqa: S104  (recognised here, not bound)
            return f"127.0.0.1:{port}"
        case "::":
            return f"[::1]:{port}"
        case name if ":" in name:
            return f"[{name}]:{port}"
        case name:
            return f"{name}:{port}"


def local_url(url: str) -> str:
    """A base URL as a client on this machine reaches it."""
    scheme, separator, address = url.rstrip("/").partition("://")
    return f"{scheme}{separator}{local_address(address)}"


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


async def _poll_health(url: str) -> None:
    interval = _FIRST_INTERVAL_SECONDS
    while not await asyncio.to_thread(is_healthy, url):
        await asyncio.sleep(interval)
        interval = min(interval * 1.5, _MAX_INTERVAL_SECONDS)


def is_healthy(url: str, timeout: float = _HEALTH_SECONDS) -> bool:
    """Whether GET /health of a server answers 200. Blocks, at most for about timeout seconds."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
