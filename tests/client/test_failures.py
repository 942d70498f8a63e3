from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import grpc
import pytest

from osaurus_grpc import errors
from osaurus_grpc.client import AsyncOsaurus, TransportError
from osaurus_grpc.client.failures import error_from_call
from osaurus_grpc.server.status import status_from_error
from osaurus_grpc.v1 import chat_pb2, error_reason_pb2, model_pb2
from tests.harness.processes import core_process

RAISED: tuple[errors.OsaurusError, ...] = (
    errors.InvalidRequestError("temperature is 3.", field="sampling.temperature"),
    errors.ContextLengthError(limit=10, prompt_tokens=12),
    errors.UnauthenticatedError("A key is needed."),
    errors.CapabilityError("No images.", capability="vision", field="messages[0]"),
    errors.FeatureNotImplementedError("Not yet."),
    errors.ModelNotFoundError("omega"),
    errors.ModelUnusableError("Model 'm' cannot be loaded.", model="m"),
    errors.ModelBusyError("It is being fetched.", model="m"),
    errors.ModelExistsError("It exists.", model="m"),
    errors.RecordNotFoundError("r1"),
    errors.SourceUnavailableError("The hub is away."),
    errors.SourceInvalidError("A pickle."),
    errors.DiskFullError("The disk is full."),
    errors.OverloadedError("Too many.", retry_after_seconds=1.5),
    errors.RateLimitedError("Too often.", retry_after_seconds=30.0),
    errors.InsufficientMemoryError("Too large."),
    errors.DrainingError(),
    errors.RequestDeadlineError("Too late."),
    errors.EngineError(),
)


def call_error(error: errors.OsaurusError) -> grpc.aio.AioRpcError:
    status = status_from_error(error)
    return grpc.aio.AioRpcError(
        status.code,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(*(status.trailing_metadata or ())),
        details=status.details,
    )


@pytest.mark.parametrize("raised", RAISED, ids=lambda error: error.reason)
def test_what_the_server_raises_is_what_the_client_raises(raised: errors.OsaurusError) -> None:
    received = error_from_call(call_error(raised), "127.0.0.1:1")
    assert type(received) is type(raised)
    assert received.message == raised.message
    assert dict(received.metadata) == dict(raised.metadata)
    for name in ("field", "model", "retry_after_seconds"):
        assert getattr(received, name, None) == getattr(raised, name, None)


def test_every_reason_of_the_contract_is_covered() -> None:
    reasons = {name.removeprefix("ERROR_REASON_") for name in dict(error_reason_pb2.ErrorReason.items())}
    assert {error.reason for error in RAISED} == reasons - {"UNSPECIFIED"}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, TransportError),
        (grpc.StatusCode.UNKNOWN, TransportError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.RequestDeadlineError),
    ],
)
def test_a_status_without_details_came_from_the_way(
    code: grpc.StatusCode, kind: type[errors.OsaurusError]
) -> None:
    bare = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="inner text")
    received = error_from_call(bare, "127.0.0.1:1")
    assert type(received) is kind
    assert "127.0.0.1:1" in received.message


def question(text: str, max_tokens: int = 8) -> chat_pb2.ChatRequest:
    request = chat_pb2.ChatRequest(model="tiny-llama")
    request.messages.add(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=text)])
    request.sampling.max_tokens = max_tokens
    request.sampling.ignore_eos = True
    return request


async def test_models_are_listed_described_loaded_and_unloaded(endless_core: str) -> None:
    async with AsyncOsaurus(endless_core) as client:
        assert await client.is_serving()
        assert await client.is_serving("osaurus.v1.InferenceService")
        assert [model.id for model in await client.list_models()] == ["tiny-llama"]
        assert (await client.get_model("TINY-LLAMA")).id == "tiny-llama"
        loaded = await client.load_model("tiny-llama", keep_alive_seconds=-1)
        assert loaded.model.state == model_pb2.MODEL_STATE_LOADED
        assert await client.unload_model("tiny-llama") is True
        assert await client.unload_model("tiny-llama") is False


async def test_a_stream_is_the_events_of_the_contract(endless_core: str) -> None:
    async with AsyncOsaurus(endless_core) as client:
        kinds = [event.WhichOneof("event") async for event in client.chat_stream(question("Hello"))]
    assert kinds[0] == "started"
    assert kinds[-2:] == ["choice_finished", "completed"]
    assert set(kinds[1:-2]) == {"content"}


async def test_leaving_a_stream_ends_the_call(endless_core: str) -> None:
    """The model cannot be unloaded while an answer runs, so that it can be shows that none does."""
    async with AsyncOsaurus(endless_core) as client:
        async with aclosing(client.chat_stream(question("Hello", max_tokens=100_000))) as events:
            async for event in events:
                if event.HasField("content"):
                    break
        assert await client.unload_model("tiny-llama", timeout=20) is True


async def test_errors_of_a_real_server(endless_core: str) -> None:
    async with AsyncOsaurus(endless_core) as client:
        with pytest.raises(errors.ModelNotFoundError, match="Model not found: omega"):
            await client.get_model("omega")
        wrong = question("Hello")
        wrong.sampling.temperature = 9
        with pytest.raises(errors.InvalidRequestError) as raised:
            await anext(client.chat_stream(wrong))
        assert raised.value.field.endswith("sampling.temperature")


async def test_a_deadline_is_an_error_of_its_own(endless_core: str) -> None:
    async with AsyncOsaurus(endless_core) as client:
        with pytest.raises(errors.RequestDeadlineError):
            async for _ in client.chat_stream(question("Hello", max_tokens=1_000_000), timeout=0.5):
                pass


async def test_nothing_listens() -> None:
    async with AsyncOsaurus("127.0.0.1:9") as client:
        assert not await client.is_serving(timeout=5)
        with pytest.raises(TransportError, match=r"127\.0\.0\.1:9"):
            await client.list_models(timeout=5)


async def test_keys(tiny_dir: Path) -> None:
    with core_process(tiny_dir, env={"OSAURUS_API_KEY": "the-key"}) as core:
        async with AsyncOsaurus(core.address, "the-key") as client:
            assert [model.id for model in await client.list_models()] == ["tiny-llama"]
        async with AsyncOsaurus(core.address) as stranger:
            assert await stranger.is_serving()
            with pytest.raises(errors.UnauthenticatedError):
                await stranger.list_models()
