"""What a call leaves behind when it has ended."""

from __future__ import annotations

import gc
import weakref

import grpc
import pytest

from osaurus_grpc.errors import InvalidRequestError
from osaurus_grpc.server.calls import CallsInProgress
from osaurus_grpc.server.interceptors import CallInterceptor, Keys
from osaurus_grpc.telemetry import Telemetry


class Request:
    """A message that weak references can watch, as protobuf's cannot be."""


class Context:
    """As much of gRPC's as a refused call needs; like it, it remembers how the call was aborted."""

    def __init__(self) -> None:
        self.aborts: list[BaseException] = []

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, *_status: object) -> None:
        self.aborts.append(grpc.aio.AbortError())
        raise self.aborts[-1]


async def refuse(request: Request, _context: Context) -> None:
    assert isinstance(request, Request)
    try:
        raise KeyError("model")
    except KeyError as error:
        raise InvalidRequestError("No.", field="model") from error


async def test_a_refused_request_is_freed_with_its_call() -> None:
    """Without the garbage collector, which may come by long after many more such requests."""
    interceptor = CallInterceptor(
        keys=Keys(()), calls=CallsInProgress(), telemetry=Telemetry(), send_timeout_seconds=1.0
    )
    answer = interceptor._unary("Chat", refuse)
    context = Context()
    request = Request()
    watched = weakref.ref(request)
    call = answer(request, context)  # type: ignore[arg-type]  # a stand-in, as said
    del request
    gc.disable()
    try:
        with pytest.raises(grpc.aio.AbortError):
            await call
        assert watched() is None
    finally:
        gc.enable()
    assert context.aborts
