"""OpenAI's Python client with its helpers: parsing, stream events, tools, abandoned streams."""

from __future__ import annotations

import enum
import json
import os

import openai
import pytest
from pydantic import BaseModel

CHAT, TINY, EMBEDDING = (os.environ[f"{name}_MODEL"] for name in ("CHAT", "TINY", "EMBEDDING"))
BASE = os.environ["SERVER_URL"] + "/v1"
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


class City(enum.StrEnum):
    PARIS = "Paris"
    OSLO = "Oslo"


class Forecast(BaseModel):
    city: City
    warm: bool


@pytest.fixture(scope="module")
def client():
    with openai.OpenAI(base_url=BASE, api_key="none", max_retries=0, timeout=120) as made:
        yield made


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_chat(client):
    answer = client.chat.completions.create(model=CHAT, messages=CAPITAL, temperature=0, max_tokens=24)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_every_sampling_field(client):
    answer = client.chat.completions.create(
        model=TINY, messages=CAPITAL, max_completion_tokens=4, n=2, seed=3, temperature=0.7, top_p=0.9,
        frequency_penalty=0.5, presence_penalty=0.5, logit_bias={"30": 5}, logprobs=True, top_logprobs=2,
        stop=["\n\n\n", "zzz"], user="someone", store=False, metadata={"a": "b"}, service_tier="auto",
        response_format={"type": "text"}, parallel_tool_calls=True, reasoning_effort="none",
        modalities=["text"], prompt_cache_key="key", safety_identifier="id", verbosity="low",
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(len(choice.logprobs.content) <= 4 for choice in answer.choices)


def test_raw_stream(client):
    with client.chat.completions.with_streaming_response.create(
        model=TINY, messages=CAPITAL, max_tokens=4, stream=True, stream_options={"include_usage": True}
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 4


def test_stream_helper(client):
    with client.chat.completions.stream(
        model=CHAT, messages=CAPITAL, temperature=0, max_tokens=24, stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds[0] == "chunk"
    assert {"content.delta", "content.done"} <= set(kinds)
    assert "Paris" in final.choices[0].message.content
    assert final.usage.total_tokens > 10


def test_parse(client):
    answer = client.chat.completions.parse(
        model=CHAT, messages=CAPITAL, temperature=0, max_tokens=64, response_format=Forecast
    )
    assert isinstance(answer.choices[0].message.parsed, Forecast)


def test_parse_of_a_stream(client):
    with client.chat.completions.stream(
        model=CHAT, messages=CAPITAL, temperature=0, max_tokens=64, response_format=Forecast
    ) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Forecast)


def test_json_object(client):
    asked = [{"role": "user", "content": "Answer in JSON."}]
    answer = client.chat.completions.create(
        model=CHAT, messages=asked, temperature=0, max_tokens=200, response_format={"type": "json_object"}
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools_and_their_results(client, choice):
    answer = client.chat.completions.create(
        model=CHAT, messages=CAPITAL, temperature=0, max_tokens=128, tools=[WEATHER], tool_choice=choice,
        parallel_tool_calls=False,
    )  # fmt: skip
    message = answer.choices[0].message
    # OpenAI's own service says "stop" after a call that was named; ours says what happened.
    assert answer.choices[0].finish_reason in {"tool_calls", "stop"}
    call = message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments)["city"] in {"Paris", "Oslo"}
    history = [*CAPITAL, message, {"role": "tool", "tool_call_id": call.id, "content": "11 degrees"}]
    last = client.chat.completions.create(
        model=CHAT, messages=history, temperature=0, max_tokens=8, tools=[WEATHER], tool_choice="none"
    )
    assert last.choices[0].message.content
    assert last.choices[0].message.tool_calls is None


def test_parsed_tools_of_a_stream(client):
    tool = openai.pydantic_function_tool(Forecast, name="forecast")
    with client.chat.completions.stream(
        model=CHAT, messages=CAPITAL, temperature=0, max_tokens=128, tools=[tool], tool_choice="required",
        parallel_tool_calls=False,  # this model would go on calling
    ) as stream:  # fmt: skip
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, Forecast)


def test_completions(client):
    answer = client.completions.create(
        model=TINY, prompt=["one", "two"], max_tokens=3, logprobs=2, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[0].logprobs.token_logprobs) == 3
    stream = client.completions.create(model=TINY, prompt="one", max_tokens=3, temperature=0, stream=True)
    streamed = "".join(chunk.choices[0].text for chunk in stream)
    assert streamed == answer.choices[0].text
    echoed = client.completions.create(model=TINY, prompt="one", max_tokens=3, temperature=0, echo=True)
    assert echoed.choices[0].text == "one" + streamed


def test_log_probabilities_of_a_prompt(client):
    answer = client.completions.create(model=TINY, prompt="one two", max_tokens=1, logprobs=2, echo=True)
    assert answer.choices[0].logprobs.token_logprobs[0] is None


def test_embeddings(client):
    texts = ["a cat", "a kitten", "the stock market"]
    # The client asks for base64 when it is told nothing.
    found = client.embeddings.create(model=EMBEDDING, input=texts)
    floats = client.embeddings.create(model=EMBEDDING, input=texts, encoding_format="float")
    vectors = [entry.embedding for entry in found.data]
    assert len(vectors[0]) == 384
    for one, other in zip(vectors, floats.data, strict=True):
        assert one == pytest.approx(other.embedding, abs=1e-6)

    def likeness(first, second):
        return sum(a * b for a, b in zip(first, second, strict=True))

    assert likeness(vectors[0], vectors[1]) > likeness(vectors[0], vectors[2]) + 0.2
    assert found.usage.prompt_tokens == found.usage.total_tokens > 0


def test_models(client):
    names = {entry.id for entry in client.models.list()}
    assert {CHAT, TINY, EMBEDDING} <= names
    assert client.models.retrieve(CHAT).id == CHAT


def test_responses(client):
    first = client.responses.create(
        model=CHAT, input="What is the capital of France?", temperature=0, max_output_tokens=24
    )
    assert "Paris" in first.output_text
    assert first.status == "completed"
    second = client.responses.create(
        model=CHAT, input="And of Norway?", previous_response_id=first.id, temperature=0, max_output_tokens=4
    )
    assert second.previous_response_id == first.id
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(second.id)


def test_responses_stream_and_parse(client):
    with client.responses.stream(
        model=CHAT, input="Tell of Oslo.", text_format=Forecast, temperature=0, max_output_tokens=64
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert isinstance(final.output_parsed, Forecast)
    parsed = client.responses.parse(
        model=CHAT, input="Tell of Oslo.", text_format=Forecast, temperature=0, max_output_tokens=64
    )
    assert parsed.output_parsed == final.output_parsed


def test_responses_tools(client):
    tool = {"type": "function", **WEATHER["function"]}
    first = client.responses.create(
        model=CHAT, input="Is it warm in Oslo?", tools=[tool], tool_choice="required", temperature=0,
        max_output_tokens=128, parallel_tool_calls=False,
    )  # fmt: skip
    call = first.output[-1]
    assert (call.type, call.name) == ("function_call", "get_weather")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "11 degrees"}
    second = client.responses.create(
        model=CHAT, input=[result], previous_response_id=first.id, temperature=0, max_output_tokens=8
    )
    assert second.output_text


def test_errors(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=CAPITAL)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=TINY, messages=[{"role": "user", "content": 3}])
    assert wrong.value.param.startswith("messages[0].content")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=TINY, messages=[{"role": "user", "content": "word " * 5000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_unknown")


def test_what_is_not_served_is_said_clearly(client):
    for call in (
        lambda: client.images.generate(model=CHAT, prompt="a cat"),
        lambda: client.files.list(),
        lambda: client.moderations.create(input="a cat"),
        lambda: client.audio.speech.create(model=CHAT, voice="alloy", input="a cat"),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            call()
        assert caught.value.status_code in {404, 405, 501}
        assert caught.value.body["message"]


def test_a_stream_that_is_left_ends(client):
    stream = client.chat.completions.create(model=TINY, messages=CAPITAL, max_tokens=200, stream=True)
    next(stream)
    stream.close()
    assert client.chat.completions.create(model=TINY, messages=CAPITAL, max_tokens=1).choices


async def test_many_at_once():
    import asyncio

    async with openai.AsyncOpenAI(base_url=BASE, api_key="none", max_retries=0) as client:
        calls = [
            client.chat.completions.create(model=TINY, messages=CAPITAL, max_tokens=8, temperature=0)
            for _ in range(24)
        ]
        texts = {answer.choices[0].message.content for answer in await asyncio.gather(*calls)}
    assert len(texts) == 1


def test_a_deadline_of_the_client(client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(
            model=CHAT, messages=CAPITAL, max_tokens=200, extra_body={"ignore_eos": True}
        )
