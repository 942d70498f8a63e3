"""Token ids out of a chat and into the next one."""

from __future__ import annotations

from typing import Any

import pytest

from osaurus_grpc.server.fold import ChatFold
from osaurus_grpc.v1 import inference_service_pb2
from tests.server.cores import chat_request, stream_request, text_of

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_the_prompts_and_the_answers_tokens(inference: Any) -> None:
    chat = chat_request(temperature=1.0, seed=8)
    chat.choice_count = 2
    plain = await inference.Chat(chat)
    chat.include_token_ids = True

    response = await inference.Chat(chat)

    assert not plain.prompt_token_ids
    assert not any(choice.token_ids for choice in plain.choices)
    assert len(response.prompt_token_ids) == response.usage.prompt_tokens
    assert [len(choice.token_ids) for choice in response.choices] == [8, 8]
    assert response.choices[0].token_ids != response.choices[1].token_ids
    fold = ChatFold()
    async for event in inference.ChatStream(stream_request(chat)):
        fold.feed(event)
    assert fold.response().choices == response.choices
    assert fold.response().prompt_token_ids == response.prompt_token_ids


async def test_context_stands_before_the_conversation(inference: Any) -> None:
    chat = chat_request("One")
    chat.include_token_ids = True
    first = await inference.Chat(chat)
    following = chat_request("Two")
    following.include_token_ids = True
    alone = await inference.Chat(following)
    context = [*first.prompt_token_ids, *first.choices[0].token_ids]
    following.context_token_ids.extend(context)

    second = await inference.Chat(following)

    # SmolLM2's beginning-of-sequence token begins every turn, so it stays.
    assert list(second.prompt_token_ids) == [*context, *alone.prompt_token_ids]
    assert second.usage.prompt_tokens == len(context) + len(alone.prompt_token_ids)
    assert text_of(second) != text_of(alone)
    counted = await inference.CountTokens(inference_service_pb2.CountTokensRequest(chat=following))
    assert counted.token_count == second.usage.prompt_tokens
