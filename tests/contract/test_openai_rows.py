"""OpenAI's request fields one by one, as llama.cpp's and vLLM's own suites try them, on a real server.

A row is a change of a small valid request and what comes of it: 200, or 400 with the field that is named.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import TINY

SECONDS = 60
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hello"}
BASE: dict[str, Any] = {"model": TINY, "messages": [USER], "max_tokens": 2}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def schema(definition: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": definition}}


TAKEN: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 2},
    {"temperature": None},
    {"top_p": 0},
    {"top_p": 1},
    {"n": 2},
    {"n": None},
    {"max_tokens": None, "max_completion_tokens": 1},
    {"max_completion_tokens": 1},
    {"stop": "x"},
    {"stop": ["a", "b", "c", "d", "e"]},
    {"stop": []},
    {"stop": None},
    {"frequency_penalty": -2, "presence_penalty": 2},
    {"logit_bias": {"5": -100, "6": 100}},
    {"logit_bias": None},
    {"logprobs": True, "top_logprobs": 3},
    {"logprobs": None},
    {"seed": -9007199254740991},
    {"seed": 2**63 - 1},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": True}},
    {"tools": None},
    {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
    {"tools": [TOOL], "parallel_tool_calls": None},
    {"tools": [tool("mcp__" + "m" * 123)]},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}},
    {"response_format": schema({})},
    {"response_format": schema({"type": "object", "properties": {"a": {"$ref": "#"}}})},
    {"response_format": schema({"type": "object", "properties": {"a": False, "b": True}})},
    {"response_format": schema({"enum": [f"value {i}" for i in range(5_000)]})},
    {"response_format": schema({"type": "string", "pattern": "^(a+)+$"})},
    {"response_format": schema({"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"})},
    {"response_format": schema({"type": "array", "minItems": 10**9})},
    {"reasoning_effort": "minimal"},
    {"store": True, "metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "service_tier": "auto"},
    {"verbosity": "low", "modalities": ["text"], "prompt_cache_key": "x", "web_search_options": {}},
    {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "typical_p": 1, "stop_token_ids": []},
    {"cache_prompt": True, "id_slot": 0, "timings_per_token": True, "a_field_of_tomorrow": [1]},
    {"messages": [{"role": "developer", "content": "Be brief."}, USER]},
    {"messages": [{"role": "user", "content": ""}]},
    {"messages": [USER, {"role": "assistant", "content": ""}, {"role": "user", "content": ""}]},
    {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  {"role": "tool", "tool_call_id": "a", "content": "x"}]},
]  # fmt: skip

# The change, and the param of the error.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": "x" * 100_000}, "model"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"stop": ["x"] * 100_000}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"logit_bias": {"foo": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias.5"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"seed": 2**63}, "seed"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": tool("g")}, "tool_choice"),
    ({"tools": [tool("m" * 129)]}, "tools[0].function.name"),
    ({"tools": [tool(".*")]}, "tools[0].function.name"),
    ({"tools": [tool("{{ x }}")]}, "tools[0].function.name"),
    ({"response_format": {"type": "x"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
    ({"response_format": schema(True)}, "response_format.json_schema.schema"),
    ({"response_format": schema({"$ref": "#"})}, "response_format.json_schema.schema"),
    ({"response_format": schema({"$ref": "http://127.0.0.1:9/x"})}, "response_format.json_schema.schema"),
    ({"response_format": schema({"$ref": "file:///etc/passwd"})}, "response_format.json_schema.schema"),
    ({"response_format": schema({"type": "string", "pattern": "(?=a)b"})},
     "response_format.json_schema.schema"),
    ({"response_format": schema({"type": "string", "enum": [1]})}, "response_format.json_schema.schema"),
    ({"response_format": schema({"description": "x" * 10_000_000})}, "response_format.json_schema.schema"),
    ({"response_format": schema({"allOf": [
        {"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(40)
    ]})}, "response_format.json_schema.schema"),
    ({"messages": None}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [123]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [{"role": 123, "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 123}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [[["x"]]]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    ]}]}, "messages[0].content[0].image_url.url"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
]  # fmt: skip

NOT_JSON = {
    "NaN": b'{"temperature":NaN}',
    "Infinity": b'{"temperature":-Infinity}',
    "a number beyond float64": b'{"temperature":1e400}',
    "very many digits": b'{"n":1' + b"0" * 5_000 + b"}",
    "a key twice": b'{"model":"a","model":"b"}',
    "UTF-16": json.dumps(BASE).encode("utf-16"),
    "deep": b'{"a":' * 100_000,
    "half a character": b'{"model":"\\ud800"}',
    "an array": b"[]",
    "nothing": b"",
    "NUL": b"\0",
}
PATHS = (
    CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate",
)  # fmt: skip


@pytest.fixture(scope="module")
def client(tiny_http: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_http, timeout=SECONDS) as made:
        yield made


def short(value: object) -> str:
    """A row's name."""
    return json.dumps(value)[:60]


@pytest.mark.parametrize("change", TAKEN, ids=short)
def test_taken(client: httpx.Client, change: dict[str, Any]) -> None:
    answer = client.post(CHAT, json={**BASE, **change})
    assert answer.status_code == 200, answer.text
    assert "finish_reason" in answer.text


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=short)
def test_refused(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    answer = client.post(CHAT, json={**BASE, **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert len(error["message"]) < 1_000


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", NOT_JSON)
def test_what_is_no_json(client: httpx.Client, path: str, case: str) -> None:
    answer = client.post(path, content=NOT_JSON[case])
    assert answer.status_code == 400, answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\0b", "..\\..\\x"])
def test_names_that_reach_for_files(client: httpx.Client, name: str) -> None:
    answer = client.post(CHAT, json={**BASE, "model": name})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/responses/"])
@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "%00", "%0d%0aSet-Cookie:%20a=b", "%ff%zz"])
def test_paths_that_reach_for_files(client: httpx.Client, path: str, name: str) -> None:
    answer = client.get(path + name)
    assert answer.status_code == 404
    assert "set-cookie" not in answer.headers
    assert "root:" not in answer.text


@pytest.mark.parametrize("path", ["/v1/models//", "/v1/models/%20"])
def test_a_path_without_a_models_name(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_compressed_body_is_bounded_by_what_it_unfolds_to(client: httpx.Client) -> None:
    headers = {"Content-Encoding": "gzip"}
    small = client.post(CHAT, content=gzip.compress(json.dumps(BASE).encode()), headers=headers)
    assert small.status_code == 200
    bomb = gzip.compress(b" " * (64 * 2**20) + b"{}")
    assert client.post(CHAT, content=bomb, headers=headers).status_code == 413


@pytest.mark.parametrize("body", [{}, {"model": TINY}, {"model": TINY, "instructions": "Be brief."}])
def test_a_response_to_nothing(client: httpx.Client, body: dict[str, Any]) -> None:
    """What OpenAI's own clients send in their tests: neither a model nor an input."""
    answer = client.post("/v1/responses", json={**body, "max_output_tokens": 2})
    assert answer.status_code == 200, answer.text
    items = client.get(f"/v1/responses/{answer.json()['id']}/input_items").json()["data"]
    assert [(item["type"], item["role"]) for item in items] == [("message", "user")]


def test_an_error_of_the_core_names_the_clients_field(client: httpx.Client) -> None:
    """The second message is the fourth of the core, since texts and results of tools are apart there."""
    result = {"type": "tool_result", "tool_use_id": "unknown", "content": "x"}
    text = {"type": "text", "text": "Hello"}
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": [text, text, result]},
    ]
    answer = client.post("/v1/messages", json={**BASE, "messages": messages})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "answers no call" in message
    assert "messages[3]" not in message
