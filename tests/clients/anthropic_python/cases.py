"""Anthropic's Python client with its helpers: streams, tools and the tool runner, parsing, counting."""

from __future__ import annotations

import json
import os

import anthropic
import pytest
from pydantic import BaseModel

CHAT, TINY = (os.environ[f"{name}_MODEL"] for name in ("CHAT", "TINY"))
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
# The client has dropped the parameter; the API has not.
GREEDY = {"temperature": 0}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ONE_CALL = {"type": "any", "disable_parallel_tool_use": True}


class Forecast(BaseModel):
    warm: bool


@pytest.fixture(scope="module")
def client():
    with anthropic.Anthropic(base_url=os.environ["SERVER_URL"], api_key="none", max_retries=0) as made:
        yield made


def test_messages(client):
    message = client.messages.create(model=CHAT, max_tokens=24, messages=CAPITAL, extra_body=GREEDY)
    assert "Paris" in message.content[0].text
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0
    assert message._request_id


def test_stream(client):
    with client.messages.stream(model=CHAT, max_tokens=24, messages=CAPITAL, extra_body=GREEDY) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert "Paris" in message.content[0].text


def test_system_blocks_and_stop_sequences(client):
    message = client.messages.create(
        model=CHAT,
        max_tokens=24,
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[{"role": "user", "content": [{"type": "text", "text": CAPITAL[0]["content"]}]}],
        stop_sequences=["Paris"],
        extra_body=GREEDY,
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "Paris")


@pytest.mark.parametrize("stream", [False, True])
def test_tools_and_their_results(client, stream):
    asked = {
        "model": CHAT, "max_tokens": 128, "messages": CAPITAL, "tools": [WEATHER], "tool_choice": ONE_CALL,
        "extra_body": GREEDY,
    }  # fmt: skip
    if stream:
        with client.messages.stream(**asked) as streaming:
            message = streaming.get_final_message()
    else:
        message = client.messages.create(**asked)
    assert message.stop_reason == "tool_use"
    call = message.content[-1]
    assert call.name == "get_weather"
    assert call.input["city"] in {"Paris", "Oslo"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "11 degrees"}
    history = [
        *CAPITAL, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]},
    ]  # fmt: skip
    after = client.messages.create(
        model=CHAT,
        max_tokens=8,
        messages=history,
        tools=[WEATHER],
        tool_choice={"type": "none"},
        extra_body=GREEDY,
    )
    assert after.content[0].text


def test_tool_runner(client):
    called = []

    @anthropic.beta_tool
    def is_warm(warm: bool) -> str:
        """Say whether it is warm."""
        called.append(warm)
        return "noted"

    runner = client.beta.messages.tool_runner(
        model=CHAT, max_tokens=128, messages=CAPITAL, tools=[is_warm], tool_choice=ONE_CALL, max_iterations=2,
        extra_body=GREEDY,
    )  # fmt: skip
    messages = list(runner)
    assert len(messages) == 2
    assert isinstance(called[0], bool)


def test_parse(client):
    message = client.messages.parse(
        model=CHAT, max_tokens=64, messages=CAPITAL, output_format=Forecast, extra_body=GREEDY
    )
    assert isinstance(message.parsed_output, Forecast)


def test_counting(client):
    counted = client.messages.count_tokens(model=CHAT, messages=CAPITAL, system="Be brief.")
    usage = client.messages.create(model=CHAT, max_tokens=1, messages=CAPITAL, system="Be brief.").usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_models(client):
    assert CHAT in {entry.id for entry in client.models.list()}
    found = client.models.retrieve(CHAT)
    assert (found.type, found.id) == ("model", CHAT)
    assert found.created_at.year > 2000


def test_errors(client):
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="claude-omega", max_tokens=1, messages=CAPITAL)
    assert unknown.value.body["error"]["type"] == "not_found_error"
    assert unknown.value.request_id
    with pytest.raises(anthropic.BadRequestError) as wrong:
        client.messages.create(model=TINY, max_tokens=0, messages=CAPITAL)
    assert wrong.value.body["error"]["type"] == "invalid_request_error"
    with (
        pytest.raises(anthropic.BadRequestError),
        client.messages.stream(
            model=TINY, max_tokens=1, messages=[{"role": "user", "content": "word " * 5000}]
        ) as stream,
    ):
        stream.get_final_message()


def test_what_is_not_served_is_said_clearly(client):
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.batches.list()
    assert caught.value.status_code in {404, 501}
    assert json.dumps(caught.value.body)


def test_a_stream_that_is_left_ends(client):
    with client.messages.stream(model=TINY, max_tokens=200, messages=CAPITAL) as stream:
        next(iter(stream.text_stream))
    assert client.messages.create(model=TINY, max_tokens=1, messages=CAPITAL).usage.output_tokens == 1


async def test_the_asynchronous_client():
    async with (
        anthropic.AsyncAnthropic(base_url=os.environ["SERVER_URL"], auth_token="none") as client,
        client.messages.stream(model=TINY, max_tokens=4, messages=CAPITAL) as stream,
    ):
        assert [text async for text in stream.text_stream]
