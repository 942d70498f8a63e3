"""Tool calls over gRPC, from a model with random weights: only decoding can make them come out right."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import jsonschema
import pytest

from osaurus_grpc.engine.types import EngineEvent, TokensGenerated
from osaurus_grpc.server.app import Core
from osaurus_grpc.v1 import chat_pb2, sampling_pb2
from tests.server.cores import chat_request, failure, stream_request

pytestmark = pytest.mark.asyncio(loop_scope="session")

SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
        "alert": {"type": "boolean"},
    },
    "required": ["unit", "days", "alert"],
    "additionalProperties": False,
}
FUNCTION = chat_pb2.TOOL_CHOICE_MODE_FUNCTION
REQUIRED = chat_pb2.TOOL_CHOICE_MODE_REQUIRED


def request(mode: chat_pb2.ToolChoiceMode.ValueType, *, schema: object = SCHEMA, **sampling: Any) -> Any:
    chat = chat_request("Weather?", **{"max_tokens": 400, "seed": 7, **sampling})
    chat.tools.add(function=chat_pb2.FunctionTool(name="weather", parameters_json=json.dumps(schema)))
    chat.tools.add(function=chat_pb2.FunctionTool(name="ping"))
    chat.tool_choice.mode = mode
    if mode == FUNCTION:
        chat.tool_choice.function_name = "weather"
    return chat


def require_calls(choice: chat_pb2.ChatChoice) -> None:
    assert choice.finish_reason == sampling_pb2.FINISH_REASON_TOOL_CALLS
    assert not "".join(part.text for part in choice.message.content)
    assert choice.message.tool_calls
    for call in choice.message.tool_calls:
        assert len(call.id) == 29
        assert call.id.startswith("call_")
        schema = SCHEMA if call.function.name == "weather" else {"type": "object", "maxProperties": 0}
        jsonschema.validate(json.loads(call.function.arguments_json), schema)


async def test_a_named_function_is_called_once(inference: Any) -> None:
    answer = await inference.Chat(request(FUNCTION))

    require_calls(answer.choices[0])
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["weather"]


async def test_exactly_one_call_where_parallel_ones_are_off(inference: Any) -> None:
    chat = request(REQUIRED)
    chat.parallel_tool_calls = False
    answers = await asyncio.gather(*(inference.Chat(chat) for _ in range(4)))

    for answer in answers:
        require_calls(answer.choices[0])
        assert len(answer.choices[0].message.tool_calls) == 1


async def test_a_stream_says_what_the_whole_answer_says(
    core: Core, inference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = core.engine.generate

    async def one_by_one(*asked: Any) -> AsyncIterator[EngineEvent]:
        """Tokens that arrived together come as one event, which a busy loop makes of them all."""
        async with aclosing(generate(*asked)) as events:
            async for event in events:
                if isinstance(event, TokensGenerated):
                    for token in event.tokens:
                        yield TokensGenerated((token,))
                else:
                    yield event

    monkeypatch.setattr(core.engine, "generate", one_by_one)
    chat = request(FUNCTION)
    (whole,) = (await inference.Chat(chat)).choices[0].message.tool_calls

    events = [event async for event in inference.ChatStream(stream_request(chat))]

    deltas = [event.tool_call for event in events if event.WhichOneof("event") == "tool_call"]
    assert (deltas[0].name, deltas[0].arguments_json) == ("weather", "")
    assert deltas[0].id.startswith("call_")
    assert not any(delta.id or delta.name for delta in deltas[1:])
    assert len(deltas) > 3
    assert "".join(delta.arguments_json for delta in deltas) == whole.function.arguments_json
    (finished,) = [e.choice_finished for e in events if e.WhichOneof("event") == "choice_finished"]
    assert finished.finish_reason == sampling_pb2.FINISH_REASON_TOOL_CALLS


async def test_calls_share_a_batch_with_free_answers(inference: Any) -> None:
    free = chat_request("Hello", max_tokens=40, seed=3)
    alone = await inference.Chat(free)

    answers = await asyncio.gather(
        *(inference.Chat(request(FUNCTION, seed=seed)) for seed in range(4)),
        *(inference.Chat(free) for _ in range(4)),
    )

    for answer in answers[:4]:
        require_calls(answer.choices[0])
    for answer in answers[4:]:
        assert answer.choices[0].message == alone.choices[0].message


@pytest.mark.parametrize("max_tokens", [1, 2, 4, 8, 18])
async def test_a_call_that_is_cut_off_says_so(inference: Any, max_tokens: int) -> None:
    """What came of its name and its marks is no text of the answer's."""
    (choice,) = (await inference.Chat(request(FUNCTION, max_tokens=max_tokens, top_logprobs=0))).choices

    assert choice.finish_reason == sampling_pb2.FINISH_REASON_LENGTH
    assert not "".join(part.text for part in choice.message.content)
    assert not choice.logprobs.tokens


async def test_log_probabilities_are_those_of_the_content(inference: Any) -> None:
    """And there is none where there are calls only; the marks behind the last one are no content."""
    chat = request(FUNCTION, top_logprobs=0)
    (choice,) = (await inference.Chat(chat)).choices
    require_calls(choice)
    assert choice.HasField("logprobs")
    assert not choice.logprobs.tokens
    events = [event async for event in inference.ChatStream(stream_request(chat))]
    assert not any(event.content.logprobs for event in events)


async def test_a_schema_that_cannot_be_enforced_is_named(inference: Any) -> None:
    chat = request(REQUIRED, schema={"type": "object", "properties": {"a": {"type": "nonsense"}}})
    error = await failure(inference.Chat(chat))

    assert error.fields == ["tools[0].function.parameters_json"]
    chat.tool_choice.mode = chat_pb2.TOOL_CHOICE_MODE_AUTO
    assert (await inference.Chat(chat)).choices


@pytest.mark.parametrize("content", ["12 C", ""])
async def test_results_are_part_of_the_prompt(inference: Any, content: str) -> None:
    def conversation(result: str, call_id: str) -> chat_pb2.ChatRequest:
        chat: chat_pb2.ChatRequest = request(chat_pb2.TOOL_CHOICE_MODE_AUTO, max_tokens=1)
        call = chat_pb2.ToolCall(id="call_1", function=chat_pb2.FunctionCall(name="ping"))
        chat.messages.add(role=chat_pb2.ROLE_ASSISTANT, tool_calls=[call])
        text = chat_pb2.ContentPart(text=result)
        chat.messages.add(role=chat_pb2.ROLE_TOOL, tool_call_id=call_id, content=[text])
        return chat

    short = await inference.Chat(conversation(content, "call_1"))
    longer = await inference.Chat(conversation(content + " and rain in the whole country", ""))

    assert longer.usage.prompt_tokens >= short.usage.prompt_tokens + 6
