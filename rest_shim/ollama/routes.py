"""Ollama's routes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import metadata

from aiohttp import web

from osaurus_grpc.v1 import chat_pb2, model_pb2
from rest_shim.backend import Backend, Caller
from rest_shim.bodies import read_body
from rest_shim.callers import caller_of
from rest_shim.errors import CoreError, Refusal
from rest_shim.ollama import convert, listing, schema
from rest_shim.ollama.stream import LineEncoder
from rest_shim.origins import refuse_foreign_origin
from rest_shim.routing import Dialect, Route, later
from rest_shim.settings import Settings
from rest_shim.wire import NDJSON_HEADERS, HttpStream, json_response, relay

_JSON = "application/json; charset=utf-8"


class OllamaRoutes:
    """Handlers of Ollama's API on one core."""

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
            Route("POST", "/chat", self.chat, ollama),
            Route("POST", "/show", self.show, ollama),
            later("POST", "/generate", ollama, "Text generation (/api/generate)"),
            later("POST", "/embed", ollama, "Embedding"),
            later("POST", "/pull", ollama, "Fetching a model over HTTP"),
            later("DELETE", "/delete", ollama, "Deleting a model over HTTP"),
            later("POST", "/copy", ollama, "Copying a model over HTTP"),
            later("POST", "/create", ollama, "Creating a model over HTTP"),
        )

    async def tags(self, request: web.Request) -> web.StreamResponse:
        """GET /tags."""
        models = await self._backend.list_models(caller_of(request))
        return json_response({"models": [listing.tag_json(model) for model in models]}, content_type=_JSON)

    async def running(self, request: web.Request) -> web.StreamResponse:
        """GET /ps."""
        models = await self._backend.list_models(caller_of(request))
        return json_response(listing.running_json(models), content_type=_JSON)

    async def version(self, _request: web.Request) -> web.StreamResponse:
        """GET /version."""
        return json_response({"version": metadata.version("osaurus")}, content_type=_JSON)

    async def show(self, request: web.Request) -> web.StreamResponse:
        """POST /show."""
        body = await read_body(request, schema.ShowBody, self._settings.request_timeout_seconds)
        name = _required(body.model or body.name)
        # Here, and not in /chat, Ollama names the model in full.
        async with _model_errors(name if ":" in name else f"{name}:latest"):
            model = await self._backend.get_model(name, caller_of(request))
        return json_response(listing.show_json(model), content_type=_JSON)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /chat; without messages it loads or unloads the model."""
        body = await read_body(request, schema.ChatBody, self._settings.request_timeout_seconds)
        name = _required(body.model)
        caller = caller_of(request)
        async with _model_errors(name):
            if not body.messages:
                refuse_foreign_origin(request, self._settings)
                return await self._change_residence(body, caller)
            chat = convert.chat_request(body)
            if body.think:
                await self._require_reasoning(name, caller)
            if body.stream:
                events = self._backend.chat_stream(chat_pb2.ChatStreamRequest(chat=chat), caller)
                timeout = self._settings.request_timeout_seconds
                stream = HttpStream(request, NDJSON_HEADERS, timeout_seconds=timeout)
                return await relay(stream, events, LineEncoder(name))
            response = await self._backend.chat(chat, caller)
        return json_response(convert.chat_json(response, name, time.time_ns()), content_type=_JSON)

    async def _change_residence(self, body: schema.ChatBody, caller: Caller) -> web.StreamResponse:
        if body.keep_alive == 0:
            await self._backend.unload_model(body.model, caller)
            reason = "unload"
        else:
            await self._backend.load_model(body.model, convert.keep_alive(body), caller)
            reason = "load"
        return json_response(convert.residence_json(body.model, reason, time.time_ns()), content_type=_JSON)

    async def _require_reasoning(self, name: str, caller: Caller) -> None:
        model = await self._backend.get_model(name, caller)
        if model_pb2.CAPABILITY_REASONING not in model.capabilities:
            raise Refusal(400, f'"{name}" does not support thinking', param="think")


def _required(name: str) -> str:
    if not name:
        raise Refusal(400, "model is required", param="model")
    return name


@asynccontextmanager
async def _model_errors(name: str) -> AsyncIterator[None]:
    """Says "not found" in Ollama's words, which clients look for."""
    try:
        yield
    except CoreError as error:
        if error.reason == "MODEL_NOT_FOUND":
            raise Refusal(404, f"model '{name}' not found", code="model_not_found") from error
        raise
