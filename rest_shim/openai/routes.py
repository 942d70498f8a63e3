"""OpenAI's routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

from aiohttp import web

from osaurus_grpc.v1 import chat_pb2, completion_pb2
from rest_shim.backend import Backend, Caller
from rest_shim.bodies import read_body
from rest_shim.callers import caller_of
from rest_shim.errors import CoreError, refusal_from_core
from rest_shim.openai import completions, convert, embeddings, schema
from rest_shim.openai.completion_stream import PARALLEL_PROMPTS, CompletionEncoder, alone, side_by_side
from rest_shim.openai.completions import CompletionBody
from rest_shim.openai.embeddings import EmbeddingsBody
from rest_shim.openai.stream import ChunkEncoder
from rest_shim.remote_images import RemoteImages
from rest_shim.routing import Dialect, Route, model_in_path
from rest_shim.settings import Settings
from rest_shim.wire import event_stream, json_response, relay


class OpenAIRoutes:
    """Handlers of OpenAI's API on one core."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self._backend = backend
        self._settings = settings
        self._images = RemoteImages(settings)

    def routes(self) -> Sequence[Route]:
        """What there is and what is to come."""
        return (
            Route("GET", "/models", self.list_models, Dialect.OPENAI),
            # An id may be "org/name".
            Route("GET", "/models/{id:.+}", self.get_model, Dialect.OPENAI),
            Route("POST", "/chat/completions", self.chat_completions, Dialect.OPENAI),
            Route("POST", "/completions", self.completions, Dialect.OPENAI),
            Route("POST", "/embeddings", self.embeddings, Dialect.OPENAI),
        )

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        """GET /models."""
        models = await self._backend.list_models(caller_of(request))
        return json_response({"object": "list", "data": [convert.model_json(model) for model in models]})

    async def get_model(self, request: web.Request) -> web.StreamResponse:
        """GET /models/{id}."""
        model = await self._backend.get_model(model_in_path(request), caller_of(request))
        return json_response(convert.model_json(model))

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """POST /chat/completions."""
        body = await read_body(request, schema.ChatBody, self._settings.request_timeout_seconds)
        body = await self._images.inlined(body)
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
            include_usage=_wants_usage(body.stream_options),
            created=int(time.time()),
        )
        events = self._backend.chat_stream(chat_pb2.ChatStreamRequest(chat=chat), caller_of(request))
        return await relay(event_stream(request, self._settings), events, encoder, convert.json_path)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /completions."""
        body = await read_body(request, CompletionBody, self._settings.request_timeout_seconds)
        asked = completions.complete_requests(body)
        try:
            if body.stream:
                return await self._completion_stream(request, body, asked)
            answers = await self._complete(asked, caller_of(request))
        except CoreError as error:
            raise refusal_from_core(error, completions.json_path) from error
        return json_response(completions.completion_json(answers, body.n, int(time.time())))

    async def _complete(
        self, asked: Sequence[completion_pb2.CompleteRequest], caller: Caller
    ) -> Sequence[completion_pb2.CompleteResponse]:
        places = asyncio.Semaphore(PARALLEL_PROMPTS)

        async def one(place: int, request: completion_pb2.CompleteRequest) -> completion_pb2.CompleteResponse:
            async with places:
                try:
                    return await self._backend.complete(request, caller)
                except CoreError as error:
                    if len(asked) == 1:
                        raise
                    raise completions.placed(error, place) from error

        tasks = [asyncio.create_task(one(place, request)) for place, request in enumerate(asked)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            # After a failure, or once the client left, nobody waits for the others.
            for task in tasks:
                task.cancel()

    async def _completion_stream(
        self, request: web.Request, body: CompletionBody, asked: Sequence[completion_pb2.CompleteRequest]
    ) -> web.StreamResponse:
        encoder = CompletionEncoder(
            include_usage=_wants_usage(body.stream_options),
            with_logprobs=body.logprobs is not None,
            created=int(time.time()),
            choice_count=body.n,
        )
        caller = caller_of(request)
        streams = [
            partial(
                self._backend.complete_stream, completion_pb2.CompleteStreamRequest(completion=one), caller
            )
            for one in asked
        ]
        events = alone(streams[0]()) if len(streams) == 1 else side_by_side(streams)
        return await relay(event_stream(request, self._settings), events, encoder, completions.json_path)

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """POST /embeddings."""
        body = await read_body(request, EmbeddingsBody, self._settings.request_timeout_seconds)
        try:
            response = await self._backend.embed(embeddings.embed_request(body), caller_of(request))
        except CoreError as error:
            raise refusal_from_core(error, embeddings.json_path) from error
        return json_response(embeddings.embeddings_json(response, body.encoding_format))


def _wants_usage(options: schema.StreamOptions | None) -> bool:
    return options is not None and options.include_usage
