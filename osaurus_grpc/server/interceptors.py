"""What every call of the contract passes: id, key, drain, errors, access log and metrics.

One interceptor, so that the order is fixed and written down: a call gets its record, shows its key,
is refused where the server drains, is answered, and ends in exactly one status, one log line and one
count. Health passes untouched; reflection only shows its key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final, Never, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError

from osaurus_grpc.errors import (
    DrainingError,
    EngineError,
    FeatureNotImplementedError,
    InvalidRequestError,
    OsaurusError,
    RequestDeadlineError,
    UnauthenticatedError,
)
from osaurus_grpc.server.calls import Call, CallsInProgress
from osaurus_grpc.server.status import status_from_error
from osaurus_grpc.telemetry import Telemetry

REQUEST_ID_KEY: Final = "x-request-id"

# The message types are the handlers' own business; an interceptor passes them through.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
UnaryMethod: TypeAlias = Callable[[Any, Context], Awaitable[Any]]
StreamMethod: TypeAlias = Callable[[Any, Context], AsyncGenerator[Any, None]]

_HEALTH_PREFIX: Final = "/grpc.health.v1."
_CONTRACT_PREFIX: Final = "/osaurus.v1."
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_BEARER: Final = "bearer "
# For a first event that is on its way when its call is ended: it only has to reach gRPC's own buffer.
_FIRST_EVENT_SECONDS: Final = 1.0

_access_log = logging.getLogger("osaurus_grpc.access")
_log = logging.getLogger(__name__)


class Keys:
    """The bearer keys that callers may show; none lets everyone in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def require(self, context: Context) -> str:
        """Who calls: a hash of the key that is shown, or "" where keys are off.

        Raises:
            UnauthenticatedError: Keys are on and the call shows none of them.
        """
        if not self._keys:
            return ""
        authorization = _metadata_value(context, "authorization")
        if authorization[: len(_BEARER)].lower() != _BEARER:
            raise UnauthenticatedError("This server asks for a bearer key, and the call carries none.")
        shown = authorization[len(_BEARER) :].strip().encode()
        # Every key is compared, so that the time taken does not tell which one came close.
        if not sum(hmac.compare_digest(shown, key) for key in self._keys):
            raise UnauthenticatedError("The bearer key is not one of this server's.")
        return hashlib.sha256(shown).hexdigest()


def _metadata_value(context: Context, key: str) -> str:
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return value if isinstance(value, str) else value.decode("latin-1")
    return ""


def _request_id(context: Context) -> str:
    shown = _metadata_value(context, REQUEST_ID_KEY)
    return shown if _REQUEST_ID.fullmatch(shown) else uuid.uuid4().hex


def _decoder(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that gives None for bytes that are no message.

    Raised here, the error would reach the client as UNKNOWN without details, past the keys and the log.
    """

    def read(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return None

    return read


def _decoded(request: Any) -> Any:
    if request is None:
        raise InvalidRequestError("The request is not a message of this method's type, in valid UTF-8.")
    return request


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the contract's methods; see the module.

    Args:
        keys: What callers must show.
        calls: Where calls in progress are kept.
        telemetry: Where ended calls are counted.
        send_timeout_seconds: How long a stream's event waits for a caller that does not read.
    """

    def __init__(
        self, *, keys: Keys, calls: CallsInProgress, telemetry: Telemetry, send_timeout_seconds: float
    ) -> None:
        self._send_timeout_seconds = send_timeout_seconds
        self._keys = keys
        self._calls = calls
        self._telemetry = telemetry
        self._wrapped: dict[str, Handler] = {}
        # Whatever a client takes an unknown method for, it is answered as a stream.
        self._unknown: Handler = grpc.stream_stream_rpc_method_handler(self._answer_unknown)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The method's handler, wrapped once and kept; for an unknown method, one that says so."""
        method = handler_call_details.method
        if (known := self._wrapped.get(method)) is not None:
            return known
        handler = await continuation(handler_call_details)
        # An unknown method; nothing a caller made up is kept.
        if handler is None:
            return self._unknown
        if method.startswith(_HEALTH_PREFIX):
            return handler
        wrapped = self._wrap(method, handler)
        self._wrapped[method] = wrapped
        return wrapped

    async def _answer_unknown(self, requests: Any, context: Context) -> None:
        error: OsaurusError = FeatureNotImplementedError("This server knows no method of that name.")
        try:
            self._keys.require(context)
        except UnauthenticatedError as refusal:
            error = refusal
        await _abort(context, _request_id(context), error)

    def _wrap(self, method: str, handler: Handler) -> Handler:
        assert handler.request_deserializer is not None, "generated code sets it"
        coders = {
            "request_deserializer": _decoder(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        name = method.rpartition("/")[2]
        # The casts: the stubs of grpc know handlers of the blocking server only.
        if not method.startswith(_CONTRACT_PREFIX):
            assert handler.stream_stream is not None, "reflection is the only other service"
            keyed = self._keyed(cast("StreamMethod", handler.stream_stream))
            return grpc.stream_stream_rpc_method_handler(
                keyed, handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_stream is not None:
            streaming = self._streaming(name, cast("StreamMethod", handler.unary_stream))
            return grpc.unary_stream_rpc_method_handler(streaming, **coders)
        assert handler.unary_unary is not None, "the contract has no client streams"
        unary = self._unary(name, cast("UnaryMethod", handler.unary_unary))
        return grpc.unary_unary_rpc_method_handler(unary, **coders)

    def _keyed(self, method: StreamMethod) -> Callable[[Any, Context], Awaitable[None]]:
        async def answer(requests: Any, context: Context) -> None:
            try:
                self._keys.require(context)
            except UnauthenticatedError as error:
                await _abort(context, _request_id(context), error)
            async with aclosing(method(requests, context)) as responses:
                async for response in responses:
                    await context.write(response)

        return answer

    def _unary(self, name: str, method: UnaryMethod) -> UnaryMethod:
        async def answer(request: Any, context: Context) -> Any:
            response = None
            asked = [request]
            # An aborted call's frames live on until the garbage collector runs, and must not hold a
            # request of many megabytes until then.
            del request

            async def work() -> None:
                nonlocal response
                response = await method(_decoded(asked.pop()), context)

            await self._conduct(name, context, work)
            return response

        return answer

    def _streaming(self, name: str, method: StreamMethod) -> UnaryMethod:
        async def answer(request: Any, context: Context) -> None:
            asked = [request]
            del request  # as above

            async def work() -> None:
                # Written here, and not yielded on: a call cancelled between two events would leave a
                # generator to the garbage collector, and its model leased until then.
                send = self._send_first
                async with aclosing(method(_decoded(asked.pop()), context)) as events:
                    async for event in events:
                        await send(context, event)
                        send = self._send

            await self._conduct(name, context, work)

        return answer

    async def _send(self, context: Context, event: Any) -> None:
        """Write an event. A caller that does not read holds its model and its place no longer than this.

        Raises:
            RequestDeadlineError: It did not read in time.
        """
        try:
            async with asyncio.timeout(self._send_timeout_seconds):
                await context.write(event)
        except TimeoutError:
            raise RequestDeadlineError("The caller does not read the stream; it was ended.") from None

    async def _send_first(self, context: Context, event: Any) -> None:
        """Write a stream's first event, to its end even where the call is ended meanwhile.

        The stream's opening metadata go with it. A status sent while they are on their way would hold
        them once more, which gRPC refuses, and the caller would wait for its status for ever.
        """
        sending = asyncio.ensure_future(self._send(context, event))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            await asyncio.wait({sending}, timeout=_FIRST_EVENT_SECONDS)
            if not sending.done():
                sending.cancel()
            elif not sending.cancelled():
                sending.exception()  # looked at; the call ends for another reason
            raise

    async def _conduct(self, name: str, context: Context, work: Callable[[], Awaitable[None]]) -> None:
        """Run a call's work and end the call with one status, one log line and one count."""
        call = Call(request_id=_request_id(context), method=name)
        code = "OK"
        failure: OsaurusError | None = None
        try:
            # Read before the call counts as in progress: a drain does not wait for refused calls.
            call.caller = self._keys.require(context)
            if self._calls.is_draining:
                raise DrainingError
            with self._calls.enter(call):
                await work()
        except OsaurusError as error:
            # Kept here, an error that knows the frames it came through is a cycle with all they hold.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            failure = error
        except asyncio.CancelledError:
            if not call.is_expelled:
                code = "DEADLINE_EXCEEDED" if _is_past_deadline(context) else "CANCELLED"
                raise
            _forget_cancellation()
            failure = DrainingError()
        except Exception as error:  # noqa: BLE001 - whatever went wrong must not reach the client
            _log_unexpected(call, error)
            failure = EngineError()
        finally:
            self._record(call, failure.code if failure else code)
        if failure is not None:
            await _abort(context, call.request_id, failure)
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))

    def _record(self, call: Call, code: str) -> None:
        seconds = time.perf_counter() - call.arrived
        self._telemetry.call_ended(method=call.method, model=call.model, code=code, seconds=seconds)
        _access_log.info(
            "request_id=%s method=%s model=%s code=%s seconds=%.3f prompt_tokens=%d completion_tokens=%d",
            call.request_id,
            call.method,
            call.model or "-",
            code,
            seconds,
            call.prompt_tokens,
            call.completion_tokens,
        )


def _is_past_deadline(context: Context) -> bool:
    remaining: float | None = context.time_remaining()
    return remaining is not None and remaining <= 0


def _forget_cancellation() -> None:
    """Take back the cancellation of this task, so that it can still send a status."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


def _log_unexpected(call: Call, error: Exception) -> None:
    # The frames without the exception's text, which may hold a piece of the prompt.
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error(
        "request_id=%s method=%s unexpected=%s\n%s",
        call.request_id,
        call.method,
        type(error).__name__,
        frames,
    )
    _log.debug("request_id=%s unexpected_text=%s", call.request_id, error)


async def _abort(context: Context, request_id: str, error: OsaurusError) -> Never:
    status = status_from_error(error)
    trailers = (*(status.trailing_metadata or ()), (REQUEST_ID_KEY, request_id))
    try:
        await context.abort(status.code, status.details, trailers)
    except grpc.aio.InternalError:
        # The caller left before it read its status. gRPC takes this for what it is, a cancelled call, and
        # logs everything else as a fault of the server.
        raise asyncio.CancelledError from None
