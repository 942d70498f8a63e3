"""A request's way: model → place → lease → prompt → limits → engine → answers → events.

Chat and completion, unary and streaming: every call takes it, and there is no other.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from osaurus_grpc.chat.grammar import Grammars
from osaurus_grpc.chat.stable_prefix import StablePrefixes
from osaurus_grpc.engine.arrivals import Arrival
from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.models.catalog import ModelEntry
from osaurus_grpc.models.residency import LoadedModel, ResidenceState, Residency
from osaurus_grpc.server import calls
from osaurus_grpc.server.admission import Admission
from osaurus_grpc.server.answering import answering, completion_answering
from osaurus_grpc.server.conversation import Conversation
from osaurus_grpc.server.convert import RunEvent, chat_event, completion_event, seconds_from_duration
from osaurus_grpc.server.listing import Listing
from osaurus_grpc.server.prompts import Prompt, Request, completion_prompt
from osaurus_grpc.server.run import Run, choice_count, output_budget
from osaurus_grpc.server.sessions import SessionKey, Sessions
from osaurus_grpc.server.validation import (
    chat_violations,
    completion_violations,
    model_violations,
    require_images_taken,
    require_valid,
)
from osaurus_grpc.telemetry import Telemetry
from osaurus_grpc.v1 import chat_pb2, completion_pb2


def keep_alive_seconds(request: Request) -> float | None:
    """What a validated request says of its model's stay in memory; None leaves it to the server."""
    return seconds_from_duration(request.keep_alive) if request.HasField("keep_alive") else None


def _session_key(request: chat_pb2.ChatRequest, entry: ModelEntry) -> SessionKey:
    return SessionKey(calls.current().caller, entry.id, request.session_id)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A validated request on its way.

    Attributes:
        request: What was asked.
        entry: Its model.
        make_prompt: Makes what the answers continue.
        arrival: Announces it to the engine.
        wants_progress: Report how far the prompt is processed.
    """

    request: Request
    entry: ModelEntry
    make_prompt: Callable[[LoadedModel], Awaitable[Prompt]]
    arrival: Arrival
    wants_progress: bool


class Generation:
    """Answers chat and completion requests.

    Args:
        listing: Finds models.
        residency: Loads them.
        engine: Generates.
        admission: Says which requests a model takes.
        sessions: Conversations that are remembered.
        grammars: Compiles what answers have to follow.
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
        sessions: Sessions,
        grammars: Grammars,
        telemetry: Telemetry,
        max_output_tokens: int,
    ) -> None:
        self._listing = listing
        self._residency = residency
        self._engine = engine
        self._admission = admission
        self._sessions = sessions
        self._grammars = grammars
        self._telemetry = telemetry
        self._max_output_tokens = max_output_tokens
        self._prefixes = StablePrefixes()

    async def chat(
        self, request: chat_pb2.ChatRequest, *, wants_progress: bool = False
    ) -> AsyncGenerator[chat_pb2.ChatStreamResponse, None]:
        """The events of a conversation's answer, in the grammar of ChatStreamResponse.

        Closing the generator stops the generation and gives back the model's lease and place.

        Args:
            request: As it came from the client.
            wants_progress: Report how far the prompt is processed.

        Raises:
            OsaurusError: Anything that errors.py lists.
        """
        require_valid(chat_violations(request))

        with self._engine.expecting(choice_count(request)) as arrival:
            entry = await self._listing.find(request.model)
            require_images_taken(request, entry)
            with self._sessions.turn(_session_key(request, entry)) as turn:
                conversation = Conversation(request, turn.history, self._prefixes)

                def observe(event: RunEvent, run: Run) -> None:
                    # Kept before the last event is out, for a caller that goes on at once.
                    if turn.is_kept and conversation.observe(chat_event(event)):
                        turn.keep(conversation.history(run.choices[0].token_ids))

                asked = _Asked(request, entry, conversation.prompt, arrival, wants_progress)
                async with aclosing(self._answered(asked, observe)) as events:
                    async for event in events:
                        yield chat_event(event)

    async def chat_prompt(self, request: chat_pb2.ChatRequest, model: LoadedModel) -> Prompt:
        """The prompt that chat() would send; its session is left alone.

        Raises:
            OsaurusError: As chat().
        """
        require_valid(model_violations(request, model.vocab_size))
        history = self._sessions.peek(_session_key(request, model.entry))
        return await Conversation(request, history, self._prefixes, is_counted=True).prompt(model)

    async def complete(
        self, request: completion_pb2.CompleteRequest, *, wants_progress: bool = False
    ) -> AsyncGenerator[completion_pb2.CompleteStreamResponse, None]:
        """The events of a text's continuation; as chat()."""
        require_valid(completion_violations(request))

        async def prompt(model: LoadedModel) -> Prompt:
            return await completion_prompt(request, model)

        with self._engine.expecting(choice_count(request)) as arrival:
            entry = await self._listing.find(request.model)
            asked = _Asked(request, entry, prompt, arrival, wants_progress)
            async with aclosing(self._answered(asked)) as events:
                async for event in events:
                    yield completion_event(event)

    async def _answered(
        self, asked: _Asked, observe: Callable[[RunEvent, Run], None] = lambda event, run: None
    ) -> AsyncGenerator[RunEvent, None]:
        call, request, entry = calls.current(), asked.request, asked.entry
        call.model = entry.id
        with self._admission.admit(entry.id):
            if self._residency.residence(entry.id).state is not ResidenceState.LOADED:
                asked.arrival.delayed()
            async with self._residency.lease(entry, keep_alive_seconds(request)) as lease:
                model = lease.model
                require_valid(model_violations(request, model.vocab_size))
                prompt = await asked.make_prompt(model)
                call.prompt_tokens = len(prompt.token_ids)
                if isinstance(request, chat_pb2.ChatRequest):
                    how = await answering(request, model, prompt, self._grammars)
                else:
                    how = await completion_answering(request, model, self._grammars)
                run = Run(
                    call,
                    request,
                    model,
                    prompt,
                    answering=how,
                    budget=output_budget(
                        request,
                        prompt_tokens=call.prompt_tokens,
                        context_length=model.context_length,
                        max_output_tokens=self._max_output_tokens,
                    ),
                    load_seconds=lease.load_seconds,
                    wants_progress=asked.wants_progress,
                    arrival=asked.arrival,
                )
                try:
                    async with aclosing(run.events(self._engine, self._telemetry)) as events:
                        async for event in events:
                            observe(event, run)
                            yield event
                finally:
                    self._telemetry.tokens(
                        model=entry.id, prompt=call.prompt_tokens, completion=call.completion_tokens
                    )
