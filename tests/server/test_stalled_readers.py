"""Callers that stop reading: they keep neither a place nor a model, and the log has no fault of ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from osaurus_grpc.server.app import Core
from osaurus_grpc.v1 import completion_pb2, sampling_pb2
from osaurus_grpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.server.cores import PATIENCE_SECONDS, TINY, eventually, failure, running_core

STALLED = 2
ANSWERS = 16
WORDS = 1_200
# What gRPC sends ahead of a reader: without probes it stays at 64 KiB.
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0),)


def talkative() -> completion_pb2.CompleteStreamRequest:
    """Answers that repeat their prompt, more than a stream's window holds."""
    return completion_pb2.CompleteStreamRequest(
        completion=completion_pb2.CompleteRequest(
            model=TINY,
            text="word " * WORDS,
            echo=True,
            choice_count=ANSWERS,
            sampling=sampling_pb2.SamplingParams(max_tokens=1),
        )
    )


@asynccontextmanager
async def impatient_core(models_dir: Path, seconds: float) -> AsyncIterator[tuple[Core, Any]]:
    """A core that waits so long for a reader, and its stub."""
    async with (
        running_core(models_dir, send_timeout_seconds=seconds) as core,
        grpc.aio.insecure_channel(core.address, options=SMALL_WINDOW) as channel,
    ):
        yield core, InferenceServiceStub(channel)


async def test_streams_that_nobody_reads_are_ended(tiny_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with impatient_core(tiny_dir, seconds=0.3) as (core, stub):
        calls = [stub.CompleteStream(talkative()) for _ in range(STALLED)]
        await eventually(lambda: len(core.calls) == STALLED)
        await eventually(lambda: len(core.calls) == 0)
        # One of them reads after all, and learns why there is no more.
        error = await failure(calls[0])
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert error.info.reason == "DEADLINE_EXCEEDED"
        # The others leave, and it is no fault of the server that they never took their status.
        for call in calls[1:]:
            call.cancel()
        # It waits until nobody holds the model.
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await core.residency.unload(TINY)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_reader_that_is_slow_but_reads_gets_everything(tiny_dir: Path) -> None:
    text = ""
    async with impatient_core(tiny_dir, seconds=3.0) as (_core, stub):
        call = stub.CompleteStream(talkative())
        while (event := await call.read()) is not grpc.aio.EOF:
            text += event.content.text
            await asyncio.sleep(0.1)
        assert await call.code() is grpc.StatusCode.OK
    assert text.count("word " * WORDS) == ANSWERS
