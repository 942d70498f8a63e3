"""Every field of OpenAI's requests, with another type and out of its range, on a real server."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import httpx
import pytest

from rest_shim.openapi.document import document
from tests.conftest import TINY
from tests.harness.wrong_values import WrongValue, WrongValues

SECONDS = 60
# The schema, its path, and what makes a request valid.
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ChatBody": (
        "/v1/chat/completions",
        {"model": TINY, "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]},
    ),
    "CompletionBody": ("/v1/completions", {"model": TINY, "max_tokens": 1, "prompt": "x"}),
    "EmbeddingsBody": ("/v1/embeddings", {"model": TINY, "input": "x"}),
    "ResponsesResponseBody": ("/v1/responses", {"model": TINY, "max_output_tokens": 1, "input": "x"}),
    "ResponsesPromptBody": ("/v1/responses/input_tokens", {"model": TINY, "input": "x"}),
}
COMPONENTS: dict[str, Any] = document()["components"]["schemas"]  # type: ignore[index]  # JSON


def field_of(wrong: WrongValue) -> str:
    """The field of the body that holds it."""
    return wrong.path.partition(".")[0].partition("[")[0]


CASES = {
    (name, field): list(wrongs)
    for name, (_, base) in BODIES.items()
    for field, wrongs in groupby(WrongValues(COMPONENTS).of(name, base), key=field_of)
}
# It is not looked into, since it is refused whatever it holds.
FREE = {"functions"}


@pytest.fixture(scope="module")
def client(tiny_http: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_http, timeout=SECONDS) as made:
        yield made


@pytest.mark.parametrize("name", BODIES)
def test_what_the_others_change_is_valid(client: httpx.Client, name: str) -> None:
    path, base = BODIES[name]
    answer = client.post(path, json=base)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("name", "field"), CASES)
def test_a_wrong_value_is_named(client: httpx.Client, name: str, field: str) -> None:
    for wrong in CASES[name, field]:
        answer = client.post(BODIES[name][0], json=wrong.body)
        assert answer.status_code == 400, (wrong, answer.text)
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
        assert error["param"] == wrong.path, wrong
        assert wrong.path in error["message"]


@pytest.mark.parametrize("name", BODIES)
def test_every_field_is_tried(name: str) -> None:
    tried = {field for body, field in CASES if body == name}
    assert set(COMPONENTS[name]["properties"]) - tried <= FREE
