"""Ollama's routes that answer: chat, generate, embed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from aiohttp import web

from osaurus_grpc.v1 import chat_pb2, completion_pb2, model_pb2
from rest_shim.arrival import read_bytes
from rest_shim.backend import Backend, Caller
from rest_shim.bodies import parse_object, read_body
from rest_shim.callers import caller_of
from rest_shim.errors import CoreError, Refusal
from rest_shim.ollama import convert, embeddings, generate, names, schema
from rest_shim.ollama.generate import GenerateEncoder
from rest_shim.ollama.stream import LineEncoder
from rest_shim.origins import refuse_foreign_origin
from rest_shim.routing import Dialect, Route
from rest_shim.settings import Settings
from rest_shim.wire import NDJSON_HEADERS, HttpStream, json_response, relay

JSON_TYPE = "application/json; charset=utf-8"

_PULL_TEXT = 'model "{}" not found, try pulling it first'


class OllamaRoutes:
    """Handlers of Ollama's API on one core."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self._backend = backend
        self._settings = settings

    def routes(self) -> Sequence[Route]:
        """What there is; the path of embeddings is OpenAI's too."""
        ollama = Dialect.OLLAMA
        return (
            Route("POST", "/chat", self.chat, ollama),
            Route("POST", "/generate", self.generate, ollama),
            Route("POST", "/embed", self.embed, ollama),
            Route("POST", "/embeddings", self.embeddings, ollama, self._is_legacy),
        )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /chat; without messages it loads or unloads the model."""
        body = await read_body(request, schema.ChatBody, self._settings.request_timeout_seconds)
        name = names.required(body.model)
        caller = caller_of(request)
        async with names.model_errors(name, json_path=convert.json_path):
            if not body.messages:
                reason = await self._change_residence(request, body, caller)
                answer = convert.residence_json(name, reason, time.time_ns())
                return json_response(answer, content_type=JSON_TYPE)
            chat = convert.chat_request(body)
            await self._check_thinking(body, caller)
            if body.stream:
                events = self._backend.chat_stream(chat_pb2.ChatStreamRequest(chat=chat), caller)
                return await relay(self._lines(request), events, LineEncoder(name), convert.json_path)
            response = await self._backend.chat(chat, caller)
        return json_response(convert.chat_json(response, name, time.time_ns()), content_type=JSON_TYPE)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """POST /generate; without a prompt it loads or unloads the model."""
        body = await read_body(request, schema.GenerateBody, self._settings.request_timeout_seconds)
        name, caller = body.model, caller_of(request)
        if not name:
            raise names.unknown(name)
        async with names.model_errors(name, json_path=convert.prompt_path):
            if not body.prompt:
                reason = await self._change_residence(request, body, caller)
                answer = generate.residence_json(name, reason, time.time_ns())
                return json_response(answer, content_type=JSON_TYPE)
            await self._check_thinking(body, caller)
            if generate.is_completion(body):
                async with _insert_errors(name):
                    return await self._complete(request, body, caller)
            chat = generate.chat_request(body)
            if body.stream:
                events = self._backend.chat_stream(chat_pb2.ChatStreamRequest(chat=chat), caller)
                encoder = GenerateEncoder(name, is_raw=False)
                return await relay(self._lines(request), events, encoder, convert.prompt_path)
            response = await self._backend.chat(chat, caller)
        return json_response(generate.generate_json(response, body, time.time_ns()), content_type=JSON_TYPE)

    async def _complete(
        self, request: web.Request, body: schema.GenerateBody, caller: Caller
    ) -> web.StreamResponse:
        completion = generate.complete_request(body)
        if body.stream:
            question = completion_pb2.CompleteStreamRequest(completion=completion)
            events = self._backend.complete_stream(question, caller)
            encoder = GenerateEncoder(body.model, is_raw=body.raw)
            return await relay(self._lines(request), events, encoder, convert.prompt_path)
        response = await self._backend.complete(completion, caller)
        return json_response(generate.generate_json(response, body, time.time_ns()), content_type=JSON_TYPE)

    async def embed(self, request: web.Request) -> web.StreamResponse:
        """POST /embed."""
        body = await read_body(request, schema.EmbedBody, self._settings.request_timeout_seconds)
        caller = caller_of(request)
        if not body.model:
            raise names.unknown(body.model, _PULL_TEXT)
        width = 0
        if not body.input or body.dimensions > 0:
            async with names.model_errors(body.model, _PULL_TEXT):
                width = (await self._backend.get_model(body.model, caller)).embedding_length
        if not body.input:
            return json_response(embeddings.nothing_json(body.model), content_type=JSON_TYPE)
        responses = []
        for turn, part in enumerate(embeddings.embed_requests(body, width)):
            async with names.model_errors(body.model, _PULL_TEXT, partial(embeddings.json_path, turn)):
                responses.append(await self._backend.embed(part, caller))
        return json_response(embeddings.embed_json(responses, body.model), content_type=JSON_TYPE)

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """POST /embeddings, Ollama's older call."""
        body = await read_body(request, schema.EmbeddingsBody, self._settings.request_timeout_seconds)
        name, caller = names.required(body.model), caller_of(request)
        async with names.model_errors(name, _PULL_TEXT, convert.prompt_path):
            if not body.prompt:
                await self._backend.get_model(name, caller)
                return json_response({"embedding": []}, content_type=JSON_TYPE)
            response = await self._backend.embed(embeddings.legacy_request(body), caller)
        return json_response(embeddings.legacy_json(response), content_type=JSON_TYPE)

    async def _is_legacy(self, request: web.Request) -> bool:
        """Whether a request to /embeddings is Ollama's: below /api, with a prompt."""
        if not request.path.startswith("/api/"):
            return False
        data = await read_bytes(request, self._settings.request_timeout_seconds)
        try:
            return "prompt" in parse_object(data)
        except Refusal:
            # OpenAI's handler says what is wrong with it.
            return False

    def _lines(self, request: web.Request) -> HttpStream:
        return HttpStream(request, NDJSON_HEADERS, timeout_seconds=self._settings.request_timeout_seconds)

    async def _change_residence(self, request: web.Request, body: schema.AnswerBody, caller: Caller) -> str:
        """Load or unload; gives Ollama's word for which."""
        refuse_foreign_origin(request, self._settings)
        if body.keep_alive == 0:
            await self._backend.unload_model(body.model, caller)
            return "unload"
        await self._backend.load_model(body.model, convert.keep_alive(body), caller)
        return "load"

    async def _check_thinking(self, body: schema.AnswerBody, caller: Caller) -> None:
        if not body.think:
            return
        model = await self._backend.get_model(body.model, caller)
        if model_pb2.CAPABILITY_REASONING not in model.capabilities:
            raise Refusal(400, f'"{body.model}" does not support thinking', param="think")


@asynccontextmanager
async def _insert_errors(name: str) -> AsyncIterator[None]:
    """Says of a model that cannot fill gaps what Ollama says of it."""
    try:
        yield
    except CoreError as error:
        if error.reason == "UNSUPPORTED_CAPABILITY" and error.field == "suffix":
            raise Refusal(400, f"{name} does not support insert", param="suffix") from error
        raise
