"""Validated requests to prompts of tokens, long ones in a thread."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from osaurus_grpc.chat import raw
from osaurus_grpc.chat.template import is_continuation, render
from osaurus_grpc.models.residency import LoadedModel
from osaurus_grpc.server.convert import message_from_proto, template_arguments
from osaurus_grpc.v1 import chat_pb2, completion_pb2

# Below this, rendering takes about as long as handing it to a thread and back.
_SHORT_PROMPT_CHARACTERS: Final = 4_096


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an answer continues.

    Attributes:
        token_ids: At least one.
        is_continued: The answer goes on with the prompt's last text, in place of beginning a turn.
        echo: Text to repeat before each answer.
        end_tokens: Token ids that end an answer beside the model's own.
    """

    token_ids: tuple[int, ...]
    is_continued: bool = False
    echo: str = ""
    end_tokens: frozenset[int] = frozenset()


async def chat_prompt(request: chat_pb2.ChatRequest, model: LoadedModel) -> Prompt:
    """A conversation, rendered, behind the tokens that the request puts before it.

    Raises:
        InvalidRequestError: The model's template refuses the conversation.
        CapabilityError: The model has no chat template.
    """
    messages = [message_from_proto(message) for message in request.messages]
    arguments = template_arguments(request)
    enabled = request.reasoning_enabled if request.HasField("reasoning_enabled") else None
    tokenizer = model.tokenizer
    context = tuple(request.context_token_ids)

    def work() -> Prompt:
        token_ids = render(
            tokenizer,
            messages,
            template_arguments=arguments,
            reasoning_effort=request.reasoning_effort,
            reasoning_enabled=enabled,
        )
        if context:
            token_ids = raw.without_beginning(tokenizer, token_ids)
        return Prompt((*context, *token_ids), is_continued=is_continuation(messages))

    is_short = sum(len(message.content) for message in messages) < _SHORT_PROMPT_CHARACTERS
    return work() if is_short else await asyncio.to_thread(work)


async def completion_prompt(request: completion_pb2.CompleteRequest, model: LoadedModel) -> Prompt:
    """A text or tokens as they are, or a text with a gap in it where the request has a suffix.

    Raises:
        InvalidRequestError: There is nothing to continue.
        CapabilityError: The model cannot fill in the middle.
    """
    tokenizer = model.tokenizer

    def work() -> Prompt:
        if request.WhichOneof("prompt") == "tokens":
            token_ids = tuple(request.tokens.token_ids)
            echo = raw.decode(tokenizer, token_ids) if request.echo else ""
            return Prompt(token_ids, is_continued=True, echo=echo)
        echo = request.text if request.echo else ""
        if request.suffix:
            gap = raw.encode_gap(tokenizer, request.text, request.suffix)
            return Prompt(gap.token_ids, is_continued=True, echo=echo, end_tokens=gap.end_tokens)
        return Prompt(raw.encode(tokenizer, request.text), is_continued=True, echo=echo)

    is_short = len(request.text) + len(request.suffix) < _SHORT_PROMPT_CHARACTERS
    return work() if is_short else await asyncio.to_thread(work)
