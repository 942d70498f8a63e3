"""A chat request's way: model → place → lease → prompt → limits → engine → answers → events.

Unary and streaming calls both take it; there is no other.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final, assert_never

from osaurus_grpc.chat.template import is_continuation, render
from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.types import (
    GenerationFinished,
    GenerationRequest,
    PrefillProgress,
    PrefillStarted,
    SamplingParams,
    TokensGenerated,
)
from osaurus_grpc.errors import ContextLengthError
from osaurus_grpc.models.residency import LoadedModel, Residency
from osaurus_grpc.server import calls
from osaurus_grpc.server.admission import Admission
from osaurus_grpc.server.calls import Call
from osaurus_grpc.server.choice import Choice
from osaurus_grpc.server.convert import (
    DEFAULT_MAX_TOKENS,
    measured_duration,
    message_from_proto,
    sampling_from_proto,
    seconds_from_duration,
    template_arguments,
)
from osaurus_grpc.server.listing import Listing
from osaurus_grpc.server.merge import merged
from osaurus_grpc.server.validation import (
    chat_violations,
    require_supported,
    require_valid,
    vocabulary_violations,
)
from osaurus_grpc.telemetry import Telemetry
from osaurus_grpc.v1 import chat_pb2, sampling_pb2, usage_pb2

# Below this, rendering takes about as long as handing it to a thread and back.
_SHORT_PROMPT_CHARACTERS: Final = 4_096
_SEED_BITS: Final = 64
# Enough for a tokenizer to tell how a token continues a text.
_CONTINUED_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class OutputBudget:
    """How many tokens an answer may have, and why it ends there.

    Attributes:
        max_tokens: At least 1.
        reason: LENGTH, or CONTEXT_LENGTH where the context and not the request set the limit.
    """

    max_tokens: int
    reason: sampling_pb2.FinishReason.ValueType


def output_budget(
    request: chat_pb2.ChatRequest, *, prompt_tokens: int, context_length: int, max_output_tokens: int
) -> OutputBudget:
    """The budget of each of a validated request's answers.

    Args:
        request: Its max_tokens and max_context_tokens count.
        prompt_tokens: Tokens of the rendered prompt.
        context_length: The model's, in tokens.
        max_output_tokens: The server's cap; 0 is none.

    Raises:
        ContextLengthError: The prompt leaves no room for one token.
    """
    limit = context_length
    if request.HasField("max_context_tokens"):
        limit = min(limit, request.max_context_tokens)
    room = limit - prompt_tokens
    if room < 1:
        raise ContextLengthError(limit=limit, prompt_tokens=prompt_tokens)
    sampling = request.sampling
    wanted = sampling.max_tokens if sampling.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    if max_output_tokens:
        wanted = min(wanted, max_output_tokens)
    if wanted > room:
        return OutputBudget(room, sampling_pb2.FINISH_REASON_CONTEXT_LENGTH)
    return OutputBudget(wanted, sampling_pb2.FINISH_REASON_LENGTH)


async def render_prompt(request: chat_pb2.ChatRequest, model: LoadedModel) -> tuple[int, ...]:
    """A validated request's prompt in tokens; a long one is rendered in a thread.

    Raises:
        InvalidRequestError: The model's template refuses the conversation.
        CapabilityError: The model has no chat template.
    """
    messages = [message_from_proto(message) for message in request.messages]
    arguments = template_arguments(request)
    enabled = request.reasoning_enabled if request.HasField("reasoning_enabled") else None

    def work() -> list[int]:
        return render(
            model.tokenizer,
            messages,
            template_arguments=arguments,
            reasoning_effort=request.reasoning_effort,
            reasoning_enabled=enabled,
        )

    is_short = sum(len(message.content) for message in messages) < _SHORT_PROMPT_CHARACTERS
    return tuple(work() if is_short else await asyncio.to_thread(work))


def keep_alive_seconds(request: chat_pb2.ChatRequest) -> float | None:
    """What a validated request says of its model's stay in memory; None leaves it to the server."""
    return seconds_from_duration(request.keep_alive) if request.HasField("keep_alive") else None


class Generation:
    """Answers chat requests.

    Args:
        listing: Finds models.
        residency: Loads them.
        engine: Generates.
        admission: Says which requests a model takes.
        telemetry: Where tokens and times are counted.
        max_output_tokens: The server's cap of an answer's length; 0 is none.
    """

    def __init__(
        self,
        *,
        listing: Listing,
        residency: Residency,
        engine: Engine,
        admission: Admission,
        telemetry: Telemetry,
        max_output_tokens: int,
    ) -> None:
        self._listing = listing
        self._residency = residency
        self._engine = engine
        self._admission = admission
        self._telemetry = telemetry
        self._max_output_tokens = max_output_tokens

    async def chat(
        self, request: chat_pb2.ChatRequest, *, wants_progress: bool = False
    ) -> AsyncGenerator[chat_pb2.ChatStreamResponse, None]:
        """The events of a request's answer, in the grammar of ChatStreamResponse.

        Closing the generator stops the generation and gives back the model's lease and place.

        Args:
            request: As it came from the client.
            wants_progress: Report how far the prompt is processed.

        Raises:
            OsaurusError: Anything that errors.py lists.
        """
        call = calls.current()
        require_valid(chat_violations(request))
        require_supported(request)
        entry = await self._listing.find(request.model)
        call.model = entry.id
        with self._admission.admit(entry.id):
            async with self._residency.lease(entry, keep_alive_seconds(request)) as lease:
                require_valid([*vocabulary_violations(request.sampling, lease.model.vocab_size)])
                prompt = await render_prompt(request, lease.model)
                call.prompt_tokens = len(prompt)
                run = _Run(
                    call,
                    request,
                    lease.model,
                    prompt,
                    budget=output_budget(
                        request,
                        prompt_tokens=len(prompt),
                        context_length=lease.model.context_length,
                        max_output_tokens=self._max_output_tokens,
                    ),
                    load_seconds=lease.load_seconds,
                    wants_progress=wants_progress,
                )
                try:
                    async with aclosing(run.events(self._engine, self._telemetry)) as events:
                        async for event in events:
                            yield event
                finally:
                    self._telemetry.tokens(
                        model=entry.id, prompt=len(prompt), completion=call.completion_tokens
                    )


class _Run:
    """One admitted request: its choices, from the first engine event to the last."""

    def __init__(
        self,
        call: Call,
        request: chat_pb2.ChatRequest,
        model: LoadedModel,
        prompt: tuple[int, ...],
        *,
        budget: OutputBudget,
        load_seconds: float,
        wants_progress: bool,
    ) -> None:
        sampling = request.sampling
        self._call = call
        self._model = model
        self._prompt = prompt
        self._budget = budget
        self._load_seconds = load_seconds
        self._wants_progress = wants_progress
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._sampling = sampling_from_proto(sampling, vocab_size=model.vocab_size)
        self._seed = sampling.seed if sampling.HasField("seed") else None
        self._top_logprobs = sampling.top_logprobs if sampling.HasField("top_logprobs") else None
        self._ignore_eos = sampling.ignore_eos
        messages = [message_from_proto(message) for message in request.messages[-1:]]
        context = prompt[-_CONTINUED_TOKENS:] if is_continuation(messages) else ()
        self._choices = [
            Choice(
                index,
                model.tokenizer,
                stop=tuple(sampling.stop),
                wants_logprobs=self._top_logprobs is not None,
                context=context,
                length_reason=budget.reason,
            )
            for index in range(request.choice_count if request.HasField("choice_count") else 1)
        ]

    def _engine_requests(self) -> Sequence[GenerationRequest]:
        return [
            GenerationRequest(
                request_id=f"{self._id}/{index}",
                model_id=self._model.entry.id,
                prompt=self._prompt,
                max_tokens=self._budget.max_tokens,
                sampling=self._choice_sampling(index),
                top_logprobs=self._top_logprobs,
                ignore_eos=self._ignore_eos,
            )
            for index in range(len(self._choices))
        ]

    def _choice_sampling(self, index: int) -> SamplingParams:
        if self._seed is None:
            return self._sampling
        # Wraps as a signed 64-bit number does, so that every seed has its successors.
        wrapped = (self._seed + index) % 2**_SEED_BITS
        return replace(self._sampling, seed=wrapped - 2**_SEED_BITS * (wrapped >> (_SEED_BITS - 1)))

    async def events(
        self, engine: Engine, telemetry: Telemetry
    ) -> AsyncGenerator[chat_pb2.ChatStreamResponse, None]:
        choices = self._choices
        call = self._call
        streams = [engine.generate(request) for request in self._engine_requests()]
        has_started = False
        async with aclosing(merged(streams, lambda index: choices[index].is_finished)) as arrivals:
            async for index, event in arrivals:
                choice = choices[index]
                match event:
                    case TokensGenerated():
                        if not call.completion_tokens:
                            telemetry.first_token(
                                model=call.model, seconds=time.perf_counter() - call.arrived
                            )
                        before = choice.completion_tokens
                        deltas = choice.feed(event.tokens)
                        call.completion_tokens += choice.completion_tokens - before
                        for delta in deltas:
                            yield delta
                    case PrefillStarted():
                        choice.admitted(event)
                        # Sent once the engine has admitted the request and not before: until then a
                        # refusal reaches a client that may still retry by itself.
                        if not has_started:
                            has_started = True
                            yield self._started()
                    case PrefillProgress():
                        if self._wants_progress and index == 0:
                            yield _progress(event)
                    case GenerationFinished():
                        for delta in choice.finish(event):
                            yield delta
                    case _:
                        assert_never(event)
        yield self._completed()

    def _started(self) -> chat_pb2.ChatStreamResponse:
        started = chat_pb2.ChatStarted(
            id=self._id,
            model=self._model.entry.id,
            prompt_tokens=len(self._prompt),
            system_fingerprint=self._model.fingerprint,
        )
        if self._load_seconds > 0:
            started.load_duration.CopyFrom(measured_duration(self._load_seconds))
        return chat_pb2.ChatStreamResponse(started=started)

    def _completed(self) -> chat_pb2.ChatStreamResponse:
        choices = self._choices
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
            prompt_tokens=len(self._prompt),
            completion_tokens=sum(choice.completion_tokens for choice in choices),
            cached_prompt_tokens=min(choice.cached_tokens for choice in choices),
        )
        return chat_pb2.ChatStreamResponse(completed=chat_pb2.ChatCompleted(usage=usage, timings=timings))


def _progress(event: PrefillProgress) -> chat_pb2.ChatStreamResponse:
    progress = chat_pb2.PromptProgress(processed_tokens=event.processed, total_tokens=event.total)
    return chat_pb2.ChatStreamResponse(prompt_progress=progress)
