"""OpenAI's own Python client against the real core and SmolLM2."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest

from tests.conftest import SMOLLM

pytestmark = pytest.mark.smollm

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
COUNT = [{"role": "user", "content": "Count from one to ten."}]


@pytest.fixture(scope="module")
def client(smollm_http: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{smollm_http}/v1", api_key="not-needed", max_retries=0) as made:
        yield made


def test_an_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=SMOLLM, messages=CAPITAL, temperature=0, max_tokens=32)
    choice = answer.choices[0]
    assert "Paris" in (choice.message.content or "")
    assert (choice.finish_reason, choice.message.role, choice.message.refusal) == ("stop", "assistant", None)
    assert choice.logprobs is None
    assert answer.id.startswith("chatcmpl-")
    assert len(answer.id) >= len("chatcmpl-") + 24
    assert (answer.object, answer.model) == ("chat.completion", SMOLLM)
    assert answer.system_fingerprint
    assert answer._request_id
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens > 10
    assert 1 <= usage.completion_tokens <= 32
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.completion_tokens_details is not None


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    arguments = {"model": SMOLLM, "messages": CAPITAL, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**arguments)
    stream = client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert "Paris" in text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


async def test_the_asynchronous_client(smollm_http: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{smollm_http}/v1", api_key="x", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=SMOLLM, messages=CAPITAL, temperature=0, max_tokens=32, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert "Paris" in text


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_length_is_bounded(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model=SMOLLM, messages=COUNT, temperature=0, **{name: 3})  # type: ignore[call-overload]  # either field
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=SMOLLM, messages=CAPITAL, temperature=0, max_tokens=32, stop=["France"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "capital" in (answer.choices[0].message.content or "")
    assert "France" not in (answer.choices[0].message.content or "")


def test_a_seed_gives_the_same_text_again(client: openai.OpenAI) -> None:
    texts = {
        client.chat.completions.create(model=SMOLLM, messages=COUNT, temperature=1, seed=7, max_tokens=12)
        .choices[0]
        .message.content
        for _ in range(2)
    }
    assert len(texts) == 1


def test_several_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=SMOLLM, messages=COUNT, temperature=1.5, seed=1, max_tokens=8, n=3
    )
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    stream = client.chat.completions.create(
        model=SMOLLM, messages=COUNT, temperature=1.5, seed=1, max_tokens=8, n=3, stream=True
    )
    texts = ["", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    by_index = sorted(answer.choices, key=lambda choice: choice.index)
    assert texts == [choice.message.content for choice in by_index]


def test_logprobs(client: openai.OpenAI) -> None:
    arguments = {"model": SMOLLM, "messages": CAPITAL, "temperature": 0, "max_tokens": 4}
    answer = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 4
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert bytes(entry.bytes or []).decode() == entry.token
        # Greedy: the chosen token is the most probable one.
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert math.exp(entry.top_logprobs[0].logprob) + math.exp(entry.top_logprobs[1].logprob) <= 1.001
    stream = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2, stream=True)
    streamed = [
        entry.token
        for chunk in stream
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == [entry.token for entry in logprobs.content]


def test_a_bias_changes_the_answer(client: openai.OpenAI) -> None:
    arguments = {"model": SMOLLM, "messages": CAPITAL, "temperature": 0, "max_tokens": 1}
    plain = client.chat.completions.create(**arguments).choices[0].message.content
    # Token ids of SmolLM2's byte-level vocabulary; one that would not come by itself.
    biased = client.chat.completions.create(**arguments, logit_bias={"30": 100}).choices[0].message.content
    assert biased != plain
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**arguments, logit_bias={"49152000": 1})
    assert caught.value.param == "logit_bias"


def test_content_parts_and_developer_messages(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=SMOLLM,
        messages=[
            {"role": "developer", "content": "You are a helpful assistant."},
            {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
        ],
        temperature=0,
        max_tokens=32,
    )
    assert "Paris" in (answer.choices[0].message.content or "")


@pytest.mark.parametrize("name", [SMOLLM.upper(), f"{SMOLLM}:latest", "default", ""])
def test_names_of_the_model(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model=name, messages=CAPITAL, max_tokens=1)
    assert answer.model == SMOLLM


def test_models(client: openai.OpenAI) -> None:
    listed = list(client.models.list())
    assert [entry.id for entry in listed] == [SMOLLM]
    assert listed[0].owned_by == "osaurus"
    assert client.models.retrieve(SMOLLM) == listed[0]


class TestErrors:
    def test_an_unknown_model(self, client: openai.OpenAI) -> None:
        for stream in (False, True):
            with pytest.raises(openai.NotFoundError) as caught:
                client.chat.completions.create(model="gpt-4", messages=CAPITAL, stream=stream)
            assert caught.value.code == "model_not_found"
            assert caught.value.body == {
                "message": "Model not found: gpt-4",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")

    def test_a_prompt_that_is_too_long(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model=SMOLLM, messages=[{"role": "user", "content": "word " * 20_000}]
            )
        assert caught.value.code == "context_length_exceeded"

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"messages": []}, "messages"),
            ({"temperature": 3}, "temperature"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role"),
            ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
            (
                {
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {"name": "n", "schema": {"properties": {"a": {"contains": {}}}}},
                    }
                },
                "response_format.json_schema.schema",
            ),
            (
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
                            ],
                        }
                    ]
                },
                "messages[0].content[0].image_url",
            ),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_field_that_cannot_be_honoured_is_named(
        self, client: openai.OpenAI, fields: dict[str, object], param: str, stream: bool
    ) -> None:
        arguments = {"model": SMOLLM, "messages": CAPITAL, "stream": stream, **fields}
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**arguments)  # type: ignore[call-overload]  # wrong on purpose
        assert caught.value.param == param

    def test_tools_that_are_hidden_do_no_harm(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model=SMOLLM,
            messages=CAPITAL,
            temperature=0,
            max_tokens=16,
            tools=[{"type": "function", "function": {"name": "f"}}],
            tool_choice="none",
        )
        assert "Paris" in (answer.choices[0].message.content or "")
