"""Anthropic's routes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from aiohttp import web

from osaurus_grpc.v1 import chat_pb2, inference_service_pb2
from rest_shim.anthropic import answer, convert, listing, schema
from rest_shim.anthropic.stream import PING, MessageEncoder
from rest_shim.backend import Backend
from rest_shim.bodies import read_body
from rest_shim.callers import caller_of, request_id_of
from rest_shim.errors import CoreError, Refusal, refusal_from_core
from rest_shim.remote_images import RemoteImages
from rest_shim.routing import Dialect, Route, is_anthropic, model_in_path
from rest_shim.settings import Settings
from rest_shim.wire import SSE_HEADERS, HttpStream, json_response, relay


class AnthropicRoutes:
    """Handlers of Anthropic's API on one core."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self._backend = backend
        self._settings = settings
        self._images = RemoteImages(settings)

    def routes(self) -> Sequence[Route]:
        """What there is; the paths of models are OpenAI's too."""
        anthropic = Dialect.ANTHROPIC
        return (
            Route("POST", "/messages", self.messages, anthropic),
            Route("POST", "/messages/count_tokens", self.count_tokens, anthropic),
            Route("GET", "/models", self.list_models, anthropic, _claims),
            Route("GET", "/models/{id:.+}", self.get_model, anthropic, _claims),
        )

    async def messages(self, request: web.Request) -> web.StreamResponse:
        """POST /messages."""
        body = await read_body(request, schema.MessagesBody, self._settings.request_timeout_seconds)
        body = await self._images.inlined(body)
        chat = convert.chat_request(body)
        try:
            if body.stream:
                return await self._stream(request, body, chat)
            response = await self._backend.chat(chat, caller_of(request))
        except CoreError as error:
            raise _refusal(error, body) from error
        message = answer.message_json(
            response,
            shows_thinking=convert.shows_thinking(body),
            omits_thinking=convert.omits_thinking(body),
        )
        return json_response(message)

    async def _stream(
        self, request: web.Request, body: schema.MessagesBody, chat: chat_pb2.ChatRequest
    ) -> web.StreamResponse:
        encoder = MessageEncoder(
            request_id_of(request),
            shows_thinking=convert.shows_thinking(body),
            omits_thinking=convert.omits_thinking(body),
        )
        stream = HttpStream(
            request,
            SSE_HEADERS,
            timeout_seconds=self._settings.request_timeout_seconds,
            keep_alive_seconds=self._settings.keep_alive_interval_seconds,
            keep_alive_frame=PING,
        )
        events = self._backend.chat_stream(chat_pb2.ChatStreamRequest(chat=chat), caller_of(request))
        return await relay(stream, events, encoder, partial(convert.json_path, body))

    async def count_tokens(self, request: web.Request) -> web.StreamResponse:
        """POST /messages/count_tokens."""
        body = await read_body(request, schema.CountBody, self._settings.request_timeout_seconds)
        body = await self._images.inlined(body)
        question = inference_service_pb2.CountTokensRequest(chat=convert.prompt_request(body))
        try:
            counted = await self._backend.count_tokens(question, caller_of(request))
        except CoreError as error:
            raise _refusal(error, body) from error
        return json_response({"input_tokens": counted.token_count})

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        """GET /models."""
        models = await self._backend.list_models(caller_of(request))
        return json_response(listing.page_json(models, request.query))

    async def get_model(self, request: web.Request) -> web.StreamResponse:
        """GET /models/{id}."""
        model = await self._backend.get_model(model_in_path(request), caller_of(request))
        return json_response(listing.model_json(model))


def _refusal(error: CoreError, body: schema.CountBody) -> Refusal:
    refusal = refusal_from_core(error, partial(convert.json_path, body))
    if error.reason == "CONTEXT_LENGTH_EXCEEDED":
        # Coding agents look for these words of Anthropic's, and make their conversation shorter then.
        tokens, limit = (error.metadata.get(key, "?") for key in ("prompt_tokens", "limit"))
        refusal.message, refusal.param = f"prompt is too long: {tokens} tokens > {limit} maximum", None
    return refusal


async def _claims(request: web.Request) -> bool:
    return is_anthropic(request)
