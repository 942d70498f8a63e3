"""Anthropic's own Python client against the real core and the tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator

import anthropic
import httpx
import pytest
from anthropic.types import (
    MessageParam,
    TextBlockParam,
    ToolChoiceParam,
    ToolParam,
    ToolResultBlockParam,
    ToolUseBlock,
)

from tests.conftest import TINY

HI: list[MessageParam] = [{"role": "user", "content": "What is the capital of France?"}]

# The SDK has dropped the parameter; the API has not.
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client(tiny_http: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=tiny_http, api_key="none", max_retries=0) as made:
        yield made


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_an_answer(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model=TINY, max_tokens=8, messages=HI, extra_body=GREEDY)
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", TINY)
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert message.usage.output_tokens == 8
    assert text_of(message)
    assert message._request_id


def test_a_stream_says_the_same(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model=TINY, max_tokens=8, messages=HI, extra_body=GREEDY)
    with client.messages.stream(model=TINY, max_tokens=8, messages=HI, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == text_of(message) == text_of(whole)
    assert message.stop_reason == whole.stop_reason
    assert message.usage.output_tokens == whole.usage.output_tokens
    both = [
        usage.input_tokens + (usage.cache_read_input_tokens or 0) for usage in (message.usage, whole.usage)
    ]
    assert both[0] == both[1]


def test_the_raw_events_are_in_order(client: anthropic.Anthropic) -> None:
    kinds = [
        event.type for event in client.messages.create(model=TINY, max_tokens=3, messages=HI, stream=True)
    ]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


async def test_the_asynchronous_client(tiny_http: str) -> None:
    async with (
        anthropic.AsyncAnthropic(base_url=f"{tiny_http}/anthropic", auth_token="none") as client,
        client.messages.stream(model=TINY, max_tokens=4, messages=HI) as stream,
    ):
        assert [text async for text in stream.text_stream]


def test_a_stop_sequence(client: anthropic.Anthropic) -> None:
    whole = text_of(client.messages.create(model=TINY, max_tokens=8, messages=HI, extra_body=GREEDY))
    stop = whole.strip()[3:6]
    message = client.messages.create(
        model=TINY, max_tokens=8, messages=HI, extra_body=GREEDY, stop_sequences=[stop]
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert stop not in text_of(message)


def test_counting_agrees_with_the_usage(client: anthropic.Anthropic) -> None:
    system: list[TextBlockParam] = [
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    ]
    counted = client.messages.count_tokens(model=TINY, messages=HI, system=system)
    usage = client.messages.create(model=TINY, max_tokens=1, messages=HI, system=system).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_repeated_prompt_is_read_from_the_cache(client: anthropic.Anthropic) -> None:
    long: list[MessageParam] = [{"role": "user", "content": "Tell me of the sea. " * 100}]
    first = client.messages.create(model=TINY, max_tokens=1, messages=long).usage
    second = client.messages.create(model=TINY, max_tokens=1, messages=long).usage
    assert second.cache_read_input_tokens
    assert second.cache_creation_input_tokens == 0
    read = [usage.input_tokens + (usage.cache_read_input_tokens or 0) for usage in (first, second)]
    assert read[0] == read[1]


def test_an_agents_request(client: anthropic.Anthropic) -> None:
    """A system prompt in blocks, a tool's result and text in one message, thinking asked for."""
    message = client.messages.create(
        model=TINY,
        max_tokens=4,
        system=[
            {"type": "text", "text": "You are an agent."},
            {"type": "text", "text": "Work in /srv.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": "List the files."},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "ls will do", "signature": "s"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "toolu_1", "name": "ls", "input": {"path": "/srv"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "a.txt", "is_error": False},
                    {"type": "text", "text": "<reminder>Be brief.</reminder>"},
                ],
            },
        ],
        thinking={"type": "enabled", "budget_tokens": 1024},
        metadata={"user_id": "u"},
        extra_headers={"anthropic-beta": "interleaved-thinking-2025-05-14"},
    )
    assert message.stop_reason == "max_tokens"


WEATHER: ToolParam = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}


def is_a_call(block: object) -> bool:
    if not isinstance(block, ToolUseBlock):
        return False
    assert block.id
    assert block.name == "get_weather"
    assert set(block.input) == {"city", "days"}
    assert isinstance(block.input["city"], str)
    assert block.input["days"] in (1, 2)
    return True


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_forced_call_follows_its_schema(client: anthropic.Anthropic, choice: ToolChoiceParam) -> None:
    message = client.messages.create(
        model=TINY, max_tokens=200, messages=HI, tools=[WEATHER],
        tool_choice={**choice, "disable_parallel_tool_use": True},  # type: ignore[typeddict-item, misc]  # of any kind
    )  # fmt: skip
    assert message.stop_reason == "tool_use"
    assert [is_a_call(block) for block in message.content] == [True]


def test_a_streamed_call_and_its_result(client: anthropic.Anthropic) -> None:
    pieces = ""
    with client.messages.stream(
        model=TINY,
        max_tokens=200,
        messages=HI,
        tools=[WEATHER],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    ) as stream:
        for event in stream:
            if event.type == "input_json":
                pieces += event.partial_json
        message = stream.get_final_message()
    call = message.content[-1]
    assert isinstance(call, ToolUseBlock)
    assert is_a_call(call)
    assert json.loads(pieces) == call.input
    assert message.stop_reason == "tool_use"
    result: list[ToolResultBlockParam] = [{"type": "tool_result", "tool_use_id": call.id, "content": "11 C"}]
    history: list[MessageParam] = [
        *HI, {"role": "assistant", "content": message.content}, {"role": "user", "content": result},
    ]  # fmt: skip
    after = client.messages.create(
        model=TINY, max_tokens=4, messages=history, tools=[WEATHER], tool_choice={"type": "none"}
    )
    assert after.stop_reason == "max_tokens"
    counted = client.messages.count_tokens(model=TINY, messages=history, tools=[WEATHER])
    assert counted.input_tokens > client.messages.count_tokens(model=TINY, messages=history).input_tokens


def test_an_answer_of_a_given_form(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"warm": {"type": "boolean"}},
        "required": ["warm"],
        "additionalProperties": False,
    }
    message = client.messages.create(
        model=TINY,
        max_tokens=60,
        messages=HI,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert isinstance(json.loads(text_of(message))["warm"], bool)


def test_models(client: anthropic.Anthropic) -> None:
    assert [entry.id for entry in client.models.list()] == [TINY]
    assert client.models.retrieve(TINY).max_input_tokens == 2048


def test_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="Model not found: claude"):
        client.messages.create(model="claude", max_tokens=1, messages=HI)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model=TINY, max_tokens=0, messages=HI)
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 2048 maximum"):
        client.messages.create(
            model=TINY, max_tokens=1, messages=[{"role": "user", "content": "word " * 5000}]
        )
    image = {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.0: .*image"):
        client.messages.create(
            model=TINY,
            max_tokens=1,
            messages=[{"role": "user", "content": [{"type": "image", "source": image}]}],  # type: ignore[typeddict-item, list-item]  # a literal's type is lost
        )
    result: ToolResultBlockParam = {"type": "tool_result", "tool_use_id": "toolu_9", "content": "11 C"}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.1\.content\.0\.tool_use_id: "):
        client.messages.create(
            model=TINY,
            max_tokens=1,
            messages=[*HI, {"role": "user", "content": [result, {"type": "text", "text": "So?"}]}],
        )


def test_a_coding_agents_request(tiny_http: str) -> None:
    """Everything that such a client sends for Anthropic's own service, and the SDK's types do not know."""
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    tools = [
        {"name": f"Tool{index}", "input_schema": schema, "eager_input_streaming": True, **cached}
        for index in range(20)
    ]
    body = {
        "model": TINY,
        "max_tokens": 32_000,
        "temperature": 1,
        "stream": True,
        "metadata": {"user_id": "user_1_account__session_2"},
        "system": [{"type": "text", "text": "You write code.", **cached}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello", **cached}]}],
        "tools": tools,
        "thinking": {"type": "enabled", "budget_tokens": 31_999},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "betas": ["context-management-2025-06-27"],
        "service_tier": "auto",
        "container": None,
    }
    headers = {"anthropic-version": "2099-01-01", "anthropic-beta": "a,b", "x-api-key": "k"}
    with httpx.Client(base_url=tiny_http, headers=headers, timeout=120) as http:
        counted = http.post("/v1/messages/count_tokens?beta=true", json={**body, "stream": None}).json()
        with http.stream("POST", "/v1/messages?beta=true", json=body) as answer:
            lines = answer.iter_lines()
            start = json.loads(
                next(line for line in lines if line.startswith("data: ")).removeprefix("data: ")
            )
    assert answer.status_code == 200
    assert answer.headers["request-id"]
    usage = start["message"]["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted["input_tokens"]
