"""Requests of the largest size, and of strange content: answered or refused, and the server goes on."""

from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit

import pytest

from tests.conftest import SMOLLM, TINY

HELLO = [{"role": "user", "content": "Hello"}]
LARGE = "a" * 31_000_000
TURNS = [{"role": ("user", "assistant")[index % 2], "content": "hi"} for index in range(10_000)]


def post(url: str, path: str, body: object) -> tuple[int, dict[str, object]]:
    """The status and the JSON of an answer; bytes are sent as they are."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LARGE}]}),
        ("/v1/chat/completions", {"messages": TURNS}),
        ("/v1/completions", {"prompt": LARGE}),
        ("/v1/completions", {"prompt": [1] * 900_000}),
        ("/v1/embeddings", {"input": LARGE}),
        ("/v1/embeddings", {"input": ["a" * 15_000] * 2048}),
        ("/v1/responses", {"input": LARGE}),
        ("/v1/responses", {"input": TURNS}),
        ("/v1/messages", {"messages": [{"role": "user", "content": LARGE}], "max_tokens": 1}),
        ("/api/chat", {"messages": [{"role": "user", "content": LARGE}]}),
        ("/api/generate", {"prompt": LARGE, "stream": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_more_than_the_context_holds_is_refused(tiny_http: str, path: str, body: dict[str, object]) -> None:
    status, answer = post(tiny_http, path, {"model": TINY, **body})
    assert status == 400
    # Anthropic's clients know its own words.
    words = "prompt is too long" if path == "/v1/messages" else "context"
    assert words in json.dumps(answer["error"])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (b'"x":' + b"[" * 200_000 + b"]" * 200_000, "nested deeper"),
        (b'"x":' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "nested deeper"),
        (b'"x":[' + b"1," * 1_000_001 + b"1]", "too many values"),
        (b'"max_tokens":' + b"9" * 1_000_000, "too large"),
        (b'"temperature":1e999', "too large"),
        (b'"user":"\\ud800"', "lone surrogate"),
        (b'"user":"\xff"', "UTF-8"),
        (b'"user":"' + b"a" * 34_000_000 + b'"', "larger than"),
    ],
    ids=["lists", "objects", "values", "digits", "exponent", "surrogate", "encoding", "size"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat"])
def test_what_cannot_be_read_is_refused(tiny_http: str, path: str, fields: bytes, says: str) -> None:
    status, answer = post(tiny_http, path, b'{"model":"tiny-llama",' + fields + b"}")
    assert status == (413 if says == "larger than" else 400)
    assert says in json.dumps(answer["error"])


def test_nul_bytes_are_characters(tiny_http: str) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a\x00b"}]}),
        ("/v1/completions", {"prompt": "a\x00b"}),
        ("/v1/embeddings", {"input": "a\x00b"}),
        ("/v1/responses", {"input": "a\x00b", "max_output_tokens": 1}),
    ):
        status, _ = post(tiny_http, path, {"model": TINY, "max_tokens": 1, **body})
        assert status == 200


@pytest.mark.smollm
def test_a_bias_for_every_token(smollm_http: str) -> None:
    bias = {str(index): 1 for index in range(49_152)}
    body = {"model": SMOLLM, "messages": HELLO, "max_tokens": 1, "logit_bias": bias}
    assert post(smollm_http, "/v1/chat/completions", body)[0] == 200
