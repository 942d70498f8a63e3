"""Structured answers of the real small model, by OpenAI's client: it could not write one by itself.

Forty schemas, streamed and whole, in batches of eight and alone: tests/harness/ways.py.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest

from tests.conftest import SMOLLM
from tests.harness.schemas import ONE_HALF, SCHEMAS, validate
from tests.harness.ways import ENDING_BIAS, IS_EVERYDAY, SEEDS, UNBOUNDED, Answer, Asking, require_agreement

pytestmark = pytest.mark.smollm

_NAMES = ONE_HALF if IS_EVERYDAY else list(SCHEMAS)
# A few of different kinds.
_ALONE = _NAMES[::5]


@pytest.fixture
async def client(smollm_http: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{smollm_http}/v1", api_key="none", timeout=600) as made:
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
        "logit_bias": ENDING_BIAS if name in UNBOUNDED else {},
    }


def require_valid(name: str, text: str) -> None:
    validate(text, SCHEMAS[name])


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("first_seed", range(SEEDS))
async def test_every_answer_is_valid_and_the_same_in_every_way(
    client: openai.AsyncOpenAI, first_seed: int
) -> None:
    async def ask(asking: Asking) -> Answer:
        asked = request(asking.name, asking.seed)
        text, reason = "", None
        if asking.is_streamed:
            async for chunk in await client.chat.completions.create(**asked, stream=True):
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    reason = choice.finish_reason or reason
        else:
            (whole,) = (await client.chat.completions.create(**asked)).choices
            text, reason = whole.message.content or "", whole.finish_reason
        assert reason in ("stop", "length")
        return Answer(text, is_cut=reason == "length")

    await require_agreement(ask, require_valid, _NAMES, _ALONE, first_seed)


class Animal(pydantic.BaseModel):
    kind: Literal["dinosaur", "bird"]
    legs: int = pydantic.Field(ge=0, le=8)
    name: str = pydantic.Field(max_length=12)


class Weight(enum.StrEnum):
    LIGHT = "light"
    HEAVY = "heavy"


class Cage(pydantic.BaseModel):
    weight: Weight
    inner: Cage | None


class Zoo(pydantic.BaseModel):
    animals: list[Animal] = pydantic.Field(min_length=1, max_length=2)
    open: bool
    curator: Animal | None
    visitors: Annotated[int, pydantic.Field(ge=0, le=99)] | Literal["none", "many"]
    cage: Cage


async def test_the_clients_helpers_give_objects(client: openai.AsyncOpenAI) -> None:
    # A recursive value has no bound but the model's taste: the bias ends it.
    nulls = {"18220": 30, "10034": 30}  # "null" and " null"
    asked: Any = {
        "model": SMOLLM,
        "messages": [{"role": "user", "content": "Describe a zoo."}],
        "response_format": Zoo,
        "max_completion_tokens": 250,
        "temperature": 0.0,
        "logit_bias": nulls,
    }
    async with client.chat.completions.stream(**asked) as stream:
        parts = [event.delta async for event in stream if event.type == "content.delta"]
        streamed = (await stream.get_final_completion()).choices[0].message
    whole = (await client.chat.completions.parse(**asked)).choices[0].message
    assert isinstance(whole.parsed, Zoo)
    assert 1 <= len(whole.parsed.animals) <= 2
    assert streamed.parsed == whole.parsed
    assert "".join(parts) == whole.content


async def test_a_schema_that_cannot_be_enforced_is_a_bad_request(client: openai.AsyncOpenAI) -> None:
    asked = request("flat", 0)
    asked["response_format"]["json_schema"]["schema"] = {"properties": {"a": {"uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(**asked)
    assert raised.value.param == "response_format.json_schema.schema"
    assert '"uniqueItems" at #/properties/a/uniqueItems' in raised.value.message
