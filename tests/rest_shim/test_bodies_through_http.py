"""Bodies: of any content type, malformed, too large, large."""

from __future__ import annotations

import json

import aiohttp
import pytest

from rest_shim.settings import Settings

from .raw import exchange
from .scripted_core import MODEL, ScriptedCore

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


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
