"""Pydantic AI: a typed result, a tool and a stream, by chat completions and by Anthropic's API."""

from __future__ import annotations

import enum
import os

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

CHAT, SERVER = os.environ["CHAT_MODEL"], os.environ["SERVER_URL"]
QUESTION = "What is the capital of France?"
SETTINGS = ModelSettings(temperature=0, max_tokens=64, parallel_tool_calls=False)


class City(enum.StrEnum):
    PARIS = "Paris"
    OSLO = "Oslo"


class Forecast(BaseModel):
    city: City
    warm: bool


def openai_provider():
    return OpenAIProvider(base_url=f"{SERVER}/v1", api_key="none")


@pytest.fixture(params=["chat", "responses", "anthropic"])
def model(request):
    if request.param == "chat":
        return OpenAIChatModel(CHAT, provider=openai_provider())
    if request.param == "responses":
        return OpenAIResponsesModel(CHAT, provider=openai_provider())
    return AnthropicModel(CHAT, provider=AnthropicProvider(base_url=SERVER, api_key="none"))


async def test_text(model):
    found = await Agent(model, model_settings=SETTINGS).run(QUESTION)
    assert "Paris" in found.output
    assert found.usage.output_tokens > 0


async def test_stream(model):
    async with Agent(model, model_settings=SETTINGS).run_stream(QUESTION) as streamed:
        text = "".join([delta async for delta in streamed.stream_text(delta=True)])
    assert "Paris" in text


async def test_a_typed_result_by_a_tool(model):
    agent = Agent(model, output_type=ToolOutput(Forecast), model_settings=SETTINGS)
    assert isinstance((await agent.run(QUESTION)).output, Forecast)


async def test_a_typed_result_by_a_schema():
    model = OpenAIChatModel(CHAT, provider=openai_provider())
    agent = Agent(model, output_type=NativeOutput(Forecast), model_settings=SETTINGS)
    assert isinstance((await agent.run(QUESTION)).output, Forecast)
