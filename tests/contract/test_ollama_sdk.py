"""Ollama's own Python client against the real core and SmolLM2."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import ollama
import pytest

from tests.conftest import SMOLLM

pytestmark = pytest.mark.smollm

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0, "num_predict": 32}


@pytest.fixture(scope="module")
def client(smollm_http: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=smollm_http) as made:
        yield made


def metrics(answer: ollama.ChatResponse) -> list[int | None]:
    return [
        answer.total_duration, answer.load_duration, answer.prompt_eval_count,
        answer.prompt_eval_duration, answer.eval_count, answer.eval_duration,
    ]  # fmt: skip


def test_an_answer(client: ollama.Client) -> None:
    answer = client.chat(SMOLLM, CAPITAL, options=GREEDY)
    assert "Paris" in (answer.message.content or "")
    assert (answer.model, answer.done, answer.done_reason) == (SMOLLM, True, "stop")
    assert all(value and value > 0 for value in metrics(answer))
    assert answer.total_duration is not None
    assert answer.eval_duration is not None
    assert answer.total_duration >= answer.eval_duration
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", answer.created_at or "")


def test_a_stream_says_the_same(client: ollama.Client) -> None:
    whole = client.chat(SMOLLM, CAPITAL, options=GREEDY)
    lines = list(client.chat(SMOLLM, CAPITAL, options=GREEDY, stream=True))
    assert "".join(line.message.content or "" for line in lines) == whole.message.content
    assert all(line.message.role == "assistant" for line in lines)
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert all(value and value > 0 for value in metrics(lines[-1]))
    assert lines[-1].eval_count == whole.eval_count
    assert all(line.eval_count is None for line in lines[:-1])


async def test_the_asynchronous_client(smollm_http: str) -> None:
    text = ""
    async with ollama.AsyncClient(host=smollm_http) as client:
        async for line in await client.chat(SMOLLM, CAPITAL, options=GREEDY, stream=True):
            text += line.message.content or ""
    assert "Paris" in text


def test_the_name_is_echoed(client: ollama.Client) -> None:
    name = f"{SMOLLM.upper()}:latest"
    answer = client.chat(name, CAPITAL, options={"num_predict": 1})
    assert (answer.model, answer.done_reason, answer.eval_count) == (name, "length", 1)


def test_a_stop_text(client: ollama.Client) -> None:
    answer = client.chat(SMOLLM, CAPITAL, options={**GREEDY, "stop": ["France"]})
    assert "France" not in (answer.message.content or "")
    assert answer.done_reason == "stop"


def test_logprobs(client: ollama.Client) -> None:
    answer = client.chat(SMOLLM, CAPITAL, options={**GREEDY, "num_predict": 3}, logprobs=True, top_logprobs=2)
    assert answer.logprobs is not None
    assert "".join(entry.token for entry in answer.logprobs) == answer.message.content
    assert all(len(entry.top_logprobs or []) == 2 for entry in answer.logprobs)


def test_the_list_of_models(client: ollama.Client) -> None:
    listed = client.list().models
    assert [entry.model for entry in listed] == [SMOLLM]
    entry = listed[0]
    assert entry.size is not None
    assert entry.size > 10_000_000
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", entry.digest or "")
    assert entry.modified_at is not None
    assert entry.details is not None
    assert (entry.details.family, entry.details.parameter_size) == ("llama", "134.52M")


def test_loading_and_unloading(client: ollama.Client) -> None:
    assert client.chat(SMOLLM, [], keep_alive="10m").done_reason == "load"
    running = client.ps().models
    assert [entry.model for entry in running] == [SMOLLM]
    assert running[0].size is not None
    assert running[0].size > 0
    assert running[0].expires_at is not None
    assert client.chat(SMOLLM, [], keep_alive=0).done_reason == "unload"
    assert client.ps().models == []
    assert client.chat(SMOLLM, [], keep_alive=-1).done_reason == "load"


def test_show(client: ollama.Client) -> None:
    shown = client.show(SMOLLM)
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 8192
    assert "im_start" in (shown.template or "")


@pytest.mark.parametrize("stream", [False, True])
def test_errors(client: ollama.Client, stream: bool) -> None:
    def error(**arguments: object) -> tuple[int, str]:
        whole = {"model": SMOLLM, "messages": CAPITAL, "stream": stream, **arguments}
        with pytest.raises(ollama.ResponseError) as caught:
            list(client.chat(**whole))  # type: ignore[call-overload]  # wrong on purpose
        return caught.value.status_code, caught.value.error

    assert error(model="nope") == (404, "model 'nope' not found")
    assert error(think=True) == (400, f'"{SMOLLM}" does not support thinking')
    assert error(messages=[{"role": "user", "content": "x", "images": [b"hello"]}])[0] == 400
    assert error(messages=[{"role": "user", "content": "word " * 20_000}])[0] == 400


def test_version(smollm_http: str) -> None:
    version = httpx.get(f"{smollm_http}/api/version").json()["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", version)
