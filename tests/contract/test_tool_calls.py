"""Tool calls of the real small model, by OpenAI's client: by itself it cannot call anything.

Arguments follow the schemas that structured answers are tested with, unstreamed in batches of eight, and
some again alone and streamed. OSAURUS_TEST_SEEDS says how many calls of each; 5 makes two hundred.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.conftest import SMOLLM
from tests.harness.schemas import SCHEMAS

pytestmark = pytest.mark.smollm

_AT_ONCE = 8
_SEEDS = int(os.environ.get("OSAURUS_TEST_SEEDS", "1"))
# Their values have no bound; an answer that is cut says so.
_UNBOUNDED = {"tree", "list by itself"}


@pytest.fixture
async def client(smollm_http: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{smollm_http}/v1", api_key="none", timeout=280) as made:
        yield made


def arguments_schema(name: str) -> dict[str, Any]:
    """The schema, in an object where it is not an object's."""
    schema = SCHEMAS[name]
    if schema.get("type") == "object" or "$ref" in schema:
        return schema
    inner = {key: value for key, value in schema.items() if key not in ("$defs", "definitions")}
    outer = {key: value for key, value in schema.items() if key in ("$defs", "definitions")}
    return {"type": "object", "properties": {"value": inner}, "required": ["value"], **outer}


def request(name: str, seed: int) -> dict[str, Any]:
    function = {"name": "store", "description": "Stores something.", "parameters": arguments_schema(name)}
    return {
        "model": SMOLLM,
        "messages": [{"role": "user", "content": f"Store {name}, number {seed}."}],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "store"}},
        # Seed 0 is greedy.
        "temperature": 1.0 if seed else 0.0,
        "seed": seed,
        "max_completion_tokens": 250,
    }


def require_valid(name: str, arguments: str) -> None:
    schema = arguments_schema(name)
    for holder in (schema, schema.get("properties", {}).get("value", {})):
        if isinstance(holder.get("items"), list):  # an older draft's tuple
            pytest.fail("tuples of older drafts are tested with structured answers")
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(arguments))


NAMES = [name for name, schema in SCHEMAS.items() if not isinstance(schema.get("items"), list)]


@pytest.mark.parametrize("seed", range(_SEEDS))
async def test_every_forced_call_is_valid(client: openai.AsyncOpenAI, seed: int) -> None:
    places = asyncio.Semaphore(_AT_ONCE)

    async def ask(name: str) -> None:
        async with places:
            completion = await client.chat.completions.create(**request(name, seed))
        (choice,) = completion.choices
        if choice.finish_reason == "length":
            assert name in _UNBOUNDED
            return
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "store"
        require_valid(name, call.function.arguments)

    await asyncio.gather(*(ask(name) for name in NAMES))


@pytest.mark.parametrize("name", ["nested", "unicode keys"])
async def test_streamed_and_alone_it_is_the_same(client: openai.AsyncOpenAI, name: str) -> None:
    arguments = ""
    first: list[str] = []
    stream = await client.chat.completions.create(**request(name, 3), stream=True)
    async for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
            assert call.function is not None
            first += [part for part in (call.id, call.function.name) if part]
            arguments += call.function.arguments or ""
    completion = await client.chat.completions.create(**request(name, 3))
    (whole,) = completion.choices[0].message.tool_calls or []
    assert whole.type == "function"
    assert whole.function.arguments == arguments
    assert first[0].startswith("call_")
    assert first[1:] == ["store"]
    require_valid(name, arguments)


async def test_the_agent_loop(client: openai.AsyncOpenAI) -> None:
    """Call, result, answer, as the API guide has it."""
    parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}}
    tools: Any = [
        {
            "type": "function",
            "function": {"name": "get_weather", "parameters": {**parameters, "required": ["city"]}},
        }
    ]
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked = await client.chat.completions.create(
        model=SMOLLM, messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False,
        temperature=0, max_completion_tokens=80,
    )  # fmt: skip
    (call,) = asked.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments).keys() == {"city"}

    messages.append(asked.choices[0].message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "Sunny, 31 degrees"})
    answered = await client.chat.completions.create(
        model=SMOLLM,
        messages=messages,
        tools=tools,
        tool_choice="none",
        temperature=0,
        max_completion_tokens=40,
    )
    assert answered.choices[0].message.tool_calls is None
    assert answered.choices[0].message.content
    assert answered.usage is not None
    assert asked.usage is not None
    assert answered.usage.prompt_tokens > 30

    messages[-1]["tool_call_id"] = "call_of_somebody_else"
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(model=SMOLLM, messages=messages, tools=tools)
    assert raised.value.param == "messages[2].tool_call_id"
