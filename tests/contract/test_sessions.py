"""Sessions over HTTP: both styles of clients, on the real core behind the real shim."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import TINY

SECONDS = 60
LONG_TEXT = "One, two, three, four, five, six, seven. " * 8


@pytest.fixture(scope="module")
def client(tiny_http: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_http, timeout=SECONDS) as made:
        yield made


def body(messages: list[dict[str, str]], session: str, **changes: Any) -> dict[str, Any]:
    values = {"model": TINY, "messages": messages, "temperature": 0, "max_tokens": 8}
    return {**values, **({"session_id": session} if session else {}), **changes}


def said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ask(client: httpx.Client, messages: list[dict[str, str]], session: str = "") -> tuple[str, int, int]:
    """The answer, its prompt's tokens, and how many of them were cached."""
    response = client.post("/v1/chat/completions", json=body(messages, session))
    assert response.status_code == 200
    document = response.json()
    usage = document["usage"]
    content = document["choices"][0]["message"]["content"]
    return content, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def test_new_turns_only(client: httpx.Client) -> None:
    _, first, _ = ask(client, [said(LONG_TEXT)], "http-new")
    _, second, second_cached = ask(client, [said("Go on.")], "http-new")
    _, third, third_cached = ask(client, [said("And then?")], "http-new")

    assert first < second < third
    assert 0 < second_cached < third_cached
    _, alone, _ = ask(client, [said("Go on.")])
    assert alone < first


def test_everything_each_time(client: httpx.Client) -> None:
    messages = [{"role": "system", "content": "Be brief."}, said(LONG_TEXT)]
    prompts, cached = [], []
    for _ in range(3):
        answer, prompt_tokens, cached_tokens = ask(client, messages, "http-everything")
        prompts.append(prompt_tokens)
        cached.append(cached_tokens)
        messages += [{"role": "assistant", "content": answer}, said("Go on.")]

    assert prompts == sorted(set(prompts))
    assert cached == sorted(set(cached))


def test_an_edited_history_restarts(client: httpx.Client) -> None:
    ask(client, [said(LONG_TEXT)], "http-edited")
    edited = [said("Hi"), {"role": "assistant", "content": "Yes?"}, said("Go on.")]
    answer, prompt_tokens, _ = ask(client, edited, "http-edited")

    assert (answer, prompt_tokens) == ask(client, edited)[:2]


def test_a_streamed_turn_is_remembered(client: httpx.Client) -> None:
    request = body([said(LONG_TEXT)], "http-stream", stream=True)
    with client.stream("POST", "/v1/chat/completions", json=request) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    text = "".join(
        json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or "" for line in lines
    )

    _, prompt_tokens, cached = ask(client, [said("Go on.")], "http-stream")

    assert text
    _, alone, _ = ask(client, [said("Go on.")])
    assert prompt_tokens > alone
    assert cached > 0
