"""Keys, limits, health, reflection and metrics of a core."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from osaurus_grpc.server.app import Core
from osaurus_grpc.v1 import inference_service_pb2
from tests.conftest import ENDLESS_TOKENS
from tests.server.cores import (
    PATIENCE_SECONDS,
    chat_request,
    eventually,
    failure,
    inference_stub,
    running_core,
    stream_request,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "osaurus.v1.InferenceService", "osaurus.v1.ModelService", "osaurus.v1.RecordService")
LIST = inference_service_pb2.ListModelsRequest()


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def test_keys(tiny_dir: Path) -> None:
    async with (
        running_core(tiny_dir, api_keys=("first", "sécond")) as core,
        inference_stub(core.address) as inference,
    ):
        chat = chat_request(max_tokens=1)
        for metadata in (
            (),
            bearer("wrong"),
            bearer(""),
            (("authorization", "Basic first"),),
            bearer("firs"),
        ):
            for call in (
                inference.ListModels(LIST, metadata=metadata),
                inference.Chat(chat, metadata=metadata),
                inference.ChatStream(stream_request(chat), metadata=metadata),
            ):
                error = await failure(call)
                assert error.code == grpc.StatusCode.UNAUTHENTICATED
                assert error.info.reason == "UNAUTHENTICATED"
                assert "first" not in error.message
        await inference.ListModels(LIST, metadata=bearer("first"))
        await inference.ListModels(LIST, metadata=(("authorization", "bearer first"),))
        assert (await inference.Chat(chat, metadata=bearer("first"))).usage.completion_tokens == 1


async def test_health_needs_no_key_and_reflection_does(tiny_dir: Path) -> None:
    async with (
        running_core(tiny_dir, api_keys=("key",)) as core,
        grpc.aio.insecure_channel(core.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
        # Without a message to send, since a client's write on a refused call fails by itself.
        error = await failure(reflect(channel, "v1", requests=()))
        assert error.code == grpc.StatusCode.UNAUTHENTICATED
        assert await listed_services(channel, "v1", bearer("key"))


async def test_the_rate_limit_tells_when_to_come_back(tiny_dir: Path) -> None:
    async with (
        running_core(tiny_dir, requests_per_minute=2) as core,
        inference_stub(core.address) as inference,
    ):
        for _ in range(2):
            await inference.Chat(chat_request(max_tokens=1))

        error = await failure(inference.ChatStream(stream_request(chat_request())))

        assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.info.reason == "RATE_LIMITED"
        assert error.retry_seconds is not None
        assert 0 < error.retry_seconds <= 60
        # Calls that generate nothing are free.
        await inference.ListModels(LIST)
        await inference.CountTokens(inference_service_pb2.CountTokensRequest(chat=chat_request()))


async def test_bad_requests_do_not_use_up_the_rate(tiny_dir: Path) -> None:
    async with (
        running_core(tiny_dir, requests_per_minute=1) as core,
        inference_stub(core.address) as inference,
    ):
        for _ in range(3):
            assert (await failure(inference.Chat(chat_request(temperature=9)))).fields
        assert (await inference.Chat(chat_request(max_tokens=1))).usage.completion_tokens == 1


async def test_health_by_service(core: Core) -> None:
    async with grpc.aio.insecure_channel(core.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in SERVICES:
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health.Check(health_pb2.HealthCheckRequest(service="unknown"))
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("name", SERVICES)
async def test_watchers_see_the_drain_also_after_one_left(tiny_dir: Path, name: str) -> None:
    request = health_pb2.HealthCheckRequest(service=name)
    async with running_core(tiny_dir) as core, grpc.aio.insecure_channel(core.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        leaver, stayer = health.Watch(request), health.Watch(request)
        for watcher in (leaver, stayer):
            assert (await watcher.read()).status == SERVING
        leaver.cancel()
        await asyncio.wait({asyncio.ensure_future(leaver.code())}, timeout=PATIENCE_SECONDS)
        # Only the server's own end of a cancelled call takes the watcher away.
        await eventually(lambda: core._health._watching[name] == 1)

        await core.drain(0.0)

        async with asyncio.timeout(PATIENCE_SECONDS):
            assert (await stayer.read()).status == NOT_SERVING
        stayer.cancel()


async def test_a_draining_core_refuses_with_a_status(endless_dir: Path) -> None:
    async with running_core(endless_dir) as core, inference_stub(core.address) as inference:
        stream = inference.ChatStream(stream_request(chat_request(max_tokens=2_000, ignore_eos=True)))
        await stream.read()
        draining = asyncio.ensure_future(core.drain(PATIENCE_SECONDS))
        await eventually(lambda: core.calls.is_draining)

        error = await failure(inference.Chat(chat_request()))

        assert error.code == grpc.StatusCode.UNAVAILABLE
        assert error.info.reason == "DRAINING"
        assert error.retry_seconds is not None
        kinds = []
        while (event := await stream.read()) is not grpc.aio.EOF:
            kinds.append(event.WhichOneof("event"))
        assert kinds[-1] == "completed"
        await draining


async def test_what_outlasts_the_drain_ends_with_a_status(endless_dir: Path) -> None:
    async with running_core(endless_dir) as core, inference_stub(core.address) as inference:
        request = stream_request(chat_request(max_tokens=ENDLESS_TOKENS, ignore_eos=True))
        stream, unary = inference.ChatStream(request), inference.Chat(request.chat)
        await eventually(lambda: core.engine.stats().running == 2)

        await core.drain(0.0)

        for call in (stream, unary):
            error = await failure(call)
            assert error.code == grpc.StatusCode.UNAVAILABLE
            assert error.info.reason == "DRAINING"
        await eventually(lambda: core.engine.stats().running == 0)


async def test_streams_that_end_while_they_open_end_with_a_status(endless_dir: Path) -> None:
    async with running_core(endless_dir) as core, inference_stub(core.address) as inference:
        request = stream_request(chat_request(max_tokens=ENDLESS_TOKENS, ignore_eos=True))
        for turns in range(80):
            ended = asyncio.ensure_future(failure(inference.ChatStream(request)))
            await eventually(lambda: core.engine.stats().running == 1, every=0.0)
            # So many turns of the loop later its first event may be about to be sent, or on its way.
            for _ in range(turns % 40):
                await asyncio.sleep(0)

            await core.drain(0.0)

            async with asyncio.timeout(PATIENCE_SECONDS):
                assert (await ended).info.reason == "DRAINING"
            core.calls.is_draining = False


REFLECTION_REQUESTS = (
    reflection_pb2.ServerReflectionRequest(list_services=""),
    reflection_pb2.ServerReflectionRequest(file_containing_symbol="osaurus.v1.ChatRequest"),
)


def reflect(
    channel: grpc.aio.Channel, version: str, metadata: Any = (), requests: Any = REFLECTION_REQUESTS
) -> Any:
    method = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    return method(iter(requests), metadata=metadata)


async def listed_services(channel: grpc.aio.Channel, version: str, metadata: Any = ()) -> list[str]:
    answers = [answer async for answer in reflect(channel, version, metadata)]
    assert answers[1].file_descriptor_response.file_descriptor_proto
    return [service.name for service in answers[0].list_services_response.service]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection(core: Core, version: str) -> None:
    async with grpc.aio.insecure_channel(core.address) as channel:
        assert sorted(await listed_services(channel, version)) == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
            "osaurus.v1.InferenceService",
            "osaurus.v1.ModelService",
            "osaurus.v1.RecordService",
        ]


async def test_metrics_and_access_log(tiny_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="osaurus_grpc.access")
    async with running_core(tiny_dir) as core, inference_stub(core.address) as inference:
        text = "an unmistakable prompt"
        metadata = (("x-request-id", "seen-in-the-log"),)
        response = await inference.Chat(chat_request(text, max_tokens=3), metadata=metadata)
        await failure(inference.Chat(chat_request(model="made-up-by-a-client")))
        metrics = core.telemetry.exposition().decode()

    for line in (
        'osaurus_requests_total{code="OK",method="Chat",model="tiny-llama"} 1.0',
        'osaurus_requests_total{code="NOT_FOUND",method="Chat",model=""} 1.0',
        'osaurus_completion_tokens_total{model="tiny-llama"} 3.0',
        f'osaurus_prompt_tokens_total{{model="tiny-llama"}} {response.usage.prompt_tokens}.0',
        'osaurus_time_to_first_token_seconds_count{model="tiny-llama"} 1.0',
        "osaurus_sequences_running 0.0",
        "osaurus_sequences_waiting 0.0",
    ):
        assert line in metrics.splitlines()
    assert "made-up-by-a-client" not in metrics
    (logged,) = [message for message in caplog.messages if "request_id=seen-in-the-log" in message]
    assert "method=Chat model=tiny-llama code=OK" in logged
    assert "completion_tokens=3" in logged
    assert text not in caplog.text
