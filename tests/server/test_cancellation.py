"""Leaving a call, at any of its stages, gives back everything it held."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from osaurus_grpc.server.app import Core
from osaurus_grpc.v1 import inference_service_pb2, model_pb2, model_service_pb2
from osaurus_grpc.v1.model_service_pb2_grpc import ModelServiceStub
from tests.conftest import ENDLESS_TOKENS
from tests.server.cores import (
    TINY,
    chat_request,
    eventually,
    failure,
    inference_stub,
    running_core,
    stream_request,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def core(endless_dir: Path) -> AsyncIterator[Core]:
    """A core whose answers end when they are left, limits off."""
    async with running_core(endless_dir) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def inference(core: Core) -> AsyncIterator[Any]:
    async with inference_stub(core.address) as stub:
        yield stub


def endless(text: str = "Hello", **sampling: Any) -> Any:
    return stream_request(chat_request(text, max_tokens=ENDLESS_TOKENS, ignore_eos=True, **sampling))


def is_idle(core: Core) -> bool:
    stats = core.engine.stats()
    return stats.running == 0 and stats.waiting == 0 and len(core.calls) == 0


@asynccontextmanager
async def cut_short(core: Core, *, choices: int = 1) -> AsyncIterator[None]:
    """What ends inside leaves the core idle, and did not simply run to its end."""
    before = core.engine.stats().completion_tokens
    yield
    await eventually(lambda: is_idle(core))
    assert core.engine.stats().completion_tokens - before < choices * (ENDLESS_TOKENS - 1_000)


async def test_a_cancelled_stream_lets_the_next_one_in(endless_dir: Path) -> None:
    async with (
        running_core(endless_dir, max_concurrent_requests=1) as core,
        inference_stub(core.address) as inference,
    ):
        stream = inference.ChatStream(endless())
        await stream.read()
        assert core.engine.stats().running == 1
        refused = await failure(inference.Chat(chat_request()))
        assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.info.reason == "OVERLOADED"
        assert refused.retry_seconds is not None

        async with cut_short(core):
            stream.cancel()

        assert (await inference.Chat(chat_request())).usage.completion_tokens == 8


async def test_a_cancelled_unary_call_stops_generating(core: Core, inference: Any) -> None:
    async with cut_short(core):
        call = inference.Chat(chat_request(max_tokens=ENDLESS_TOKENS, ignore_eos=True))
        await eventually(lambda: core.engine.stats().running == 1)

        call.cancel()


async def test_a_stream_that_nobody_reads_can_be_cancelled(core: Core, inference: Any) -> None:
    async with cut_short(core):
        stream = inference.ChatStream(endless(top_logprobs=20))
        await eventually(lambda: core.engine.stats().running == 1)

        stream.cancel()


async def test_cancelling_during_prefill(core: Core, inference: Any) -> None:
    await inference.Chat(chat_request())
    async with cut_short(core):
        stream = inference.ChatStream(endless("word " * 1_500))
        while (await stream.read()).WhichOneof("event") != "started":
            pass

        stream.cancel()
    assert (await inference.Chat(chat_request())).usage.completion_tokens == 8


async def test_cancelling_in_the_engines_queue(endless_dir: Path) -> None:
    async with running_core(endless_dir, max_batch_size=1) as core, inference_stub(core.address) as inference:
        running = inference.ChatStream(endless())
        await running.read()
        waiting = inference.ChatStream(endless())
        await eventually(lambda: core.engine.stats().waiting == 1)

        waiting.cancel()
        await eventually(lambda: core.engine.stats().waiting == 0)
        assert core.engine.stats().running == 1

        async with cut_short(core):
            running.cancel()


async def test_cancelling_some_choices_stops_them_all(core: Core, inference: Any) -> None:
    async with cut_short(core):
        request = endless()
        request.chat.choice_count = 4
        stream = inference.ChatStream(request)
        await eventually(lambda: core.engine.stats().running == 4)

        stream.cancel()


async def test_a_waiter_that_leaves_does_not_abort_the_load(endless_dir: Path) -> None:
    async with running_core(endless_dir) as core, inference_stub(core.address) as inference:
        call = inference.Chat(chat_request())
        await eventually(lambda: len(core.calls) == 1)
        call.cancel()
        await eventually(lambda: len(core.calls) == 0)

        # The load goes on without it, where it had begun; else this one begins it.
        assert (await inference.Chat(chat_request())).usage.completion_tokens == 8
        assert is_idle(core)


async def test_a_deadline_ends_the_generation(core: Core, inference: Any) -> None:
    async with cut_short(core, choices=16):
        request = endless()
        request.chat.choice_count = 16
        stream = inference.ChatStream(request, timeout=0.3)

        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in stream:
                pass

        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


CLIENT = """
import sys, time, grpc
from osaurus_grpc.v1 import chat_pb2
from osaurus_grpc.v1.inference_service_pb2_grpc import InferenceServiceStub
request = chat_pb2.ChatStreamRequest.FromString(bytes.fromhex(sys.argv[2]))
stream = InferenceServiceStub(grpc.insecure_channel(sys.argv[1])).ChatStream(request)
next(stream)
print("started", flush=True)
time.sleep(600)
"""


async def test_a_client_that_dies_ends_the_generation(core: Core) -> None:
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, core.address, endless().SerializeToString().hex(),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with cut_short(core):
            assert client.stdout is not None
            assert await client.stdout.readline() == b"started\n"
            client.kill()
    finally:
        if client.returncode is None:
            client.kill()
        await client.wait()


async def test_failed_requests_hold_nothing(tiny_dir: Path) -> None:
    async with (
        running_core(tiny_dir, max_concurrent_requests=1) as core,
        inference_stub(core.address) as inference,
    ):
        for _ in range(3):
            error = await failure(inference.Chat(chat_request("word " * 20_000)))
            assert error.info.reason == "CONTEXT_LENGTH_EXCEEDED"
        await eventually(lambda: is_idle(core))


async def test_load_and_unload(endless_dir: Path) -> None:
    async with running_core(endless_dir) as core, grpc.aio.insecure_channel(core.address) as channel:
        models = ModelServiceStub(channel)
        load = model_service_pb2.LoadModelRequest(model=TINY)
        first, second = await models.LoadModel(load), await models.LoadModel(load)
        assert first.model.state == model_pb2.MODEL_STATE_LOADED
        assert first.load_duration.ToNanoseconds() > 0
        assert second.load_duration.ToNanoseconds() == 0

        unload = model_service_pb2.UnloadModelRequest(model=TINY)
        assert (await models.UnloadModel(unload)).was_loaded
        assert not (await models.UnloadModel(unload)).was_loaded
        assert core.residency.residence(TINY).resident_bytes == 0

        error = await failure(models.UnloadModel(model_service_pb2.UnloadModelRequest()))
        assert error.fields == ["model"]


async def test_unloading_waits_for_the_requests_in_flight(endless_dir: Path) -> None:
    async with (
        running_core(endless_dir) as core,
        inference_stub(core.address) as inference,
        grpc.aio.insecure_channel(core.address) as channel,
    ):
        stream = inference.ChatStream(stream_request(chat_request(max_tokens=2_000, ignore_eos=True)))
        await stream.read()
        unloading = asyncio.ensure_future(
            ModelServiceStub(channel).UnloadModel(model_service_pb2.UnloadModelRequest(model=TINY))
        )
        event = None
        while (newer := await stream.read()) is not grpc.aio.EOF:
            event = newer
        assert event.completed.usage.completion_tokens == 2_000
        assert (await unloading).was_loaded


async def test_listing_goes_on_beside_a_generation(core: Core, inference: Any) -> None:
    stream = inference.ChatStream(endless())
    await stream.read()

    models = (await inference.ListModels(inference_service_pb2.ListModelsRequest())).models

    assert models[0].state == model_pb2.MODEL_STATE_LOADED
    stream.cancel()
    await eventually(lambda: is_idle(core))
