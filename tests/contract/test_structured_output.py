"""Structured answers of the real small model, by OpenAI's client: it could not write one by itself.

Forty schemas, unstreamed in batches of eight beside each other, and a part of them again alone and
streamed. OSAURUS_TEST_SEEDS says how many answers each schema gets; 5 makes two hundred.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.conftest import SMOLLM
from tests.harness.schemas import SCHEMAS

pytestmark = pytest.mark.smollm

_AT_ONCE = 8
_SEEDS = int(os.environ.get("OSAURUS_TEST_SEEDS", "1"))


@pytest.fixture
async def client(smollm_http: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{smollm_http}/v1", api_key="none", timeout=280) as made:
        yield made


def request(name: str, seed: int) -> dict[str, Any]:
    return {
        "model": SMOLLM,
        "messages": [{"role": "user", "content": f"Give me {name}, number {seed}."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": SCHEMAS[name]},
        },
        # Seed 0 is greedy.
        "temperature": 1.0 if seed else 0.0,
        "seed": seed,
        "max_completion_tokens": 250,
    }


def require_valid(name: str, text: str) -> None:
    schema = SCHEMAS[name]
    if isinstance(schema.get("items"), list):  # an older draft's tuple
        schema = {**schema, "prefixItems": schema["items"], "items": schema["additionalItems"]}
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


@pytest.mark.parametrize("first_seed", range(_SEEDS))
async def test_every_answer_is_valid(client: openai.AsyncOpenAI, first_seed: int) -> None:
    places = asyncio.Semaphore(_AT_ONCE)

    async def ask(name: str, seed: int) -> None:
        async with places:
            completion = await client.chat.completions.create(**request(name, seed))
        (choice,) = completion.choices
        # Of the values here only recursive ones have no bound; cut, they say so.
        if choice.finish_reason == "length":
            assert name in {"tree", "list by itself"}
            return
        assert choice.finish_reason == "stop"
        require_valid(name, choice.message.content or "")

    # The first round is half greedy, half sampled.
    await asyncio.gather(*(ask(name, first_seed + i % 2) for i, name in enumerate(SCHEMAS)))


@pytest.mark.parametrize("name", ["nested", "enum of kinds", "unicode keys", "date-time"])
async def test_streamed_and_alone_it_is_the_same(client: openai.AsyncOpenAI, name: str) -> None:
    text = ""
    stream = await client.chat.completions.create(**request(name, 3), stream=True)
    async for chunk in stream:
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
    completion = await client.chat.completions.create(**request(name, 3))
    assert completion.choices[0].message.content == text
    require_valid(name, text)


class Animal(pydantic.BaseModel):
    kind: Literal["dinosaur", "bird"]
    legs: int = pydantic.Field(ge=0, le=8)
    name: str = pydantic.Field(max_length=12)


class Zoo(pydantic.BaseModel):
    animals: list[Animal] = pydantic.Field(min_length=1, max_length=2)
    open: bool
    curator: Animal | None


async def test_the_clients_parse_gives_objects(client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.parse(
        model=SMOLLM,
        messages=[{"role": "user", "content": "Describe a zoo."}],
        response_format=Zoo,
        max_completion_tokens=200,
        temperature=0.0,
    )
    zoo = completion.choices[0].message.parsed
    assert isinstance(zoo, Zoo)
    assert 1 <= len(zoo.animals) <= 2


async def test_a_schema_that_cannot_be_enforced_is_a_bad_request(client: openai.AsyncOpenAI) -> None:
    asked = request("flat", 0)
    asked["response_format"]["json_schema"]["schema"] = {"properties": {"a": {"uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(**asked)
    assert raised.value.param == "response_format.json_schema.schema"
    assert '"uniqueItems" at #/properties/a/uniqueItems' in raised.value.message
