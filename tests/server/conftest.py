"""A core inside the test's process, shared by the tests of this room.

One event loop for all of them: grpc.aio wants one a process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from osaurus_grpc.server.app import Core
from tests.server.cores import inference_stub, running_core


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def core(tiny_dir: Path) -> AsyncIterator[Core]:
    """A core that serves tiny-llama, limits off."""
    async with running_core(tiny_dir) as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def forgetful(tiny_dir: Path) -> AsyncIterator[Any]:
    """InferenceService of a core that serves tiny-llama and keeps no KV caches."""
    async with (
        running_core(tiny_dir, prompt_cache_bytes=0) as running,
        inference_stub(running.address) as stub,
    ):
        yield stub


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def inference(core: Core) -> AsyncIterator[Any]:
    """InferenceService of the shared core."""
    async with inference_stub(core.address) as stub:
        yield stub
