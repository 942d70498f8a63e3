"""Tool calls of the real small model, by OpenAI's client: by itself it cannot call anything.

Arguments follow the schemas that structured answers are tested with, streamed and whole, in batches of
eight and alone: tests/harness/ways.py.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.conftest import SMOLLM
from tests.harness.schemas import OTHER_HALF, SCHEMAS, validate
from tests.harness.ways import ENDING_BIAS, IS_EVERYDAY, SEEDS, UNBOUNDED, Answer, Asking, require_agreement

pytestmark = pytest.mark.smollm


@pytest.fixture
async def client(smollm_http: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{smollm_http}/v1", api_key="none", timeout=600) as made:
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
        "logit_bias": ENDING_BIAS if name in UNBOUNDED else {},
    }


def require_valid(name: str, arguments: str) -> None:
    validate(arguments, arguments_schema(name))


_CHOSEN = [name for name in SCHEMAS if name in OTHER_HALF] if IS_EVERYDAY else list(SCHEMAS)
# A few of different kinds.
_ALONE = _CHOSEN[::8]


async def whole_call(client: openai.AsyncOpenAI, asked: dict[str, Any]) -> Answer:
    (choice,) = (await client.chat.completions.create(**asked)).choices
    assert choice.finish_reason in ("tool_calls", "length")
    assert choice.message.content is None
    calls = choice.message.tool_calls or []
    assert len(calls) == 1 or choice.finish_reason == "length"
    arguments = ""
    for call in calls:
        assert call.type == "function"
        assert call.id.startswith("call_")
        assert call.function.name == "store"
        arguments = call.function.arguments
    return Answer(arguments, is_cut=choice.finish_reason == "length")


async def streamed_call(client: openai.AsyncOpenAI, asked: dict[str, Any]) -> Answer:
    first: list[str] = []
    arguments, reason = "", None
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            assert not choice.delta.content
            for call in choice.delta.tool_calls or []:
                assert call.index == 0
                assert call.function is not None
                first += [part for part in (call.id, call.function.name) if part]
                arguments += call.function.arguments or ""
    assert reason in ("tool_calls", "length")
    if first:
        assert first[0].startswith("call_")
        assert first[1:] == ["store"]
    return Answer(arguments, is_cut=reason == "length")


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("first_seed", range(SEEDS))
async def test_every_forced_call_is_valid_and_the_same_in_every_way(
    client: openai.AsyncOpenAI, first_seed: int
) -> None:
    async def ask(asking: Asking) -> Answer:
        way = streamed_call if asking.is_streamed else whole_call
        return await way(client, request(asking.name, asking.seed))

    await require_agreement(ask, require_valid, _CHOSEN, _ALONE, first_seed)


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
