"""Who may run so that the KV caches fit in memory. Counts bytes; holds no tensors.

All models share one budget. What a model's running sequences take of it is computed, not measured,
and errs upwards: a batch is one tensor a layer, every row as long as the longest, grown in steps of 256
tokens. A row that joins has caches of its own until it is written into the batch's, and where these
are copied to grow, a few layers exist twice. A batch of B rows is therefore counted as B + 1 rows of
the longest one's length. One long row among many short ones is dear, so it waits until few enough of
them are left.

A batch that holds memory for more rows than it has need not be copied when one joins, and one that
keeps what a row left need not be copied then. Such spare rows are counted too, but they have only
what nobody else wants: running sequences and kept beginnings go first.

A sequence is let in with the tokens it has and room for one step of growth, not with all it might
generate: answers are mostly far shorter than their limit, and a default of some thousand tokens
would leave most of the memory unused. Where the running sequences grow into the budget, the youngest
one gives its row back and waits at the queue's head; its tokens are kept and it goes on from them,
computed anew or found in the prompt cache (recomputation as in vLLM, arXiv:2309.06180, section 4.5).
Each time that happens to a sequence, the room it needs to come back doubles, so that it happens to
one sequence a logarithmic number of times.

Waiting sequences are let in in order of arrival. One that does not fit may be passed by later ones
that do, some times; from then on nobody is let in before it, in whatever model.

Kept beginnings (the prompt cache) have what the running sequences leave of the budget. While one of
them is cut out of a batch or put back into it, another copy of that one sequence may exist for a moment;
that, weights and activations are beyond the budget.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from osaurus_grpc.engine.sequence import Sequence
from osaurus_grpc.errors import ContextLengthError, InvalidRequestError

# mlx-lm's caches allocate in steps of so many tokens; also the growth a sequence is let in with.
STEP_TOKENS = 256
# Later sequences that may be let in before one that does not fit.
_PATIENCE = 8
# Of the memory that is left when the weights are in: the rest is for activations and everybody else.
_SHARE_OF_FREE_MEMORY = 0.75
_FOREVER = float("inf")


@dataclass(frozen=True, slots=True)
class KVFootprint:
    """Bytes that one sequence's caches take, all layers together.

    Attributes:
        token_bytes: Of each token, in layers that keep all of them.
        windows: A pair for each kind of layer that keeps the last tokens only: how many, and bytes of
            each.
        state_bytes: Of recurrent layers, whatever the length.
    """

    token_bytes: int
    windows: tuple[tuple[int, int], ...] = ()
    state_bytes: int = 0

    def row_bytes(self, tokens: int) -> int:
        """Of a row with so many tokens, allocated in steps, while it grows."""
        held = tokens + STEP_TOKENS
        sliding = sum(min(held, window + STEP_TOKENS) * each for window, each in self.windows)
        return held * self.token_bytes + sliding + self.state_bytes

    def batch_bytes(self, rows: int, longest: int) -> int:
        """Of a batch whose longest row has so many tokens, a joining row's copy included."""
        return (rows + 1) * self.row_bytes(longest) if rows else 0

    def tokens_within(self, limit: int) -> int:
        """Tokens of the longest sequence that can run alone; -1 where not even an empty one can."""
        if self.batch_bytes(1, 0) > limit:
            return -1
        low, high = 0, 2**40
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.batch_bytes(1, middle) <= limit else (low, middle - 1)
        return low


def spare_rows(rows: int) -> int:
    """Rows that a batch of so many may hold memory for beyond them, at most.

    As many again: then rows that join or leave one by one have a batch copied a logarithmic number of
    times. A row that is alone has caches of its own.
    """
    return max(2, rows) if rows > 1 else 0


class KeptCaches(Protocol):
    """Caches that can be dropped: the prompt cache."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def allow(self, nbytes: int) -> None:
        """Hold no more than so many bytes from now on."""
        ...


class KVBudget:
    """The bytes that the KV caches of all models may take, kept beginnings included.

    Written on the MLX thread; the figures may be read on others.

    Args:
        limit_bytes: The budget; negative is a share of the memory that is free, see adapt().
    """

    def __init__(self, limit_bytes: int = -1) -> None:
        self._is_fixed = limit_bytes >= 0
        self.limit_bytes = limit_bytes if self._is_fixed else 2**62
        self.preemptions = 0
        self._members: list[KVMemory] = []
        # A waiting sequence that was passed often enough: nobody is let in before it.
        self.impatient: Sequence | None = None

    def adapt(self, free_bytes: int) -> None:
        """Follow what memory is free, where the budget is not a fixed one. When weights come or go."""
        if not self._is_fixed:
            free = free_bytes + self.running_bytes + self.kept_bytes
            self.limit_bytes = int(_SHARE_OF_FREE_MEMORY * free)

    def join(self, member: KVMemory) -> None:
        """A model came into service."""
        self._members.append(member)

    def leave(self, member: KVMemory) -> None:
        """A model went out of service, and its sequences with it."""
        self._members.remove(member)
        self.impatient = None  # another model's says so again when it is looked at next

    @property
    def running_bytes(self) -> int:
        """What running sequences are counted as, spare rows included."""
        return sum(member.running_bytes for member in self._members)

    @property
    def kept_bytes(self) -> int:
        """What kept beginnings take."""
        return sum(member.kept.nbytes for member in self._members)

    def running_elsewhere(self, member: KVMemory) -> int:
        """What the sequences of other models need; their spare rows give way."""
        return sum(other.needed_bytes for other in self._members if other is not member)

    def oldest_elsewhere(self, member: KVMemory) -> float:
        """When the oldest running sequence of other models was submitted."""
        return min((other.oldest for other in self._members if other is not member), default=_FOREVER)

    def press(self, member: KVMemory) -> None:
        """Let kept beginnings have what running sequences leave; those of other models go first."""
        room = self.limit_bytes - self.running_bytes - self.kept_bytes
        for holder in sorted(self._members, key=lambda other: other is member):
            held = holder.kept.nbytes
            holder.kept.allow(max(0, held + room))
            room += held - holder.kept.nbytes


class KVMemory:
    """One model's part of the budget.

    Args:
        budget: Shared by all models.
        footprint: Of this model's sequences.
        kept: Its kept beginnings.
        max_rows: Sequences that run at most.

    Attributes:
        needed_bytes: What its running sequences need at least.
        running_bytes: What they are counted as, spare rows included.
        spare_rows: Rows that its batch may hold memory for beyond those that run.
        oldest: When the oldest of them was submitted, monotonic seconds; infinity where none runs.
    """

    def __init__(self, budget: KVBudget, footprint: KVFootprint, kept: KeptCaches, max_rows: int) -> None:
        self.kept = kept
        self.needed_bytes = self.running_bytes = 0
        self.spare_rows = 0
        self._max_rows = max_rows
        self.oldest = _FOREVER
        self._budget = budget
        self._footprint = footprint
        budget.join(self)

    def close(self) -> None:
        """Give everything back: the model goes out of service."""
        self.needed_bytes = self.running_bytes = self.spare_rows = 0
        self._budget.leave(self)

    def require_possible(self, prompt_tokens: int, max_tokens: int, *, field: str = "prompt") -> None:
        """Refuse a request that would not fit even alone; waiting would not help it. On any thread.

        Args:
            prompt_tokens: Of its prompt.
            max_tokens: That it may generate.
            field: Where the prompt is.

        Raises:
            ContextLengthError: There is not memory for the prompt.
            InvalidRequestError: There is for the prompt, and not for all of max_tokens.
        """
        limit = max(0, self._footprint.tokens_within(self._budget.limit_bytes))
        room = limit - prompt_tokens
        if room < min(max_tokens, 1):
            raise ContextLengthError(
                limit=limit,
                prompt_tokens=prompt_tokens,
                field=field,
                message=f"The prompt has {prompt_tokens} tokens; the server has memory for the KV cache of "
                f"{limit}, the answer included.",
            )
        if room < max_tokens:
            raise InvalidRequestError(
                f"max_tokens must be at most {room} beside this prompt of {prompt_tokens} tokens: the server "
                f"has memory for the KV cache of {limit}, and {max_tokens} may be generated.",
                field="sampling.max_tokens",
                metadata={"limit": str(limit), "prompt_tokens": str(prompt_tokens)},
            )

    def opening(self, running: Iterable[Sequence]) -> Opening:
        """Begin a round of admissions beside these sequences."""
        return Opening(self, self._budget, self._footprint, running)

    def forget(self, sequence: Sequence) -> None:
        """A sequence ended while it waited."""
        if self._budget.impatient is sequence:
            self._budget.impatient = None

    def overdrawn(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Sequences that must give their rows back before the next step, the youngest first.

        Also notes what the others take. The oldest sequence of all always stays.
        """
        rows = list(running)
        available = self._budget.limit_bytes - self._budget.running_elsewhere(self)
        needed = self._needed(rows)
        victims: list[Sequence] = []
        if needed > available:
            rows.sort(key=_age)
            spared = 1 if rows[0].submitted_at <= self._budget.oldest_elsewhere(self) else 0
            while len(rows) > spared and needed > available:
                victims.append(rows.pop())
                needed = self._needed(rows)
        for victim in victims:
            victim.preemptions += 1
        self._budget.preemptions += len(victims)
        self._note(rows, needed)
        return victims

    def note(self, rows: list[Sequence]) -> None:
        """These sequences run now; let kept beginnings make way for them."""
        self._note(rows, self._needed(rows))

    def _note(self, rows: list[Sequence], needed: int) -> None:
        self.needed_bytes = self.running_bytes = needed
        self.oldest = min(map(_age, rows), default=_FOREVER)
        longest = max((row.total_tokens for row in rows), default=0)
        room = self._budget.limit_bytes - self._budget.running_bytes - self._budget.kept_bytes
        each = max(1, self._footprint.row_bytes(longest))
        self.spare_rows = max(0, min(spare_rows(len(rows)), self._max_rows - len(rows), room // each))
        self.running_bytes += self.spare_rows * each
        self._budget.press(self)

    def _needed(self, rows: list[Sequence]) -> int:
        longest = max((row.total_tokens for row in rows), default=0)
        return self._footprint.batch_bytes(len(rows), longest)


class Opening:
    """One round of admissions; made by KVMemory.opening().

    Attributes:
        is_full: Not even a sequence without tokens would fit.
    """

    def __init__(
        self, memory: KVMemory, budget: KVBudget, footprint: KVFootprint, running: Iterable[Sequence]
    ) -> None:
        self._memory = memory
        self._budget = budget
        self._footprint = footprint
        self._rows = list(running)
        self._longest = max(map(_grown, self._rows), default=0)
        self._elsewhere = budget.running_elsewhere(memory)
        # Sequences of this round that did not fit and that others may still pass.
        self._passed: list[Sequence] = []
        self.is_full = not self._has_room(0)

    def take(self, sequence: Sequence) -> bool:
        """Let a sequence in, where it fits and passes nobody it must not; call in order of arrival."""
        impatient = self._budget.impatient
        if impatient is not None and impatient is not sequence:
            return False
        if not self._has_room(_grown(sequence)):
            if sequence.passed >= _PATIENCE:
                self._budget.impatient = sequence
            self._passed.append(sequence)
            return False
        if impatient is sequence:
            self._budget.impatient = None
        for one in self._passed:
            one.passed += 1
            if one.passed >= _PATIENCE and self._budget.impatient is None:
                self._budget.impatient = one
        self._rows.append(sequence)
        self._longest = max(self._longest, _grown(sequence))
        self._memory.note(self._rows)
        self.is_full = not self._has_room(0)
        return True

    def _has_room(self, tokens: int) -> bool:
        """Whether another sequence, which grows to so many tokens, fits."""
        if not self._rows and not self._elsewhere:
            return True  # alone; it was found possible when it came
        needed = self._footprint.batch_bytes(len(self._rows) + 1, max(self._longest, tokens))
        return needed + self._elsewhere <= self._budget.limit_bytes


def _age(sequence: Sequence) -> float:
    return sequence.submitted_at


def _grown(sequence: Sequence) -> int:
    """Tokens of a sequence after the growth it is let in with."""
    growth = STEP_TOKENS << min(sequence.preemptions, 32)
    return sequence.total_tokens + min(sequence.tokens_left, growth)
