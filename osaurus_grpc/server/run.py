"""One admitted request: its answers, from the first engine event to the last.

What was asked, a conversation or a text, is a prompt of tokens by now; the events are those of
ChatStreamResponse, and CompleteStream's are made from them at the door.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, assert_never

from osaurus_grpc.chat.detokenize import token_bytes
from osaurus_grpc.engine.arrivals import Arrival
from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.types import (
    EngineEvent,
    GenerationFinished,
    GenerationRequest,
    PrefillProgress,
    PrefillStarted,
    PromptScored,
    SamplingParams,
    Token,
    TokensGenerated,
)
from osaurus_grpc.errors import ContextLengthError
from osaurus_grpc.models.residency import LoadedModel
from osaurus_grpc.server.answering import Answering
from osaurus_grpc.server.calls import Call
from osaurus_grpc.server.choice import Choice
from osaurus_grpc.server.convert import (
    DEFAULT_MAX_TOKENS,
    RunEvent,
    measured_duration,
    prompt_logprobs_to_proto,
    sampling_from_proto,
)
from osaurus_grpc.server.merge import merged
from osaurus_grpc.server.prompts import Prompt, Request, context_limit, least_answer, prompt_field
from osaurus_grpc.telemetry import Telemetry
from osaurus_grpc.v1 import chat_pb2, completion_pb2, sampling_pb2, usage_pb2

_SEED_BITS: Final = 64
# Enough for a tokenizer to tell how a token continues a text.
_CONTINUED_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class OutputBudget:
    """How many tokens an answer may have, and why it ends there.

    Attributes:
        max_tokens: At least 1, or 0 where none is asked for.
        reason: LENGTH, or CONTEXT_LENGTH where the context and not the request set the limit.
    """

    max_tokens: int
    reason: sampling_pb2.FinishReason.ValueType


def output_budget(
    request: Request, *, prompt_tokens: int, context_length: int, max_output_tokens: int
) -> OutputBudget:
    """The budget of each of a validated request's answers.

    Args:
        request: Its max_tokens and max_context_tokens count.
        prompt_tokens: Tokens of the prompt.
        context_length: The model's, in tokens.
        max_output_tokens: The server's cap; 0 is none.

    Raises:
        ContextLengthError: The prompt leaves no room for an answer.
    """
    limit = context_limit(request, context_length)
    room = limit - prompt_tokens
    if room < least_answer(request):
        raise ContextLengthError(limit=limit, prompt_tokens=prompt_tokens, field=prompt_field(request))
    sampling = request.sampling
    wanted = sampling.max_tokens if sampling.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    if max_output_tokens:
        wanted = min(wanted, max_output_tokens)
    if wanted > room:
        return OutputBudget(room, sampling_pb2.FINISH_REASON_CONTEXT_LENGTH)
    return OutputBudget(wanted, sampling_pb2.FINISH_REASON_LENGTH)


def choice_count(request: Request) -> int:
    """Answers that a validated request wants."""
    return request.choice_count if request.HasField("choice_count") else 1


class Run:
    """A request's choices as one stream of events, in the grammar of ChatStreamResponse.

    Log-probabilities of a prompt come right after the first event.

    Args:
        call: Gets the tokens counted.
        request: What was asked, validated; only what chat and completion share is read.
        model: Leased for as long as this runs.
        prompt: What the answers continue.
        answering: How they are held to form and read.
        budget: How long they may be.
        load_seconds: What the request waited for its model to load; 0.0 where it was loaded.
        wants_progress: Report how far the prompt is processed.
        arrival: Announces it to the engine.

    Attributes:
        choices: The answers, in the order of their index.
    """

    def __init__(
        self,
        call: Call,
        request: Request,
        model: LoadedModel,
        prompt: Prompt,
        *,
        answering: Answering,
        budget: OutputBudget,
        load_seconds: float,
        wants_progress: bool,
        arrival: Arrival | None = None,
    ) -> None:
        sampling = request.sampling
        self._call = call
        self._model = model
        self._prompt = prompt
        self._budget = budget
        self._constraint = answering.constraint
        self._load_seconds = load_seconds
        self._wants_progress = wants_progress
        self._arrival = arrival
        self._wants_token_ids = request.include_token_ids
        kind = "chatcmpl" if isinstance(request, chat_pb2.ChatRequest) else "cmpl"
        self._id = f"{kind}-{uuid.uuid4().hex}"
        self._sampling = sampling_from_proto(sampling, vocab_size=model.vocab_size)
        self._seed = sampling.seed if sampling.HasField("seed") else None
        self._top_logprobs = sampling.top_logprobs if sampling.HasField("top_logprobs") else None
        self._ignore_eos = sampling.ignore_eos
        self._prompt_field = prompt_field(request)
        self._prompt_logprobs: int | None = None
        if isinstance(request, completion_pb2.CompleteRequest) and request.HasField("prompt_logprobs"):
            self._prompt_logprobs = request.prompt_logprobs
        # Prompt tokens whose log-probabilities are still to come, and events that come after them.
        self._unscored = 0 if self._prompt_logprobs is None else len(prompt.token_ids)
        self._held: list[chat_pb2.ChatStreamResponse] = []
        self._has_started = False
        self.choices = [
            Choice(
                index,
                model.tokenizer,
                stop=tuple(sampling.stop),
                wants_logprobs=self._top_logprobs is not None,
                wants_token_ids=self._wants_token_ids,
                context=prompt.token_ids[-_CONTINUED_TOKENS:] if prompt.is_continued else (),
                shown=answering.shown,
                reader=answering.make_reader(),
                end_tokens=frozenset() if sampling.ignore_eos else prompt.end_tokens,
                length_reason=budget.reason,
            )
            for index in range(choice_count(request))
        ]

    def _engine_requests(self) -> Sequence[GenerationRequest]:
        return [
            GenerationRequest(
                request_id=f"{self._id}/{index}",
                model_id=self._model.entry.id,
                prompt=self._prompt.token_ids,
                max_tokens=self._budget.max_tokens,
                sampling=self._choice_sampling(index),
                top_logprobs=self._top_logprobs,
                ignore_eos=self._ignore_eos,
                stable_prefix_tokens=self._prompt.stable_tokens,
                images=self._prompt.images,
                constraint=None if self._constraint is None else self._constraint.fork(),
                # The choices share the prompt.
                prompt_logprobs=self._prompt_logprobs if index == 0 else None,
                prompt_field=self._prompt_field,
            )
            for index in range(len(self.choices))
        ]

    def _choice_sampling(self, index: int) -> SamplingParams:
        if self._seed is None:
            return self._sampling
        # Wraps as a signed 64-bit number does, so that every seed has its successors.
        wrapped = (self._seed + index) % 2**_SEED_BITS
        return replace(self._sampling, seed=wrapped - 2**_SEED_BITS * (wrapped >> (_SEED_BITS - 1)))

    async def events(self, engine: Engine, telemetry: Telemetry) -> AsyncGenerator[RunEvent, None]:
        """Generate. Closing the generator stops the generation."""
        choices = self.choices
        streams = [engine.generate(request, self._arrival) for request in self._engine_requests()]
        async with aclosing(merged(streams, lambda index: choices[index].is_finished)) as arrivals:
            async for index, event in arrivals:
                for said in self._said(index, event, telemetry):
                    yield said
        yield self._completed()

    def _said(self, index: int, event: EngineEvent, telemetry: Telemetry) -> Sequence[RunEvent]:
        """What one event of a choice's sequence means for the caller."""
        choice = self.choices[index]
        match event:
            case TokensGenerated():
                return self._after_scores(self._fed(choice, event, telemetry))
            case PrefillStarted():
                choice.admitted(event)
                # Sent once the engine has admitted the request and not before: until then a refusal
                # reaches a client that may still retry by itself.
                if self._has_started:
                    return []
                self._has_started = True
                return [self._started(), *self._after_scores(self._echoes())]
            case PrefillProgress():
                return [_progress(event)] if self._wants_progress and index == 0 else []
            case PromptScored(tokens=tokens):
                return self._scored(tokens)
            case GenerationFinished():
                return self._after_scores(choice.finish(event))
            case _:
                assert_never(event)

    def _scored(self, tokens: Sequence[Token]) -> Sequence[RunEvent]:
        """More of the prompt's log-probabilities, and what waited for the last of them."""
        self._unscored -= len(tokens)
        scores = prompt_logprobs_to_proto(tokens, partial(token_bytes, self._model.tokenizer))
        if self._unscored:
            return [scores]
        held, self._held = self._held, []
        return [scores, *held]

    def _after_scores(self, events: Sequence[chat_pb2.ChatStreamResponse]) -> Sequence[RunEvent]:
        """The events, once the whole prompt is scored: other choices' sequences do not wait for that."""
        if not self._unscored:
            return events
        self._held.extend(events)
        return []

    def _fed(
        self, choice: Choice, event: TokensGenerated, telemetry: Telemetry
    ) -> list[chat_pb2.ChatStreamResponse]:
        call = self._call
        if not call.completion_tokens:
            telemetry.first_token(model=call.model, seconds=time.perf_counter() - call.arrived)
        before = choice.completion_tokens
        deltas = choice.feed(event.tokens)
        call.completion_tokens += choice.completion_tokens - before
        return deltas

    def _started(self) -> chat_pb2.ChatStreamResponse:
        """The first event."""
        started = chat_pb2.ChatStarted(
            id=self._id,
            model=self._model.entry.id,
            prompt_tokens=len(self._prompt.token_ids),
            system_fingerprint=self._model.fingerprint,
            prompt_token_ids=self._prompt.token_ids if self._wants_token_ids else (),
        )
        if self._load_seconds > 0:
            started.load_duration.CopyFrom(measured_duration(self._load_seconds))
        return chat_pb2.ChatStreamResponse(started=started)

    def _echoes(self) -> list[chat_pb2.ChatStreamResponse]:
        """The prompt once for each choice, where it is to be repeated."""
        deltas = [
            chat_pb2.ContentDelta(choice_index=index, text=self._prompt.echo)
            for index in range(len(self.choices))
            if self._prompt.echo
        ]
        return [chat_pb2.ChatStreamResponse(content=delta) for delta in deltas]

    def _completed(self) -> chat_pb2.ChatStreamResponse:
        choices = self.choices
        timings = usage_pb2.Timings(
            total_duration=measured_duration(time.perf_counter() - self._call.arrived),
            # Choices run side by side: the longest of each phase is what the caller waited for.
            queue_duration=measured_duration(max(choice.queue_seconds for choice in choices)),
            prompt_duration=measured_duration(max(choice.prompt_seconds for choice in choices)),
            decode_duration=measured_duration(max(choice.decode_seconds for choice in choices)),
        )
        if self._load_seconds > 0:
            timings.load_duration.CopyFrom(measured_duration(self._load_seconds))
        usage = usage_pb2.Usage(
            prompt_tokens=len(self._prompt.token_ids),
            completion_tokens=sum(choice.completion_tokens for choice in choices),
            reasoning_tokens=sum(choice.reasoning_tokens for choice in choices),
            cached_prompt_tokens=min(choice.cached_tokens for choice in choices),
        )
        return chat_pb2.ChatStreamResponse(completed=chat_pb2.ChatCompleted(usage=usage, timings=timings))


def _progress(event: PrefillProgress) -> chat_pb2.ChatStreamResponse:
    progress = chat_pb2.PromptProgress(processed_tokens=event.processed, total_tokens=event.total)
    return chat_pb2.ChatStreamResponse(prompt_progress=progress)
