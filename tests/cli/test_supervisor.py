from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from osaurus_grpc.cli.process import Child, ChildEndedError
from osaurus_grpc.cli.supervisor import (
    GivingUpError,
    RestartPolicy,
    Supervisor,
    is_healthy,
    local_address,
    local_url,
)
from tests.cli import modules

HASTY = RestartPolicy(first_delay_seconds=0.01, max_delay_seconds=0.02, max_quick_endings=3)


def supervisor(folder: Path, core: str, shim: str) -> tuple[Supervisor, Child, Child]:
    environment = modules.write(folder, core=core, shim=shim)
    children = Child("the core", "core", [], environment), Child("the shim", "shim", [], environment)
    built = Supervisor(*children, core_grace_seconds=10, shim_grace_seconds=10, policy=HASTY)
    return built, *children


async def test_both_run_and_both_end(tmp_path: Path) -> None:
    supervised, core, shim = supervisor(tmp_path, modules.WELL, modules.WELL)
    addresses = await supervised.start()
    assert is_healthy(addresses.http)
    assert f"--core={addresses.grpc}" in shim.arguments
    await supervised.stop()
    assert not core.is_running
    assert not shim.is_running
    assert not is_healthy(addresses.http)


async def test_a_child_that_dies_is_started_again_on_its_port(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    supervised, core, shim = supervisor(tmp_path, modules.WELL, modules.WELL)
    addresses = await supervised.start()
    watching = asyncio.create_task(supervised.watch())
    try:
        for child in (shim, core):
            old = child.pid
            os.kill(old, signal.SIGKILL)
            async with asyncio.timeout(60):
                # A restarted child has no event for it.
                while child.pid == old or not await asyncio.to_thread(is_healthy, addresses.http):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert not watching.done()
        told = capsys.readouterr().err
        assert "the shim was ended by SIGKILL; starting it again" in told
        assert "the core was ended by SIGKILL; starting it again" in told
    finally:
        watching.cancel()
        await supervised.stop()
    assert not core.is_running
    assert not shim.is_running


async def test_a_child_that_keeps_dying_is_given_up(tmp_path: Path) -> None:
    supervised, core, shim = supervisor(tmp_path, modules.WELL, modules.WELL)
    await supervised.start()
    try:
        modules.write(tmp_path, core=modules.DYING)
        core.kill()
        async with asyncio.timeout(120):
            with pytest.raises(GivingUpError, match="the core was ended by SIGKILL"):
                await supervised.watch()
    finally:
        await supervised.stop()
    assert not shim.is_running


async def test_a_child_that_cannot_start_again_is_given_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    supervised, core, _ = supervisor(tmp_path, modules.WELL, modules.WELL)
    await supervised.start()
    try:
        modules.write(tmp_path, core=modules.FAILING)
        core.kill()
        async with asyncio.timeout(120):
            with pytest.raises(GivingUpError, match="ended with status 1"):
                await supervised.watch()
    finally:
        await supervised.stop()
    assert capfd.readouterr().err.count("failing: the reason") == HASTY.max_quick_endings


@pytest.mark.parametrize("failing", ["core", "shim"])
async def test_a_child_that_fails_at_first_is_not_started_again(
    failing: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sources = {"core": modules.WELL, "shim": modules.WELL} | {failing: modules.FAILING}
    supervised, core, shim = supervisor(tmp_path, **sources)
    try:
        with pytest.raises(ChildEndedError, match=f"the {failing} ended with status 1"):
            await supervised.start()
    finally:
        await supervised.stop()
    assert capfd.readouterr().err == "failing: the reason\n"
    assert not core.is_running
    assert not shim.is_running


async def test_a_core_that_dies_while_it_loads_ends_the_start(tmp_path: Path) -> None:
    unhealthy = modules.WELL.replace("200", "503")
    supervised, core, _ = supervisor(tmp_path, modules.WELL, unhealthy)
    starting = asyncio.create_task(supervised.start())
    try:
        while not core.is_running:  # noqa: ASYNC110  (a child has no event for it)
            await asyncio.sleep(0.02)
        core.kill()
        with pytest.raises(ChildEndedError, match="the core was ended by SIGKILL"):
            await starting
    finally:
        await supervised.stop()


def test_delays_double_up_to_a_bound() -> None:
    policy = RestartPolicy(first_delay_seconds=1, max_delay_seconds=5)
    assert [policy.delay_seconds(count) for count in range(6)] == [1, 1, 2, 4, 5, 5]


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("0.0.0.0:1", "127.0.0.1:1"),
        ("[::]:1", "[::1]:1"),
        (":::1", "[::1]:1"),
        ("[::1]:1", "[::1]:1"),
        ("192.0.2.1:1", "192.0.2.1:1"),
        ("localhost:1", "localhost:1"),
    ],
)
def test_addresses_as_a_client_on_this_machine_reaches_them(address: str, local: str) -> None:
    assert local_address(address) == local
    assert local_url(f"http://{address}/") == f"http://{local}"


def test_what_is_not_a_server_is_not_healthy(tmp_path: Path) -> None:
    assert not is_healthy("http://127.0.0.1:9", timeout=1)
    assert not is_healthy("http://no-such-host.invalid:80", timeout=1)
