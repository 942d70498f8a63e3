"""Conversations that are too long for their model, cut at the beginning where a request allows it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from osaurus_grpc.v1 import chat_pb2, inference_service_pb2
from rest_shim.responses.conversation import Conversation

Count = Callable[[Conversation], Awaitable[inference_service_pb2.CountTokensResponse]]

_LEADING = (chat_pb2.ROLE_SYSTEM, chat_pb2.ROLE_DEVELOPER)
# Of the context, kept free for the answer where earlier turns have to go: at most this share.
_ANSWER_SHARE = 4
_ANSWER_TOKENS = 256


async def fitted(talk: Conversation, answer_tokens: int | None, count: Count) -> Conversation:
    """The conversation, without its oldest turns where all of them do not fit into the context.

    A turn begins with what the user says, so that no result loses its call. What the developer says at
    the very beginning stays.

    Args:
        talk: The whole conversation.
        answer_tokens: Tokens that the answer may have, or None.
        count: Counts a conversation's tokens.

    Returns:
        The longest rest that fits; all of it where not even the last turn does.
    """
    whole = await count(talk)
    if whole.token_count < whole.context_length:
        return talk
    room = min(answer_tokens or _ANSWER_TOKENS, whole.context_length // _ANSWER_SHARE)
    start = next((place for place, message in enumerate(talk.messages) if message.role not in _LEADING), 0)
    cuts = [
        place
        for place, message in enumerate(talk.messages)
        if place > start and message.role == chat_pb2.ROLE_USER
    ]
    low, high = 0, len(cuts)
    while low < high:
        middle = (low + high) // 2
        counted = await count(talk.without(start, cuts[middle]))
        if counted.token_count + room <= counted.context_length:
            high = middle
        else:
            low = middle + 1
    return talk if low == len(cuts) else talk.without(start, cuts[low])
