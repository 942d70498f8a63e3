"""The engine as the event loop sees it: submit a request, iterate over its events, stop when you like."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

from osaurus_grpc.engine.arrivals import Arrival
from osaurus_grpc.engine.memory import KVBudget, KVMemory
from osaurus_grpc.engine.prefix_disk import PrefixDisk
from osaurus_grpc.engine.runner import Delivery
from osaurus_grpc.engine.sequence import Sequence
from osaurus_grpc.engine.types import (
    EngineEvent,
    GenerationFinished,
    GenerationRequest,
    PrefillStarted,
    TokensGenerated,
)
from osaurus_grpc.engine.worker import Worker
from osaurus_grpc.errors import (
    CapabilityError,
    DrainingError,
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
    OsaurusError,
    OverloadedError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STOP_SECONDS = 30.0
# Tokens of inputs embedded at once, padding included: what running streams wait for at most, unless
# one input is longer.
_EMBEDDING_TOKENS = 512

Embedder: TypeAlias = Callable[[SequenceOf[SequenceOf[int]]], list[list[float]]]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine is doing now, and did since it started.

    Attributes:
        running: Sequences in a batch.
        waiting: Sequences that wait for a place in one.
        prompt_tokens: Prompt tokens of admitted sequences.
        completion_tokens: Tokens generated.
        kv_running_bytes: What the KV caches of running sequences are counted as.
        kv_kept_bytes: KV caches kept for requests that begin alike.
        kv_budget_bytes: What both together may take.
        kv_disk_bytes: KV caches in files.
        kv_disk_failing: Whether none can be written, for want of room above all.
        preemptions: Times a sequence gave its place back because memory ran out.
        cache_lookups: Prompts whose beginning was looked for in kept KV caches.
        cache_hits: Those that had one.
        cache_tokens_reused: Prompt tokens that were not computed therefore.
        cache_evictions: Parts of kept KV caches dropped to make room.
        drafted_tokens: Tokens guessed ahead by speculative decoding.
        accepted_tokens: Of these, tokens that became part of an answer.
    """

    running: int
    waiting: int
    prompt_tokens: int
    completion_tokens: int
    kv_running_bytes: int
    kv_kept_bytes: int
    kv_budget_bytes: int
    kv_disk_bytes: int
    kv_disk_failing: bool
    preemptions: int
    cache_lookups: int
    cache_hits: int
    cache_tokens_reused: int
    cache_evictions: int
    drafted_tokens: int
    accepted_tokens: int


@dataclass(slots=True)
class _Attached:
    """A model in service, as the event loop knows it."""

    vocab_size: int
    memory: KVMemory
    running: int = 0


class _Inbox:
    """Events of one sequence on their way from the MLX thread to its reader."""

    def __init__(self) -> None:
        self._events: list[EngineEvent | OsaurusError] = []
        self._arrived = asyncio.Event()

    def put(self, event: EngineEvent | OsaurusError) -> None:
        self._events.append(event)
        self._arrived.set()

    async def take(self) -> list[EngineEvent | OsaurusError]:
        """Everything that arrived since the last call; waits for at least one event."""
        # The wait is bounded by the caller: its RPC has a deadline and cancels this task.
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events


class Engine:
    """Continuous batching over loaded models, on one MLX thread.

    All methods run on the event loop that called start().

    Args:
        max_batch_size: Sequences of a model decoded together.
        max_waiting_requests: Sequences that may wait for a place, over all models.
        prefill_chunk_tokens: Prompt tokens processed between two decode steps at most.
        max_pause_steps: As StepClock has it.
        prompt_cache_bytes: Of the KV caches that each model keeps for requests that begin alike; 0
            keeps none.
        prompt_cache_bits: Quantize these to 8 or 4 bits while they are kept; 0 keeps them as they are.
        kv_cache_bytes: Of the KV caches of all models, running and kept; negative is a share of the
            memory that is free when their weights are in.
        prefix_disk: Keeps beginnings beyond the end of the process; the engine starts and stops it.
        prompt_lookup_tokens: Tokens that a sequence which runs alone guesses from its own text at most;
            0 guesses none.
        draft_tokens: Tokens that a draft model guesses for one at most.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_waiting_requests: int,
        prefill_chunk_tokens: int,
        max_pause_steps: int = 4,
        prompt_cache_bytes: int = 0,
        prompt_cache_bits: int = 0,
        kv_cache_bytes: int = -1,
        prefix_disk: PrefixDisk | None = None,
        prompt_lookup_tokens: int = 0,
        draft_tokens: int = 4,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_waiting = max_waiting_requests
        self._budget = KVBudget(kv_cache_bytes)
        self._worker = Worker(
            self._deliver,
            self._report_death,
            max_batch_size=max_batch_size,
            prefill_chunk_tokens=prefill_chunk_tokens,
            max_pause_steps=max_pause_steps,
            prompt_cache_bytes=prompt_cache_bytes,
            prompt_cache_bits=prompt_cache_bits,
            budget=self._budget,
            prefix_disk=prefix_disk,
            prompt_lookup_tokens=prompt_lookup_tokens,
            draft_tokens=draft_tokens,
        )
        self._prefix_disk = prefix_disk
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inboxes: dict[Sequence, _Inbox] = {}
        self._models: dict[str, _Attached] = {}
        self._embedders: dict[str, Embedder] = {}
        self._waiting = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._is_stopping = False
        self._died = asyncio.Event()
        # Answers that callers of the MLX thread wait for.
        self._calls: set[asyncio.Future[Any]] = set()

    async def start(self) -> None:
        """Start the MLX thread and wait for its self-test.

        Raises RuntimeError where mlx-lm does not behave as the engine expects.
        """
        self._loop = asyncio.get_running_loop()
        if self._prefix_disk is not None:
            self._prefix_disk.start()
        self._worker.start()
        ready = asyncio.ensure_future(self.call(lambda: None))
        while not ready.done():
            await asyncio.wait([ready], timeout=0.5)
            if not ready.done() and not self._worker.is_alive:
                ready.cancel()
                raise RuntimeError("the MLX thread ended in its self-test; the log has the reason")

    async def stop(self) -> None:
        """End all sequences with DrainingError and stop the MLX thread, models freed."""
        self._is_stopping = True
        for inbox in self._inboxes.values():
            inbox.put(DrainingError())
        if not await asyncio.to_thread(self._worker.stop, _STOP_SECONDS):
            logger.error("event=mlx_thread_stuck")
        if self._prefix_disk is not None:
            await asyncio.to_thread(self._prefix_disk.stop)

    async def death(self) -> None:
        """Wait until the MLX thread has died of an error. Nothing can be generated from then on."""
        await self._died.wait()

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function on the MLX thread between two steps; what it returns or raises comes back.

        Raises DrainingError once the engine is stopping, and EngineError where the thread has died.
        """
        assert self._loop is not None
        self._require_running()
        loop, result = self._loop, self._loop.create_future()
        self._calls.add(result)
        result.add_done_callback(self._calls.discard)

        def settle(value: T | None, error: BaseException | None) -> None:
            if result.done():
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(value)

        def run() -> None:
            value, error = None, None
            try:
                value = function()
            except BaseException as raised:  # noqa: BLE001  (handed to the caller, whatever it is)
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop may be closed at exit
                loop.call_soon_threadsafe(settle, value, error)

        self._worker.post(run)
        answer: T = await result
        return answer

    async def attach(
        self,
        model_id: str,
        model: object,
        end_tokens: tuple[int, ...],
        vocab_size: int,
        *,
        identity: str = "",
        draft_id: str = "",
    ) -> None:
        """Take a loaded mlx-lm model into service.

        Args:
            model_id: What requests call it.
            model: The model, built and evaluated on the MLX thread.
            end_tokens: Ids that end an answer.
            vocab_size: Width of its logits.
            identity: Changes with weights, dtype and whatever else changes what the model computes;
                under it, its beginnings are kept on the disk. "" keeps none there.
            draft_id: A model in service of the same vocabulary that drafts for this one; it must stay
                as long as this one does. "" is none.

        Raises:
            ModelUnusableError: The draft model's KV cache cannot be cut back.
        """
        memory = await self.call(
            lambda: self._worker.attach(model_id, model, end_tokens, vocab_size, identity, draft_id)
        )
        self._models[model_id] = _Attached(vocab_size, memory)

    async def require_draft(self, model_id: str) -> None:
        """Raise ModelUnusableError where a model in service cannot draft: its KV cache cannot be cut back."""
        await self.call(lambda: self._worker.require_draft(model_id))

    def attach_embedder(self, model_id: str, embedder: Embedder) -> None:
        """Take what makes embedding vectors with a loaded model into service."""
        self._embedders[model_id] = embedder

    async def embed(self, model_id: str, inputs: SequenceOf[SequenceOf[int]]) -> list[list[float]]:
        """Embedding vectors, not normalised, in the order of the inputs.

        The inputs are taken some at a time between the steps of running sequences. Cancelling the task
        that waits ends it after those at hand.

        Args:
            model_id: A model that is loaded in the engine.
            inputs: Token ids, at least one each and within the model's context and vocabulary.

        Raises:
            CapabilityError: The model gives no embedding vectors.
            EngineError: The device failed.
            DrainingError: The engine is stopping, or the model was unloaded.
        """
        self._require_running()
        if model_id not in self._embedders:
            raise CapabilityError("This model gives no embeddings.", capability="embedding", field="model")
        vectors: list[list[float]] = [[]] * len(inputs)
        for group in _groups_of_like_length(inputs):
            embedder = self._embedders.get(model_id)
            if embedder is None:  # unloaded since
                raise DrainingError
            try:
                made = await self.call(partial(embedder, [inputs[i] for i in group]))
            except OsaurusError:
                raise
            except Exception as error:  # the device's errors have no common base class
                logger.exception("event=embedding_failed model=%s", model_id)
                raise EngineError from error
            for i, vector in zip(group, made, strict=True):
                vectors[i] = vector
        return vectors

    async def detach(self, model_id: str) -> None:
        """Take a model out of service; sequences that still use it end with DrainingError."""
        self._models.pop(model_id, None)
        self._embedders.pop(model_id, None)

        def drop() -> list[Sequence]:
            runner = self._worker.detach(model_id)
            return runner.close() if runner is not None else []

        for sequence in await self.call(drop):
            if inbox := self._inboxes.get(sequence):
                inbox.put(DrainingError())

    async def free(self) -> None:
        """Return memory that dropped models took to the system."""
        await self.call(self._worker.free)

    def stats(self) -> EngineStats:
        """What the engine is doing now, and did since it started."""
        cache = self._worker.prompt_cache_counters
        return EngineStats(
            running=len(self._inboxes) - self._waiting,
            waiting=self._waiting,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            kv_running_bytes=self._budget.running_bytes,
            kv_kept_bytes=self._budget.kept_bytes,
            kv_budget_bytes=self._budget.limit_bytes,
            kv_disk_bytes=self._prefix_disk.nbytes if self._prefix_disk is not None else 0,
            kv_disk_failing=self._prefix_disk is not None and self._prefix_disk.is_failing,
            preemptions=self._budget.preemptions,
            cache_lookups=cache.lookups,
            cache_hits=cache.hits,
            cache_tokens_reused=cache.tokens_reused,
            cache_evictions=cache.evictions,
            drafted_tokens=self._worker.speculation_counters.drafted,
            accepted_tokens=self._worker.speculation_counters.accepted,
        )

    def expecting(self, count: int = 1) -> AbstractContextManager[Arrival]:
        """Announce a request of so many sequences that is being readied, for the time of a block.

        Requests that are submitted meanwhile may wait for it a little, to be prefilled together.
        """
        return self._worker.arrivals.expect(count)

    async def generate(
        self, request: GenerationRequest, arrival: Arrival | None = None
    ) -> AsyncGenerator[EngineEvent, None]:
        """Generate one sequence, of a request that may have been announced.

        Yields PrefillStarted, PrefillProgress* with PromptScored* among them where the prompt is to be
        scored, TokensGenerated*, GenerationFinished. Tokens that arrived together come as one event.
        Closing the generator, or cancelling the task that reads it, frees the sequence's place before
        the next step.

        Raises:
            InvalidRequestError: The request does not fit the model.
            ContextLengthError: There would not be memory for its prompt's KV cache even alone.
            OverloadedError: The queue is full.
            EngineError: The device failed on this sequence.
            DrainingError: The engine is stopping, or the model was unloaded.
        """
        attached = self._check(request)
        await self._require_memory(attached, request)
        seed = request.sampling.seed
        sequence = Sequence(request, secrets.randbits(62) if seed is None else seed)
        inbox = self._inboxes[sequence] = _Inbox()
        self._waiting += 1
        is_waiting, is_over = True, False
        if arrival is not None:
            arrival.submitted()
        self._worker.post(lambda: self._submit(sequence))
        try:
            while not is_over:
                for event in _coalesced(await inbox.take()):
                    match event:
                        case PrefillStarted():
                            self._waiting -= 1
                            attached.running += 1
                            is_waiting = False
                            self._prompt_tokens += len(request.prompt)
                        case TokensGenerated(tokens=tokens):
                            self._completion_tokens += len(tokens)
                        case GenerationFinished():
                            is_over = True
                        case OsaurusError():
                            is_over = True
                            raise event
                        case _:
                            pass
                    yield event
        finally:
            del self._inboxes[sequence]
            if is_waiting:
                self._waiting -= 1
            else:
                attached.running -= 1
            if not is_over:
                self._worker.post(lambda: self._cancel(sequence))

    def _submit(self, sequence: Sequence) -> None:
        """Queue a sequence. On the MLX thread."""
        runner = self._worker.runner(sequence.request.model_id)
        if runner is not None:
            runner.submit(sequence)
        else:  # unloaded since it was checked
            self._deliver([(sequence, DrainingError())])

    def _cancel(self, sequence: Sequence) -> None:
        """Drop a sequence. On the MLX thread."""
        if runner := self._worker.runner(sequence.request.model_id):
            runner.cancel(sequence)

    def _require_running(self) -> None:
        if self._died.is_set():
            raise EngineError
        if self._is_stopping:
            raise DrainingError

    def _report_death(self) -> None:
        """On the MLX thread, its last act."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop may be closed at exit
            self._loop.call_soon_threadsafe(self._die)

    def _die(self) -> None:
        """End everything that waits for the MLX thread."""
        self._died.set()
        for inbox in self._inboxes.values():
            inbox.put(EngineError())
        for result in list(self._calls):
            if not result.done():
                result.set_exception(EngineError())

    def _deliver(self, deliveries: list[Delivery]) -> None:
        """Hand a step's events to their readers: one call into the loop a step. On the MLX thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop may be closed at exit
            self._loop.call_soon_threadsafe(self._sort, deliveries)

    def _sort(self, deliveries: list[Delivery]) -> None:
        for sequence, event in deliveries:
            if inbox := self._inboxes.get(sequence):
                inbox.put(event)

    async def _require_memory(self, attached: _Attached, request: GenerationRequest) -> None:
        """Refuse what would not fit even alone, by the memory that is free now."""

        def require() -> None:
            attached.memory.require_possible(
                len(request.prompt), request.max_tokens, field=request.prompt_field
            )

        try:
            require()
        except InvalidRequestError:
            # Less may have been free when the budget was set, which is when a model last came or went.
            await self.call(self._worker.adapt)
            require()

    def _check(self, request: GenerationRequest) -> _Attached:
        """Refuse what would fail, or kill the process, inside a step."""
        self._require_running()
        attached = self._models.get(request.model_id)
        if attached is None and request.model_id in self._embedders:
            raise CapabilityError("This model gives embeddings only.", capability="completion", field="model")
        if attached is None:
            raise ModelNotFoundError(request.model_id)
        vocab_size = attached.vocab_size
        if not request.prompt:
            raise InvalidRequestError("The prompt is empty.", field=request.prompt_field)
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
            raise InvalidRequestError(
                f"The prompt holds token ids outside 0 to {vocab_size - 1}.",
                field=request.prompt_field,
            )
        if request.max_tokens < 0:
            raise InvalidRequestError("max_tokens must not be negative.", field="sampling.max_tokens")
        for token_id in request.sampling.logit_bias:
            if not 0 <= token_id < vocab_size:  # MLX on a CPU would write outside its buffer
                raise InvalidRequestError(
                    f"logit_bias: {token_id} is not a token id of this model (0 to {vocab_size - 1}).",
                    field="sampling.logit_bias",
                )
        if self._waiting >= self._max_waiting + max(0, self._max_batch_size - attached.running):
            raise OverloadedError(
                "Too many requests are waiting; try again shortly.", retry_after_seconds=1.0
            )
        return attached


def _groups_of_like_length(inputs: SequenceOf[SequenceOf[int]]) -> Iterator[list[int]]:
    """Indices of inputs, all of them, in groups that waste little on padding and take moderate time."""
    group: list[int] = []
    for i in sorted(range(len(inputs)), key=lambda i: len(inputs[i])):
        if group and len(inputs[i]) * (len(group) + 1) > _EMBEDDING_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _coalesced(events: list[EngineEvent | OsaurusError]) -> list[EngineEvent | OsaurusError]:
    """The same events with neighbouring TokensGenerated made one."""
    if len(events) < 2:
        return events
    merged: list[EngineEvent | OsaurusError] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, TokensGenerated) and isinstance(last, TokensGenerated):
            merged[-1] = TokensGenerated(last.tokens + event.tokens)
        else:
            merged.append(event)
    return merged
