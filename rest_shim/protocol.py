"""HTTP that cannot be read: what aiohttp's parser refuses is answered like everything else here.

Requests that the parser cannot make sense of never reach a handler or a middleware. aiohttp answers them
in plain text that quotes the client's bytes; browsers may not read it for want of CORS, and a header that
it quotes may be a key. The classes below put an answer of ours in its place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import (
    BadStatusLine,
    HttpProcessingError,
    InvalidURLError,
    LineTooLong,
)
from aiohttp.web_protocol import _ErrInfo

from rest_shim.errors import Refusal, internal_refusal, refusal_from_status

log = logging.getLogger(__name__)

# Longest request line and longest header field, in bytes. They differ so that LineTooLong, which names
# only the limit, tells one from the other. Pages on localhost share the cookies of all its ports.
MAX_LINE_BYTES = 8190
MAX_FIELD_BYTES = 32 * 1024
# aiohttp's own words for the one other refusal that has a status of its own.
_TOO_MANY_HEADERS = "Too many headers received"

Answer = Callable[[web.BaseRequest, Refusal], web.Response]


def refusal_of_malformed(error: BaseException | None) -> Refusal:
    """What a client is told about bytes that are not HTTP; none of them is quoted."""
    match error:
        case LineTooLong(args=(_, limit, *_)) if limit == MAX_FIELD_BYTES:
            return Refusal(431, f"A header of the request is longer than {MAX_FIELD_BYTES} bytes.")
        case LineTooLong():
            return Refusal(414, f"The request line is longer than {MAX_LINE_BYTES} bytes.")
        case BadStatusLine() | InvalidURLError():
            return Refusal(400, "The request line is not valid HTTP.")
        case HttpProcessingError(message=message) if message.startswith(_TOO_MANY_HEADERS):
            return Refusal(431, "The request has too many headers.")
        case _:
            return Refusal(400, "The request is not valid HTTP.")


class HttpProtocol(web.RequestHandler):
    """One connection, whose unreadable requests get an answer of ours."""

    __slots__ = ("_answer", "_link", "_send_timeout_seconds", "_stall", "_unsent_bytes")

    def __init__(
        self, manager: web.Server, *, answer: Answer, send_timeout_seconds: float, **settings: Any
    ) -> None:
        super().__init__(manager, **settings)
        self._answer = answer
        self._send_timeout_seconds = send_timeout_seconds
        # aiohttp forgets its transport when it closes it; that one still waits for its last bytes to go.
        self._link: asyncio.WriteTransport | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._unsent_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._link = cast("asyncio.WriteTransport", transport)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is closed, by whomever."""
        self._forget_reader()
        self._link = None
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More is to be sent than the client takes; it must go on reading, or its connection is cut."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The client has read enough."""
        self._forget_reader()
        super().resume_writing()

    async def start(self) -> None:
        """Answer the connection's requests; what is unsent after the last must be read, too."""
        try:
            await super().start()
        finally:
            if self._link is not None and self._link.get_write_buffer_size():
                self._watch_reader()

    def _watch_reader(self) -> None:
        self._forget_reader()
        if self._link is not None:
            self._unsent_bytes = self._link.get_write_buffer_size()
            self._stall = self._loop.call_later(self._send_timeout_seconds, self._check_reader)

    def _forget_reader(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _check_reader(self) -> None:
        """Cut the connection of a client that took not one byte; it may be as slow as it likes."""
        if self._link is None:
            return
        if self._link.get_write_buffer_size() < self._unsent_bytes:
            self._watch_reader()
            return
        log.info("cut connection of client that does not read unsent_bytes=%d", self._unsent_bytes)
        self._link.abort()

    def data_received(self, data: bytes) -> None:
        """Bytes of the client; where they break off a body, its handler hears of it.

        aiohttp's parser drops a body whose chunks go wrong, and its handler would wait for the rest until
        the request's deadline.
        """
        super().data_received(data)
        if self._messages and isinstance(self._messages[-1][0], _ErrInfo):
            waiting = [payload for _, payload in self._messages]
            if self._current_request is not None:
                waiting.append(self._current_request.content)
            for payload in waiting:
                if not payload.is_eof():
                    payload.set_exception(web.RequestPayloadError())

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = HTTPStatus.INTERNAL_SERVER_ERROR,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what no handler answered; the connection ends with it.

        Raises:
            ConnectionError: An answer has begun already, or the client left.
        """
        if isinstance(exc, ConnectionError):
            # The client left while it was answered: nobody is there to be told.
            raise exc
        if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            # Not the error's text, which quotes headers; its kind says enough.
            log.info("refused malformed request kind=%s", type(exc).__name__)
            refusal = refusal_of_malformed(exc)
        else:
            log.error("no handler answered status=%d", status, exc_info=exc)
            refusal = internal_refusal()
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        response = self._answer(request, refusal)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer; one that aiohttp made before any middleware ran is put in our words."""
        if isinstance(resp, web.HTTPException):
            resp = self._answer(request, refusal_from_status(resp.status))
        return await super().finish_response(request, resp, start_time)


class HttpServer(web.Server):
    """Makes a protocol a connection."""

    def __init__(self, server: web.Server, answer: Answer, settings: dict[str, Any]) -> None:
        super().__init__(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
        )
        self._answer = answer
        self._settings = settings

    def __call__(self) -> HttpProtocol:
        """A new connection's protocol."""
        return HttpProtocol(self, answer=self._answer, loop=asyncio.get_running_loop(), **self._settings)


class HttpRunner(web.AppRunner):
    """Runs an application on such connections.

    Args:
        app: The application.
        answer: The answer to a request that never reached the application.
        handler_cancellation: Whether a handler is cancelled when its client leaves.
        shutdown_timeout: Seconds that running requests may take to end.
        protocol: Settings of each connection, as web.RequestHandler takes them.
    """

    __slots__ = ("_answer", "_protocol")

    def __init__(
        self,
        app: web.Application,
        *,
        answer: Answer,
        handler_cancellation: bool,
        shutdown_timeout: float,
        **protocol: Any,
    ) -> None:
        super().__init__(app, handler_cancellation=handler_cancellation, shutdown_timeout=shutdown_timeout)
        self._answer = answer
        self._protocol = protocol

    async def _make_server(self) -> web.Server:
        # aiohttp lets an application choose neither its server's class nor its protocol's.
        server = await super()._make_server()
        settings = {"max_line_size": MAX_LINE_BYTES, "max_field_size": MAX_FIELD_BYTES, **self._protocol}
        return HttpServer(server, self._answer, settings)
