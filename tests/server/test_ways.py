"""Constrained answers and calls over gRPC, token for token the same streamed and whole, alone and beside.

As tests/contract has it with a real model and over HTTP: see tests/harness/ways.py. The model's weights
are random, so many answers cost little.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from osaurus_grpc.server.fold import ChatFold
from osaurus_grpc.v1 import chat_pb2, sampling_pb2
from tests.contract.test_structured_output import require_valid as require_valid_answer
from tests.contract.test_tool_calls import arguments_schema
from tests.harness.schemas import SCHEMAS, validate
from tests.harness.ways import SEEDS, UNBOUNDED, Answer, Asking, require_agreement
from tests.server.cores import chat_request, stream_request

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(1_200)]

_LENGTH = sampling_pb2.FINISH_REASON_LENGTH
# In the everyday run some; tests/chat and tests/contract ask for all of them.
_STEP = 1 if SEEDS > 1 else 5


def asked(asking: Asking) -> chat_pb2.ChatRequest:
    request = chat_request(
        f"Store {asking.name}, number {asking.seed}.",
        temperature=1.0 if asking.seed else 0.0,
        seed=asking.seed,
        max_tokens=400,
    )
    request.include_token_ids = True
    return request


async def choice_of(inference: Any, request: chat_pb2.ChatRequest, *, is_streamed: bool) -> Any:
    if not is_streamed:
        return (await inference.Chat(request)).choices[0]
    fold = ChatFold()
    async for event in inference.ChatStream(stream_request(request)):
        fold.feed(event)
    return fold.response().choices[0]


def answer(text: str, choice: chat_pb2.ChatChoice) -> Answer:
    # The tokens are compared with the text.
    return Answer(text, choice.finish_reason == _LENGTH, tuple(choice.token_ids))


@pytest.mark.parametrize("first_seed", range(SEEDS))
async def test_answers_are_the_same_in_every_way(inference: Any, first_seed: int) -> None:
    async def ask(asking: Asking) -> Answer:
        request = asked(asking)
        form = request.response_format.json_schema
        form.name, form.schema_json, form.strict = "n", json.dumps(SCHEMAS[asking.name]), True
        choice = await choice_of(inference, request, is_streamed=asking.is_streamed)
        return answer("".join(part.text for part in choice.message.content), choice)

    names, alone = list(SCHEMAS)[::_STEP], ["flat", "date"]
    await require_agreement(ask, require_valid_answer, names, alone, first_seed, may_be_cut=UNBOUNDED)


@pytest.mark.parametrize("first_seed", range(SEEDS))
async def test_forced_calls_are_the_same_in_every_way(inference: Any, first_seed: int) -> None:
    async def ask(asking: Asking) -> Answer:
        request = asked(asking)
        parameters = json.dumps(arguments_schema(asking.name))
        request.tools.add(function=chat_pb2.FunctionTool(name="store", parameters_json=parameters))
        request.tool_choice.mode = chat_pb2.TOOL_CHOICE_MODE_FUNCTION
        request.tool_choice.function_name = "store"
        choice = await choice_of(inference, request, is_streamed=asking.is_streamed)
        calls = choice.message.tool_calls
        assert [call.function.name for call in calls] == ["store"] or choice.finish_reason == _LENGTH
        return answer("".join(call.function.arguments_json for call in calls), choice)

    def require_valid_call(name: str, arguments: str) -> None:
        validate(arguments, arguments_schema(name))

    await require_agreement(
        ask, require_valid_call, list(SCHEMAS)[::_STEP], ["flat"], first_seed, may_be_cut=UNBOUNDED
    )
