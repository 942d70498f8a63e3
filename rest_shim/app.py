"""The aiohttp application: routes, what happens around every request, and the server's life."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib import metadata

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from rest_shim.anthropic.routes import AnthropicRoutes
from rest_shim.arrival import HELD_BODIES, HeldBodies
from rest_shim.backend import Backend
from rest_shim.callers import ANTHROPIC_REQUEST_ID_HEADER, REQUEST_ID_HEADER, request_id_of
from rest_shim.errors import (
    CoreError,
    Refusal,
    anthropic_body,
    internal_refusal,
    ollama_body,
    openai_body,
    refusal_from_core,
    refusal_from_status,
)
from rest_shim.keys import KeyGate
from rest_shim.metrics import HttpMetrics
from rest_shim.ollama.library import LibraryRoutes
from rest_shim.ollama.routes import OllamaRoutes
from rest_shim.openai.routes import OpenAIRoutes
from rest_shim.origins import check_host, cors_headers, preflight
from rest_shim.progress import RequestsInProgress, take_back_expulsion
from rest_shim.protocol import HttpRunner
from rest_shim.responses.routes import ResponsesRoutes
from rest_shim.routing import Dialect, Handler, Route, RouteTable
from rest_shim.settings import Settings, is_loopback
from rest_shim.status import StatusRoutes
from rest_shim.wire import json_response

log = logging.getLogger(__name__)

# Says what runs here; /version speaks of the API that Ollama's clients look for.
SERVER = f"osaurus/{metadata.version('osaurus')}"

_STARTED = web.RequestKey("started", float)

# How long a start on an exposed address waits for the core to say whether it asks for a key.
_EXPOSURE_CHECK_SECONDS = 30.0

# How long an idle connection is kept for its next request.
_IDLE_CONNECTION_SECONDS = 75.0

# For requests that were ended to tell their clients.
_GOODBYE_SECONDS = 1.0

# Nginx's word for a client that left; it appears in logs and metrics only.
_CLIENT_CLOSED_REQUEST = 499


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Drops aiohttp's records of malformed HTTP: they quote headers, and a header may be a key."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


class StartError(Exception):
    """The server cannot start; the text says in one line why."""


class RestShim:
    """What surrounds the routes of one application.

    Attributes:
        progress: The requests that are being answered.
    """

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self._settings = settings
        self._gate = KeyGate(backend)
        self._bodies = HeldBodies(settings.max_held_body_bytes)
        self._metrics = HttpMetrics(self._bodies)
        self.progress = RequestsInProgress()
        self._table = RouteTable(
            (
                *StatusRoutes(backend, self._metrics).routes(),
                *OpenAIRoutes(backend, settings).routes(),
                *ResponsesRoutes(backend, settings).routes(),
                *OllamaRoutes(backend, settings).routes(),
                *LibraryRoutes(backend, settings).routes(),
                *AnthropicRoutes(backend, settings).routes(),
            )
        )

    @property
    def routes(self) -> Sequence[Route]:
        """All routes, without prefixes."""
        return self._table.routes

    def application(self) -> web.Application:
        """The application, ready for a runner."""
        app = web.Application(
            middlewares=[self._observe, self._answer_errors],
            client_max_size=self._settings.max_body_bytes,
        )
        app[HELD_BODIES] = self._bodies
        app.on_response_prepare.append(self._add_headers)
        self._table.register(app.router)
        return app

    def answer_unreadable(self, request: web.BaseRequest, refusal: Refusal) -> web.Response:
        """The answer to a request that no handler saw; its dialect is not known where it has no path."""
        self._metrics.begin()
        self._metrics.end(request.method, "unmatched", refusal.status, 0.0)
        response = self._error(request, refusal)
        self._put_headers(request, response)
        return response

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Every response of a handler passes here, streams and errors too."""
        self._put_headers(request, response)

    def _put_headers(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        for name in (REQUEST_ID_HEADER, ANTHROPIC_REQUEST_ID_HEADER):
            response.headers[name] = request_id_of(request)
        response.headers["Server"] = SERVER
        # As OpenAI's server counts: until the head of the answer, so that of a stream its first token.
        milliseconds = (time.monotonic() - request.get(_STARTED, time.monotonic())) * 1000
        response.headers["openai-processing-ms"] = str(round(milliseconds))
        response.headers.update(cors_headers(request, self._settings))

    @web.middleware
    async def _observe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Logs and counts."""
        started = request[_STARTED] = time.monotonic()
        self._metrics.begin()
        status = _CLIENT_CLOSED_REQUEST
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            self._bodies.release(request)
            seconds = time.monotonic() - started
            route = self._table.pattern(request.path)
            self._metrics.end(request.method, route, status, seconds)
            # Supervisors and monitors ask for health all the time.
            log.log(
                logging.DEBUG if route == "/health" else logging.INFO,
                "request method=%s route=%s status=%d seconds=%.3f request_id=%s",
                request.method, route, status, seconds, request_id_of(request),
            )  # fmt: skip

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turns whatever goes wrong before the first byte into the dialect's error."""
        try:
            check_host(request, self._settings)
            if request.method == "OPTIONS":
                return preflight(request, self._table.methods(request.path))
            with self.progress.enter(request):
                await self._gate.require(request)
                return await handler(request)
        except asyncio.CancelledError:
            expulsion = take_back_expulsion(request)
            if expulsion is None:
                raise
            return self._error(request, expulsion)
        except Refusal as refusal:
            return self._error(request, refusal)
        except CoreError as error:
            return self._error(request, refusal_from_core(error))
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted({*error.allowed_methods, "OPTIONS"}))
            wrong_method = refusal_from_status(error.status, f"{request.method} is not allowed on this path.")
            wrong_method.headers["Allow"] = allowed
            return self._error(request, wrong_method)
        except web.HTTPRequestEntityTooLarge as error:
            text = f"The request body is larger than {self._settings.max_body_bytes} bytes."
            return self._error(request, refusal_from_status(error.status, text))
        except web.HTTPException as error:
            text = "There is nothing at this path." if error.status == HTTPStatus.NOT_FOUND else ""
            return self._error(request, refusal_from_status(error.status, text))
        except ConnectionError:
            # The client left; aiohttp ends the connection.
            raise
        except Exception:
            log.exception("request failed request_id=%s", request_id_of(request))
            return self._error(request, internal_refusal())

    def _error(self, request: web.BaseRequest, refusal: Refusal) -> web.Response:
        dialect = self._table.dialect(request)
        content_type = "application/json"
        match dialect:
            case Dialect.OLLAMA:
                body, content_type = ollama_body(refusal), "application/json; charset=utf-8"
            case Dialect.ANTHROPIC:
                body = anthropic_body(refusal, request_id_of(request))
            case Dialect.OPENAI:
                body = openai_body(refusal)
        return json_response(body, status=refusal.status, headers=refusal.headers, content_type=content_type)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Sequence[str]]:
    """Serve inside the context; yields the addresses as URLs.

    On leaving it, the server stops listening, running requests get drain_seconds to end, those that are
    left are ended with an error, and the connection to the core is closed last.

    Raises:
        StartError: The address cannot be bound or must not be exposed.
    """
    http_log = log.getChild("http")
    http_log.addFilter(_is_worth_logging)
    backend = Backend(settings.core, request_timeout_seconds=settings.request_timeout_seconds)
    shim = RestShim(backend, settings)
    runner = HttpRunner(
        shim.application(),
        answer=shim.answer_unreadable,
        # Without it aiohttp notices a client that leaves only at the next write.
        handler_cancellation=True,
        access_log=None,
        # arrival.py unfolds compressed bodies.
        auto_decompress=False,
        logger=http_log,
        keepalive_timeout=_IDLE_CONNECTION_SECONDS,
        shutdown_timeout=_GOODBYE_SECONDS,
        send_timeout_seconds=settings.send_timeout_seconds,
    )
    try:
        await _check_exposure(backend, settings)
        await runner.setup()
        await _bind(runner, settings)
        yield [_url(address) for address in runner.addresses]
        await _drain(runner, shim.progress, settings.drain_seconds)
    finally:
        await runner.cleanup()
        await backend.close()


async def _drain(runner: web.AppRunner, progress: RequestsInProgress, seconds: float) -> None:
    """Stop listening, give running requests so long, and end those that are left with an error."""
    for site in list(runner.sites):
        await site.stop()
    # What waits on kept-alive connections was sent by clients that saw a server.
    await asyncio.sleep(0)
    if runner.server is not None:
        runner.server.pre_shutdown()
    await progress.drain(seconds)
    if progress:
        log.warning("ending requests count=%d", len(progress))
        await progress.expel(_GOODBYE_SECONDS)


async def _check_exposure(backend: Backend, settings: Settings) -> None:
    """An address that others can reach needs keys, and only the core knows whether there are any."""
    if is_loopback(settings.host) or settings.insecure_expose:
        return
    try:
        is_keyed = await backend.asks_for_key(_EXPOSURE_CHECK_SECONDS)
    except CoreError as error:
        raise StartError(
            f"not listening on {settings.host}: the core at {settings.core} did not say whether it asks "
            f"for a key ({error.code})"
        ) from error
    if not is_keyed:
        raise StartError(
            f"not listening on {settings.host}: the core at {settings.core} asks for no key; start it "
            "with --api-key, or give --insecure-expose"
        )


async def _bind(runner: web.AppRunner, settings: Settings) -> None:
    # A second server on the port must fail, not share it.
    site = web.TCPSite(runner, settings.host, settings.port, reuse_port=False)
    try:
        await site.start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"port {settings.port} on {settings.host} is taken; choose another with --port"
            ) from error
        raise StartError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}"
        ) from error


def _url(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    host, port = address[0], address[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve_until(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until stop is set, and say where on stdout.

    Raises:
        StartError: The server cannot start.
    """
    async with serving(settings) as urls:
        print(f"osaurus-rest listening on {urls[0]}", flush=True)
        await stop.wait()
        log.info("stopping drain_seconds=%g", settings.drain_seconds)
