"""A core whose MLX thread dies ends with an error, so that what supervises it starts it anew."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from osaurus_grpc.engine.runner import Runner
from osaurus_grpc.engine.types import GenerationRequest, SamplingParams
from osaurus_grpc.errors import EngineError
from osaurus_grpc.server import app
from osaurus_grpc.settings import Settings


async def test_it_ends_and_says_why(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared: asyncio.Future[app.Core] = asyncio.get_running_loop().create_future()
    prepare = app.Core.prepare

    async def watched(self: app.Core) -> None:
        await prepare(self)
        prepared.set_result(self)

    def gone(self: Runner) -> None:
        raise RuntimeError("device gone")

    monkeypatch.setattr(app.Core, "prepare", watched)
    monkeypatch.setattr(Runner, "prefill", gone)
    settings = Settings(
        grpc_port=0, models_dir=tiny_dir, preload_model="tiny-llama", reject_shared_models_dir=False
    )
    async with asyncio.timeout(240):
        serving = asyncio.create_task(app.serve(settings))
        core = await prepared
        request = GenerationRequest("r", "tiny-llama", (1, 2), 5, SamplingParams())
        with pytest.raises(EngineError):
            async for _ in core.engine.generate(request):
                pass
        with pytest.raises(app.StartError, match="MLX thread died"):
            await serving
    assert "listening on" in capsys.readouterr().out
