"""Errors of the core in each dialect, and a core that is away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from osaurus_grpc.v1 import chat_pb2
from rest_shim.app import serving
from rest_shim.settings import Settings

from .scripted_core import MODEL, ScriptedCore, abort

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


class TestCoreErrors:
    @pytest.mark.parametrize(
        ("code", "reason", "status", "kind", "name"),
        [
            ("INVALID_ARGUMENT", "INVALID_FIELD", 400, "invalid_request_error", "invalid_request"),
            (
                "INVALID_ARGUMENT",
                "CONTEXT_LENGTH_EXCEEDED",
                400,
                "invalid_request_error",
                "context_length_exceeded",
            ),
            ("NOT_FOUND", "MODEL_NOT_FOUND", 404, "invalid_request_error", "model_not_found"),
            (
                "FAILED_PRECONDITION",
                "UNSUPPORTED_CAPABILITY",
                400,
                "invalid_request_error",
                "unsupported_capability",
            ),
            ("FAILED_PRECONDITION", "MODEL_UNUSABLE", 500, "server_error", "model_unusable"),
            ("RESOURCE_EXHAUSTED", "OVERLOADED", 429, "rate_limit_error", "rate_limit_exceeded"),
            ("RESOURCE_EXHAUSTED", "RATE_LIMITED", 429, "rate_limit_error", "rate_limit_exceeded"),
            ("RESOURCE_EXHAUSTED", "INSUFFICIENT_MEMORY", 503, "server_error", "service_unavailable"),
            ("UNAVAILABLE", "DRAINING", 503, "server_error", "service_unavailable"),
            ("UNAUTHENTICATED", "UNAUTHENTICATED", 401, "authentication_error", "invalid_api_key"),
            ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", 504, "server_error", "request_timeout"),
            ("INTERNAL", "ENGINE_FAILED", 500, "server_error", "internal_server_error"),
            ("UNIMPLEMENTED", "NOT_IMPLEMENTED", 501, "server_error", "not_implemented"),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    async def test_every_reason_before_the_first_byte(
        self,
        http: aiohttp.ClientSession,
        core: ScriptedCore,
        code: str,
        reason: str,
        status: int,
        kind: str,
        name: str,
        stream: bool,
    ) -> None:
        details = []
        if code in {"RESOURCE_EXHAUSTED", "UNAVAILABLE"} and reason != "INSUFFICIENT_MEMORY":
            details = [error_details_pb2.RetryInfo(retry_delay=Duration(seconds=6, nanos=500_000_000))]

        async def fail(_request: object, context: grpc.aio.ServicerContext) -> chat_pb2.ChatResponse:
            await abort(context, grpc.StatusCode[code], reason, "What is wrong.", *details)
            raise AssertionError

        async def fail_stream(
            request: object, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            yield chat_pb2.ChatStreamResponse(content=(await fail(request, context)))  # type: ignore[arg-type]  # never built

        core.chat_script, core.stream_script = fail, fail_stream
        async with http.post("/v1/chat/completions", json={**CHAT, "stream": stream}) as response:
            assert response.status == status
            assert response.content_type == "application/json"
            error = (await response.json())["error"]
            assert (error["message"], error["type"], error["code"]) == ("What is wrong.", kind, name)
            if reason == "INSUFFICIENT_MEMORY":
                # The core would say when, if a retry made sense.
                assert "Retry-After" not in response.headers
                assert response.headers["x-should-retry"] == "false"
            elif status in {429, 503}:
                assert response.headers["Retry-After"] == "7"
        async with http.post("/api/chat", json={**CHAT, "stream": stream}) as response:
            assert response.status == status
            expected = f"model '{MODEL}' not found" if reason == "MODEL_NOT_FOUND" else "What is wrong."
            assert await response.json() == {"error": expected}

    async def test_the_field_is_named_in_the_dialects_terms(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        async def fail(_request: object, context: grpc.aio.ServicerContext) -> chat_pb2.ChatResponse:
            bad = error_details_pb2.BadRequest()
            bad.field_violations.add(field="sampling.logit_bias", description="unknown token")
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "unknown token", bad)
            raise AssertionError

        core.chat_script = fail
        async with http.post("/v1/chat/completions", json=CHAT) as response:
            assert (await response.json())["error"]["param"] == "logit_bias"

    async def test_an_exception_of_the_core_is_not_shown(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        async def fail(_request: object, _context: grpc.aio.ServicerContext) -> chat_pb2.ChatResponse:
            raise RuntimeError("/secret/path")

        core.chat_script = fail
        async with http.post("/v1/chat/completions", json=CHAT) as response:
            assert response.status == 500
            text = await response.text()
        assert "secret" not in text
        assert json.loads(text)["error"]["code"] == "internal_server_error"


class TestWithoutCore:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(core="127.0.0.1:9", port=0)

    async def test_a_core_that_is_away_is_503_in_every_dialect(self, http: aiohttp.ClientSession) -> None:
        async with http.post("/v1/chat/completions", json=CHAT) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
            error = (await response.json())["error"]
            assert (error["type"], error["code"]) == ("server_error", "service_unavailable")
        async with http.post("/api/chat", json={**CHAT, "stream": True}) as response:
            assert response.status == 503
            assert isinstance((await response.json())["error"], str)

    async def test_what_needs_no_core_answers(self, http: aiohttp.ClientSession) -> None:
        for path, status in (("/", 200), ("/api/version", 200), ("/metrics", 200), ("/health", 503)):
            async with http.get(path) as response:
                assert response.status == status

    async def test_a_core_that_comes_back_is_found_again(self) -> None:
        core = ScriptedCore()
        server = await core.start()
        port = int(core.address.rpartition(":")[2])
        async with (
            serving(Settings(core=core.address, port=0)) as urls,
            aiohttp.ClientSession(urls[0]) as http,
        ):
            async with http.post("/v1/chat/completions", json=CHAT) as response:
                assert response.status == 200
            await server.stop(None)
            async with http.post("/v1/chat/completions", json=CHAT) as response:
                assert response.status == 503
            server = await core.start(port)
            async with asyncio.timeout(60):
                while True:
                    async with http.post("/v1/chat/completions", json=CHAT) as response:
                        if response.status == 200:
                            break
                    await asyncio.sleep(0.05)
        await server.stop(None)
