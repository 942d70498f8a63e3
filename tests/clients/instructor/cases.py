"""Instructor: typed answers by tools and by schemas."""

from __future__ import annotations

import enum
import os

import instructor
import openai
import pytest
from pydantic import BaseModel


class City(enum.StrEnum):
    PARIS = "Paris"
    OSLO = "Oslo"


class Forecast(BaseModel):
    city: City
    warm: bool


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA], ids=str)
def test_a_typed_answer(mode):
    raw = openai.OpenAI(base_url=os.environ["SERVER_URL"] + "/v1", api_key="none", max_retries=0)
    client = instructor.from_openai(raw, mode=mode)
    found = client.chat.completions.create(
        model=os.environ["CHAT_MODEL"],
        messages=[{"role": "user", "content": "Is it warm in Oslo?"}],
        response_model=Forecast,
        max_retries=0,
        temperature=0,
        max_tokens=64,
    )
    assert isinstance(found, Forecast)
