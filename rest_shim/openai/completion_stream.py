"""The stream of a text completion: the core's events in, server-sent events out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import assert_never

from osaurus_grpc.v1 import chat_pb2, completion_pb2, sampling_pb2, usage_pb2
from rest_shim.errors import CoreError, Refusal, openai_body
from rest_shim.openai.completions import placed, total_usage
from rest_shim.openai.convert import finish_reason, usage_json
from rest_shim.openai.legacy_logprobs import LegacyLogprobs
from rest_shim.wire import SSE_DONE, dump, sse_frame

Event = completion_pb2.CompleteStreamResponse
Events = AbstractAsyncContextManager[AsyncIterable[Event]]

# Prompts of one request that run side by side: a batch's worth, and no more of the model's places.
PARALLEL_PROMPTS = 4
_QUEUED_EVENTS = 64


@dataclass(frozen=True, slots=True)
class PlacedEvent:
    """An event of one prompt's stream.

    Attributes:
        place: Which of the request's prompts it is about, 0-based.
        event: The event.
    """

    place: int
    event: Event


class CompletionEncoder:
    """One stream's state.

    Args:
        choice_count: Choices of each prompt; they are numbered through.
        include_usage: Whether a chunk with the usage comes last.
        with_logprobs: Whether log-probabilities were asked for.
        created: Unix seconds, the same on every chunk.
    """

    def __init__(
        self, *, include_usage: bool, with_logprobs: bool, created: int, choice_count: int = 1
    ) -> None:
        self._choice_count = choice_count
        self._include_usage = include_usage
        self._with_logprobs = with_logprobs
        self._created = created
        self._head = ""
        self._tail = ""
        self._closing = ""
        self._logprobs: dict[int, LegacyLogprobs] = {}
        # The prompts' own, which come before each choice's text.
        self._prompts: dict[int, list[sampling_pb2.PromptTokenLogprob]] = {}
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """Whether the stream has ended as its grammar wants."""
        return self._is_complete

    def encode(self, placed: PlacedEvent) -> bytes:
        """The frames of one event."""
        event = placed.event
        kind = event.WhichOneof("event")
        match kind:
            case "content":
                return self._content(placed.place, event.content)
            case "prompt_logprobs":
                self._prompts.setdefault(placed.place, []).extend(event.prompt_logprobs.tokens)
                return b""
            case "started":
                self._start(event.started)
                return b""
            case "choice_finished":
                return self._finish(placed.place, event.choice_finished)
            case "completed":
                return self._complete(event.completed.usage)
            case "prompt_progress" | None:
                # None: an event that a newer core knows and this shim does not.
                return b""
            case _:
                assert_never(kind)

    def failure(self, refusal: Refusal) -> bytes:
        """The error event; openai-python raises APIError on it."""
        return sse_frame(openai_body(refusal))

    def _start(self, started: chat_pb2.ChatStarted) -> None:
        self._head = (
            f'data: {{"id":{dump(started.id)},"object":"text_completion","created":{self._created},'
            f'"model":{dump(started.model)},"choices":['
        )
        self._closing = f'],"system_fingerprint":{dump(started.system_fingerprint)}'
        self._tail = self._closing + (',"usage":null}\n\n' if self._include_usage else "}\n\n")

    def _content(self, place: int, delta: chat_pb2.ContentDelta) -> bytes:
        if not delta.text and not delta.logprobs:
            return b""
        index = place * self._choice_count + delta.choice_index
        logprobs = self._logprobs_of(place, index, delta.text, delta.logprobs)
        return self._chunk(index, delta.text, "null", logprobs)

    def _finish(self, place: int, finished: chat_pb2.ChoiceFinished) -> bytes:
        index = place * self._choice_count + finished.choice_index
        reason = f'"{finish_reason(finished.finish_reason)}"'
        ends = [finished.end_logprob] if finished.HasField("end_logprob") else []
        if place in self._prompts and (ends or index not in self._logprobs):
            # A prompt's log-probabilities are of no use without that of the token by which it ended.
            return self._chunk(index, "", reason, self._logprobs_of(place, index, "", ends))
        return self._chunk(index, "", reason)

    def _logprobs_of(
        self, place: int, index: int, text: str, tokens: Sequence[sampling_pb2.ChosenTokenLogprob]
    ) -> str:
        if not self._with_logprobs:
            return "null"
        if index not in self._logprobs:
            self._logprobs[index] = LegacyLogprobs()
            text = self._logprobs[index].take_prompt(self._prompts.get(place, ()), text)
        self._logprobs[index].take(tokens, text)
        return dump(self._logprobs[index].told())

    def _chunk(self, index: int, text: str, reason: str, logprobs: str = "null") -> bytes:
        choice = f'{{"text":{dump(text)},"index":{index},"logprobs":{logprobs},"finish_reason":{reason}}}'
        return f"{self._head}{choice}{self._tail}".encode("ascii")

    def _complete(self, usage: usage_pb2.Usage) -> bytes:
        self._is_complete = True
        if not self._include_usage:
            return SSE_DONE
        chunk = f'{self._head}{self._closing},"usage":{dump(usage_json(usage))}}}\n\n'
        return chunk.encode("ascii") + SSE_DONE


@asynccontextmanager
async def alone(stream: Events) -> AsyncIterator[AsyncIterable[PlacedEvent]]:
    """The stream of a request with one prompt."""
    async with stream as events:
        yield (PlacedEvent(0, event) async for event in events)


@asynccontextmanager
async def side_by_side(
    streams: Sequence[Callable[[], Events]],
) -> AsyncIterator[AsyncIterable[PlacedEvent]]:
    """Several prompts' streams as one stream of the same grammar.

    Args:
        streams: Opens each prompt's stream; at most PARALLEL_PROMPTS are open at a time.

    Raises:
        CoreError: The first that any of them raises, inside the iteration; the others are ended.
    """
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(_QUEUED_EVENTS)
    places = iter(range(len(streams)))

    async def work() -> None:
        for place in places:
            is_whole = False
            try:
                async with streams[place]() as events:
                    async for event in events:
                        is_whole = event.HasField("completed")
                        await queue.put((place, event))
                if not is_whole:
                    raise CoreError("INTERNAL")
            except CoreError as error:
                await queue.put((place, placed(error, place)))
            except Exception as error:  # noqa: BLE001 - the reader raises it
                await queue.put((place, error))

    workers = [asyncio.create_task(work()) for _ in range(min(PARALLEL_PROMPTS, len(streams)))]
    try:
        yield _merge(queue, len(streams))
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _merge(
    queue: asyncio.Queue[tuple[int, Event | Exception]], stream_count: int
) -> AsyncIterator[PlacedEvent]:
    is_started = False
    costs: list[usage_pb2.Usage] = []
    while len(costs) < stream_count:
        place, event = await queue.get()
        if isinstance(event, Exception):
            raise event
        match event.WhichOneof("event"):
            case "started":
                if not is_started:
                    is_started = True
                    yield PlacedEvent(place, event)
            case "content" | "choice_finished" | "prompt_logprobs":
                yield PlacedEvent(place, event)
            case "completed":
                costs.append(event.completed.usage)
            case _:
                pass
    yield PlacedEvent(0, Event(completed=chat_pb2.ChatCompleted(usage=total_usage(costs))))
