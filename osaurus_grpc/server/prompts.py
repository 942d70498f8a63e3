"""What answers continue, and raw prompts; those of conversations are made in conversation.py."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from osaurus_grpc.chat import raw
from osaurus_grpc.models.residency import LoadedModel
from osaurus_grpc.v1 import completion_pb2

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
    """

    token_ids: tuple[int, ...]
    is_continued: bool = False
    echo: str = ""
    end_tokens: frozenset[int] = frozenset()


async def completion_prompt(request: completion_pb2.CompleteRequest, model: LoadedModel) -> Prompt:
    """A text or tokens as they are, or a text with a gap in it where the request has a suffix.

    A long text is tokenized in a thread.

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
