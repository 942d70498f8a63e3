"""OpenAI's routes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from aiohttp import web

from osaurus_grpc.v1 import chat_pb2
from rest_shim.backend import Backend
from rest_shim.bodies import read_body
from rest_shim.callers import caller_of
from rest_shim.errors import CoreError, refusal_from_core
from rest_shim.openai import convert, schema
from rest_shim.openai.stream import ChunkEncoder
from rest_shim.routing import Dialect, Route, later
from rest_shim.settings import Settings
from rest_shim.wire import SSE_HEADERS, HttpStream, json_response, relay


class OpenAIRoutes:
    """Handlers of OpenAI's API on one core."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self._backend = backend
        self._settings = settings

    def routes(self) -> Sequence[Route]:
        """What there is and what is to come."""
        return (
            Route("GET", "/models", self.list_models, Dialect.OPENAI),
            # An id may be "org/name".
            Route("GET", "/models/{id:.+}", self.get_model, Dialect.OPENAI),
            Route("POST", "/chat/completions", self.chat_completions, Dialect.OPENAI),
            later("POST", "/completions", Dialect.OPENAI, "Text completion"),
            later("POST", "/embeddings", Dialect.OPENAI, "Embedding"),
            later("POST", "/responses", Dialect.OPENAI, "The Responses API"),
        )

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        """GET /models."""
        models = await self._backend.list_models(caller_of(request))
        return json_response({"object": "list", "data": [convert.model_json(model) for model in models]})

    async def get_model(self, request: web.Request) -> web.StreamResponse:
        """GET /models/{id}."""
        name = request.match_info["id"].rstrip("/")
        return json_response(convert.model_json(await self._backend.get_model(name, caller_of(request))))

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """POST /chat/completions."""
        body = await read_body(request, schema.ChatBody, self._settings.request_timeout_seconds)
        chat = convert.chat_request(body)
        try:
            if body.stream:
                return await self._stream(request, body, chat)
            response = await self._backend.chat(chat, caller_of(request))
        except CoreError as error:
            raise refusal_from_core(error, convert.json_path) from error
        return json_response(convert.chat_json(response, int(time.time())))

    async def _stream(
        self, request: web.Request, body: schema.ChatBody, chat: chat_pb2.ChatRequest
    ) -> web.StreamResponse:
        encoder = ChunkEncoder(
            choice_count=body.n or 1,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            created=int(time.time()),
        )
        stream = HttpStream(
            request,
            SSE_HEADERS,
            timeout_seconds=self._settings.request_timeout_seconds,
            keep_alive_seconds=self._settings.keep_alive_interval_seconds,
        )
        events = self._backend.chat_stream(chat_pb2.ChatStreamRequest(chat=chat), caller_of(request))
        return await relay(stream, events, encoder, convert.json_path)
