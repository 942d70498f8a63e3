"""One request's state on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from osaurus_grpc.engine.token_chain import Chain
from osaurus_grpc.engine.types import (
    EngineEvent,
    GenerationFinished,
    GenerationRequest,
    StopCause,
    Token,
    TokensGenerated,
)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request with what was generated for it. Owned by the MLX thread once submitted.

    Attributes:
        request: What was asked.
        seed: The resolved seed.
        chain: Names of its tokens, by which others that begin alike are found.
        generated: Token ids so far; the truth after an error, when the batch's own lists are not.
        uid: Its row in the batch; None while it waits.
        cached_tokens: Prompt tokens whose KV cache was found and not computed.
        prefilled: Prompt tokens processed since it has that row.
        is_decoding: Its prompt is processed.
        strikes: Device errors that happened while this sequence was on trial.
        kept_tokens: Of its prompt, those that others can find already.
        is_awaited: Others wait for its prompt to be processed.
        awaited: The sequence whose prompt it waits for.
        vain_waits: Times that waiting for another's prefill came to nothing.
        passed: Later sequences that were let in before it for want of memory.
        preemptions: Times it gave its row back for want of memory.
        scored_tokens: Prompt tokens whose log-probabilities were told.
    """

    request: GenerationRequest
    seed: int
    submitted_at: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    chain: Chain = field(default_factory=Chain)
    generated: list[int] = field(default_factory=list)
    uid: int | None = None
    cached_tokens: int = 0
    prefilled: int = 0
    is_decoding: bool = False
    strikes: int = 0
    kept_tokens: int = 0
    is_awaited: bool = False
    awaited: Sequence | None = None
    vain_waits: int = 0
    passed: int = 0
    preemptions: int = 0
    scored_tokens: int = 0

    @property
    def prefill_tokens(self) -> SequenceOf[int]:
        """What must be in the KV cache before the next token: the answer too, once it lost its row.

        Pieces of images are there by their names.
        """
        prompt = self.request.prompt_names
        return [*prompt, *self.generated] if self.generated else prompt

    @property
    def is_scored(self) -> bool:
        """Whether its prompt's log-probabilities are still to be told: all of the prompt is computed then."""
        return self.request.prompt_logprobs is not None and self.scored_tokens < len(self.request.prompt)

    @property
    def total_tokens(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.request.prompt) + len(self.generated)

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that must be computed."""
        return len(self.request.prompt) + len(self.generated) - self.cached_tokens

    @property
    def unprocessed_tokens(self) -> int:
        """Prompt tokens that are still to be computed, once it has a row."""
        return len(self.request.prompt) + len(self.generated) - self.prefilled

    @property
    def tokens_left(self) -> int:
        """Tokens it may still generate."""
        return self.request.max_tokens - len(self.generated)

    def record(self, token: Token | None, end: str | None, now: float) -> list[EngineEvent]:
        """Note what a step gave this sequence and say it as events.

        Args:
            token: The new token, or None where there is none.
            end: None, "end_token", "stop" or "length", as batch.Decoded has them.
            now: The step's time, monotonic seconds.
        """
        events: list[EngineEvent] = []
        if not self.first_token_at:
            self.first_token_at = now
        self.last_token_at = now
        end_token = None
        if end == "end_token":
            token, end_token = None, token
        if token is not None:
            self.generated.append(token.token_id)
            events.append(TokensGenerated((token,)))
        if end is not None:
            events.append(
                GenerationFinished(
                    cause=StopCause.MAX_TOKENS if end == "length" else StopCause.END_OF_SEQUENCE,
                    completion_tokens=len(self.generated),
                    prompt_seconds=self.first_token_at - self.admitted_at,
                    decode_seconds=now - self.first_token_at,
                    end_token=end_token,
                )
            )
        return events
