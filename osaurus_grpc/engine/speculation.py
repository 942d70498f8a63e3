"""Drafting tokens ahead for a sequence that runs alone, and when that pays. Holds no tensors.

A pass over k + 1 tokens reads all weights once, as a pass over one does. Where a guess of the next k
tokens can be had cheaply, one pass verifies all of it: every position is sampled by the sequence's own
sampler, and the guess is accepted as far as it agrees (decoding.py). The sampled tokens are the answer
whatever the guess was, so the answer is that of plain decoding: greedy text is the same but for
rounding, and a seeded one uses the same number of its generator for its n-th token. This is how
mlx_lm.generate.speculative_generate_step accepts.

Guesses come from the sequence itself, where its last tokens occurred before (prompt lookup,
https://github.com/apoorvumang/prompt-lookup-decoding), else from a draft model (drafting.py).

Each way of drafting is watched for each sequence. Let p be the share of guessed tokens that were
accepted lately and c what each guessed token adds to a pass, in plain steps, measured. A guess of k
tokens then gives (1 - p^(k+1)) / (1 - p) tokens for 1 + c k steps (Leviathan et al., arXiv:2211.17192,
section 3). The k that gives most is guessed; where none gives more than plain steps, the sequence goes
on without this way of drafting, and tries again after some steps, each time twice as many. The first
guess of a sequence, and after each such pause, is made in any case: what is not tried is not learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from osaurus_grpc.engine.sampling import RowSampler

# Tokens at the end that are looked for; a longer match is the better guess.
_LONGEST_MATCH = 3
_SHORTEST_MATCH = 2
# Of the share of accepted tokens: what a new sequence is taken to have seen, and how fast it fades.
_PRIOR_ACCEPTED, _PRIOR_GUESSED = 3.0, 4.0
_MEMORY = 0.85
# Plain steps until a way of drafting that did not pay is tried again, at first and at most.
_FIRST_PAUSE = 16
_LONGEST_PAUSE = 256
# Tokens of a guess that is made to learn whether guesses pay.
_PROBE_TOKENS = 4
# Of the first measurements the least counts: whatever a device does for the first time takes long.
_FIRST_MEASUREMENTS = 3
# Weight of the newest measurement.
_SMOOTHING = 0.3
# A guess must promise so much more than plain steps, since measurements are noisy.
_MARGIN = 1.03


@dataclass(slots=True)
class SpeculationCounters:
    """What drafting was good for since the start. Written on the MLX thread; others may read it.

    Attributes:
        drafted: Tokens guessed.
        accepted: Of these, tokens that became part of an answer.
    """

    drafted: int = 0
    accepted: int = 0


class Lookup:
    """Guesses from what followed the last tokens where they occurred before, the latest first."""

    def __init__(self) -> None:
        # Of each n-gram, by its tokens, the place after its latest occurrence that something follows.
        self._places: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, tokens: Sequence[int], last: int, count: int) -> list[int]:
        """The tokens that may follow, at most count; none where the end is new.

        Args:
            tokens: The sequence without its last token; from call to call it only grows.
            last: The last token.
            count: At least 1.
        """
        self._index(tokens)
        length = len(tokens) + 1
        for size in range(_LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
            if length <= size:
                continue
            end = (*tokens[length - size :], last)
            place = self._places.get(end)
            if place is not None:
                return self._from(place, tokens, last, count)
        return []

    def _index(self, tokens: Sequence[int]) -> None:
        """Note the n-grams that something follows: those that end before the last token."""
        for place in range(self._indexed + 1, len(tokens) + 1):
            for size in range(_SHORTEST_MATCH, _LONGEST_MATCH + 1):
                if place >= size:
                    self._places[tuple(tokens[place - size : place])] = place
        self._indexed = max(self._indexed, len(tokens))

    @staticmethod
    def _from(place: int, tokens: Sequence[int], last: int, count: int) -> list[int]:
        """The tokens from a place on; where they run out at the end, the guess itself goes on."""
        found = list(tokens[place : place + count])
        if len(found) < count:
            found.append(last)
        period = len(found)
        while len(found) < count:
            found.append(found[-period])
        return found


class Toll:
    """What a guessed token adds to a pass, learned from the passes that were run.

    Shared by all sequences of a model; one for each way of drafting, whose own cost is part of it.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._measurements = 0

    def observe(self, seconds: float, *, plain_seconds: float, guessed: int) -> None:
        """Learn from a step that guessed so many tokens and verified them."""
        each = max(0.0, seconds - plain_seconds) / guessed
        self._measurements += 1
        if self.seconds is None:
            self.seconds = each
        elif self._measurements <= _FIRST_MEASUREMENTS:
            self.seconds = min(self.seconds, each)
        else:
            self.seconds += _SMOOTHING * (each - self.seconds)


class Pace:
    """How many tokens to guess for one sequence in one way.

    Args:
        most: Tokens at most.
        toll: What each costs.
    """

    def __init__(self, most: int, toll: Toll) -> None:
        self.toll = toll
        self._most = most
        self._accepted, self._guessed = _PRIOR_ACCEPTED, _PRIOR_GUESSED
        self._pause = 0
        self._next_pause = _FIRST_PAUSE
        self._is_probing = True

    @property
    def is_paused(self) -> bool:
        """Whether it is off, or did not pay lately."""
        return self._most == 0 or self._pause > 0

    def rest(self) -> None:
        """A step went by without guessing in this way."""
        if self._pause:
            self._pause -= 1
            if not self._pause:
                # Trying again: as hopeful as at the beginning.
                self._accepted, self._guessed = _PRIOR_ACCEPTED, _PRIOR_GUESSED
                self._is_probing = True

    def count(self, plain_seconds: float) -> int:
        """How many tokens to guess; 0, and a pause, where it does not pay.

        Args:
            plain_seconds: What a plain step takes; 0 where none was timed yet.
        """
        if self._pause or not plain_seconds:
            return 0
        if self.toll.seconds is None:
            return self._most
        if self._is_probing:
            return min(self._most, _PROBE_TOKENS)
        share = min(self._accepted / self._guessed, 0.999)
        cost = self.toll.seconds / plain_seconds
        best, most = 0, _MARGIN
        for k in range(1, self._most + 1):
            gain = (1 - share ** (k + 1)) / (1 - share) / (1 + cost * k)
            if gain > most:
                best, most = k, gain
        if not best:
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)
        return best

    def note(self, guessed: int, accepted: int) -> None:
        """Learn from a guess; what comes after the first wrong token says nothing."""
        judged = min(guessed, accepted + 1)
        self._is_probing = False
        self._accepted = _MEMORY * self._accepted + accepted
        self._guessed = _MEMORY * self._guessed + judged


class DraftSource(Protocol):
    """A draft model, as this module sees it."""

    def propose(self, tokens: Sequence[int], last: int, count: int, sampler: RowSampler) -> Guess:
        """As Lookup.propose(); guesses nothing in a step that went by reading a long prompt."""
        ...

    def clear(self) -> None:
        """Forget everything, whatever state an exception left it in."""
        ...


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens that may come next.

    Attributes:
        tokens: The guess; may be empty.
        is_timely: Whether making it took what making it always takes.
    """

    tokens: list[int]
    is_timely: bool = True


@dataclass(frozen=True, slots=True)
class Trial:
    """A guess that is being verified.

    Attributes:
        tokens: The guess; not empty.
        pace: Learns from it.
    """

    tokens: list[int]
    pace: Pace

    def learn(self, seconds: float, plain_seconds: float) -> None:
        """Note what guessing and verifying took, against a plain step; 0 is not known."""
        if plain_seconds:
            self.pace.toll.observe(seconds, plain_seconds=plain_seconds, guessed=len(self.tokens))


class Speculation:
    """How the sequences of one model draft.

    Args:
        lookup_tokens: Tokens guessed by prompt lookup at most; 0 guesses none.
        draft_tokens: Tokens guessed by the draft model at most.
        draft: The draft model, where there is one.
        plain_seconds: Says what a plain step of one row takes; 0 while it is not known.
        counters: What it was good for.
    """

    def __init__(
        self,
        *,
        lookup_tokens: int,
        draft_tokens: int = 0,
        draft: DraftSource | None = None,
        plain_seconds: Callable[[], float],
        counters: SpeculationCounters,
    ) -> None:
        self.lookup_tokens = lookup_tokens
        self.draft_tokens = draft_tokens if draft is not None else 0
        self.draft = draft
        self.plain_seconds = plain_seconds
        self.counters = counters
        self.lookup_toll, self.draft_toll = Toll(), Toll()

    def drafts(self) -> Drafts:
        """The drafting state of a new sequence."""
        return Drafts(self)


class Drafts:
    """The drafting state of one sequence.

    Args:
        speculation: Of its model.
    """

    def __init__(self, speculation: Speculation) -> None:
        self._speculation = speculation
        self._lookup = Lookup()
        self._lookup_pace = Pace(speculation.lookup_tokens, speculation.lookup_toll)
        self._draft_pace = Pace(speculation.draft_tokens, speculation.draft_toll)

    @property
    def is_active(self) -> bool:
        """Whether guesses are worth looking for."""
        return not (self._lookup_pace.is_paused and self._draft_pace.is_paused)

    def rest(self) -> None:
        """A step went by without a guess."""
        self._lookup_pace.rest()
        self._draft_pace.rest()

    def guess(
        self, tokens: Sequence[int], last: int, limit: int, sampler: RowSampler
    ) -> tuple[Trial | None, bool]:
        """Guess what comes after a sequence.

        Args:
            tokens: The sequence without its last token.
            last: The last token.
            limit: Tokens at most.
            sampler: The sequence's; left as it is.

        Returns:
            The guess, if there is one, and whether making it took what it always takes.
        """
        plain_seconds = self._speculation.plain_seconds()
        if count := min(limit, self._lookup_pace.count(plain_seconds)):
            found = self._lookup.propose(tokens, last, count)
            if found:
                return Trial(found, self._lookup_pace), True
        draft = self._speculation.draft
        if draft is not None and (count := min(limit, self._draft_pace.count(plain_seconds))):
            guess = draft.propose(tokens, last, count, sampler)
            if guess.tokens:
                return Trial(guess.tokens, self._draft_pace), guess.is_timely
            return None, guess.is_timely
        return None, True

    def note(self, trial: Trial, accepted: int) -> None:
        """A guess was verified, and so many of its tokens were right."""
        trial.pace.note(len(trial.tokens), accepted)
        self._speculation.counters.drafted += len(trial.tokens)
        self._speculation.counters.accepted += accepted
