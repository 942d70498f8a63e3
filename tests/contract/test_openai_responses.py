"""OpenAI's Responses API by its own Python client against the real core."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pydantic
import pytest
from openresponses_types.types import ResponseResource

from tests.conftest import SMOLLM, TINY


@pytest.fixture(scope="module")
def client(tiny_http: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny_http}/v1", api_key="not-needed", max_retries=0) as made:
        yield made


def test_a_response(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=TINY, input="Hello", temperature=0, max_output_tokens=6)
    assert answer.id.startswith("resp_")
    assert answer.output[0].id.startswith("msg_")  # type: ignore[union-attr]  # a message
    assert answer.model == TINY
    assert answer.usage is not None
    assert answer.usage.input_tokens > 0
    if answer.status == "incomplete":
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.usage.output_tokens == 6
    ResponseResource.model_validate_json(answer.model_dump_json(by_alias=True))


def test_the_model_may_be_left_out(client: openai.OpenAI) -> None:
    assert client.responses.create(input="Hello", max_output_tokens=1).model == TINY


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    arguments = {"model": TINY, "input": "Hello", "temperature": 0, "max_output_tokens": 8}
    whole = client.responses.create(**arguments)
    events = list(client.responses.create(**arguments, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [event.type for event in events[-4:-1]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == (
        whole.output_text
    )
    last = events[-1]
    assert last.type in {"response.completed", "response.incomplete"}
    assert last.response.output_text == whole.output_text
    assert last.response.usage.output_tokens == whole.usage.output_tokens


def test_the_stream_helper(client: openai.OpenAI) -> None:
    with client.responses.stream(model=TINY, input="Hello", max_output_tokens=4) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert isinstance(text, str)


def test_a_response_is_kept_until_it_is_deleted(client: openai.OpenAI) -> None:
    items = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
    ]
    made = client.responses.create(model=TINY, input=items, max_output_tokens=2, metadata={"a": "b"})  # type: ignore[arg-type]  # typed dicts
    found = client.responses.retrieve(made.id)
    assert found.model_dump() == made.model_dump()
    listed = list(client.responses.input_items.list(made.id, order="asc", limit=1))
    assert [item.role for item in listed] == ["system", "user"]  # type: ignore[union-attr]  # messages
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    unkept = client.responses.create(model=TINY, input="Hello", max_output_tokens=1, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_is_continued(client: openai.OpenAI, stream: bool) -> None:
    arguments = {"model": TINY, "temperature": 0, "max_output_tokens": 6}
    if stream:
        first = list(client.responses.create(**arguments, input="one", stream=True))[-1].response
    else:
        first = client.responses.create(**arguments, input="one")
    second = client.responses.create(**arguments, input="two", previous_response_id=first.id)
    history = [
        {"role": "user", "content": "one"},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"role": "user", "content": "two"},
    ]
    whole = client.responses.create(**arguments, input=history)
    assert second.output_text == whole.output_text
    assert second.usage.input_tokens == whole.usage.input_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**arguments, input="x", previous_response_id="resp_unknown")
    assert caught.value.param == "previous_response_id"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "word " * 20_000}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        ({"input": [{"role": "user", "content": ""}]}, "input[0].content"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(
    client: openai.OpenAI, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": TINY, "input": "Hello", **fields})  # type: ignore[call-overload]  # wrong on purpose
    assert caught.value.param == param


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=TINY, input="Hello", temperature=0, max_output_tokens=3, top_logprobs=2,
        include=["message.output_text.logprobs"],
    )  # fmt: skip
    part = answer.output[0].content[0]  # type: ignore[union-attr,index]  # a message
    assert len(part.logprobs) == answer.usage.output_tokens  # type: ignore[union-attr,arg-type]  # a text
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)  # type: ignore[union-attr]  # a text


@pytest.fixture(scope="module")
def smollm(smollm_http: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{smollm_http}/v1", api_key="x", max_retries=0) as made:
        yield made


class Capital(pydantic.BaseModel):
    city: str
    country: str


@pytest.mark.smollm
class TestSmolLM:
    def test_an_answer(self, smollm: openai.OpenAI) -> None:
        answer = smollm.responses.create(
            model=SMOLLM, input="What is the capital of France?", temperature=0, max_output_tokens=32
        )
        assert answer.status == "completed"
        assert "Paris" in answer.output_text
        assert answer.completed_at is not None
        more = smollm.responses.create(
            model=SMOLLM, input="And of Italy?", previous_response_id=answer.id, temperature=0,
            max_output_tokens=16,
        )  # fmt: skip
        assert more.usage is not None
        # The first turn is not computed again.
        assert more.usage.input_tokens_details.cached_tokens > 0

    def test_a_structured_answer(self, smollm: openai.OpenAI) -> None:
        answer = smollm.responses.parse(
            model=SMOLLM, input="The capital of France is Paris.", text_format=Capital, temperature=0,
            max_output_tokens=64,
        )  # fmt: skip
        assert isinstance(answer.output_parsed, Capital)

    def test_a_forced_call_and_its_result(self, smollm: openai.OpenAI) -> None:
        tool = {
            "type": "function", "name": "get_weather", "strict": True,
            "parameters": {
                "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}},
                "required": ["city"], "additionalProperties": False,
            },
        }  # fmt: skip
        asked = smollm.responses.create(
            model=SMOLLM, input="What is the weather in Paris?", tools=[tool], tool_choice="required",  # type: ignore[list-item]  # typed dicts
            temperature=0, max_output_tokens=64, parallel_tool_calls=False,
        )  # fmt: skip
        (call,) = [item for item in asked.output if item.type == "function_call"]
        assert call.name == "get_weather"
        assert set(json.loads(call.arguments)) == {"city"}
        answer = smollm.responses.create(
            model=SMOLLM, previous_response_id=asked.id, temperature=0, max_output_tokens=16, tools=[tool],  # type: ignore[list-item]  # typed dicts
            input=[{"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 25 degrees"}],
            tool_choice="none",
        )  # fmt: skip
        assert answer.output_text
