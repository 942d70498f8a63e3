"""The rows of a batch that gain a token every step.

One step is in flight: the pass for the next token is built and started before this step's token is
awaited, so the device always has work (the scheme of mlx_lm.generate.GenerationBatch). Rows under a
constraint are no exception: what may come next is worked out from this step's token while the device
is busy with the pass, and the choice is added to that. A row's first token is one. It is read as soon
as it is there, since somebody waits for it: MLX's CPU back end holds up whoever starts a pass until
most of it is done.

A row that runs alone may guess ahead (speculation.py). Its tokens are then read as they come, since
a guess follows the last one, and one pass verifies a guess. Between two steps the state is the same
in all cases, so rows join and leave at any time.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeAlias, cast

import mlx.nn as nn

from osaurus_grpc.engine import layers
from osaurus_grpc.engine.batch_row import BatchRow
from osaurus_grpc.engine.logprobs import LogprobRow
from osaurus_grpc.engine.memory import spare_rows
from osaurus_grpc.engine.ragged_cache import STEP, lengths_of, rounded
from osaurus_grpc.engine.sampling import BatchSampler
from osaurus_grpc.engine.speculation import Drafts, Trial
from osaurus_grpc.engine.types import Token
from osaurus_grpc.errors import OsaurusError

# A row, its token, and how it ended, if it did: as batch.Decoded says it.
Result: TypeAlias = tuple[BatchRow, Token | None, "str | OsaurusError | None"]

# Recurrent states and the offsets of some caches are rebound every step without being evaluated and
# would grow a graph without bound (mlx-lm #1672); evaluating them this often keeps it short.
STATE_EVALUATION_STEPS = 64


class DecodeBatch:
    """Rows with their tokens in flight.

    Args:
        model: An mlx-lm model.
        max_rows: At most.

    Attributes:
        rows: In the order of the caches' rows, which changes when one leaves.
        spare_rows: Rows beyond its own that it may hold memory for, where that spares copies.
        trial: The guess that the last step verified, if it did.
        is_timely: Whether the last step began a pass and did nothing besides.
    """

    def __init__(self, model: nn.Module, max_rows: int) -> None:
        self.rows: list[BatchRow] = []
        self.spare_rows = max_rows
        self._max_rows = max_rows
        self.caches: list[Any] = []
        self._model = model
        self._sampler = BatchSampler()
        # The tokens to come, one a row, and their log-probabilities: chosen, and being computed.
        self._next = mx.array([], dtype=mx.uint32)
        self._details: list[LogprobRow | None] = []
        # The same tokens where they were read already and not fed yet.
        self._read: list[int] | None = None
        # Rows whose first token is being computed.
        self._new = False
        self._steps = 0
        # Tokens of the prompt that room is being made for; 0 is none.
        self._expected = 0
        self.trial: Trial | None = None
        self.is_timely = False

    def join(self, rows: Sequence[BatchRow], caches: list[Any], fed: mx.array, logits: mx.array) -> None:
        """Take in rows whose prompts are processed.

        Args:
            rows: One or more; they give up the caches of their own.
            caches: One a layer: plain ones of one row, or batch ones of several.
            fed: The last token of each prompt, shape (rows,).
            logits: What it gave, shape (rows, vocab_size).
        """
        tokens, details = BatchSampler().sample([row.sampler for row in rows], fed, logits)
        start(rows, tokens, details, [cache.state for cache in caches])
        if not self.rows:
            self.caches, self._next = caches, tokens
        else:
            self._feed_read()
            mine = self.caches if len(self.rows) > 1 else layers.as_batch(self.caches)
            theirs = caches if len(rows) > 1 else layers.as_batch(caches)
            layers.join(mine, theirs, self._seats(len(self.rows) + len(rows)))
            self.caches = mine
            self._next = mx.concatenate([self._next, tokens])
        self.rows.extend(rows)
        self._details.extend(details)
        self._new = True
        for row in rows:
            row.caches = []
        self.fit()

    def expect(self, tokens: int, share: float = 0.0) -> None:
        """A long prompt will join: make room for it little by little, that no step has to make all of it.

        Args:
            tokens: Of the prompt; 0 where none will.
            share: Of what is left to do.
        """
        self._expected = tokens
        if not (tokens and self.rows):
            return
        if layers.is_plain(self.caches):
            self.caches = layers.as_batch(self.caches)
        layers.make_way(self.caches, share, self._seats(len(self.rows) + 1), tokens)

    def step(self, *, guesses: bool = False) -> list[Result]:
        """The token of each row, and how it ended, if it did; the caller then drops rows that ended.

        Gives nothing where the tokens that are due were read by the last step: they are fed now. The
        pass for the token after this one is not started where every row ends with this one. A row that
        guesses may give several tokens.

        Args:
            guesses: Nobody else is there or about to join: a row that is alone may guess.
        """
        self.trial, self.is_timely = None, False
        self.fit()
        drafts = self._drafts() if guesses else None
        is_timely = True
        if drafts is not None and self._read is not None:
            (row,), (last,) = self.rows, self._read
            trial, is_timely = drafts.guess(row.tokens, last, row.tokens_left - 1, row.sampler)
            if trial is not None:
                self.is_timely = is_timely
                return self._verify(row, drafts, trial, last)
        waits = drafts is not None or self._waits
        if not self.rows or (self._feed_read() and not waits):
            return []
        tokens, details = self._next, self._details
        # Guesses and draws on the host need what came before: nothing can be started ahead of it.
        starts = not (self._new or waits) and any(row.tokens_left > 1 for row in self.rows)
        is_guarded = any(row.sampler.guard is not None for row in self.rows)
        logits = self._begin_next() if starts else None
        if logits is not None and not is_guarded:
            self._choose(logits)
        self.is_timely = self.is_timely and is_timely
        ids = cast("list[int]", tokens.tolist())
        if starts:
            self._note_fed(ids)
        else:
            self._read, self._new = ids, False
        results = [
            (row, *_outcome(row, token_id, detail))
            for row, token_id, detail in zip(self.rows, ids, details, strict=True)
        ]
        if logits is not None and is_guarded:
            self._choose(logits)
        return results

    def _drafts(self) -> Drafts | None:
        """The only row's, where it guesses now."""
        drafts = self.rows[0].drafts if len(self.rows) == 1 else None
        if drafts is None or not layers.is_plain(self.caches):
            return None
        drafts.rest()
        return drafts if drafts.is_active and self.rows[0].tokens_left > 1 else None

    def _verify(self, row: BatchRow, drafts: Drafts, trial: Trial, last: int) -> list[Result]:
        """One pass over the last token and a guess; the tokens up to the first that was not guessed."""
        fed = [last, *trial.tokens]
        self.trial = trial
        logits = self._model(mx.array([fed]), cache=self.caches)[0]
        results: list[Result] = []
        accepted = 0
        for token_id, detail in self._sampled(row, fed, logits):
            results.append((row, *_outcome(row, token_id, detail)))
            agrees = accepted < len(trial.tokens) and token_id == trial.tokens[accepted]
            accepted += agrees
            if results[-1][2] is not None or not agrees:
                self._next, self._read = mx.array([token_id], dtype=mx.uint32), [token_id]
                break
        self._details = [None]
        for cache in self.caches:
            cache.trim(len(trial.tokens) - accepted)
        row.tokens.extend(fed[: 1 + accepted])
        drafts.note(trial, accepted)
        return results

    def _sampled(
        self, row: BatchRow, fed: Sequence[int], logits: mx.array
    ) -> Iterator[tuple[int, LogprobRow | None]]:
        """The tokens of one row's positions, each chosen when all before it are taken as said.

        Args:
            row: The row.
            fed: What gave the logits.
            logits: Shape (len(fed), vocab_size).
        """
        if row.sampler.is_bare:
            for token_id in cast("list[int]", mx.argmax(logits, axis=-1).tolist()):
                yield token_id, None
            return
        mx.eval(logits)
        for i, token in enumerate(fed):
            tokens, details = self._sampler.sample([row.sampler], mx.array([token]), logits[i : i + 1])
            start([row], tokens, details)
            yield cast("int", tokens.item()), details[0]

    @property
    def _waits(self) -> bool:
        """Whether the logits must be known before the next pass is started."""
        return any(row.sampler.needs_host for row in self.rows)

    def _feed_read(self) -> bool:
        """Start the pass that is fed the tokens read by the last step; whether there are any."""
        if self._read is None:
            return False
        ids, self._read = self._read, None
        self._choose(self._begin_next())
        self._note_fed(ids)
        return True

    def _note_fed(self, ids: Sequence[int]) -> None:
        for row, token_id in zip(self.rows, ids, strict=True):
            row.tokens.append(token_id)

    def _begin_next(self) -> mx.array:
        """Build the pass that is fed the tokens in flight; its logits, shape (rows, vocab_size)."""
        inputs = self._inputs()
        logits = cast("mx.array", self._model(self._next[:, None], cache=self.caches, **inputs)[:, -1, :])
        if any(row.sampler.guard is not None for row in self.rows):
            # The device goes ahead while it is worked out what may come next.
            mx.async_eval(logits)  # type: ignore[no-untyped-call]  # MLX's stub
        return logits

    def _choose(self, logits: mx.array) -> None:
        """Choose what comes after the tokens in flight, and have it computed.

        The guards have been fed those tokens.
        """
        samplers = [row.sampler for row in self.rows]
        self._next, self._details = self._sampler.sample(samplers, self._next, logits)
        start(self.rows, self._next, self._details)
        self.is_timely = True
        self._steps += 1
        if self._steps % STATE_EVALUATION_STEPS == 0:
            layers.evaluate(self.caches)

    def _inputs(self) -> dict[str, mx.array]:
        """What else the model is called with: images may take fewer positions than tokens."""
        deltas = [row.position_delta for row in self.rows]
        return {"position_deltas": mx.array(deltas)} if any(deltas) else {}

    def drop(self, leaving: Collection[BatchRow]) -> None:
        """Let rows leave, with their caches, whatever token they are at. The last ones take their seats."""
        gone = [i for i, row in enumerate(self.rows) if row in leaving]
        if not gone:
            return
        order = layers.arrangement(len(self.rows), gone)
        if not order:
            self.clear()
            return
        self.rows = [self.rows[i] for i in order]
        self._details = [self._details[i] for i in order]
        if self._read is not None:
            self._read = [self._read[i] for i in order]
        self._next = self._next[mx.array(order)]
        single = layers.as_single(self.caches, order[0]) if len(order) == 1 else None
        if single is None:
            layers.leave(self.caches, order)
            self.fit()
        else:
            self.caches = single

    def _seats(self, rows: int) -> int:
        """Rows to make room for when there are so many and the caches are copied anyway."""
        spare = min(self.spare_rows, spare_rows(rows))
        return max(rows, min(self._max_rows, rows + max(spare // 2, min(spare, 1))))

    def fit(self) -> None:
        """Give back memory beyond what may be held: of rows that left or do not come, or of long ones."""
        seats, capacity = layers.places(self.caches)
        if not seats:
            return
        rows = len(self.rows) + bool(self._expected)
        longest = max(*lengths_of(self.caches), self._expected)
        allowed = max(rows, min(self._max_rows, rows + min(self.spare_rows, spare_rows(rows))))
        if seats * capacity > allowed * (longest + STEP):
            layers.resize(self.caches, self._seats(rows), rounded(longest + 1))

    def clear(self) -> None:
        """Drop all rows, whatever state an exception left them in."""
        self.rows, self.caches, self._details = [], [], []
        self._next = mx.array([], dtype=mx.uint32)
        self._read, self._new = None, False
        self._expected = 0


def start(
    rows: Sequence[BatchRow], tokens: mx.array, details: Sequence[LogprobRow | None], states: object = ()
) -> None:
    """Have chosen tokens computed, with all that a later step would otherwise find unevaluated."""
    pending = [array for detail in details if detail is not None for array in detail.arrays()]
    penalties = [
        array for row in rows if row.sampler.penalties is not None for array in row.sampler.penalties.state()
    ]
    mx.async_eval(tokens, pending, penalties, states)  # type: ignore[no-untyped-call]  # MLX's stub


def _outcome(
    row: BatchRow, token_id: int, detail: LogprobRow | None
) -> tuple[Token | None, str | OsaurusError | None]:
    """Note a row's new token; what of it is shown, and whether the row ends."""
    row.tokens_left -= 1
    guard = row.sampler.guard
    if guard is not None:
        guard.feed(token_id)
    token = Token(token_id) if detail is None else detail.token(token_id)
    if token_id in row.end_tokens:
        return token, "end_token"
    if guard is not None and guard.failure is not None:
        return None, guard.failure
    if guard is not None and guard.is_done:
        return token, "stop"
    return token, None if row.tokens_left else "length"
