"""The Python client that the command line and internal tools use: asyncio, typed, over the stubs.

Answers are the protobuf messages themselves. Every call has a deadline. A failure arrives as the
exception of osaurus_grpc.errors that the server raised, found by the reason in the status's
google.rpc.ErrorInfo; what has no ErrorInfo never reached the API and becomes a TransportError.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType
from typing import Self

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships no types
from grpc_health.v1 import health_pb2, health_pb2_grpc

from osaurus_grpc import errors
from osaurus_grpc.v1 import (
    chat_pb2,
    inference_service_pb2,
    inference_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
)

ERROR_DOMAIN = "osaurus.ai"
# A question about state answers at once; loading reads a model from disk; an answer may be long.
QUERY_SECONDS = 10.0
LOAD_SECONDS = 900.0
ANSWER_SECONDS = 600.0
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),
)


class TransportError(errors.OsaurusError):
    """The call failed on its way: nothing listens, the connection broke, or a foreign server answered."""

    code = "UNAVAILABLE"
    reason = ""


class Client:
    """One connection to a core. Use it as an async context manager, or close() it.

    Args:
        address: "HOST:PORT" of the core's gRPC server.
        api_key: Bearer key; "" sends none.
    """

    def __init__(self, address: str, api_key: str = "") -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._inference = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls still running are cancelled."""
        await self._channel.close()

    async def is_serving(self, service: str = "", timeout: float = QUERY_SECONDS) -> bool:
        """Whether the core, or one of its services by full name, reports SERVING.

        False also where nothing answers.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            answer = await self._health.Check(request, timeout=timeout)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def list_models(self, timeout: float = QUERY_SECONDS) -> list[model_pb2.Model]:
        """All installed models, in the order of their ids."""
        found: list[model_pb2.Model] = []
        token = ""
        while True:
            request = inference_service_pb2.ListModelsRequest(page_token=token)
            try:
                page = await self._inference.ListModels(request, timeout=timeout, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                raise error_from_call(error, self.address) from error
            found.extend(page.models)
            token = page.next_page_token
            if not token:
                return found

    async def get_model(self, model: str = "", timeout: float = QUERY_SECONDS) -> model_pb2.Model:
        """One model by any of its names; "" is the default model. ModelNotFoundError."""
        request = inference_service_pb2.GetModelRequest(model=model)
        try:
            answer = await self._inference.GetModel(request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self.address) from error
        return answer.model

    async def load_model(
        self, model: str, keep_alive_seconds: float | None = None, timeout: float = LOAD_SECONDS
    ) -> model_service_pb2.LoadModelResponse:
        """Load a model; None keeps it as long as the server's default says, negative for ever."""
        request = model_service_pb2.LoadModelRequest(model=model)
        if keep_alive_seconds is not None:
            request.keep_alive.CopyFrom(_duration(keep_alive_seconds))
        try:
            return await self._models.LoadModel(request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self.address) from error

    async def unload_model(self, model: str, timeout: float = LOAD_SECONDS) -> bool:
        """Unload a model once the requests that use it have ended; False where it was not loaded."""
        request = model_service_pb2.UnloadModelRequest(model=model)
        try:
            answer = await self._models.UnloadModel(request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self.address) from error
        return answer.was_loaded

    async def chat_stream(
        self, request: chat_pb2.ChatRequest, timeout: float = ANSWER_SECONDS
    ) -> AsyncGenerator[chat_pb2.ChatStreamResponse, None]:
        """The events of an answer: started, deltas, one choice_finished a choice, completed.

        Closing the generator (or cancelling the task that reads it) stops the generation. Use
        contextlib.aclosing around a loop that may be left early. Events of an unknown kind, from a
        newer server, are skipped.

        Raises:
            OsaurusError: Of the kind the server raised, before the first event or after it.
            TransportError: The connection broke, or the stream ended without its last event.
        """
        is_complete = False
        call = self._inference.ChatStream(
            chat_pb2.ChatStreamRequest(chat=request), timeout=timeout, metadata=self._metadata
        )
        try:
            async for event in call:
                if event.WhichOneof("event") is None:
                    continue
                is_complete = event.HasField("completed")
                yield event
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self.address) from error
        finally:
            # Leaving the loop does not end the call by itself.
            call.cancel()
        if not is_complete:
            raise TransportError(f"The server at {self.address} ended the answer before it was complete.")


def connect(address: str, api_key: str = "") -> Client:
    """A client of the core at "HOST:PORT". Nothing is sent before the first call.

    Must be called in the event loop that makes the calls.
    """
    return Client(address, api_key)


def _duration(seconds: float) -> Duration:
    value = Duration()
    value.FromNanoseconds(round(seconds * 1e9))
    return value


def error_from_call(error: grpc.aio.AioRpcError, address: str) -> errors.OsaurusError:
    """The exception that a failed call stands for."""
    message = error.details() or ""
    info, details = _error_info(error)
    if info is not None and info.domain == ERROR_DOMAIN:
        if build := _BUILDERS.get(info.reason):
            return build(message, info.metadata, details)
        return errors.OsaurusError(message, metadata=info.metadata)
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.RequestDeadlineError(f"The server at {address} did not answer in time.")
        case grpc.StatusCode.UNAVAILABLE:
            return TransportError(f"The server at {address} cannot be reached, or went away.")
        case code:
            return TransportError(f"The call to {address} failed with {code.name}: {message}")


def _error_info(
    error: grpc.aio.AioRpcError,
) -> tuple[error_details_pb2.ErrorInfo | None, status_pb2.Status]:
    """The status details in the trailing metadata, and the ErrorInfo among them."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            status = status_pb2.Status.FromString(value)
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info, status
    return None, status


def _field(status: status_pb2.Status) -> str:
    """Path of the first field that a BadRequest among the details complains about, or ""."""
    for detail in status.details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request) and bad_request.field_violations:
            return str(bad_request.field_violations[0].field)
    return ""


def _retry_seconds(status: status_pb2.Status) -> float | None:
    """The delay that a RetryInfo among the details asks for, or None."""
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            return float(retry.retry_delay.ToNanoseconds() / 1e9)
    return None


_Builder = Callable[[str, Mapping[str, str], status_pb2.Status], errors.OsaurusError]


def _plain(kind: type[errors.OsaurusError]) -> _Builder:
    return lambda message, metadata, status: kind(message, metadata=metadata)


def _of_model(kind: type[errors.ModelError]) -> _Builder:
    return lambda message, metadata, status: kind(message, model=metadata.get("model", ""))


def _of_capacity(kind: type[errors.CapacityError]) -> _Builder:
    return lambda message, metadata, status: kind(message, retry_after_seconds=_retry_seconds(status))


def _context_length(
    message: str, metadata: Mapping[str, str], status: status_pb2.Status
) -> errors.OsaurusError:
    return errors.ContextLengthError(
        limit=int(metadata.get("limit") or 0),
        prompt_tokens=int(metadata.get("prompt_tokens") or 0),
        field=_field(status),
    )


_BUILDERS: Mapping[str, _Builder] = {
    "INVALID_FIELD": lambda message, metadata, status: errors.InvalidRequestError(
        message, field=_field(status), metadata=metadata
    ),
    "CONTEXT_LENGTH_EXCEEDED": _context_length,
    "UNAUTHENTICATED": _plain(errors.UnauthenticatedError),
    "UNSUPPORTED_CAPABILITY": lambda message, metadata, status: errors.CapabilityError(
        message, capability=metadata.get("capability", ""), field=metadata.get("field", "")
    ),
    "NOT_IMPLEMENTED": _plain(errors.FeatureNotImplementedError),
    "MODEL_NOT_FOUND": lambda message, metadata, status: errors.ModelNotFoundError(metadata.get("model", "")),
    "MODEL_UNUSABLE": _of_model(errors.ModelUnusableError),
    "MODEL_BUSY": _of_model(errors.ModelBusyError),
    "MODEL_EXISTS": _of_model(errors.ModelExistsError),
    "SOURCE_UNAVAILABLE": _plain(errors.SourceUnavailableError),
    "SOURCE_INVALID": _plain(errors.SourceInvalidError),
    "DISK_FULL": _plain(errors.DiskFullError),
    "RECORD_NOT_FOUND": lambda message, metadata, status: errors.RecordNotFoundError(
        metadata.get("record", "")
    ),
    "OVERLOADED": _of_capacity(errors.OverloadedError),
    "RATE_LIMITED": _of_capacity(errors.RateLimitedError),
    "INSUFFICIENT_MEMORY": _of_capacity(errors.InsufficientMemoryError),
    "DRAINING": lambda message, metadata, status: errors.DrainingError(),
    "DEADLINE_EXCEEDED": _plain(errors.RequestDeadlineError),
    "ENGINE_FAILED": lambda message, metadata, status: errors.EngineError(),
}
