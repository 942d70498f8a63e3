"""What surrounds the routes: paths, methods, ids, residence."""

from __future__ import annotations

import re

import aiohttp
import pytest
from google.protobuf.duration_pb2 import Duration

from osaurus_grpc.v1 import model_service_pb2

from .scripted_core import MODEL, ScriptedCore, model

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
PREFIXES = ("", "/v1", "/api", "/v1/api")


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
