"""Penalties and biases of logits, of all rows of a batch in one go, each row with settings of its own.

A row's state is what it looks back at: the tokens in its repetition window and those it generated.
Where the device is the CPU, the state is numbers on the host, and only the logits of tokens that are
looked back at are touched, where they lie. Elsewhere the state is arrays on the device, one for all
rows; they are made anew when rows join or leave, out of those that the rows had before.

The repetition penalty is that of the CTRL paper (arXiv:1909.05858), by the sign of the logit; the other
two are OpenAI's (https://platform.openai.com/docs/api-reference/chat).
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from osaurus_grpc.engine.types import SamplingParams

# What a logit is held to when it is divided by a tiny repetition penalty.
_LARGEST_LOGIT = 1e30

_Floats = npt.NDArray[np.float32]
_Ids = npt.NDArray[np.int64]


class TokenCounts:
    """How often each of some tokens occurs."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids: _Ids = np.zeros(16, np.int64)
        self._counts: _Floats = np.zeros(16, np.float32)

    def add(self, token_id: int, times: int = 1) -> None:
        """Count a token, or discount it."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        self._counts[place] += times

    @property
    def ids(self) -> _Ids:
        """Every token once, also those whose count is down to 0."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> _Floats:
        """Of each token in ids."""
        return self._counts[: len(self._places)]


class Penalties:
    """What one row looks back at.

    Args:
        params: The row's settings.
        context: Tokens of the prompt and, after a rebuild, those generated, without the one that is
            fed next.
        generated: How many tokens at the end of context were generated.
        next_is_generated: Whether the token fed next was generated (after a rebuild) or ends the
            prompt.

    Attributes:
        window: Tokens in the repetition window, the oldest first; None where nothing is looked for.
            Grows without bound only where all tokens are looked back at.
        seen: Counts of the tokens in the window.
        said: Counts of the generated tokens; None where nothing is looked for.
        bias: Ids and what is added to their logits; None where nothing is.
        on_device: The arrays that hold this state, and the row's place in them, once there are any.
    """

    def __init__(
        self, params: SamplingParams, context: Sequence[int], *, generated: int, next_is_generated: bool
    ) -> None:
        self.params = params
        self.window: list[int] | None = None
        self.seen, self.said = TokenCounts(), None
        self.counts_next = next_is_generated
        if params.repetition_penalty != 1.0 and params.repetition_context != 0:
            keep = len(context) if params.repetition_context < 0 else params.repetition_context
            self.window = list(context[-keep:] if keep else ())
            for token_id in self.window:
                self.seen.add(token_id)
        if params.presence_penalty or params.frequency_penalty:
            self.said = TokenCounts()
            for token_id in context[len(context) - generated :]:
                self.said.add(token_id)
        self.bias: tuple[_Ids, _Floats] | None = None
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias.keys(), np.int64)
            self.bias = ids, np.fromiter(params.logit_bias.values(), np.float32)
        self.on_device: tuple[DevicePenalties, int] | None = None

    def note(self, token_id: int) -> None:
        """A token was fed."""
        if self.window is not None:
            self.window.append(token_id)
            self.seen.add(token_id)
            if len(self.window) > self.params.repetition_context > 0:
                self.seen.add(self.window.pop(0), -1)
        if self.said is not None and self.counts_next:
            self.said.add(token_id)
        self.counts_next = True

    def state(self) -> list[mx.array]:
        """Arrays that grow lazily from step to step unless they are evaluated."""
        return [] if self.on_device is None else self.on_device[0].state()


def apply_on_host(rows: Sequence[Penalties | None], fed: Sequence[int], logits: _Floats) -> None:
    """Note the tokens that were fed and penalise the logits they gave, in place.

    Args:
        rows: One a row; None is left alone.
        fed: One a row.
        logits: Shape (rows, vocab_size).
    """
    for row, token_id in zip(rows, fed, strict=True):
        if row is not None:
            row.note(token_id)
    _repetition_on_host([(i, row) for i, row in enumerate(rows) if row and row.window], logits)
    _counted_on_host([(i, row) for i, row in enumerate(rows) if row and row.said is not None], logits)
    biased = [(i, row.bias) for i, row in enumerate(rows) if row and row.bias is not None]
    if biased:
        places = _places([(i, ids) for i, (ids, _) in biased])
        logits[places] += np.concatenate([values for _, (_, values) in biased])


def _places(parts: Sequence[tuple[int, _Ids]]) -> tuple[_Ids, _Ids]:
    """Indices of some tokens of some rows; no place twice."""
    return (
        np.repeat([i for i, _ in parts], [len(ids) for _, ids in parts]),
        np.concatenate([ids for _, ids in parts]),
    )


def _each(values: Sequence[float], parts: Sequence[_Ids]) -> _Floats:
    """One value a row, repeated for each of its tokens."""
    return np.repeat(np.asarray(values, np.float32), [len(ids) for ids in parts])


def _repetition_on_host(rows: Sequence[tuple[int, Penalties]], logits: _Floats) -> None:
    if not rows:
        return
    parts = [row.seen.ids[row.seen.counts > 0] for _, row in rows]
    places = _places([(i, ids) for (i, _), ids in zip(rows, parts, strict=True)])
    penalty = _each([row.params.repetition_penalty for _, row in rows], parts)
    seen = logits[places]
    logits[places] = np.where(seen < 0, seen * penalty, _divided_on_host(seen, penalty))


def _divided_on_host(seen: _Floats, penalty: _Floats) -> _Floats:
    with np.errstate(over="ignore"):
        divided: _Floats = np.minimum(seen / np.maximum(penalty, 1 / _LARGEST_LOGIT), _LARGEST_LOGIT)
    return divided


def _counted_on_host(rows: Sequence[tuple[int, Penalties]], logits: _Floats) -> None:
    counted = [(i, row, row.said) for i, row in rows if row.said is not None and len(row.said.ids)]
    if not counted:
        return
    parts = [said.ids for _, _, said in counted]
    places = _places([(i, said.ids) for i, _, said in counted])
    counts = np.concatenate([said.counts for _, _, said in counted])
    frequency = _each([row.params.frequency_penalty for _, row, _ in counted], parts)
    presence = _each([row.params.presence_penalty for _, row, _ in counted], parts)
    logits[places] -= frequency * counts + presence


@dataclass(slots=True)
class _Part:
    """A row's state out of arrays: counts of shape (vocab_size,), a ring of the window's tokens."""

    seen: mx.array
    said: mx.array
    ring: mx.array
    fed: int


class DevicePenalties:
    """The state of all rows of a batch on the device.

    Args:
        rows: One a row of the batch; None penalises nothing.
        vocab_size: Width of the logits.
    """

    def __init__(self, rows: Sequence[Penalties | None], vocab_size: int) -> None:
        self._rows = list(rows)
        self._vocab_size = vocab_size
        parts = [self._part(row) for row in rows]
        self._seen = mx.stack([part.seen for part in parts])
        self._said = mx.stack([part.said for part in parts])
        width = max(part.ring.shape[0] for part in parts)
        self._ring = mx.stack([mx.pad(part.ring, (0, width - part.ring.shape[0])) for part in parts])
        # Tokens that each row's window has had.
        self._fed = [part.fed for part in parts]
        self._bias = mx.stack([self._row_bias(row) for row in rows])
        params = [SamplingParams() if row is None else row.params for row in rows]
        self._repetition = mx.array([p.repetition_penalty for p in params])[:, None]
        self._frequency = mx.array([p.frequency_penalty for p in params])[:, None]
        self._presence = mx.array([p.presence_penalty for p in params])[:, None]
        for i, row in enumerate(rows):
            if row is not None:
                row.on_device = self, i

    def _part(self, row: Penalties | None) -> _Part:
        """A row's state: what other arrays have of it, or else what it began with."""
        if row is not None and row.on_device is not None:
            other, i = row.on_device
            held = other._ring[i, : _width(row)]
            return _Part(other._seen[i], other._said[i], held, other._fed[i])
        seen, said = np.zeros((2, self._vocab_size), np.float32)
        ring = np.zeros(0 if row is None else _width(row), np.int32)
        window: list[int] = []
        if row is not None:
            window = row.window or []
            seen[row.seen.ids] = row.seen.counts
            if row.said is not None:
                said[row.said.ids] = row.said.counts
            if len(ring):
                ring[: len(window)] = window
        return _Part(mx.array(seen), mx.array(said), mx.array(ring), len(window))

    def _row_bias(self, row: Penalties | None) -> mx.array:
        bias = np.zeros(self._vocab_size, np.float32)
        if row is not None and row.bias is not None:
            bias[row.bias[0]] = row.bias[1]
        return mx.array(bias)

    def apply(self, fed: mx.array, logits: mx.array) -> mx.array:
        """Note the tokens that were fed and penalise the logits they gave. Lazy.

        Args:
            fed: Shape (rows,).
            logits: float32, shape (rows, vocab_size).

        Returns:
            float32, shape (rows, vocab_size).
        """
        self._note(fed.astype(mx.int32))
        divided = mx.minimum(logits / mx.maximum(self._repetition, 1 / _LARGEST_LOGIT), _LARGEST_LOGIT)
        penalised = mx.where(logits < 0, logits * self._repetition, divided)
        logits = mx.where(self._seen > 0, penalised, logits)
        return logits - self._frequency * self._said - self._presence * (self._said > 0) + self._bias

    def _note(self, fed: mx.array) -> None:
        """Count the tokens; one that its row's full window has had longest leaves it."""
        looking = [i for i, row in enumerate(self._rows) if row is not None and row.window is not None]
        full = [i for i in looking if 0 < _width(self._rows[i]) <= self._fed[i]]
        if full:
            places = mx.array([self._fed[i] % _width(self._rows[i]) for i in full])
            oldest = self._ring[mx.array(full), places]
            self._seen = self._seen.at[mx.array(full), oldest].add(-1.0)
        if looking:
            index = mx.array(looking)
            self._seen = self._seen.at[index, fed[index]].add(1.0)
        bounded = [i for i in looking if _width(self._rows[i])]
        if bounded:
            places = mx.array([self._fed[i] % _width(self._rows[i]) for i in bounded])
            self._ring[mx.array(bounded), places] = fed[mx.array(bounded)]
        counting = []
        for i, row in enumerate(self._rows):
            if row is None:
                continue
            self._fed[i] += row.window is not None
            if row.said is not None and row.counts_next:
                counting.append(i)
            row.counts_next = True
        if counting:
            index = mx.array(counting)
            self._said = self._said.at[index, fed[index]].add(1.0)

    def state(self) -> list[mx.array]:
        """Arrays that grow lazily from step to step unless they are evaluated."""
        return [self._seen, self._said, self._ring]


def _width(row: Penalties | None) -> int:
    """Tokens of a row's window at most; 0 where it is not bounded, or there is none."""
    return 0 if row is None or row.window is None else max(0, row.params.repetition_context)
