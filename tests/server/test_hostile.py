"""What hostile gRPC clients send to a real core, and that nothing of theirs stays there afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from osaurus_grpc.v1 import (
    chat_pb2,
    inference_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from tests.conftest import TINY

SERVICE = "/osaurus.v1.InferenceService"
SECONDS = 240.0
STREAMS = 1_000


def asked(**fields: object) -> chat_pb2.ChatRequest:
    """A short request, with changes."""
    message = chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text="Hello")])
    base = chat_pb2.ChatRequest(model=TINY, messages=[message])
    base.sampling.max_tokens = 1
    base.MergeFrom(chat_pb2.ChatRequest(**fields))  # type: ignore[arg-type]  # as the test says
    return base


@pytest.fixture
async def channel(tiny_core: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(tiny_core) as made:
        yield made


@pytest.fixture
async def stub(channel: grpc.aio.Channel) -> inference_service_pb2_grpc.InferenceServiceAsyncStub:
    return inference_service_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-any-return, call-overload, unused-ignore]  # the stub serves both


async def raw(channel: grpc.aio.Channel, data: bytes, method: str = "Chat") -> grpc.StatusCode:
    """The status of a call whose request is these bytes."""
    call = channel.unary_unary(f"{SERVICE}/{method}")(data, timeout=SECONDS)
    code = await call.code()
    assert "Traceback" not in (await call.details() or "")
    return code  # type: ignore[no-any-return, unused-ignore]  # grpc ships no types for it


async def test_unknown_fields_are_ignored(channel: grpc.aio.Channel) -> None:
    # Field 500 of length 3, and field 501 as a number.
    assert (
        await raw(channel, asked().SerializeToString() + b"\xa2\x1f\x03abc\xa8\x1f\x07") is grpc.StatusCode.OK
    )


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        b"\x0a\xff\xff\xff\xff\x0f",
        # A model's name that is no UTF-8.
        b"\x0a\x02\xff\xfe",
        # A group that never ends.
        b"\x0b" * 10_000,
    ],
)
async def test_bytes_that_are_no_request(channel: grpc.aio.Channel, data: bytes) -> None:
    refused = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL}
    assert await raw(channel, data) in refused
    assert await raw(channel, asked().SerializeToString()) is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("messages[0].role", asked(messages=[])),
        ("tool_choice.mode", asked(tool_choice=chat_pb2.ToolChoice(mode=99))),  # type: ignore[arg-type]  # not one
    ],
)
async def test_enum_numbers_that_there_are_not(
    channel: grpc.aio.Channel, field: str, request_: chat_pb2.ChatRequest
) -> None:
    if field.startswith("messages"):
        request_.messages[0].role = 99  # type: ignore[assignment]  # not one
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(f"{SERVICE}/Chat")(request_.SerializeToString(), timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in (caught.value.details() or "")


async def test_very_many_of_everything(
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub,
) -> None:
    """Refused by the first thing that is wrong, in a status of a few KiB, which trailers can hold."""
    many = [
        asked(messages=asked().messages[:1] * 20_000),
        asked(context_token_ids=[2**31 - 1] * 500_000),
        asked(tools=[chat_pb2.Tool()] * 5_000),
    ]
    request = asked()
    request.sampling.stop.extend(["x"] * 100_000)
    biased = asked()
    for token_id in range(300_000):
        biased.sampling.logit_bias[token_id - 1_000] = 1_000.0
    beyond = asked()
    for token_id in range(300_000):
        beyond.sampling.logit_bias[token_id] = 1.0
    for made in (*many, request, biased, beyond):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Chat(made, timeout=SECONDS)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(caught.value.details() or "") < 2_000


async def test_metadata_of_wrong_kinds(
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub,
) -> None:
    metadata = (
        ("x-request-id", "a" * 2_000),
        ("authorization", "nonsense"),
        ("traceparent", "00-nonsense"),
        ("x-request-id-bin", b"\x00\xff"),
    )
    answer = await stub.Chat(asked(), timeout=SECONDS, metadata=metadata)
    assert answer.choices


async def test_deadlines_that_have_passed_and_calls_cancelled_before_they_start(
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub,
) -> None:
    for seconds in (0.0, 0.000_001):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Chat(asked(), timeout=seconds)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    call = stub.Chat(asked(), timeout=SECONDS)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await stub.Chat(asked(), timeout=SECONDS)).choices


async def test_a_thousand_streams_on_one_connection_leave_nothing(
    channel: grpc.aio.Channel,
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub,
) -> None:
    """Each asks for more than it stays for."""
    long = asked()
    long.sampling.max_tokens = 1_000

    async def leave_early() -> grpc.StatusCode:
        call = stub.ChatStream(chat_pb2.ChatStreamRequest(chat=long), timeout=SECONDS)
        try:
            async for _ in call:
                break
        except grpc.aio.AioRpcError as error:
            return error.code()
        finally:
            call.cancel()
        return grpc.StatusCode.OK

    async with asyncio.timeout(SECONDS):
        codes = await asyncio.gather(*(leave_early() for _ in range(STREAMS)))
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert grpc.StatusCode.OK in codes
    # It waits until no request holds the model.
    unload = model_service_pb2.UnloadModelRequest(model=TINY)
    await model_service_pb2_grpc.ModelServiceStub(channel).UnloadModel(unload, timeout=SECONDS)
    assert (await stub.Chat(asked(), timeout=SECONDS)).choices
