"""The way to the core: the only module that speaks gRPC.

Every call has a deadline and is cancelled when its caller leaves it, however that happens: leaving
an `async for` over a grpc.aio call does not end the call by itself.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2  # type: ignore[import-untyped]  # ships no types
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status  # type: ignore[import-untyped]  # ships no types

from osaurus_grpc.v1 import (
    chat_pb2,
    completion_pb2,
    embedding_pb2,
    inference_service_pb2,
    inference_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    record_service_pb2,
    record_service_pb2_grpc,
)
from rest_shim.errors import CoreError

ERROR_DOMAIN = "osaurus.ai"

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# For calls that read a list or ask for health, as opposed to calls that generate or load.
_LOOKUP_TIMEOUT_SECONDS = 10.0
_HEALTH_TIMEOUT_SECONDS = 2.0

_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "osaurus.v1.InferenceService"}],
            # gRPC retries only until the first response header, so a generation never runs twice.
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}

CHANNEL_OPTIONS: Sequence[tuple[str, int | str]] = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # A long prefill is silent; pings tell a dead core from a busy one.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted core is found at once, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Proxy variables are meant for the web, not for the core.
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)

_Question = TypeVar("_Question")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request a call serves.

    Attributes:
        request_id: Travels as metadata, so that both logs name the request alike.
        authorization: The client's Authorization value for the core to judge, or "".
    """

    request_id: str
    authorization: str = ""

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What the call carries beside its request."""
        base = (("x-request-id", self.request_id),)
        return (*base, ("authorization", self.authorization)) if self.authorization else base


class Backend:
    """The core, seen from the shim.

    Must be made inside the running event loop. Methods raise CoreError for every status but OK.
    """

    def __init__(self, address: str, *, request_timeout_seconds: float) -> None:
        self._timeout = request_timeout_seconds
        self._lookup_timeout = min(_LOOKUP_TIMEOUT_SECONDS, request_timeout_seconds)
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._inference = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._records = record_service_pb2_grpc.RecordServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def close(self) -> None:
        """Cancel what still runs and close the connection."""
        await self._channel.close()

    async def chat(self, request: chat_pb2.ChatRequest, caller: Caller) -> chat_pb2.ChatResponse:
        """Answer a conversation in one message."""
        return await _answer(self._inference.Chat(request, timeout=self._timeout, metadata=caller.metadata()))

    @asynccontextmanager
    async def chat_stream(
        self, request: chat_pb2.ChatStreamRequest, caller: Caller
    ) -> AsyncIterator[AsyncIterable[chat_pb2.ChatStreamResponse]]:
        """Answer a conversation as it is generated; leaving the context ends the generation."""
        async with _stream(
            self._inference.ChatStream(request, timeout=self._timeout, metadata=caller.metadata())
        ) as events:
            yield events

    async def complete(
        self, request: completion_pb2.CompleteRequest, caller: Caller
    ) -> completion_pb2.CompleteResponse:
        """Continue a text in one message."""
        return await _answer(
            self._inference.Complete(request, timeout=self._timeout, metadata=caller.metadata())
        )

    @asynccontextmanager
    async def complete_stream(
        self, request: completion_pb2.CompleteStreamRequest, caller: Caller
    ) -> AsyncIterator[AsyncIterable[completion_pb2.CompleteStreamResponse]]:
        """Continue a text as it is generated; leaving the context ends the generation."""
        async with _stream(
            self._inference.CompleteStream(request, timeout=self._timeout, metadata=caller.metadata())
        ) as events:
            yield events

    async def embed(self, request: embedding_pb2.EmbedRequest, caller: Caller) -> embedding_pb2.EmbedResponse:
        """Vectors of texts."""
        return await _answer(
            self._inference.Embed(request, timeout=self._timeout, metadata=caller.metadata())
        )

    async def put_record(self, collection: str, record_id: str, content: bytes, caller: Caller) -> None:
        """Keep a record in the core for the time that is its default."""
        record = record_service_pb2.Record(id=record_id, content=content)
        request = record_service_pb2.PutRecordRequest(collection=collection, record=record)
        await _answer(
            self._records.PutRecord(request, timeout=self._lookup_timeout, metadata=caller.metadata())
        )

    async def get_record(self, collection: str, record_id: str, caller: Caller) -> bytes:
        """The content of a record."""
        request = record_service_pb2.GetRecordRequest(collection=collection, id=record_id)
        response = await _answer(
            self._records.GetRecord(request, timeout=self._lookup_timeout, metadata=caller.metadata())
        )
        return response.record.content

    async def delete_record(self, collection: str, record_id: str, caller: Caller) -> None:
        """Drop a record."""
        request = record_service_pb2.DeleteRecordRequest(collection=collection, id=record_id)
        await _answer(
            self._records.DeleteRecord(request, timeout=self._lookup_timeout, metadata=caller.metadata())
        )

    async def count_tokens(
        self, request: inference_service_pb2.CountTokensRequest, caller: Caller
    ) -> inference_service_pb2.CountTokensResponse:
        """Count a prompt's tokens; the first use of a model loads it."""
        return await _answer(
            self._inference.CountTokens(request, timeout=self._timeout, metadata=caller.metadata())
        )

    async def list_models(self, caller: Caller) -> Sequence[model_pb2.Model]:
        """All installed models, in the order of their ids."""
        request = inference_service_pb2.ListModelsRequest()
        found: list[model_pb2.Model] = []
        while True:
            page = await _answer(
                self._inference.ListModels(request, timeout=self._lookup_timeout, metadata=caller.metadata())
            )
            found.extend(page.models)
            if not page.next_page_token:
                return found
            request = inference_service_pb2.ListModelsRequest(page_token=page.next_page_token)

    async def get_model(self, name: str, caller: Caller) -> model_pb2.Model:
        """One model, its chat template included."""
        request = inference_service_pb2.GetModelRequest(model=name)
        response = await _answer(
            self._inference.GetModel(request, timeout=self._lookup_timeout, metadata=caller.metadata())
        )
        return response.model

    async def load_model(self, name: str, keep_alive: Duration | None, caller: Caller) -> None:
        """Bring a model into memory."""
        request = model_service_pb2.LoadModelRequest(model=name, keep_alive=keep_alive)
        await _answer(self._models.LoadModel(request, timeout=self._timeout, metadata=caller.metadata()))

    async def unload_model(self, name: str, caller: Caller) -> None:
        """Take a model out of memory once the requests that use it have ended."""
        request = model_service_pb2.UnloadModelRequest(model=name)
        await _answer(self._models.UnloadModel(request, timeout=self._timeout, metadata=caller.metadata()))

    async def copy_model(self, source: str, destination: str, caller: Caller) -> None:
        """Give a model a second name."""
        request = model_service_pb2.CopyModelRequest(source=source, destination=destination)
        await _answer(self._models.CopyModel(request, timeout=self._timeout, metadata=caller.metadata()))

    async def delete_model(self, name: str, caller: Caller) -> None:
        """Delete an alias or a model."""
        request = model_service_pb2.DeleteModelRequest(model=name)
        await _answer(self._models.DeleteModel(request, timeout=self._timeout, metadata=caller.metadata()))

    async def is_serving(self) -> bool:
        """Whether the core answers its health check with SERVING."""
        try:
            answer = await _answer(
                self._health.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_SECONDS)
            )
        except CoreError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def show_key(self, caller: Caller) -> None:
        """Have the core judge a caller's key, and do no more.

        Raises:
            CoreError: UNAUTHENTICATED, or the core does not answer.
        """
        request = inference_service_pb2.ListModelsRequest(page_size=1)
        await _answer(
            self._inference.ListModels(request, timeout=_HEALTH_TIMEOUT_SECONDS, metadata=caller.metadata())
        )

    async def asks_for_key(self, timeout_seconds: float) -> bool:
        """Whether the core refuses a caller without a key; waits for the core to come up.

        Raises:
            CoreError: The core did not answer in time, so that this is not known.
        """
        request = inference_service_pb2.ListModelsRequest(page_size=1)
        try:
            await _answer(self._inference.ListModels(request, timeout=timeout_seconds, wait_for_ready=True))
        except CoreError as error:
            if error.code == "UNAUTHENTICATED":
                return True
            raise
        return False


async def _answer(call: grpc.aio.UnaryUnaryCall[_Question, _Answer]) -> _Answer:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise _core_error(error) from error
    finally:
        call.cancel()


@asynccontextmanager
async def _stream(
    call: grpc.aio.UnaryStreamCall[_Question, _Answer],
) -> AsyncIterator[AsyncIterable[_Answer]]:
    try:
        yield call
    except grpc.aio.AioRpcError as error:
        raise _core_error(error) from error
    finally:
        call.cancel()


def _core_error(error: grpc.aio.AioRpcError) -> CoreError:
    """The status with what its rich details say; details of other domains are ignored."""
    code = error.code().name
    try:
        status = rpc_status.from_call(error)
    except ValueError:
        # The details contradict the status line: not something our core sends.
        status = None
    if status is None:
        return CoreError(code)
    reason, field, retry_after, message = "", "", None, status.message
    metadata: dict[str, str] = {}
    info, bad, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        if detail.Unpack(info):
            if info.domain == ERROR_DOMAIN:
                reason, metadata = info.reason, dict(info.metadata)
                field = field or info.metadata.get("field", "")
        elif detail.Unpack(bad):
            first = next((violation for violation in bad.field_violations if violation.field), None)
            if first is not None:
                field = first.field
                if len(bad.field_violations) > 1:
                    # One at a time, so that the text can speak of the client's own field.
                    message = first.description
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return CoreError(code, reason, message, field=field, retry_after_seconds=retry_after, metadata=metadata)
