"""The description of the HTTP API: that it is one, whole, and of this server."""

from __future__ import annotations

import json

import aiohttp
import pytest
from jsonschema import Draft202012Validator

from rest_shim.app import RestShim
from rest_shim.backend import Backend
from rest_shim.openapi.document import OPERATIONS, document
from rest_shim.routing import Route, strip_prefix
from rest_shim.settings import Settings

from .scripted_core import ScriptedCore

# They answer 501 until their work is done.
TO_COME = {
    ("GET", "/ui"), ("POST", "/pull"), ("POST", "/create"), ("POST", "/push"),
    ("GET", "/blobs/{digest}"), ("POST", "/blobs/{digest}"), ("POST", "/responses/compact"),
}  # fmt: skip


def key(route: Route) -> tuple[str, str]:
    return route.method, route.path.replace(":.+}", "}")


async def test_every_route_is_described_and_nothing_else(core: ScriptedCore) -> None:
    backend = Backend(core.address, request_timeout_seconds=1)
    try:
        routes = {key(route) for route in RestShim(backend, Settings()).routes}
    finally:
        await backend.close()
    described = {(operation.method, strip_prefix(operation.path)) for operation in OPERATIONS}
    assert routes - described == TO_COME
    assert described <= routes


def references(value: object) -> set[str]:
    if isinstance(value, dict):
        found = {str(value["$ref"])} if "$ref" in value else set()
        return found.union(*(references(item) for item in value.values()))
    return set().union(*(references(item) for item in value)) if isinstance(value, list) else set()


async def test_it_is_served_as_it_is(http: aiohttp.ClientSession) -> None:
    async with http.get("/openapi.json") as response:
        assert response.content_type == "application/json"
        served = await response.json()
    assert served == json.loads(json.dumps(document()))
    schemas = served["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    assert references(served) == {f"#/components/schemas/{name}" for name in schemas}
    names = [operation["operationId"] for path in served["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names))


def test_links_lead_to_what_is_described() -> None:
    by_name = {operation.name: operation for operation in OPERATIONS}
    links = [link for operation in OPERATIONS for link in operation.links.values()]
    assert links
    for link in links:
        target = by_name[link.operation]
        assert set(link.parameters) <= {parameter["name"] for parameter in target.parameters}
        if link.body:
            assert set(link.body) <= set(getattr(target.body, "model_fields", {}))


def accepts(name: str, value: object) -> bool:
    root = {"$ref": f"#/components/schemas/{name}", "components": document()["components"]}
    return bool(Draft202012Validator(root).is_valid(value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ChatBody", {"model": "m", "messages": [{"role": "user", "content": "x"}]}),
        ("ChatBody", {"model": "m", "tool_choice": "auto", "stop": "a", "temperature": None, "unknown": 1,
                      "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
        ("CompletionBody", {"model": "m", "prompt": [[1, 2], [3]], "stop": ["a"]}),
        ("EmbeddingsBody", {"model": "m", "input": ["a", "b"]}),
        ("ResponsesResponseBody", {"input": "x", "tool_choice": "none"}),
        ("ResponsesResponseBody", {"input": [{"role": "user", "content": "x"}]}),
        ("AnthropicMessagesBody", {"model": "m", "max_tokens": 1, "system": "s",
                                   "messages": [{"role": "user", "content": "x"}]}),
        ("OllamaChatBody", {"model": "m", "keep_alive": "5m", "format": "json", "think": "low",
                            "messages": [{"role": "human", "content": "x"}]}),
        ("OllamaEmbedBody", {"model": "m", "input": "x"}),
    ],
)  # fmt: skip
def test_what_is_taken_is_described(name: str, value: object) -> None:
    assert accepts(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ChatBody", {"model": "m", "messages": []}),
        ("ChatBody", {"messages": [{"role": "user", "content": "x"}]}),
        ("ChatBody", {"model": "m", "messages": [{"role": "user", "content": [{"type": "audio"}]}]}),
        ("ChatBody", {"model": "m", "messages": [{"role": "user", "content": "x"}], "seed": 2**63}),
        ("ChatBody", {"model": "m", "messages": [{"role": "user", "content": "x"}], "stop": ["a"] * 65}),
        ("CompletionBody", {"model": "m", "prompt": []}),
        ("EmbeddingsBody", {"model": "m", "input": ""}),
        ("ResponsesResponseBody", {"input": [{"type": "web_search_call"}]}),
    ],
)
def test_what_is_refused_is_described(name: str, value: object) -> None:
    assert not accepts(name, value)
