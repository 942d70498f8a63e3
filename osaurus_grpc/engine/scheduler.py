"""Which sequences of one model run, and how much prompt a step may process. Holds no tensors.

Sequences join and leave between decode steps. Prompts are processed in chunks between the decode
steps of running sequences; a chunk's size is chosen from what steps were seen to take, so that
running streams pause for a bounded number of decode steps only. One long prompt is processed at a
time, in order of arrival; a prompt that fits into one chunk does not queue behind it.

A sequence whose prompt goes on like one that is being processed right now waits until that part is in
the prompt cache, so that sequences which arrive together and begin alike pay for their beginning once.
It waits for a running prefill only, which either gets past that part or ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from osaurus_grpc.engine.memory import KVMemory
from osaurus_grpc.engine.sequence import Sequence
from osaurus_grpc.engine.token_chain import BLOCK_TOKENS, Chain

# A chunk may take this long while nobody decodes: what a cancellation waits for at most.
_IDLE_CHUNK_SECONDS = 0.5
# A chunk is of so many tokens at least, whatever the pause: less would cost about as much.
_SMALLEST_CHUNK = 8
# A chunk while nobody decodes, before it is known what one takes.
_FIRST_CHUNK = 256
# A prompt of so many tokens is not divided for the sake of running sequences.
_PASSING_PROMPT = 128
# A prompt of so many tokens is never a long one.
_SHORT_PROMPT = 64
# Of a pass: what its prompts may wait for others that are on their way.
_GATHERING_SHARE = 0.1
# Tokens worth waiting for while another sequence computes them.
_SMALLEST_SHARED = 64
# Waits that may come to nothing, because the other one was cancelled or the cache is too small.
_PATIENCE = 3
# Weight of the newest measurement.
_SMOOTHING = 0.3
# Of the steps with a prompt, those that may take longer than the room that is left for late ones.
_LATE_SHARE = 0.05
# How far one step moves what is thought of the others.
_LATENESS_STEP = 0.04
# The room that is left for late steps at most: smaller chunks cost more, which helps nobody on a busy
# machine.
_MOST_ROOM = 0.5


class StepClock:
    """What a step costs, learned from the steps that were run.

    A forward pass is taken to cost one decode step, which reads all weights, plus a share for each
    further prompt token.

    Args:
        max_pause_steps: Decode steps that the time between two tokens of running sequences may grow to
            while a prompt is processed: one for the token itself, the others for a chunk.

    Attributes:
        decode_seconds: Of a decode step; 0 while it is not known.
        lone_seconds: Of one with a single row.
        seconds_per_prompt_token: What a prompt token adds to a pass; 0 where nothing was seen, too.
        lateness: The share by which all steps with a prompt but one in twenty exceed what was foretold, at
            most: a quantile, followed by steps up for what exceeds it and smaller ones down for the others
            (Robbins and Monro, 1951).
    """

    def __init__(self, max_pause_steps: int = 4) -> None:
        self._max_pause_steps = max_pause_steps
        self.decode_seconds = 0.0
        self.lone_seconds = 0.0
        self.seconds_per_prompt_token = 0.0
        self.lateness = 0.0
        self._largest_pass = 0

    def observe(self, seconds: float, *, decoding: int, prefilled: int) -> None:
        """Learn from a step that decoded so many rows and prefilled so many tokens."""
        if not prefilled:
            if decoding:
                self.decode_seconds = self._blend(self.decode_seconds, seconds)
            if decoding == 1:
                self.lone_seconds = self._blend(self.lone_seconds, seconds)
            return
        passes = 2 if decoding else 1
        if self.seconds_per_prompt_token:
            foretold = passes * self.decode_seconds + prefilled * self.seconds_per_prompt_token
            is_later = seconds / foretold - 1 > self.lateness
            self.lateness += _LATENESS_STEP * (is_later - _LATE_SHARE)
            self.lateness = min(_MOST_ROOM, max(0.0, self.lateness))
        self._largest_pass = max(self._largest_pass, prefilled)
        cost = max(0.0, seconds - passes * self.decode_seconds) / prefilled
        self.seconds_per_prompt_token = self._blend(self.seconds_per_prompt_token, cost)

    def pass_seconds(self, tokens: int) -> float:
        """What a pass over so many prompt tokens takes; 0 while nothing is known."""
        return self.decode_seconds + tokens * self.seconds_per_prompt_token

    @staticmethod
    def _blend(old: float, new: float) -> float:
        return new if old == 0.0 else old + _SMOOTHING * (new - old)

    def chunk_tokens(self, largest: int, *, decoding: int) -> int:
        """Tokens of the next prefill chunk: of 8, 12, 16, 24, 32, 48 and so on, or largest if that is less.

        Few sizes keep the number of different shapes small, for kernels and allocators. While nothing is
        known of what a chunk takes, running sequences are not made to wait for a large one; while chunks seem
        to cost nothing, as small ones may, for one of twice the size that was seen. Where steps are hard to
        foretell, room is left for the late ones.
        """
        if not self.seconds_per_prompt_token:
            first = _SMALLEST_CHUNK if decoding else _FIRST_CHUNK
            if not self._largest_pass:
                return min(first, largest)
            largest = min(largest, max(first, 2 * self._largest_pass))
        allowed = _IDLE_CHUNK_SECONDS
        if decoding:
            # The bound is on the whole pause, with the decode step in it.
            allowed = (self._max_pause_steps / (1 + self.lateness) - 1) * self.decode_seconds
        chunk = size = _SMALLEST_CHUNK
        while size <= largest and (size == _SMALLEST_CHUNK or self.pass_seconds(size) <= allowed):
            chunk = size
            # Powers of two, and those and a half.
            size = size // 2 * 3 if size.bit_count() == 1 else size // 3 * 4
        return min(chunk, largest)


class KeptBeginnings(Protocol):
    """What a scheduler asks the prompt cache."""

    def match_length(self, chain: Chain, tokens: SequenceOf[int]) -> int:
        """Tokens at the beginning of a prompt that need not be computed."""
        ...

    def last_place(self, length: int, stable_tokens: int, limit: int) -> int:
        """Where within its first tokens a prompt that is being processed can be taken up by others."""
        ...


class Scheduler:
    """The waiting and running sequences of one model.

    Args:
        max_batch_size: Rows at most.
        prefill_chunk_tokens: A chunk's tokens at most.
        max_pause_steps: As StepClock has it.
        memory: What KV caches may take; None counts nothing.
        kept: Beginnings that need not be computed; None is none.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        prefill_chunk_tokens: int,
        max_pause_steps: int = 4,
        memory: KVMemory | None = None,
        kept: KeptBeginnings | None = None,
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self.clock = StepClock(max_pause_steps)
        self._max_batch_size = max_batch_size
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._memory = memory
        self._kept = kept

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def sequences(self) -> Iterator[Sequence]:
        """All of them, the running ones first."""
        yield from self.running.values()
        yield from self.waiting

    @property
    def decoding(self) -> int:
        """Running sequences whose prompt is processed."""
        return sum(sequence.is_decoding for sequence in self.running.values())

    @property
    def spare_rows(self) -> int:
        """Rows beyond the running ones that the batch may hold memory for."""
        return self._max_batch_size if self._memory is None else self._memory.spare_rows

    def chunk_tokens(self) -> int:
        """Prompt tokens the next step may process, over all prompts.

        Short prompts go through one pass each, or one together, whatever the pause: in pieces, each of
        which reads all weights, several of them would take many times as long.
        """
        chunk = self.clock.chunk_tokens(self._prefill_chunk_tokens, decoding=self.decoding)
        are_short = [
            sequence.uncached_tokens <= _PASSING_PROMPT
            for sequence in self.running.values()
            if not sequence.is_decoding
        ]
        if any(are_short):
            chunk = max(chunk, _FIRST_CHUNK if all(are_short) else _PASSING_PROMPT)
        return min(chunk, self._prefill_chunk_tokens)

    def patience(self) -> float:
        """Seconds that are little beside the pass that the waiting prompts need, for others to join it."""
        tokens = sum(sequence.uncached_tokens for sequence in self.waiting)
        return _GATHERING_SHARE * self.clock.pass_seconds(min(tokens, self.chunk_tokens()))

    def admit(self) -> list[Sequence]:
        """Take the sequences that may join now, and fit in memory, out of the queue, in order of arrival.

        The caller gives each its row and calls started().
        """
        if not self.waiting:
            return []
        chunk = self.chunk_tokens()
        prefilling = [s for s in self.running.values() if not s.is_decoding]
        free = self._max_batch_size - len(self.running)
        # The prompts share the chunk. One of them may be long, which is one that its share of the next
        # chunk does not finish.
        sharing = len(prefilling)
        share = max(_SHORT_PROMPT, chunk // max(1, sharing))
        has_long = any(s.unprocessed_tokens > share for s in prefilling)
        admitted: list[Sequence] = []
        skipped: list[Sequence] = []
        opening = self._memory.opening(self.running.values()) if self._memory is not None else None
        while self.waiting and free > 0 and not (opening is not None and opening.is_full):
            sequence = self.waiting.popleft()
            if self._is_held(sequence, [*prefilling, *admitted]):
                skipped.append(sequence)
                continue
            fits = sequence.uncached_tokens <= max(_SHORT_PROMPT, chunk // (sharing + 1))
            if not fits and has_long:
                skipped.append(sequence)
                continue
            if opening is not None and not opening.take(sequence):
                skipped.append(sequence)
                continue
            has_long = has_long or not fits
            admitted.append(sequence)
            sharing += 1
            free -= 1
        self.waiting.extendleft(reversed(skipped))
        return admitted

    def _is_held(self, sequence: Sequence, prefilling: SequenceOf[Sequence]) -> bool:
        """Whether a waiting sequence should wait for what another is computing just now."""
        if self._kept is None or sequence.is_scored:
            return False
        awaited = sequence.awaited
        if awaited is not None:
            # What is left of a prompt when its last pass begins is kept when it gives the first token.
            is_computing = awaited.uid is not None and not awaited.generated
            if is_computing and self._shared_tokens(sequence, awaited) > 0:
                return True
            sequence.awaited = None
            found = self._kept.match_length(sequence.chain, sequence.prefill_tokens)
            sequence.vain_waits += found <= sequence.cached_tokens
            sequence.cached_tokens = found
        if sequence.vain_waits < _PATIENCE:
            offers = [
                (self._shared_tokens(sequence, other), other) for other in prefilling if not other.generated
            ]
            shared, other = max(offers, key=lambda offer: offer[0], default=(0, None))
            if other is not None and shared >= _SMALLEST_SHARED:
                sequence.awaited, other.is_awaited = other, True
        return sequence.awaited is not None

    def _shared_tokens(self, sequence: Sequence, other: Sequence) -> int:
        """Tokens that a waiting sequence lacks and another one is about to have computed for it."""
        assert self._kept is not None
        missing = sequence.cached_tokens // BLOCK_TOKENS
        names, others = sequence.chain.names, other.chain.names
        # Most have nothing in common, which the first block tells.
        if missing >= min(len(names), len(others)) or names[missing] != others[missing]:
            return 0
        shared = sequence.chain.common_blocks(other.chain) * BLOCK_TOKENS
        limit = min(shared, sequence.total_tokens - 1)
        place = self._kept.last_place(other.total_tokens, other.request.stable_prefix_tokens, limit)
        kept = other.cached_tokens if other.uid is None else other.kept_tokens
        return place - max(sequence.cached_tokens, kept)

    def awaited(self) -> set[int]:
        """Rows whose prompts others wait for."""
        return {uid for uid, sequence in self.running.items() if sequence.is_awaited}

    def started(self, sequence: Sequence, uid: int) -> None:
        """A sequence has a row."""
        sequence.uid = uid
        sequence.prefilled = sequence.kept_tokens = sequence.cached_tokens
        sequence.is_decoding = False
        self.running[uid] = sequence

    def ended(self, sequence: Sequence) -> None:
        """A sequence finished, failed or was cancelled, wherever it was."""
        if sequence.uid is not None:
            self.running.pop(sequence.uid, None)
            sequence.uid = None
            if self._memory is not None:
                self._memory.note(list(self.running.values()))
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            if self._memory is not None:
                self._memory.forget(sequence)

    def preempt(self) -> list[int]:
        """Send sequences for which memory no longer suffices back to the queue's head; returns their rows."""
        rows: list[int] = []
        if self._memory is None:
            return rows
        for sequence in self._memory.overdrawn(self.running.values()):
            assert sequence.uid is not None
            rows.append(sequence.uid)
            del self.running[sequence.uid]
            sequence.uid = None
            sequence.is_decoding = False
            self.waiting.appendleft(sequence)
        return rows

    def restart(self) -> list[Sequence]:
        """Take all running sequences out, in order: their rows are gone."""
        sequences = list(self.running.values())
        self.running.clear()
        if self._memory is not None:
            self._memory.note([])
        for sequence in sequences:
            sequence.uid = None
            sequence.is_decoding = False
        return sequences
