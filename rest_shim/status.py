"""The routes that tell how the server is."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from aiohttp import web

from rest_shim.backend import Backend
from rest_shim.metrics import CONTENT_TYPE, HttpMetrics
from rest_shim.openapi.document import document
from rest_shim.routing import Dialect, Route, later
from rest_shim.wire import json_response

RUNNING_TEXT = "Osaurus is running"


class StatusRoutes:
    """Handlers of what belongs to no dialect."""

    def __init__(self, backend: Backend, metrics: HttpMetrics) -> None:
        self._backend = backend
        self._metrics = metrics

    def routes(self) -> Sequence[Route]:
        """What there is and what is to come."""
        return (
            Route("GET", "/", self.running, Dialect.OPENAI),
            Route("GET", "/health", self.health, Dialect.OPENAI),
            Route("GET", "/metrics", self.metrics, Dialect.OPENAI),
            Route("GET", "/openapi.json", self.describe, Dialect.OPENAI),
            later("GET", "/ui", Dialect.OPENAI, "The web page"),
        )

    async def running(self, _request: web.Request) -> web.StreamResponse:
        """GET /."""
        return web.Response(text=RUNNING_TEXT)

    async def health(self, _request: web.Request) -> web.StreamResponse:
        """GET /health: whether an answer can be had, so the core is asked too."""
        is_serving = await self._backend.is_serving()
        body = {
            "status": "ok" if is_serving else "unavailable",
            "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if is_serving:
            return json_response(body)
        return json_response(body, status=503, headers={"Retry-After": "2"})

    async def describe(self, _request: web.Request) -> web.StreamResponse:
        """GET /openapi.json."""
        return json_response(document())

    async def metrics(self, _request: web.Request) -> web.StreamResponse:
        """GET /metrics; of a shim whose core is dead, too, since that is when metrics are wanted."""
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})
