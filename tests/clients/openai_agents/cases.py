"""OpenAI's Agents SDK on the Responses API and on chat completions: a tool is called, its result answered."""

from __future__ import annotations

import os
from typing import Literal

import agents
import openai
import pytest

agents.set_tracing_disabled(True)


@pytest.mark.parametrize("kind", [agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel])
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_agent_with_a_tool(kind, streamed):
    called = []

    @agents.function_tool
    def get_weather(city: Literal["Paris", "Oslo"]) -> str:
        """The weather of a city."""
        called.append(city)
        return "11 degrees"

    client = openai.AsyncOpenAI(base_url=os.environ["SERVER_URL"] + "/v1", api_key="none", max_retries=0)
    agent = agents.Agent(
        name="Weatherman",
        instructions="Answer briefly.",
        model=kind(os.environ["CHAT_MODEL"], client),
        tools=[get_weather],
        # The choice is reset after the first call, so the second turn is an answer.
        model_settings=agents.ModelSettings(
            temperature=0, max_tokens=64, tool_choice="required", parallel_tool_calls=False
        ),
        tool_use_behavior="stop_on_first_tool",
    )
    if streamed:
        result = agents.Runner.run_streamed(agent, "How warm is it in Oslo?", max_turns=3)
        async for _ in result.stream_events():
            pass
    else:
        result = await agents.Runner.run(agent, "How warm is it in Oslo?", max_turns=3)
    assert called[0] in {"Paris", "Oslo"}
    assert result.final_output == "11 degrees"
