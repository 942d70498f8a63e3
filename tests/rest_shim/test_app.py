"""What surrounds the routes: paths, methods, CORS, hosts, ids, limits, errors of the core."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import aiohttp
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from osaurus_grpc.v1 import chat_pb2, model_service_pb2
from rest_shim.app import StartError, serving
from rest_shim.settings import Settings

from .scripted_core import MODEL, ScriptedCore, abort, model

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
PREFIXES = ("", "/v1", "/api", "/v1/api")


async def exchange(url: str, *parts: bytes) -> bytes:
    """Raw bytes to the server, and all that comes back until it closes."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        async with asyncio.timeout(60):
            return await reader.read()
    finally:
        writer.close()


class TestRoutes:
    @pytest.mark.parametrize("prefix", PREFIXES)
    @pytest.mark.parametrize("slash", ["", "/"])
    @pytest.mark.parametrize(
        "path", ["", "/health", "/models", f"/models/{MODEL}", "/tags", "/ps", "/version"]
    )
    async def test_get_routes_answer_under_every_prefix(
        self, http: aiohttp.ClientSession, prefix: str, path: str, slash: str
    ) -> None:
        async with http.get((prefix + path + slash) or "/") as response:
            assert response.status == 200

    @pytest.mark.parametrize("prefix", PREFIXES)
    @pytest.mark.parametrize("path", ["/chat/completions", "/chat", "/chat/completions/", "/chat/"])
    async def test_post_routes_answer_under_every_prefix(
        self, http: aiohttp.ClientSession, prefix: str, path: str
    ) -> None:
        async with http.post(prefix + path, json=CHAT) as response:
            assert response.status == 200
            assert "message" in await response.text()

    async def test_two_prefixes_are_not_stripped(self, http: aiohttp.ClientSession) -> None:
        async with http.get("/v1/v1/models") as response:
            assert response.status == 404

    async def test_root_and_health(self, http: aiohttp.ClientSession) -> None:
        async with http.get("/") as response:
            assert await response.text() == "Osaurus is running"
            assert response.content_type == "text/plain"
        async with http.get("/health") as response:
            body = await response.json()
        assert body["status"] == "ok"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", body["timestamp"])

    async def test_health_asks_the_core(self, http: aiohttp.ClientSession, core: ScriptedCore) -> None:
        await core.set_serving(False)
        async with http.get("/health") as response:
            assert (response.status, (await response.json())["status"]) == (503, "unavailable")
            assert int(response.headers["Retry-After"]) >= 1
        await core.set_serving(True)
        async with http.get("/health") as response:
            assert response.status == 200

    @pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/api/tags", "/api/version"])
    async def test_head_is_get_without_a_body(self, http: aiohttp.ClientSession, path: str) -> None:
        async with http.head(path) as head, http.get(path) as get:
            assert head.status == get.status == 200
            assert head.headers["Content-Type"] == get.headers["Content-Type"]
            assert await head.read() == b""

    async def test_models_of_every_page_are_listed(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        core.models = [model(f"m{index}") for index in range(5)]
        async with http.get("/v1/models") as response:
            body = await response.json()
        assert body["object"] == "list"
        assert [entry["id"] for entry in body["data"]] == ["m0", "m1", "m2", "m3", "m4"]

    @pytest.mark.parametrize("name", [f"mlx-community/{MODEL}", f"mlx-community%2F{MODEL}"])
    async def test_an_id_may_hold_a_slash(self, http: aiohttp.ClientSession, name: str) -> None:
        async with http.get(f"/v1/models/{name}") as response:
            assert (await response.json())["id"] == MODEL

    async def test_an_unknown_model(self, http: aiohttp.ClientSession) -> None:
        async with http.get("/v1/models/gpt-4") as response:
            assert response.status == 404
            assert await response.json() == {
                "error": {
                    "message": "Model not found: gpt-4",
                    "type": "invalid_request_error",
                    "param": "model",
                    "code": "model_not_found",
                }
            }

    async def test_every_answer_says_how_long_it_took(self, http: aiohttp.ClientSession) -> None:
        for path in ("/", "/v1/models", "/v1/nope"):
            async with http.get(path) as response:
                assert int(response.headers["openai-processing-ms"]) >= 0

    async def test_unknown_paths(self, http: aiohttp.ClientSession) -> None:
        async with http.get("/v1/nope") as response:
            assert response.status == 404
            assert set((await response.json())["error"]) == {"message", "type", "param", "code"}
        async with http.post("/api/signout", json={}) as response:
            assert response.status == 404
            assert isinstance((await response.json())["error"], str)

    async def test_wrong_methods(self, http: aiohttp.ClientSession) -> None:
        async with http.get("/v1/chat/completions") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "OPTIONS, POST"
            assert (await response.json())["error"]["code"] == "method_not_allowed"
        async with http.post("/v1/models") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "GET, HEAD, OPTIONS"
        async with http.get("/api/chat") as response:
            assert response.status == 405
            assert isinstance((await response.json())["error"], str)

    @pytest.mark.parametrize(
        ("method", "path", "dialect"),
        [
            ("GET", "/ui", "openai"),
            ("POST", "/api/pull", "ollama"), ("POST", "/api/create", "ollama"),
            ("POST", "/api/push", "ollama"), ("POST", "/api/blobs/sha256:00", "ollama"),
        ],
    )  # fmt: skip
    async def test_what_is_to_come_says_so(
        self, http: aiohttp.ClientSession, method: str, path: str, dialect: str
    ) -> None:
        async with http.request(method, path, data=b"{}") as response:
            assert response.status == 501
            assert response.headers["x-should-retry"] == "false"
            body = await response.json()
        if dialect == "openai":
            assert body["error"]["code"] == "not_implemented"
        else:
            assert "not implemented" in body["error"]

    async def test_metrics_count_requests_by_route(self, http: aiohttp.ClientSession) -> None:
        for path in (f"/v1/models/{MODEL}", f"/models/{MODEL}/", "/x/1", "/x/2"):
            async with http.get(path):
                pass
        async with http.get("/metrics") as response:
            text = await response.text()
            assert response.headers["Content-Type"].startswith("text/plain")
        assert 'osaurus_http_requests_total{method="GET",route="/models/{id}",status="200"} 2.0' in text
        assert 'osaurus_http_requests_total{method="GET",route="unmatched",status="404"} 2.0' in text
        assert "osaurus_http_requests_in_progress 1.0" in text


class TestOrigins:
    async def test_every_answer_may_be_read_by_any_page(self, http: aiohttp.ClientSession) -> None:
        for path, status in (("/", 200), ("/nope", 404), ("/v1/chat/completions", 405), ("/ui", 501)):
            async with http.get(path, headers={"Origin": "https://example.com"}) as response:
                assert response.status == status
                assert response.headers["Access-Control-Allow-Origin"] == "*"
        for stream in (False, True):
            async with http.post("/v1/chat/completions", json={**CHAT, "stream": stream}) as response:
                assert response.headers["Access-Control-Allow-Origin"] == "*"

    async def test_preflight(self, http: aiohttp.ClientSession) -> None:
        headers = {
            "Origin": "https://example.com",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type, x-stainless-os, bad header, x-osaurus",
        }
        for path in ("/v1/chat/completions", "/nope", "/"):
            async with http.options(path, headers=headers) as response:
                assert (response.status, await response.read()) == (204, b"")
                assert response.headers["Access-Control-Allow-Origin"] == "*"
                allowed = response.headers["Access-Control-Allow-Methods"].split(", ")
                assert {"GET", "POST", "OPTIONS"} <= set(allowed)
                names = response.headers["Access-Control-Allow-Headers"].split(", ")
                assert names == ["Content-Type", "Authorization", "x-stainless-os", "x-osaurus"]
        async with http.options("/api/delete") as response:
            assert "DELETE" in response.headers["Access-Control-Allow-Methods"]

    @pytest.mark.parametrize("origin", ["https://example.com", "null", "http://127.0.0.1:1"])
    async def test_a_foreign_page_does_not_load_or_unload(
        self, http: aiohttp.ClientSession, core: ScriptedCore, origin: str
    ) -> None:
        for body in ({"model": MODEL}, {"model": MODEL, "keep_alive": 0}):
            async with http.post("/api/chat", json=body, headers={"Origin": origin}) as response:
                assert response.status == 403
                assert isinstance((await response.json())["error"], str)
        assert not core.requests

    async def test_our_own_page_may_load(self, http: aiohttp.ClientSession, shim: str) -> None:
        async with http.post("/api/chat", json={"model": MODEL}, headers={"Origin": shim}) as response:
            assert response.status == 200

    @pytest.mark.parametrize(
        "host", ["localhost", "127.0.0.1:99", "[::1]:5", "app.localhost", "LOCALHOST:1337"]
    )
    async def test_loopback_hosts(self, http: aiohttp.ClientSession, host: str) -> None:
        async with http.get("/v1/models", headers={"Host": host}) as response:
            assert response.status == 200

    @pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "10.0.0.1", "[::2", "x y"])
    async def test_other_hosts_are_refused(self, shim: str, core: ScriptedCore, host: str) -> None:
        raw = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        answer = await exchange(shim, raw)
        assert answer.startswith((b"HTTP/1.1 403", b"HTTP/1.1 400"))
        assert not core.requests


class TestListedOrigins:
    @pytest.fixture
    def settings(self, core: ScriptedCore) -> Settings:
        return Settings(core=core.address, port=0, allowed_origins=("https://chat.example",))

    async def test_only_listed_origins_are_named(self, http: aiohttp.ClientSession) -> None:
        async with http.get("/", headers={"Origin": "https://chat.example"}) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
            assert response.headers["Vary"] == "Origin"
        async with http.get("/", headers={"Origin": "https://evil.example"}) as response:
            assert "Access-Control-Allow-Origin" not in response.headers

    async def test_a_listed_origin_may_load(self, http: aiohttp.ClientSession) -> None:
        headers = {"Origin": "https://chat.example"}
        async with http.post("/api/chat", json={"model": MODEL}, headers=headers) as response:
            assert response.status == 200


class TestRequestIds:
    async def test_a_sane_id_is_kept_and_passed_on(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        async with http.get("/v1/models", headers={"x-request-id": "abc-123"}) as response:
            assert response.headers["x-request-id"] == "abc-123"
        assert core.metadata["x-request-id"] == "abc-123"

    @pytest.mark.parametrize("offered", ["", "a b", "x" * 129, "ä", "{}"])
    async def test_another_id_is_replaced(self, http: aiohttp.ClientSession, offered: str) -> None:
        async with http.get("/nope", headers={"x-request-id": offered}) as response:
            assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])


class TestKeys:
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/openapi.json"), ("GET", "/metrics"), ("GET", "/ui"), ("GET", "/api/version"),
            ("POST", "/api/pull"), ("GET", "/nothing"), ("POST", "/v1/messages"), ("DELETE", "/api/delete"),
        ],
    )  # fmt: skip
    async def test_every_route_but_health_wants_one(
        self, http: aiohttp.ClientSession, core: ScriptedCore, method: str, path: str
    ) -> None:
        core.key = "secret"
        async with http.request(method, path) as response:
            assert response.status == 401
        async with http.request(method, path, headers={"Authorization": "Bearer secret"}) as response:
            assert response.status != 401

    async def test_a_stranger_cannot_make_it_read_a_body(self, shim: str, core: ScriptedCore) -> None:
        core.key = "secret"
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 33000000\r\n\r\n"
        host, port = shim.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head)
        async with asyncio.timeout(60):
            assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
        writer.close()

    async def test_a_key_is_asked_about_once(self, http: aiohttp.ClientSession, core: ScriptedCore) -> None:
        core.key = "secret"
        for key, statuses in (("wrong", [401, 401]), ("secret", [200, 200, 200])):
            core.keys_shown = 0
            for status in statuses:
                headers = {"Authorization": f"Bearer {key}"}
                async with http.get("/api/version", headers=headers) as response:
                    assert response.status == status
        assert core.keys_shown == 1

    async def test_a_key_is_passed_on_and_the_core_judges(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        core.key = "secret"
        for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            async with http.get("/v1/models", headers=headers) as response:
                assert response.status == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
            async with http.post("/v1/chat/completions", json=CHAT, headers=headers) as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
                error = (await response.json())["error"]
                assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            async with http.get("/metrics", headers=headers) as response:
                assert response.status == 401
            async with http.get("/api/tags", headers=headers) as response:
                assert response.status == 401
                assert isinstance((await response.json())["error"], str)

    async def test_status_and_preflight_need_no_key(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        core.key = "secret"
        for path in ("/", "/health"):
            async with http.get(path) as response:
                assert response.status == 200
        async with http.options("/v1/models") as response:
            assert response.status == 204

    async def test_a_key_that_no_header_of_the_core_can_hold(self, shim: str) -> None:
        raw = (
            "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nx-api-key: schlüssel\r\n\r\n"
        )
        assert (await exchange(shim, raw.encode())).startswith(b"HTTP/1.1 401")


class TestBodies:
    @pytest.fixture
    def settings(self, core: ScriptedCore) -> Settings:
        return Settings(core=core.address, port=0, max_body_bytes=10_000)

    @pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "nonsense", ""])
    async def test_the_content_type_does_not_matter(self, http: aiohttp.ClientSession, kind: str) -> None:
        data = json.dumps(CHAT).encode()
        async with http.post("/v1/chat/completions", data=data, headers={"Content-Type": kind}) as response:
            assert response.status == 200

    @pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"a": NaN}', b"[" * 9_000])
    async def test_bad_json_in_both_dialects(self, http: aiohttp.ClientSession, data: bytes) -> None:
        async with http.post("/v1/chat/completions", data=data) as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "invalid_request"
        async with http.post("/api/chat", data=data) as response:
            assert response.status == 400
            assert isinstance((await response.json())["error"], str)

    async def test_a_body_that_is_announced_too_large(self, shim: str, core: ScriptedCore) -> None:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += b"Content-Length: 10001\r\n\r\n"
        answer = await exchange(shim, head, b"x" * 10_001)
        assert answer.startswith(b"HTTP/1.1 413")
        assert b'"code":"request_too_large"' in answer
        assert b"Access-Control-Allow-Origin: *" in answer
        assert not core.requests

    async def test_a_body_that_grows_too_large(self, shim: str) -> None:
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        chunk = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
        answer = await exchange(shim, head, *[chunk] * 3, b"0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413")
        assert b'{"error":"The request body is larger than 10000 bytes."}' in answer

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
    async def test_a_body_that_is_not_encoded_as_it_says(
        self, shim: str, core: ScriptedCore, caplog: pytest.LogCaptureFixture, path: str
    ) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Encoding: gzip\r\n"
        answer = await exchange(shim, head.encode() + b"Content-Length: 9\r\n\r\n", b'{"a": 12}')
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"not encoded as its headers say" in answer
        assert not core.requests
        assert "Traceback" not in caplog.text

    async def test_malformed_http_is_not_quoted_in_the_log(
        self, shim: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        raw = (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer my-key" + b"x" * 40_000 + b"\r\n\r\n"
        )
        assert b" 431 " in await exchange(shim, raw)
        assert "my-key" not in caplog.text

    async def test_one_connection_serves_many_requests(self, shim: str) -> None:
        body = json.dumps({**CHAT, "stream": True}).encode()
        post = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (
            len(body),
            body,
        )
        last = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        # Sent at once, without waiting for answers: pipelining.
        answer = await exchange(shim, post + post + last)
        assert answer.count(b"HTTP/1.1 200 OK") == 3
        assert answer.count(b"data: [DONE]") == 2
        assert answer.endswith(b"Osaurus is running")


class TestLargeBodies:
    async def test_a_large_body_is_read_like_a_small_one(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        words = "word " * 200_000
        body = {**CHAT, "messages": [{"role": "user", "content": words}]}
        async with http.post("/v1/chat/completions", json=body) as response:
            assert response.status == 200
        assert core.requests[-1].messages[0].content[0].text == words  # type: ignore[attr-defined]  # a ChatRequest
        async with http.post("/v1/chat/completions", json={**body, "temperature": 3}) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, "temperature")

    async def test_too_many_messages(self, http: aiohttp.ClientSession) -> None:
        body = {**CHAT, "messages": [{"role": "user", "content": "x"}] * 20_000}
        for path in ("/v1/chat/completions", "/api/chat"):
            async with http.post(path, json=body) as response:
                assert response.status == 400
                assert "messages" in await response.text()

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


class TestResidence:
    async def test_no_messages_load(self, http: aiohttp.ClientSession, core: ScriptedCore) -> None:
        for extra in ({}, {"messages": []}, {"messages": None, "stream": True}, {"keep_alive": "10m"}):
            async with http.post("/api/chat", json={"model": MODEL, **extra}) as response:
                assert response.content_type == "application/json"
                body = await response.json()
            assert list(body) == ["model", "created_at", "message", "done", "done_reason"]
            assert body["message"] == {"role": "assistant", "content": ""}
            assert (body["done"], body["done_reason"]) == (True, "load")
        assert core.requests[-1] == model_service_pb2.LoadModelRequest(
            model=MODEL, keep_alive=Duration(seconds=600)
        )

    async def test_no_messages_and_no_time_unload(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        async with http.post("/api/chat", json={"model": MODEL, "messages": [], "keep_alive": 0}) as response:
            assert (await response.json())["done_reason"] == "unload"
        assert core.requests == [model_service_pb2.UnloadModelRequest(model=MODEL)]

    async def test_a_model_is_needed_and_must_exist(self, http: aiohttp.ClientSession) -> None:
        for body in ({}, {"model": ""}, {"model": None}, {"messages": CHAT["messages"]}):
            async with http.post("/api/chat", json=body) as response:
                assert (response.status, await response.json()) == (400, {"error": "model is required"})
        async with http.post("/api/chat", json={"model": "nope"}) as response:
            assert (response.status, await response.json()) == (404, {"error": "model 'nope' not found"})
        async with http.post("/api/chat") as response:
            assert (response.status, await response.json()) == (400, {"error": "missing request body"})

    async def test_show(self, http: aiohttp.ClientSession) -> None:
        for key in ("model", "name"):
            async with http.post("/api/show", json={key: MODEL}) as response:
                assert (await response.json())["model_info"]["general.architecture"] == "llama"
        for name in ("nope", "nope:latest"):
            async with http.post("/api/show", json={"model": name}) as response:
                body = await response.json()
            assert (response.status, body) == (404, {"error": "model 'nope:latest' not found"})
        async with http.post("/api/show", json={}) as response:
            assert (response.status, await response.json()) == (400, {"error": "model is required"})

    async def test_thinking_needs_a_model_that_can(self, http: aiohttp.ClientSession) -> None:
        async with http.post("/api/chat", json={**CHAT, "think": True}) as response:
            text = f'"{MODEL}" does not support thinking'
            assert (response.status, await response.json()) == (400, {"error": text})
        async with http.post("/api/chat", json={**CHAT, "think": False}) as response:
            assert response.status == 200


class TestExposure:
    async def test_an_address_others_reach_needs_a_key(self, core: ScriptedCore) -> None:
        settings = Settings(core=core.address, host="0.0.0.0", port=0)  # noqa: S104 - the case under test
        with pytest.raises(StartError, match="asks for no key"):
            async with serving(settings):
                pass
        core.key = "secret"
        async with serving(settings) as urls:
            assert urls

    async def test_unless_it_is_allowed(self) -> None:
        settings = Settings(core="127.0.0.1:9", host="0.0.0.0", port=0, insecure_expose=True)  # noqa: S104 - as above
        async with serving(settings) as urls, aiohttp.ClientSession() as session:
            port = urls[0].rpartition(":")[2]
            async with session.get(f"http://127.0.0.1:{port}/", headers={"Host": "my.lan"}) as response:
                assert response.status == 200
