"""Writing answers: JSON, server-sent events, lines of JSON.

A stream's response begins with its first frame, so that a request which fails before it still gets
a real HTTP status. Every frame goes out in one write: parsers exist that lose an event which is
split across reads.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Protocol, Self, TypeVar

from aiohttp import web

from rest_shim.errors import CoreError, Refusal, internal_refusal, refusal_from_core
from rest_shim.progress import take_back_expulsion
from rest_shim.settings import Settings

log = logging.getLogger(__name__)

_Event = TypeVar("_Event")
_EventIn = TypeVar("_EventIn", contravariant=True)

SSE_DONE = b"data: [DONE]\n\n"
SSE_KEEP_ALIVE = b": keep-alive\n\n"

_CUT_GRACE_SECONDS = 1.0

# no-transform and X-Accel-Buffering keep proxies from holding events back.
SSE_HEADERS: Mapping[str, str] = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache, no-transform",
    "Connection": "keep-alive",
    "X-Accel-Buffering": "no",
}
NDJSON_HEADERS: Mapping[str, str] = {
    "Content-Type": "application/x-ndjson",
    "Cache-Control": "no-cache, no-transform",
    "Connection": "keep-alive",
}

_dump = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def dump(value: object) -> str:
    """Compact JSON in ASCII: raw U+2028 and U+0085 count as line ends to some clients."""
    return _dump(value)


def json_response(
    value: object,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    content_type: str = "application/json",
) -> web.Response:
    """A whole answer."""
    return web.Response(
        body=dump(value).encode("ascii"),
        status=status,
        headers={**(headers or {}), "Content-Type": content_type},
    )


def sse_frame(value: object, event: str = "") -> bytes:
    """One server-sent event; with its name where it has one."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {dump(value)}\n\n".encode("ascii")


def ndjson_line(value: object) -> bytes:
    """One line of JSON."""
    return f"{dump(value)}\n".encode("ascii")


class HttpStream:
    """A streamed response, begun by its first frame.

    An async context manager: inside it, where keep_alive_seconds is given, keep_alive_frame is sent
    whenever nothing else was for so long. That begins the response too: a client behind a proxy
    must see a byte even while a model loads. A client that stops reading blocks send(); its
    connection is cut after timeout_seconds and a little, in which the core's own deadline shows.
    """

    def __init__(
        self,
        request: web.Request,
        headers: Mapping[str, str],
        *,
        timeout_seconds: float,
        keep_alive_seconds: float | None = None,
        keep_alive_frame: bytes = SSE_KEEP_ALIVE,
    ) -> None:
        self._request = request
        self._response = web.StreamResponse(headers=headers)
        if not request.keep_alive:
            del self._response.headers["Connection"]
        self._keep_alive_seconds = keep_alive_seconds
        self._keep_alive_frame = keep_alive_frame
        self._loop = asyncio.get_running_loop()
        self._last_sent = self._loop.time()
        self._starting = asyncio.Lock()
        self._beat: asyncio.Task[None] | None = None
        self._timeout_seconds = timeout_seconds
        self._cut: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        if self._request.transport is not None:
            delay = self._timeout_seconds + _CUT_GRACE_SECONDS
            self._cut = self._loop.call_later(delay, self._request.transport.abort)
        if self._keep_alive_seconds is not None:
            self._beat = asyncio.create_task(self._keep_alive(self._keep_alive_seconds))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.quiet()
        if self._cut is not None:
            self._cut.cancel()

    @property
    def request(self) -> web.Request:
        """What is answered."""
        return self._request

    @property
    def is_started(self) -> bool:
        """Whether the status line is decided."""
        return self._response.prepared

    async def send(self, frames: bytes) -> None:
        """Write whole frames at once."""
        if not self._response.prepared:
            await self._start()
        self._last_sent = self._loop.time()
        await self._response.write(frames)

    async def finish(self) -> web.StreamResponse:
        """End the response; the connection stays open for the next request."""
        await self.quiet()
        if not self._response.prepared:
            await self._start()
        await self._response.write_eof()
        return self._response

    async def fail(self, frames: bytes) -> web.StreamResponse:
        """End a begun response with an error's frames, and the connection with it."""
        self._response.force_close()
        await self.send(frames)
        return await self.finish()

    async def quiet(self) -> None:
        """Send no more comments. Afterwards is_started changes only by send()."""
        if self._beat is None:
            return
        # The beat holds the lock while it writes, so it is never cut off in the middle.
        async with self._starting:
            self._beat.cancel()
        self._beat = None

    async def _start(self) -> None:
        async with self._starting:
            if not self._response.prepared:
                await self._response.prepare(self._request)

    async def _keep_alive(self, interval: float) -> None:
        while True:
            remaining = self._last_sent + interval - self._loop.time()
            if remaining > 0:
                await asyncio.sleep(remaining)
                continue
            try:
                await self._start()
                async with self._starting:
                    self._last_sent = self._loop.time()
                    await self._response.write(self._keep_alive_frame)
            except ConnectionError:
                # The client left; the request's own task learns of it by being cancelled.
                return


def event_stream(request: web.Request, settings: Settings) -> HttpStream:
    """A stream of server-sent events, with comments while nothing else is sent."""
    return HttpStream(
        request,
        SSE_HEADERS,
        timeout_seconds=settings.request_timeout_seconds,
        keep_alive_seconds=settings.keep_alive_interval_seconds,
    )


class Encoder(Protocol[_EventIn]):
    """A dialect's view of an answer's stream: events in, frames out."""

    @property
    def is_complete(self) -> bool:
        """Whether the last event of the stream's grammar was seen."""

    def encode(self, event: _EventIn) -> bytes:
        """The frames of one event; empty where the dialect shows nothing."""

    def failure(self, refusal: Refusal) -> bytes:
        """The frame that ends a begun stream with an error."""


async def relay(
    stream: HttpStream,
    events: AbstractAsyncContextManager[AsyncIterable[_Event]],
    encoder: Encoder[_Event],
    json_path: Callable[[str], str] = str,
) -> web.StreamResponse:
    """Pass an answer's events on to the client.

    Raises:
        CoreError: The stream failed before its first byte.
        Refusal: The server's end came before it.
    """
    async with stream:
        try:
            async with events as call:
                async for event in call:
                    frames = encoder.encode(event)
                    if encoder.is_complete:
                        # The end is the end: no comment comes after it.
                        await stream.quiet()
                    if frames:
                        await stream.send(frames)
            if not encoder.is_complete:
                # An OK status in mid-answer: not a stream of this contract.
                raise CoreError("INTERNAL")
            return await stream.finish()
        except ConnectionError:
            raise
        except asyncio.CancelledError:
            refusal = None if encoder.is_complete else take_back_expulsion(stream.request)
            if refusal is None:
                raise
            return await _end(stream, encoder, refusal, refusal)
        except Exception as error:  # noqa: BLE001 - whatever went wrong, a stream does not just end
            return await _end(stream, encoder, error, _stream_refusal(error, json_path))


async def _end(
    stream: HttpStream, encoder: Encoder[_Event], error: Exception, refusal: Refusal
) -> web.StreamResponse:
    """Tell the client that there is no more, in the stream where it has begun."""
    await stream.quiet()
    if not stream.is_started:
        raise error
    return await stream.fail(encoder.failure(refusal))


def _stream_refusal(error: Exception, json_path: Callable[[str], str]) -> Refusal:
    if isinstance(error, CoreError):
        log.warning("stream failed code=%s reason=%s", error.code, error.reason or "-")
        return refusal_from_core(error, json_path)
    log.error("stream failed", exc_info=error)
    return internal_refusal()
