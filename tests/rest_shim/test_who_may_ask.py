"""Who may ask: origins, hosts, keys, addresses that others reach."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from rest_shim.app import StartError, serving
from rest_shim.settings import Settings

from .raw import exchange
from .scripted_core import MODEL, ScriptedCore

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


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
