"""litellm through each of the providers that such a server is reached by."""

from __future__ import annotations

import json
import os

import litellm
import pytest

CHAT, EMBEDDING, SERVER = (os.environ[name] for name in ("CHAT_MODEL", "EMBEDDING_MODEL", "SERVER_URL"))
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
OPENAI = {"model": f"openai/{CHAT}", "api_base": f"{SERVER}/v1", "api_key": "none"}
OLLAMA = {"model": f"ollama_chat/{CHAT}", "api_base": SERVER}
ANTHROPIC = {"model": f"anthropic/{CHAT}", "api_base": SERVER, "api_key": "none"}
GENERATE = {"model": f"ollama/{CHAT}", "api_base": SERVER}
ALL = pytest.mark.parametrize(
    "provider", [OPENAI, OLLAMA, ANTHROPIC, GENERATE], ids=lambda provider: provider["model"].split("/")[0]
)
WITH_CHOICE = pytest.mark.parametrize(
    "provider", [OPENAI, ANTHROPIC], ids=lambda provider: provider["model"].split("/")[0]
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "forecast", "description": "It.", "parameters": SCHEMA}}
SAID = {"messages": MESSAGES, "temperature": 0, "max_tokens": 24, "num_retries": 0}


@ALL
def test_completion(provider):
    answer = litellm.completion(**provider, **SAID)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens > 10


@ALL
def test_stream(provider):
    stream = litellm.completion(**provider, **SAID, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def test_async():
    answer = await litellm.acompletion(**OPENAI, **SAID)
    assert "Paris" in answer.choices[0].message.content


@pytest.mark.parametrize("provider", [OPENAI, OLLAMA], ids=["openai", "ollama_chat"])
def test_schema(provider):
    form = {"type": "json_schema", "json_schema": {"name": "forecast", "schema": SCHEMA, "strict": True}}
    answer = litellm.completion(**{**provider, **SAID, "max_tokens": 64}, response_format=form)
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "warm"}


@WITH_CHOICE
def test_tools(provider):
    answer = litellm.completion(
        **{**provider, **SAID, "max_tokens": 96}, tools=[TOOL], tool_choice="required",
        parallel_tool_calls=False,
    )  # fmt: skip
    message = answer.choices[0].message
    call = message.tool_calls[0]
    assert (answer.choices[0].finish_reason, call.function.name) == ("tool_calls", "forecast")
    assert set(json.loads(call.function.arguments)) == {"city", "warm"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "11 degrees"}
    last = litellm.completion(
        **{**provider, **SAID, "messages": [*MESSAGES, message.model_dump(), result]}, tools=[TOOL],
        tool_choice="none",
    )  # fmt: skip
    assert last.choices[0].message.content


def test_responses():
    answer = litellm.responses(**OPENAI, input="What is the capital of France?", max_output_tokens=24)
    assert answer.status in {"completed", "incomplete"}


@pytest.mark.parametrize("kind", ["openai", "ollama"])
def test_embedding(kind):
    base = f"{SERVER}/v1" if kind == "openai" else SERVER
    found = litellm.embedding(
        model=f"{kind}/{EMBEDDING}", input=["a cat", "a dog"], api_base=base, api_key="none"
    )
    assert [len(entry["embedding"]) for entry in found.data] == [384, 384]


@ALL
def test_errors(provider):
    name = provider["model"].split("/")[0]
    with pytest.raises(
        (litellm.NotFoundError, litellm.APIConnectionError, litellm.BadRequestError)
    ) as caught:
        litellm.completion(**{**provider, "model": f"{name}/gpt-9"}, **SAID)
    assert "not found" in str(caught.value).lower()
