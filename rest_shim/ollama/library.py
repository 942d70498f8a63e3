"""Ollama's routes about models: which there are, what they are, their names."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from rest_shim.backend import Backend
from rest_shim.bodies import read_body
from rest_shim.callers import caller_of
from rest_shim.errors import Refusal
from rest_shim.ollama import listing, names, schema
from rest_shim.ollama.routes import JSON_TYPE
from rest_shim.origins import refuse_foreign_origin
from rest_shim.routing import Dialect, Route, later
from rest_shim.settings import Settings
from rest_shim.wire import json_response

# The release of Ollama whose API this is. Clients compare it with the least one that they need, so it
# is not our own, which the Server header tells.
OLLAMA_VERSION = "0.20.0"

_QUOTED_TEXT = 'model "{}" not found'


class LibraryRoutes:
    """Handlers of Ollama's calls about models, on one core."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self._backend = backend
        self._settings = settings

    def routes(self) -> Sequence[Route]:
        """What there is and what is to come."""
        ollama = Dialect.OLLAMA
        return (
            Route("GET", "/tags", self.tags, ollama),
            Route("GET", "/ps", self.running, ollama),
            Route("GET", "/version", self.version, ollama),
            Route("POST", "/show", self.show, ollama),
            Route("POST", "/copy", self.copy, ollama),
            Route("DELETE", "/delete", self.delete, ollama),
            later("POST", "/pull", ollama, "Fetching a model over HTTP (osaurus pull does it)"),
            later("POST", "/create", ollama, "Creating a model over HTTP"),
            later("POST", "/push", ollama, "Pushing a model"),
            later("GET", "/blobs/{digest}", ollama, "Storing blobs for /create"),
            later("POST", "/blobs/{digest}", ollama, "Storing blobs for /create"),
        )

    async def tags(self, request: web.Request) -> web.StreamResponse:
        """GET /tags."""
        models = await self._backend.list_models(caller_of(request))
        tags = [listing.tag_json(model) for model in models]
        return json_response({"models": tags}, content_type=JSON_TYPE)

    async def running(self, request: web.Request) -> web.StreamResponse:
        """GET /ps."""
        models = await self._backend.list_models(caller_of(request))
        return json_response(listing.running_json(models), content_type=JSON_TYPE)

    async def version(self, _request: web.Request) -> web.StreamResponse:
        """GET /version."""
        return json_response({"version": OLLAMA_VERSION}, content_type=JSON_TYPE)

    async def show(self, request: web.Request) -> web.StreamResponse:
        """POST /show."""
        body = await read_body(request, schema.NameBody, self._settings.request_timeout_seconds)
        name = names.required(body.either)
        # Here, and not in /chat, Ollama names the model in full.
        async with names.model_errors(names.with_tag(name)):
            model = await self._backend.get_model(name, caller_of(request))
        return json_response(listing.show_json(model), content_type=JSON_TYPE)

    async def copy(self, request: web.Request) -> web.StreamResponse:
        """POST /copy: another name for a model."""
        body = await read_body(request, schema.CopyBody, self._settings.request_timeout_seconds)
        refuse_foreign_origin(request, self._settings)
        for key, name in (("source", body.source), ("destination", body.destination)):
            if not name:
                raise Refusal(400, f'{key} "" is invalid', param=key)
        async with names.model_errors(body.source, _QUOTED_TEXT):
            await self._backend.copy_model(body.source, body.destination, caller_of(request))
        return web.Response()

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """DELETE /delete: an alias; the core says what else it deletes."""
        body = await read_body(request, schema.NameBody, self._settings.request_timeout_seconds)
        refuse_foreign_origin(request, self._settings)
        name = names.required(body.either)
        async with names.model_errors(name):
            await self._backend.delete_model(name, caller_of(request))
        return web.Response()
