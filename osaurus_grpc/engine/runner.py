"""Runs the sequences of one model: admits, steps, and recovers from device errors.

After an exception inside a step the batch's caches are undefined (mlx-lm advances them before it
fails), so the batch is rebuilt and its sequences go on from their own tokens. They rejoin one at a
time, each on trial until its next token: an error then is that sequence's doing, and one that fails
twice is ended with an EngineError while the others go on.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from osaurus_grpc.engine.batch import Batch, BatchEvent, Decoded, Prefilled
from osaurus_grpc.engine.logprobs import PromptScores
from osaurus_grpc.engine.persistence import Persistence
from osaurus_grpc.engine.sampling import RowSampler
from osaurus_grpc.engine.scheduler import Scheduler
from osaurus_grpc.engine.sequence import Sequence
from osaurus_grpc.engine.types import EngineEvent, PrefillProgress, PrefillStarted, PromptScored
from osaurus_grpc.errors import EngineError, OsaurusError

logger = logging.getLogger(__name__)

_TRIALS = 2

Delivery: TypeAlias = tuple[Sequence, "EngineEvent | OsaurusError"]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What the first half of a step was: how long it took, and how many rows gained tokens.

    Attributes:
        seconds: It took.
        rows: Tokens it gave.
        has_first: One of them is a sequence's first.
    """

    seconds: float = 0.0
    rows: int = 0
    has_first: bool = False


class Runner:
    """One model's share of the MLX thread.

    Args:
        model_id: Its name in logs.
        make_batch: Makes an empty batch of the model.
        vocab_size: Width of the model's logits.
        scheduler: Its queue.
        persistence: Reads beginnings from the disk; None where none are there.
    """

    def __init__(
        self,
        model_id: str,
        make_batch: Callable[[], Batch],
        vocab_size: int,
        scheduler: Scheduler,
        persistence: Persistence | None = None,
    ) -> None:
        self._model_id = model_id
        self._make_batch = make_batch
        self._vocab_size = vocab_size
        self._batch = make_batch()
        self.scheduler = scheduler
        self._persistence = persistence
        if persistence is not None:
            persistence.on_resume(self._enqueue)
        self._suspects: deque[Sequence] = deque()
        self._on_trial: Sequence | None = None
        # Taken out of the queue and not yet in the batch: what an error between the two must not lose.
        self._joining: deque[Sequence] = deque()
        # Rows of cancelled sequences, removed by the next step.
        self._leaving: list[int] = []
        # Of the first half of the step that is being run.
        self._tokens = _Tokens()

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to step."""
        return bool(len(self.scheduler) or self._suspects or self._leaving or not self._batch.is_tidy)

    @property
    def patience(self) -> float:
        """Seconds for which prompts that arrived may wait for others; 0 where anything runs already."""
        if self._suspects or self.scheduler.running or not self.scheduler.waiting:
            return 0.0
        return self.scheduler.patience()

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence, once what the disk has of its beginning is read."""
        sequence.chain.extend(sequence.prefill_tokens)
        if sequence.is_scored or self._persistence is None or not self._persistence.restore(sequence):
            self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        if not sequence.is_scored:
            sequence.cached_tokens = self._batch.match_length(sequence.chain, sequence.prefill_tokens)
        self.scheduler.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence at whatever stage it is; its row is free for the next step."""
        if sequence.uid is not None:
            # Not removed here: that computes and may fail, which only step() recovers from.
            self._leaving.append(sequence.uid)
        elif sequence in self._suspects:
            self._suspects.remove(sequence)
        if self._on_trial is sequence:
            self._on_trial = None
        if self._persistence is not None:
            self._persistence.forget(sequence)
        self.scheduler.ended(sequence)

    def decode(self) -> list[Delivery]:
        """Drop who left, give every running sequence its token, and say what came of it.

        The first half of a step. What is submitted before the second half is admitted there.
        """
        self._tokens = _Tokens()
        try:
            self._leaving.extend(self.scheduler.preempt())
            if self._on_trial is not None and self._on_trial.uid is None:
                self._on_trial = None  # preempted; it comes back through the queue
            self._let_leave()
            self._batch.spare_rows = self.scheduler.spare_rows
            started = time.monotonic()
            events = self._batch.decode(self.scheduler.awaited())
            now = time.monotonic()
        except Exception:  # the device's errors have no common base class; survivors must go on
            logger.exception("event=step_failed model=%s rows=%d", self._model_id, len(self._batch))
            return self._recover()
        decoded = [event for event in events if isinstance(event, Decoded)]
        self._tokens = _Tokens(now - started, len(decoded), any(map(self._is_first, decoded)))
        return [delivery for event in events for delivery in self._interpret(event, now)]

    def prefill(self) -> list[Delivery]:
        """Admit what may join, process prompts, and say what came of it. The second half of a step."""
        deliveries: list[Delivery] = []
        try:
            self._let_leave()
            self._join(deliveries)
            self._batch.spare_rows = self.scheduler.spare_rows
            self._batch.tidy()
            chunk = self.scheduler.chunk_tokens()
            started = time.monotonic()
            events = self._batch.prefill(chunk, self.scheduler.awaited())
            now = time.monotonic()
        except Exception:
            logger.exception("event=step_failed model=%s rows=%d", self._model_id, len(self._batch))
            return [*deliveries, *self._recover()]
        self._learn([event for event in events if isinstance(event, Prefilled)], now - started)
        for event in events:
            deliveries.extend(self._interpret(event, now))
        return deliveries

    def _let_leave(self) -> None:
        while self._leaving:
            self._batch.remove(self._leaving.pop())

    def _join(self, deliveries: list[Delivery]) -> None:
        """Let sequences into the batch: suspects one by one, then the queue."""
        if self._on_trial is not None:
            return
        if self._suspects:
            self._on_trial = self._suspects.popleft()
            self._joining.append(self._on_trial)
        else:
            self._joining.extend(self.scheduler.admit())
        while self._joining:
            deliveries.extend(self._start(self._joining[0]))
            self._joining.popleft()

    def _start(self, sequence: Sequence) -> list[Delivery]:
        """Give a sequence its row."""
        request = sequence.request
        sampler = RowSampler(
            request.sampling,
            request.prompt,
            sequence.generated,
            top_logprobs=request.top_logprobs,
            seed=sequence.seed,
            vocab_size=self._vocab_size,
            constraint=request.constraint,
        )
        uid, sequence.cached_tokens = self._batch.insert(
            sequence.prefill_tokens,
            sequence.tokens_left,
            sampler,
            ignore_eos=request.ignore_eos,
            chain=sequence.chain,
            stable_tokens=request.stable_prefix_tokens,
            guesses=not sequence.strikes,  # after an error it goes on by what is known to work
            scores=self._scores(sequence),
            images=request.images,
        )
        self.scheduler.started(sequence, uid)
        if sequence.admitted_at:
            return []  # it had a row before
        sequence.admitted_at = time.monotonic()
        waited = sequence.admitted_at - sequence.submitted_at
        return [(sequence, PrefillStarted(waited, sequence.cached_tokens))]

    def _scores(self, sequence: Sequence) -> PromptScores | None:
        """What a sequence's prompt is to be scored for, if it is."""
        count = sequence.request.prompt_logprobs
        if count is None or not sequence.is_scored:
            return None
        return PromptScores(
            sequence.request.prompt, min(count, self._vocab_size), self._vocab_size, sequence.scored_tokens
        )

    def _learn(self, prompts: list[Prefilled], seconds: float) -> None:
        """Learn from a whole step, whose second half took so long; the halves overlap on a device."""
        prefilled = sum(self._advance(event) for event in prompts)
        if any(event.processed == event.total for event in prompts):
            return  # a prompt's last pass is still running
        tokens = self._tokens
        if tokens.has_first:
            return  # the step waited for that pass
        clock = self.scheduler.clock
        if self._batch.trial is not None:
            if self._batch.is_timely:
                self._batch.trial.learn(tokens.seconds, clock.lone_seconds)
            return
        if tokens.rows and not prefilled and not self._batch.is_timely:
            return  # no pass was begun, or a draft model read a prompt
        clock.observe(tokens.seconds + seconds, decoding=tokens.rows, prefilled=prefilled)

    def _is_first(self, event: Decoded) -> bool:
        """Whether a token is the first one since its sequence has a row."""
        sequence = self.scheduler.running.get(event.uid)
        return sequence is not None and not sequence.first_token_at

    def _advance(self, event: Prefilled) -> int:
        """Note how far a prompt is; returns the tokens it advanced by."""
        sequence = self.scheduler.running.get(event.uid)
        if sequence is None:
            return 0
        advanced = event.processed - sequence.prefilled
        sequence.prefilled = event.processed
        if sequence.is_awaited and event.processed < event.total:
            sequence.kept_tokens = event.processed
        return advanced

    def _interpret(self, event: BatchEvent, now: float) -> list[Delivery]:
        """What one event of the batch means for its sequence."""
        sequence = self.scheduler.running.get(event.uid)
        if sequence is None:
            return []
        match event:
            case Prefilled(processed=processed, total=total, scores=scores):
                sequence.is_decoding = processed >= total
                if sequence.generated:
                    return []  # the prompt was reported before an error
                sequence.scored_tokens += len(scores)
                scored = [(sequence, PromptScored(scores))] if scores else []
                return [*scored, (sequence, PrefillProgress(processed, total))]
            case Decoded(token=token, end=end):
                if self._on_trial is sequence:
                    self._on_trial = None
                    sequence.strikes = 0
                if end is not None:
                    self.scheduler.ended(sequence)
                if isinstance(end, OsaurusError):
                    return [(sequence, end)]
                return [(sequence, said) for said in sequence.record(token, end, now)]

    def _recover(self) -> list[Delivery]:
        """After an exception, rebuild the batch; all its sequences become suspects."""
        deliveries: list[Delivery] = []
        survivors = [*self.scheduler.restart(), *(s for s in self._joining if s.uid is None)]
        self._joining.clear()
        self._leaving.clear()
        culprit, self._on_trial = self._on_trial, None
        if culprit is None and len(survivors) == 1:
            (culprit,) = survivors  # alone, it is its own trial
        if culprit is not None:
            survivors.remove(culprit)
            culprit.strikes += 1
            if culprit.strikes >= _TRIALS:
                deliveries.append((culprit, EngineError()))
            else:
                # It goes last, so that its second failure costs the others nothing.
                survivors.append(culprit)
        self._suspects.extendleft(reversed(survivors))
        self._batch.close()
        self._batch = self._make_batch()
        return deliveries

    def close(self) -> list[Sequence]:
        """Give everything up; returns the sequences that were live."""
        live = [*self.scheduler.restart(), *self.scheduler.waiting, *self._suspects]
        if self._persistence is not None:
            live.extend(self._persistence.close())
        self.scheduler.waiting.clear()
        self._suspects.clear()
        self._leaving.clear()
        self._batch.close()
        return live
