from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from rest_shim.app import serving
from rest_shim.settings import Settings

from .scripted_core import ScriptedCore


@pytest.fixture
async def core() -> AsyncIterator[ScriptedCore]:
    scripted = ScriptedCore()
    server = await scripted.start()
    yield scripted
    await server.stop(None)


@pytest.fixture
def settings(core: ScriptedCore) -> Settings:
    """The shim's settings; a test module or class overrides the fixture for others."""
    return Settings(core=core.address, port=0, drain_seconds=5.0)


@pytest.fixture
async def shim(settings: Settings) -> AsyncIterator[str]:
    """Base URL of a shim in front of the scripted core, on a real port."""
    async with serving(settings) as urls:
        yield urls[0]


@pytest.fixture
async def http(shim: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(shim, timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield session
