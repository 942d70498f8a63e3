"""What answers continue, and raw prompts; those of conversations are made in conversation.py."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, TypeAlias

from osaurus_grpc.chat import raw
from osaurus_grpc.chat.length import fewest_tokens
from osaurus_grpc.engine.types import PromptImages
from osaurus_grpc.errors import ContextLengthError, InvalidRequestError
from osaurus_grpc.models.residency import LoadedModel
from osaurus_grpc.v1 import chat_pb2, completion_pb2

# The fields that both are read for have the same names in both.
Request: TypeAlias = chat_pb2.ChatRequest | completion_pb2.CompleteRequest

# Of a prompt's tokens and the most probable ones beside them: what one message holds without difficulty.
MAX_PROMPT_LOGPROBS: Final = 2**20

# Below this, tokenizing takes about as long as handing it to a thread and back.
_SHORT_PROMPT_CHARACTERS: Final = 4_096


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an answer continues.

    Attributes:
        token_ids: At least one.
        is_continued: The answer goes on with the prompt's last text, in place of beginning a turn.
        echo: Text to repeat before each answer.
        end_tokens: Token ids that end an answer beside the model's own.
        stable_tokens: At the beginning, those of system messages and tools.
        images: Those among the tokens; None is none.
    """

    token_ids: tuple[int, ...]
    is_continued: bool = False
    echo: str = ""
    end_tokens: frozenset[int] = frozenset()
    stable_tokens: int = 0
    images: PromptImages | None = None


def context_limit(request: Request, context_length: int) -> int:
    """Tokens of prompt and answer at most: the model's context, or less where the request says so."""
    if request.HasField("max_context_tokens"):
        return min(context_length, request.max_context_tokens)
    return context_length


def least_answer(request: Request) -> int:
    """Tokens of an answer for which there must be room: 1, or 0 where none is to be generated."""
    sampling = request.sampling
    return 0 if sampling.HasField("max_tokens") and sampling.max_tokens == 0 else 1


def prompt_field(request: Request) -> str:
    """The field that a request's prompt is in."""
    return "messages" if isinstance(request, chat_pb2.ChatRequest) else "prompt"


def require_fit(request: Request, model: LoadedModel, text: str) -> None:
    """Refuse a text that is longer than any that fits, before it is tokenized.

    Raises:
        ContextLengthError: The prompt leaves no room for an answer, whatever its tokens are.
    """
    limit = context_limit(request, model.context_length)
    fewest = fewest_tokens(model.tokenizer, text)
    if fewest + least_answer(request) > limit:
        raise ContextLengthError(
            limit=limit, prompt_tokens=fewest, field=prompt_field(request), is_estimate=True
        )


async def completion_prompt(request: completion_pb2.CompleteRequest, model: LoadedModel) -> Prompt:
    """A text or tokens as they are, or a text with a gap in it where the request has a suffix.

    A long text is tokenized in a thread.

    Raises:
        InvalidRequestError: There is nothing to continue, or more than can fit or be scored.
        CapabilityError: The model cannot fill in the middle.
    """
    tokenizer = model.tokenizer

    def work() -> Prompt:
        if request.WhichOneof("prompt") == "tokens":
            token_ids = tuple(request.tokens.token_ids)
            limit = context_limit(request, model.context_length)
            if len(token_ids) + least_answer(request) > limit:
                raise ContextLengthError(limit=limit, prompt_tokens=len(token_ids), field="prompt")
            echo = raw.decode(tokenizer, token_ids) if request.echo else ""
            return Prompt(token_ids, is_continued=True, echo=echo)
        for text in (request.text, request.suffix):
            require_fit(request, model, text)
        echo = request.text if request.echo else ""
        if request.suffix:
            gap = raw.encode_gap(tokenizer, request.text, request.suffix)
            return Prompt(gap.token_ids, is_continued=True, echo=echo, end_tokens=gap.end_tokens)
        return Prompt(raw.encode(tokenizer, request.text), is_continued=True, echo=echo)

    size = len(request.text) + len(request.suffix) + len(request.tokens.token_ids)
    is_short = size < _SHORT_PROMPT_CHARACTERS
    prompt = work() if is_short else await asyncio.to_thread(work)
    if request.HasField("prompt_logprobs"):
        _require_scorable(prompt, request.prompt_logprobs)
    return prompt


def _require_scorable(prompt: Prompt, count: int) -> None:
    most = MAX_PROMPT_LOGPROBS // (1 + count)
    if len(prompt.token_ids) > most:
        raise InvalidRequestError(
            f"prompt_logprobs: with {count} alternatives a prompt of at most {most} tokens can be scored; "
            f"this one has {len(prompt.token_ids)}.",
            field="prompt_logprobs",
        )
