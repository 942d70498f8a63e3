"""The one MLX thread: loads, steps, evaluates and frees, for all models.

MLX arrays that are not evaluated belong to the thread that built them, and its streams and random
state are a thread's own; so everything happens here, and only plain values leave. Others post
functions, which run between steps.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import memory_bytes, mx, trim_memory  # isort: skip  # loads the BLAS

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from mlx_lm.models.cache import make_prompt_cache

from osaurus_grpc.engine import footprint, layers
from osaurus_grpc.engine.arrivals import Arrivals
from osaurus_grpc.engine.batch import Batch, self_test
from osaurus_grpc.engine.drafting import DraftModel, KeptBesideDraft
from osaurus_grpc.engine.memory import KeptCaches, KVBudget, KVMemory
from osaurus_grpc.engine.persistence import Persistence
from osaurus_grpc.engine.prefix_disk import PrefixDisk
from osaurus_grpc.engine.prompt_cache import PromptCache, PromptCacheCounters, prompt_cache_of
from osaurus_grpc.engine.runner import Delivery, Runner
from osaurus_grpc.engine.scheduler import Scheduler
from osaurus_grpc.engine.speculation import Speculation, SpeculationCounters
from osaurus_grpc.errors import ModelUnusableError

logger = logging.getLogger(__name__)

# Without work for so long, what was freed is given back.
_REST_SECONDS = 30.0

Deliver: TypeAlias = Callable[[list[Delivery]], None]


class Worker:
    """A thread that owns MLX and the runners of all loaded models.

    Args:
        deliver: Called on the thread with what a step gave; must return at once and not raise.
        report_death: Called on the thread when it ends by an error that nothing recovers from, such as a
            device that is gone for good.
        max_batch_size: Rows of a model's batch at most.
        prefill_chunk_tokens: Prompt tokens between two decode steps at most.
        max_pause_steps: As StepClock has it.
        prompt_cache_bytes: Of a model's kept beginnings; 0 keeps none.
        prompt_cache_bits: Quantize them to 8 or 4 bits; 0 keeps them as they are.
        budget: Of the KV caches of all models.
        prefix_disk: Keeps beginnings beyond the end of the process; None keeps none.
        prompt_lookup_tokens: Tokens that a lone sequence guesses by prompt lookup at most; 0 is off.
        draft_tokens: Tokens that a draft model guesses for one at most.

    Attributes:
        prompt_cache_counters: What the kept beginnings were good for; other threads may read it.
        speculation_counters: What guesses were good for; other threads may read it.
        arrivals: Requests that are being readied; the event loop counts them.
    """

    def __init__(
        self,
        deliver: Deliver,
        report_death: Callable[[], None],
        *,
        max_batch_size: int,
        prefill_chunk_tokens: int,
        max_pause_steps: int,
        prompt_cache_bytes: int,
        prompt_cache_bits: int,
        budget: KVBudget,
        prefix_disk: PrefixDisk | None = None,
        prompt_lookup_tokens: int = 0,
        draft_tokens: int = 0,
    ) -> None:
        self._deliver = deliver
        self._report_death = report_death
        self._max_batch_size = max_batch_size
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._max_pause_steps = max_pause_steps
        self._prompt_cache_bytes = prompt_cache_bytes
        self._prompt_cache_bits = prompt_cache_bits
        self.prompt_cache_counters = PromptCacheCounters()
        self._budget = budget
        self._prefix_disk = prefix_disk
        self._prompt_lookup_tokens = prompt_lookup_tokens
        self._draft_tokens = draft_tokens
        self.speculation_counters = SpeculationCounters()
        # The models in service, for those that draft with them; with the width of their logits.
        self._models: dict[str, tuple[Any, int]] = {}
        self._memories: dict[str, KVMemory] = {}
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.arrivals = Arrivals(wake=lambda: self.post(lambda: None))
        self._runners: dict[str, Runner] = {}
        self._is_stopping = False
        self._has_stepped = False  # since memory was last given back
        # A daemon: a device call that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="mlx", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def post(self, function: Callable[[], None]) -> None:
        """Run a function on the thread before its next step. The function must not raise."""
        self._posted.put(function)

    def stop(self, timeout_seconds: float) -> bool:
        """Give up all sequences, free all models, end the thread; False where it did not end in time."""

        def end() -> None:
            self._is_stopping = True

        self.post(end)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    # What follows runs on the thread.

    def runner(self, model_id: str) -> Runner | None:
        """The runner of a loaded model. On the MLX thread only."""
        return self._runners.get(model_id)

    def attach(
        self,
        model_id: str,
        model: object,
        end_tokens: tuple[int, ...],
        vocab_size: int,
        identity: str = "",
        draft_id: str = "",
    ) -> KVMemory:
        """Take a loaded model into service; returns its part of the KV budget. On the MLX thread only.

        Raises ModelUnusableError where the draft model cannot draft.
        """
        draft = self._draft(draft_id, vocab_size)
        prompt_cache = prompt_cache_of(
            model,
            self._prompt_cache_bytes,
            bits=self._prompt_cache_bits,
            counters=self.prompt_cache_counters,
        )
        kept: KeptCaches = prompt_cache if draft is None else KeptBesideDraft(prompt_cache, draft)
        memory = KVMemory(self._budget, footprint.measure(model), kept, self._max_batch_size)
        trim_memory()  # what loading took beside the weights
        self._budget.adapt(memory_bytes())
        scheduler = Scheduler(
            max_batch_size=self._max_batch_size,
            prefill_chunk_tokens=self._prefill_chunk_tokens,
            max_pause_steps=self._max_pause_steps,
            memory=memory,
            kept=prompt_cache,
        )

        speculation = self._speculation(scheduler, draft)

        def make_batch() -> Batch:
            return Batch(model, end_tokens, self._max_batch_size, prompt_cache, speculation)

        persistence = self._persistence(model, prompt_cache, identity)
        self._runners[model_id] = Runner(model_id, make_batch, vocab_size, scheduler, persistence)
        self._memories[model_id] = memory
        self._models[model_id] = model, vocab_size
        return memory

    def require_draft(self, model_id: str) -> None:
        """Raise ModelUnusableError where a model cannot draft for any other. On the MLX thread only."""
        if model_id not in self._models:
            raise ModelUnusableError(f"Model '{model_id}' cannot draft: it gives no text.", model=model_id)
        model, _ = self._models[model_id]
        if not layers.is_plain(make_prompt_cache(model)):
            raise ModelUnusableError(
                f"Model '{model_id}' cannot draft: its KV cache cannot be cut back.", model=model_id
            )

    def _draft(self, draft_id: str, vocab_size: int) -> DraftModel | None:
        """What drafts for a model whose logits are so wide."""
        if not draft_id:
            return None
        self.require_draft(draft_id)
        model, width = self._models[draft_id]
        return DraftModel(model, min(vocab_size, width))

    def _speculation(self, scheduler: Scheduler, draft: DraftModel | None) -> Speculation | None:
        """How a model's sequences guess ahead, where they do."""
        if not self._prompt_lookup_tokens and (draft is None or not self._draft_tokens):
            return None
        return Speculation(
            lookup_tokens=self._prompt_lookup_tokens,
            draft_tokens=self._draft_tokens,
            draft=draft,
            plain_seconds=lambda: scheduler.clock.lone_seconds,
            counters=self.speculation_counters,
        )

    def _persistence(self, model: object, store: PromptCache, identity: str) -> Persistence | None:
        """What keeps a model's beginnings on the disk, where it can be done."""
        if self._prefix_disk is None or not identity or not store.max_bytes:
            return None
        return Persistence(self._prefix_disk, store, identity, model, self.post)

    def detach(self, model_id: str) -> Runner | None:
        """Take a model out of service and free what can be freed. On the MLX thread only.

        The caller tells the live sequences of the returned runner, by its close(), and calls free()
        once it holds the model no more.
        """
        if (memory := self._memories.pop(model_id, None)) is not None:
            memory.close()
        self._models.pop(model_id, None)
        return self._runners.pop(model_id, None)

    def free(self) -> None:
        """Return the memory of dropped models to the system. On the MLX thread only."""
        gc.collect()
        mx.clear_cache()
        trim_memory()
        self.adapt()

    def adapt(self) -> None:
        """Set a KV budget that is not fixed by the memory that is free. On the MLX thread only."""
        self._budget.adapt(memory_bytes())

    def _run(self) -> None:
        try:
            self_test()
        except RuntimeError:
            logger.exception("event=self_test_failed")
            raise
        try:
            while not self._is_stopping:
                self._await_work()
                self._decode()
                # What came meanwhile is prefilled in this step.
                self._run_posted(wait=False)
                self._gather()
                self._prefill()
            for runner in self._runners.values():
                runner.close()
            self._runners.clear()
            self._models.clear()
            self.free()
            # MLX's own threads behind this thread's streams: one that is left when the process ends
            # aborts it.
            mx.clear_streams()
        except Exception:  # what is left of the device cannot be trusted: end, and say so
            logger.critical("event=mlx_thread_died", exc_info=True)
            self._report_death()

    # Not in _run(), whose locals live while it waits and would keep an unloaded model in memory.

    def _await_work(self) -> None:
        """Run what was posted; where there is nothing to step, sleep until there is something.

        What was freed goes back to the system where nothing came for a while: to ask for it again takes time.
        """
        if any(runner.is_busy for runner in self._runners.values()):
            self._has_stepped = True
            self._run_posted(wait=False)
        elif self._has_stepped and not self._run_posted(wait=True, timeout_seconds=_REST_SECONDS):
            mx.clear_cache()
            trim_memory()
            self._has_stepped = False
        elif not self._has_stepped:
            self._run_posted(wait=True)

    def _decode(self) -> None:
        """The first half of a step of every model that has something to do."""
        for runner in self._runners.values():
            if runner.is_busy and (deliveries := runner.decode()):
                self._deliver(deliveries)

    def _gather(self) -> None:
        """Wait for requests that are on their way, before the first pass over those that are here."""
        if not self.arrivals.count or any(len(runner.scheduler.running) for runner in self._runners.values()):
            return
        deadline = time.monotonic() + max((runner.patience for runner in self._runners.values()), default=0.0)
        while self.arrivals.count and (left := deadline - time.monotonic()) > 0:
            self._run_posted(wait=True, timeout_seconds=left)

    def _prefill(self) -> None:
        """The second half."""
        for runner in self._runners.values():
            if runner.is_busy and (deliveries := runner.prefill()):
                self._deliver(deliveries)

    def _run_posted(self, *, wait: bool, timeout_seconds: float | None = None) -> bool:
        """Run what was posted; with wait, sleep until there is something, or for so long.

        Returns:
            Whether there was something.
        """
        has_run = False
        try:
            function = self._posted.get(block=wait, timeout=timeout_seconds)
            while True:
                has_run = True
                function()
                function = self._posted.get(block=False)
        except queue.Empty:
            return has_run
