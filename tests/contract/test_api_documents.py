"""Every example of the two API documents, as it stands there (tools and sessions excepted).

The documents are Osaurus's "API Reference" and its older "OpenAI API Guide". Requests run against
the real core with SmolLM2, which answers to the examples' model names by an alias. Shapes of
responses are compared byte for byte where the documents show bytes, on a core that is made to give
the examples' texts; what the documents do not show (system_fingerprint, logprobs) is taken out first.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import aiohttp
import httpx
import openai
import pytest

from osaurus_grpc.v1 import sampling_pb2
from rest_shim.app import serving
from rest_shim.settings import Settings
from tests.conftest import SMOLLM
from tests.harness.processes import NO_LIMITS, core_process, rest_process
from tests.rest_shim.scripted_core import (
    ID,
    MODEL,
    ScriptedCore,
    completed,
    content,
    finished,
    model,
    response,
    started,
)

GUIDE_MODEL = "llama-3.2-3b-instruct"

HELLO = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Hello, how are you?"},
    ],
    "max_tokens": 1000,
    "temperature": 0.7,
    "top_p": 0.9,
    "stream": False,
    "tools": [],
}
SKY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    "stream": False,
    "options": {"temperature": 0.7, "top_p": 0.9, "num_predict": 1000},
}


def shows(document: object, ours: object, path: str = "") -> None:
    """Ours has all that the document shows, of the same types and in the same order."""
    assert type(ours) is type(document), path
    if isinstance(document, Mapping):
        assert isinstance(ours, Mapping)
        assert [key for key in ours if key in document] == list(document), path
        for key, value in document.items():
            shows(value, ours[key], f"{path}.{key}")
    elif isinstance(document, list):
        assert isinstance(ours, list)
        for entry in ours:
            shows(document[0], entry, f"{path}[]")


class TestShapes:
    """Responses as the documents show them, on a core that gives the examples' texts."""

    @pytest.fixture
    async def core(self) -> AsyncIterator[ScriptedCore]:
        scripted = ScriptedCore()
        server = await scripted.start()
        yield scripted
        await server.stop(None)

    @pytest.fixture
    async def http(self, core: ScriptedCore) -> AsyncIterator[aiohttp.ClientSession]:
        async with (
            serving(Settings(core=core.address, port=0)) as urls,
            aiohttp.ClientSession(urls[0]) as made,
        ):
            yield made

    async def test_status(self, http: aiohttp.ClientSession) -> None:
        async with http.get("/") as answer:
            assert await answer.text() == "Osaurus is running"
        async with http.get("/health") as answer:
            text = await answer.text()
        assert re.fullmatch(r'\{"status":"ok","timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"\}', text)

    @pytest.mark.parametrize("path", ["/v1/models", "/models"])
    async def test_models(self, http: aiohttp.ClientSession, core: ScriptedCore, path: str) -> None:
        core.models = [model(GUIDE_MODEL), model("qwen2.5-7b-instruct")]
        for entry in core.models:
            entry.modify_time.seconds = 1738193123
        async with http.get(path) as answer:
            assert await answer.text() == (
                '{"object":"list","data":['
                '{"id":"llama-3.2-3b-instruct","object":"model","created":1738193123,"owned_by":"osaurus"},'
                '{"id":"qwen2.5-7b-instruct","object":"model","created":1738193123,"owned_by":"osaurus"}]}'
            )

    async def test_tags(self, http: aiohttp.ClientSession) -> None:
        async with http.get("/api/tags") as answer:
            body = await answer.json()
        document = {
            "name": MODEL,
            "size": 2147483648,
            "digest": "sha256:" + "ab" * 32,
            "modified_at": "2024-03-15T10:30:45Z",
        }
        assert {key: body["models"][0][key] for key in document} == document

    async def test_a_chat_completion(self, http: aiohttp.ClientSession) -> None:
        async with http.post("/v1/chat/completions", json=HELLO) as answer:
            text = await answer.text()
        created = json.loads(text)["created"]
        bare = text
        for added in (
            ',"refusal":null,"annotations":[]',
            ',"logprobs":null',
            ',"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":'
            '{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}',
            ',"service_tier":"default","system_fingerprint":"fp_0123456789"',
        ):
            assert added in bare
            bare = bare.replace(added, "")
        assert bare == (
            f'{{"id":"{ID}","object":"chat.completion","created":{created},"model":"{MODEL}","choices":'
            '[{"index":0,"message":{"role":"assistant","content":'
            '"I\'m doing well, thank you! How can I help you today?"},"finish_reason":"stop"}],'
            '"usage":{"prompt_tokens":25,"completion_tokens":15,"total_tokens":40}}'
        )

    async def test_a_chat_completion_stream(self, http: aiohttp.ClientSession, core: ScriptedCore) -> None:
        core.events = (started(), content("I'm"), content(" doing"), finished(), completed())
        async with http.post("/v1/chat/completions", json={**HELLO, "stream": True}) as answer:
            text = await answer.text()
        created = json.loads(text.partition("\n")[0].removeprefix("data: "))["created"]
        bare = text.replace(',"logprobs":null', "").replace(',"system_fingerprint":"fp_0123456789"', "")
        # The reference's first delta is {"role":"assistant"}; OpenAI's own says too that it has neither text
        # nor a refusal yet.
        assert '{"role":"assistant","content":"","refusal":null}' in bare
        bare = bare.replace(',"content":"","refusal":null}', "}")
        head = (
            f'data: {{"id":"{ID}","object":"chat.completion.chunk","created":{created},"model":"{MODEL}",'
            '"choices":[{"index":0,"delta":'
        )
        assert bare == (
            head + '{"role":"assistant"},"finish_reason":null}]}\n\n'
            + head + '{"content":"I\'m"},"finish_reason":null}]}\n\n'
            + head + '{"content":" doing"},"finish_reason":null}]}\n\n'
            + head + '{},"finish_reason":"stop"}]}\n\n'
            + "data: [DONE]\n\n"
        )  # fmt: skip

    async def test_ollamas_chat(self, http: aiohttp.ClientSession, core: ScriptedCore) -> None:
        said = "The sky appears blue due to a phenomenon called Rayleigh scattering..."

        async def script(_request: object, _context: object) -> object:
            whole = response(said)
            whole.timings.load_duration.FromNanoseconds(123_456_789)
            whole.usage.completion_tokens = 85
            return whole

        core.chat_script = script  # type: ignore[assignment]  # looser types are enough here
        async with http.post("/api/chat", json=SKY) as answer:
            body = await answer.json()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", body["created_at"])
        document = {
            "model": MODEL,
            "message": {"role": "assistant", "content": said},
            "done": True,
            "total_duration": 1234567890,
            "load_duration": 123456789,
            "prompt_eval_duration": 12345678,
            "eval_duration": 234567890,
            "eval_count": 85,
        }
        assert {key: body[key] for key in document} == document

    async def test_the_error(self, http: aiohttp.ClientSession, core: ScriptedCore) -> None:
        core.chat_script = None
        async with http.get("/v1/models/gpt-4") as answer:
            body = await answer.json()
        document = {
            "message": "Model not found: gpt-4",
            "type": "invalid_request_error",
            "code": "model_not_found",
        }
        assert {key: body["error"][key] for key in document} == document

    async def test_why_an_answer_ended(self, http: aiohttp.ClientSession, core: ScriptedCore) -> None:
        core.events = (started(), finished(sampling_pb2.FINISH_REASON_LENGTH), completed())
        async with http.post("/v1/chat/completions", json={**HELLO, "stream": True}) as answer:
            assert '"finish_reason":"length"' in await answer.text()


@pytest.fixture(scope="module")
def server(smollm_dir: Path) -> Iterator[str]:
    """Base URL of the whole product; answers are capped, since examples ask for up to 1,000 tokens."""
    aliases = [flag for name in (MODEL, GUIDE_MODEL) for flag in ("--alias", f"{name}={SMOLLM}")]
    with (
        core_process(smollm_dir, *NO_LIMITS, *aliases, "--max-output-tokens", "8") as core,
        rest_process(core.address) as rest,
    ):
        yield rest.url


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=120) as made:
        yield made


@pytest.mark.smollm
class TestRequests:
    """The documents' requests, answered by a real model."""

    def test_models_and_tags(self, client: httpx.Client) -> None:
        shows(
            {
                "object": "list",
                "data": [{"id": "x", "object": "model", "created": 1234567890, "owned_by": "osaurus"}],
            },
            client.get("/v1/models").json(),
        )
        body = client.get("/api/tags").json()
        assert isinstance(body["models"][0]["size"], int)
        assert re.fullmatch("sha256:[0-9a-f]{64}", body["models"][0]["digest"])

    def test_the_references_chat_completion(self, client: httpx.Client) -> None:
        answer = client.post("/v1/chat/completions", json=HELLO)
        assert answer.status_code == 200
        body = answer.json()
        shows(
            {
                "id": "chatcmpl-123",
                "object": "chat.completion",
                "created": 1234567890,
                "model": MODEL,
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
                ],
                "usage": {"prompt_tokens": 25, "completion_tokens": 15, "total_tokens": 40},
            },
            body,
        )
        assert body["choices"][0]["message"]["content"]

    @pytest.mark.parametrize(
        "body",
        [
            # The guide shows a comment inside this one, which no JSON parser takes.
            {
                "model": GUIDE_MODEL,
                "messages": HELLO["messages"],
                "session_id": "my-session-1",
                "temperature": 0.7,
                "max_tokens": 150,
            },
            {
                "model": GUIDE_MODEL,
                "messages": [{"role": "user", "content": "Tell me a short story"}],
                "stream": True,
                "temperature": 0.8,
                "max_tokens": 200,
            },
        ],
    )
    def test_the_guides_chat_completions(self, client: httpx.Client, body: dict[str, object]) -> None:
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        if not body.get("stream"):
            assert answer.json()["choices"][0]["message"]["content"]
            return
        assert answer.headers["content-type"] == "text/event-stream"
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        for event in events[:-2]:
            shows(
                {
                    "id": "chatcmpl-abc123",
                    "object": "chat.completion.chunk",
                    "created": 1738193123,
                    "model": GUIDE_MODEL,
                    "choices": [{"index": 0, "delta": {}}],
                },
                json.loads(event.removeprefix("data: ")),
            )

    def test_ollamas_chat(self, client: httpx.Client) -> None:
        body = client.post("/api/chat", json=SKY).json()
        shows(
            {"model": MODEL, "created_at": "x", "message": {"role": "x", "content": "x"}, "done": True}, body
        )
        assert body["model"] == MODEL
        for key in ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration", "eval_count"):
            assert isinstance(body[key], int)
            assert body[key] > 0

    def test_the_error(self, client: httpx.Client) -> None:
        answer = client.post("/v1/chat/completions", json={**HELLO, "model": "gpt-4"})
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "Model not found: gpt-4"
        assert answer.json()["error"]["code"] == "model_not_found"

    def test_the_prefixes(self, client: httpx.Client) -> None:
        for prefix in ("", "/v1", "/api", "/v1/api"):
            assert client.get(f"{prefix}/models").json() == client.get("/v1/models").json()

    def test_a_browsers_fetch(self, client: httpx.Client) -> None:
        """The JavaScript example with what a browser does around it: a preflight, an Origin."""
        origin = {"Origin": "https://app.example"}
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        preflight = client.options("/v1/chat/completions", headers={**origin, **asked})
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == "*"
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert "content-type" in preflight.headers["access-control-allow-headers"].lower()
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Explain quantum computing"}],
            "max_tokens": 500,
        }
        answer = client.post("/v1/chat/completions", json=body, headers=origin)
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.json()["choices"][0]["message"]["content"]

    def test_the_javascript_stream_reader(self, client: httpx.Client) -> None:
        """It parses each read by itself, so no event may be spread over two."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Tell me a story"}],
            "stream": True,
        }
        text, is_done = "", False
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for chunk in answer.iter_raw():
                for line in chunk.decode().split("\n"):
                    if not line.startswith("data: "):
                        continue
                    data = line[6:]
                    if data == "[DONE]":
                        is_done = True
                        break
                    text += json.loads(data)["choices"][0]["delta"].get("content") or ""
        assert is_done
        assert text

    def test_the_python_examples(self, server: str) -> None:
        with openai.OpenAI(base_url=f"{server}/v1", api_key="not-needed", max_retries=0) as sdk:
            assert [entry.id for entry in sdk.models.list().data] == [SMOLLM]
            answer = sdk.chat.completions.create(
                model=GUIDE_MODEL,
                messages=[
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": "What is the capital of France?"},
                ],
                temperature=0.7,
                max_tokens=100,
            )
            assert answer.choices[0].message.content
            explained = sdk.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Explain quantum computing"}],
                max_tokens=500,
            )
            assert explained.choices[0].message.content
            stream = sdk.chat.completions.create(
                model=GUIDE_MODEL,
                messages=[{"role": "user", "content": "Write a haiku about coding"}],
                stream=True,
            )
            said = ""
            for chunk in stream:
                if chunk.choices[0].delta.content is not None:
                    said += chunk.choices[0].delta.content
            assert said
