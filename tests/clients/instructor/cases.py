"""Instructor: typed answers by tools and by schemas, whole, growing and one after the other."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from typing import Literal

import instructor
import openai
import pytest
from pydantic import BaseModel

MODES = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]


class City(enum.StrEnum):
    PARIS = "Paris"
    OSLO = "Oslo"


class Forecast(BaseModel):
    city: City
    warm: bool


class Growing(BaseModel):
    """Without an enumeration: the library does not make one of a text that is not yet whole."""

    city: Literal["Paris", "Oslo"]
    warm: bool


ASKED = {
    "model": os.environ["CHAT_MODEL"],
    "messages": [{"role": "user", "content": "Is it warm in Oslo?"}],
    "max_retries": 0,
    "temperature": 0,
    "max_tokens": 64,
}


@pytest.fixture(params=MODES, ids=str)
def client(request: pytest.FixtureRequest) -> Iterator[instructor.Instructor]:
    with openai.OpenAI(base_url=os.environ["SERVER_URL"] + "/v1", api_key="none", max_retries=0) as raw:
        yield instructor.from_openai(raw, mode=request.param)


def test_a_typed_answer(client):
    found = client.chat.completions.create(response_model=Forecast, **ASKED)
    assert isinstance(found, Forecast)


def test_a_typed_answer_while_it_grows(client):
    states = list(client.chat.completions.create_partial(response_model=Growing, **ASKED))
    assert len(states) > 1
    last = states[-1].model_dump()
    assert Growing.model_validate(last)
    # What was there once stays; texts grow.
    for state in states:
        for name, value in state.model_dump().items():
            assert value is None or value == last[name] or str(last[name]).startswith(value)


@pytest.mark.parametrize("client", [mode for mode in MODES if mode.name.startswith("TOOLS")], indirect=True)
def test_typed_answers_one_after_the_other(client):
    found = list(
        client.chat.completions.create_iterable(response_model=Forecast, **ASKED | {"max_tokens": 200})
    )
    assert all(isinstance(one, Forecast) for one in found)
