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
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"include": ["everything"]}, "include[0]"),
        ({"metadata": {"a" * 65: "b"}}, "metadata." + "a" * 64 + "..."),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "word " * 20_000}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(
    client: openai.OpenAI, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": TINY, "input": "Hello", **fields})  # type: ignore[call-overload]  # wrong on purpose
    assert caught.value.param == param


def test_what_changes_nothing_is_taken_and_told(client: openai.OpenAI) -> None:
    said = {
        "metadata": {"a": "b"}, "max_tool_calls": 3, "parallel_tool_calls": False, "truncation": "auto",
        "prompt_cache_key": "k", "safety_identifier": "s", "text": {"verbosity": "low"}, "store": False,
    }  # fmt: skip
    answer = client.responses.create(
        model=TINY, input="Hello", max_output_tokens=2, service_tier="flex", user="u",
        include=["reasoning.encrypted_content"], **said,  # type: ignore[arg-type]  # a table
    )  # fmt: skip
    shown = answer.model_dump(exclude_unset=True)
    for name in said.keys() - {"text"}:
        assert shown[name] == said[name]
    assert (shown["text"]["verbosity"], shown["service_tier"], shown["background"]) == (
        "low",
        "default",
        False,
    )
    assert answer.status == "incomplete"
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cache_write_tokens == 0  # type: ignore[attr-defined]  # newer than its stub
    assert answer.usage.total_tokens == answer.usage.input_tokens + 2


def test_instructions_are_of_their_own_request_only(client: openai.OpenAI) -> None:
    arguments = {"model": TINY, "temperature": 0, "max_output_tokens": 4}
    first = client.responses.create(**arguments, input="one", instructions="Speak like a pirate, always.")
    second = client.responses.create(**arguments, input="two", previous_response_id=first.id)
    assert second.instructions is None
    history = [{"role": "user", "content": "one"}, *first.output, {"role": "user", "content": "two"}]
    whole = client.responses.create(**arguments, input=history)  # type: ignore[arg-type]  # the SDK's own items
    assert second.usage.input_tokens == whole.usage.input_tokens
    assert second.output_text == whole.output_text


def test_a_client_may_refer_to_items_and_send_nothing_else(client: openai.OpenAI) -> None:
    """As the AI SDK does where responses are stored: no previous_response_id, only the items' ids."""
    arguments = {"model": TINY, "temperature": 0, "max_output_tokens": 4}
    first = client.responses.create(**arguments, input="one")
    user = {"role": "user", "content": "one"}
    named = {"type": "item_reference", "id": first.output[0].id}
    second = client.responses.create(**arguments, input=[user, named, {"role": "user", "content": "two"}])
    continued = client.responses.create(**arguments, input="two", previous_response_id=first.id)
    assert second.output_text == continued.output_text


def test_the_tokens_of_an_input(client: openai.OpenAI) -> None:
    first = client.responses.create(model=TINY, input="one", instructions="Be brief.", max_output_tokens=2)
    for fields in ({"input": "one", "instructions": "Be brief."}, {"previous_response_id": first.id}):
        counted = client.responses.input_tokens.count(model=TINY, **fields)  # type: ignore[arg-type]  # a table
        assert counted.object == "response.input_tokens"
        asked = client.responses.create(model=TINY, max_output_tokens=1, **fields)  # type: ignore[call-overload]  # a table
        assert counted.input_tokens == asked.usage.input_tokens


def test_only_what_runs_in_the_background_is_cancelled(client: openai.OpenAI) -> None:
    made = client.responses.create(model=TINY, input="Hello", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_unknown")
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.retrieve(made.id, stream=True, starting_after=2)
    assert caught.value.param == "stream"


@pytest.mark.parametrize("stream", [False, True])
def test_truncation(client: openai.OpenAI, stream: bool) -> None:
    """Old turns go where they are too many, instructions and the last turn stay."""
    turns = [
        {"role": role, "content": f"{word} " * 100}
        for word in ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta")
        for role in ("user", "assistant")
    ]
    last = {"role": "user", "content": "the end"}
    arguments = {"model": TINY, "temperature": 0, "max_output_tokens": 4, "instructions": "Be brief."}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**arguments, input=[*turns * 2, last])  # type: ignore[call-overload]  # a table
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    made = client.responses.create(  # type: ignore[call-overload]  # a table
        **arguments, input=[*turns * 2, last], truncation="auto", stream=stream
    )
    answer = list(made)[-1].response if stream else made
    assert answer.truncation == "auto"
    kept = answer.usage.input_tokens
    assert 1_500 < kept < 2_048
    # The same as if the client had left the oldest turns out itself.
    rests = [[*(turns * 2)[cut:], last] for cut in range(0, len(turns) * 2, 2)]
    counts = [
        client.responses.input_tokens.count(model=TINY, instructions="Be brief.", input=rest).input_tokens  # type: ignore[arg-type]  # a table
        for rest in rests
    ]
    own = client.responses.create(**arguments, input=rests[counts.index(kept)])  # type: ignore[call-overload]  # a table
    assert own.output_text == answer.output_text
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=TINY, input="word " * 9_000, truncation="auto")


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
