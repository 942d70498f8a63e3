"""What goes into the engine and what comes out of it. Plain values: no tensors, no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; every field resolved and in range.

    Attributes:
        temperature: 0 is greedy.
        top_p: Mass of the nucleus, in (0, 1]; 1 is off.
        top_k: Tokens kept; 0 is off.
        min_p: Share of the most probable token's probability, in [0, 1]; 0 is off.
        repetition_penalty: Above 0; 1 is off.
        repetition_context: Tokens looked back at, prompt included; -1 is all.
        presence_penalty: Subtracted once from every generated token's logit.
        frequency_penalty: Subtracted from a token's logit for each time it was generated.
        logit_bias: Token id to bias.
        seed: None draws one at random.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None


class Constraint(Protocol):
    """What a sequence may say, token by token; stateful, and owned by one sequence.

    The engine calls it on the MLX thread, once or twice a step, and expects answers in well under a
    millisecond. Whatever a method raises ends that sequence and no other: an OsaurusError reaches the
    client as it is, anything else as an EngineError.
    """

    def accept(self, token_id: int) -> None:
        """A token was generated; one that ends the sequence is given too."""
        ...

    def mask(self) -> npt.NDArray[np.uint32] | None:
        """Which tokens may come next: bit i % 32 of word i // 32 is set where token i may.

        Returns:
            Shape (ceil(vocab_size / 32),), or None where any token may come. Tokens that end the
            sequence are set where it may end here.
        """
        ...

    @property
    def is_done(self) -> bool:
        """Nothing but the end may follow: the engine ends the sequence without another token."""
        ...

    def fork(self) -> Constraint:
        """A copy in the initial state; after a device error the generated tokens are replayed to it."""
        ...


class PromptImages(Protocol):
    """Images in a prompt. What is read in place of their tokens is the model's business.

    Attributes:
        names: The prompt by which KV caches are found: tokens, and for each piece of an image a number
            below 0 that tells it from those of all other images.
        position_delta: What is added to a token's place behind the prompt to give its position.
    """

    @property
    def names(self) -> tuple[int, ...]: ...  # noqa: D102  (said above)

    @property
    def position_delta(self) -> int: ...  # noqa: D102  (said above)

    def inputs(self, model: Any, start: int, names: Sequence[int]) -> tuple[Any, Mapping[str, Any]]:
        """A part of the prompt for a call of the model. On the MLX thread.

        Args:
            model: The model.
            start: Where the part begins.
            names: Its names; behind the prompt, tokens that were generated before.

        Returns:
            Token ids of shape (1, tokens), and what else to call the model with.
        """
        ...


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate.

    Attributes:
        request_id: Unique among live requests; shows in logs.
        model_id: A model that is loaded in the engine.
        prompt: Token ids, at least one.
        max_tokens: Tokens to generate at most, with the prompt within the context; 0 processes the
            prompt only.
        sampling: How tokens are chosen.
        top_logprobs: None computes no log-probabilities; k reports the chosen token's and the k
            most probable tokens'.
        ignore_eos: Generate to max_tokens, whatever the model says.
        constraint: What the answer may be; used by this request alone. A sequence whose constraint is
            done ends, with ignore_eos too.
        stable_prefix_tokens: Tokens at the prompt's beginning that are likely to come again in other
            requests, such as a system prompt and tools; their KV cache is kept longest.
        prompt_logprobs: None scores no prompt; k reports the log-probabilities of the prompt's tokens
            and, at each place, of the k most probable ones. The whole prompt is computed then.
        prompt_field: Where the prompt is in what the client sent, for errors.
        images: Those in the prompt, for a model that takes them; None is none.
    """

    request_id: str
    model_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    top_logprobs: int | None = None
    ignore_eos: bool = False
    constraint: Constraint | None = None
    stable_prefix_tokens: int = 0
    prompt_logprobs: int | None = None
    prompt_field: str = "prompt"
    images: PromptImages | None = None

    @property
    def prompt_names(self) -> tuple[int, ...]:
        """The prompt by which KV caches are found."""
        return self.prompt if self.images is None else self.images.names


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token id with the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token, generated or of the prompt.

    Attributes:
        token_id: Its id.
        logprob: Set where the request asked for log-probabilities; never for a prompt's first token.
        top: The most probable tokens in descending order, as many as were asked for.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


class StopCause(Enum):
    """Why the engine ended a sequence."""

    END_OF_SEQUENCE = "end_of_sequence"
    MAX_TOKENS = "max_tokens"


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    """The request left the queue and has a place in the batch. Always the first event.

    Attributes:
        queue_seconds: How long it waited.
        cached_tokens: Prompt tokens whose KV cache was reused.
    """

    queue_seconds: float
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """Prompt tokens processed so far, of how many."""

    processed: int
    total: int


@dataclass(frozen=True, slots=True)
class PromptScored:
    """More of the prompt's tokens with their log-probabilities, in order, where asked for. Never empty."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class TokensGenerated:
    """New tokens, in order; the end-of-sequence token is never among them. Never empty."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class GenerationFinished:
    """The sequence ended. Always the last event.

    Attributes:
        cause: Why.
        completion_tokens: Tokens generated, the end-of-sequence token not counted.
        prompt_seconds: From admission to the first token.
        decode_seconds: From the first token to the last.
        end_token: The end-of-sequence token, where that ended it.
    """

    cause: StopCause
    completion_tokens: int
    prompt_seconds: float
    decode_seconds: float
    end_token: Token | None = None


EngineEvent: TypeAlias = (
    PrefillStarted | PrefillProgress | PromptScored | TokensGenerated | GenerationFinished
)
