"""The Responses API's own JSON, as it comes off the wire, against the published schemas.

Those are the Open Responses specification's (openresponses-types) and OpenAI's own (the models of its
client, which a client would not check strictly).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from openresponses_types import types as spec
from pydantic import TypeAdapter

from tests.conftest import TINY

PATH = "/v1/responses"
TOOL = {
    "type": "function", "name": "get_weather", "description": "The weather of a city.", "strict": True,
    "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"],
        "additionalProperties": False,
    },
}  # fmt: skip
FORM = {
    "type": "json_schema", "name": "answer", "strict": True,
    "schema": {
        "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
        "additionalProperties": False,
    },
}  # fmt: skip
REQUESTS: dict[str, dict[str, Any]] = {
    "a text": {},
    "a cut text": {"max_output_tokens": 1},
    "log-probabilities": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "a call": {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 64},
    "a cut call": {"tools": [TOOL], "tool_choice": {"type": "function", "name": "get_weather"},
                   "max_output_tokens": 3},
    "allowed tools": {
        "tools": [TOOL],
        "tool_choice": {
            "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}],
        },
    },
    "a form": {"text": {"format": FORM}},
    "everything": {
        "instructions": "Be brief.", "metadata": {"a": "b"}, "temperature": 0.5, "top_p": 0.9, "store": False,
        "reasoning": {"effort": "low", "summary": "auto"}, "truncation": "auto", "service_tier": "flex",
        "parallel_tool_calls": False, "max_tool_calls": 1, "safety_identifier": "s", "prompt_cache_key": "k",
        "presence_penalty": 1, "frequency_penalty": 1, "text": {"verbosity": "low"},
        "include": ["reasoning.encrypted_content"],
    },
}  # fmt: skip

# The specification's events, each by its name.
SPECIFIED: dict[str, Any] = {
    next(iter(event.model_fields["type"].annotation)).value: event
    for name, event in vars(spec).items()
    if name.endswith("StreamingEvent")
}
OF_CLIENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ITEM_OF_CLIENT: TypeAdapter[Any] = TypeAdapter(ResponseItem)


@pytest.fixture(scope="module")
def client(tiny_http: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_http, timeout=60) as made:
        yield made


def asked(name: str) -> dict[str, Any]:
    return {"model": TINY, "input": "Hello", "max_output_tokens": 8, "temperature": 0, **REQUESTS[name]}


def as_specified(value: Any) -> Any:
    """The specification has no place for a form's schema, which OpenAI's own answers repeat."""
    told = copy.deepcopy(value)
    resource = told.get("response", told)
    if resource.get("object") == "response" and "schema" in resource["text"]["format"]:
        resource["text"]["format"]["schema"] = None
    return told


def check_resource(resource: Any) -> None:
    assert set(resource) == set(spec.ResponseResource.model_fields)
    spec.ResponseResource.model_validate(as_specified(resource))
    Response.model_validate(resource)
    assert (resource["incomplete_details"] is not None) == (resource["status"] == "incomplete")


@pytest.mark.parametrize("name", REQUESTS)
def test_a_resource(client: httpx.Client, name: str) -> None:
    body = asked(name)
    answer = client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    check_resource(made)
    assert made["usage"]["total_tokens"] == made["usage"]["input_tokens"] + made["usage"]["output_tokens"]
    kept = client.get(f"{PATH}/{made['id']}")
    if not body.get("store", True):
        assert kept.status_code == 404
        return
    assert kept.json() == made
    page = client.get(f"{PATH}/{made['id']}/input_items").json()
    for item in page["data"]:
        ITEM_OF_CLIENT.validate_python(item)
    assert client.delete(f"{PATH}/{made['id']}").json() == {
        "id": made["id"], "object": "response", "deleted": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_a_stream(client: httpx.Client, name: str) -> None:
    answer = client.post(PATH, json={**asked(name), "stream": True})
    assert answer.headers["content-type"] == "text/event-stream"
    *frames, done, nothing = answer.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    events = []
    for frame in frames:
        head, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert head == f"event: {event['type']}"
        SPECIFIED[event["type"]].model_validate(as_specified(event))
        OF_CLIENT.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in (events[0], events[1], events[-1]):
        check_resource(event["response"])
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert items == last["output"]
    # What is cut off is the last thing that there is, and then the response is cut off too.
    assert [item["status"] for item in items[:-1]] == ["completed"] * (len(items) - 1)
    assert items[-1]["status"] == last["status"]
    for index, item in enumerate(items):
        pieces = "".join(
            event["delta"]
            for event in events
            if event["type"].endswith(".delta") and event["output_index"] == index
        )
        assert pieces == (
            item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        )
