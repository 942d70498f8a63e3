"""From a batch of logits to one token a row, each row with settings of its own.

A row's randomness comes from a counter on the host: the n-th token of a sequence uses the n-th
key of a generator seeded with the sequence's seed, so neither the other rows nor a rebuilt batch
change what a seeded request says. The key gives each token of the vocabulary noise of its own, and the
token of the largest sum of logit and noise is taken (Gumbel's trick), of the vocabulary or of the
candidates that top_k, top_p and min_p leave. Logits that differ in their last bits, as those of one
prompt do by what of it was cached and what runs beside it, then give the same token but where two sums
are that near. (Inverting the cumulative distribution at one number does not: each of thousands of
improbable tokens ends at a border that all the tokens before it move.)

Rows of one kind are computed together: greedy rows by one argmax, plain rows by another, rows that
truncate the distribution by one sort. Where the device is the CPU, rows that are not greedy are drawn on
the host instead (host_sampling).

A row under a constraint is sampled from what its mask leaves, after penalties and bias; the
log-probabilities reported are those before the mask. Its mask needs the token that was fed, the pass
does not: decoding.py has the one computed while the other runs.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from osaurus_grpc.engine import host_sampling
from osaurus_grpc.engine.guard import Guard
from osaurus_grpc.engine.logprobs import LogprobRow, LogprobTable
from osaurus_grpc.engine.penalties import DevicePenalties, Penalties, apply_on_host
from osaurus_grpc.engine.types import Constraint, SamplingParams
from osaurus_grpc.models.platform import mx

_KEY_BITS = 64
# Half the distance of MLX's uniform numbers: added to them, none is 0.
_HALF_STEP = 2.0**-33
# Below this a row is greedy: the inverse of a denormal temperature is no float32.
_COLDEST_TEMPERATURE = 1e-6
# By row: a bit a token, uint32, shape (words,).
_Masks: TypeAlias = dict[int, npt.NDArray[np.uint32]]
# Whether logits are in the host's memory and computed by its cores.
_IS_HOST = mx.default_device().type == mx.DeviceType.cpu


class RowSampler:
    """The sampling state of one sequence.

    Args:
        params: Its settings.
        prompt: Its prompt's token ids, at least one.
        generated: Tokens generated before the batch was rebuilt; empty at first.
        top_logprobs: As GenerationRequest.top_logprobs.
        seed: The resolved seed.
        vocab_size: Width of the logits.
        constraint: As GenerationRequest.constraint.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        generated: Sequence[int],
        *,
        top_logprobs: int | None,
        seed: int,
        vocab_size: int,
        constraint: Constraint | None = None,
    ) -> None:
        self.params = params
        self.guard = None if constraint is None else Guard(constraint, generated)
        self.top_logprobs = None if top_logprobs is None else min(top_logprobs, vocab_size)
        self.is_greedy = params.temperature < _COLDEST_TEMPERATURE or params.top_k == 1
        self.truncates = not self.is_greedy and (
            0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0
        )
        self.penalties: Penalties | None = None
        if (
            params.logit_bias
            or params.presence_penalty
            or params.frequency_penalty
            or params.repetition_penalty != 1.0
        ):
            self.penalties = Penalties(
                params,
                [*prompt, *generated][:-1],
                generated=max(0, len(generated) - 1),
                next_is_generated=bool(generated),
            )
        # Whether its next token is chosen on the host, where the logits are awaited.
        self.needs_host = _IS_HOST and not (self.is_greedy and self.penalties is None)
        self._random = random.Random(seed)  # noqa: S311  (reproducible sampling, not secrets)
        for _ in generated:
            self.draw()

    def draw(self) -> int:
        """The key of this step's noise."""
        return self._random.getrandbits(_KEY_BITS)

    @property
    def is_bare(self) -> bool:
        """Whether its token is the most probable one and nothing else is asked for."""
        return self.is_greedy and self.penalties is None and self.guard is None and self.top_logprobs is None

    def shadow(self) -> RowSampler:
        """One that draws with the keys that are next here, for guesses: free of penalties and masks."""
        made = copy.copy(self)
        made.guard = made.penalties = made.top_logprobs = None
        made._random = random.Random()  # noqa: S311  (as above)
        made._random.setstate(self._random.getstate())
        return made


@dataclass(frozen=True, slots=True)
class _Truncation:
    """Settings of the rows that truncate, as columns of shape (rows, 1)."""

    inverse_temperature: mx.array
    top_p: mx.array
    top_k: mx.array
    log_min_p: mx.array


class BatchSampler:
    """Samples a batch whose rows are RowSamplers; keeps what depends only on which rows there are.

    Args:
        on_host: Draw on the host, where the logits are awaited, unless all rows are greedy; None does
            so where the device is the host.
    """

    def __init__(self, *, on_host: bool | None = None) -> None:
        self._on_host = _IS_HOST if on_host is None else on_host
        self._rows: tuple[RowSampler, ...] = ()
        self._greedy: list[int] = []
        self._plain: list[int] = []
        self._truncating: list[int] = []
        self._inverse_temperature = mx.array([])
        self._truncation: _Truncation | None = None
        self._order: mx.array | None = None
        self._penalties: DevicePenalties | None = None

    def sample(
        self, rows: Sequence[RowSampler], fed: mx.array, logits: mx.array
    ) -> tuple[mx.array, list[LogprobRow | None]]:
        """Choose one token a row. Lazy, but for draws on the host.

        The guards of rows with a constraint have been fed all tokens up to those fed here.

        Args:
            rows: One a row of the batch.
            fed: Token ids that gave these logits, shape (rows,).
            logits: Of the model's dtype, shape (rows, vocab_size).

        Returns:
            Token ids, uint32, shape (rows,), and the log-probabilities of the rows that asked.
        """
        self._plan(rows)
        is_constrained = any(row.guard is not None for row in rows)
        if is_constrained:
            mx.async_eval(logits)  # type: ignore[no-untyped-call]  # MLX's stub
        logits = logits.astype(mx.float32)
        if any(row.penalties is not None for row in rows):
            logits = self._penalised(rows, fed, logits)
        tokens = self._choose(rows, logits, _masks(rows) if is_constrained else {})
        return tokens, _details(rows, logits, tokens)

    def _penalised(self, rows: Sequence[RowSampler], fed: mx.array, logits: mx.array) -> mx.array:
        if self._on_host:
            # A view: what numpy writes is what MLX reads. Nobody else holds these logits.
            view = np.array(logits, copy=False)
            apply_on_host([row.penalties for row in rows], cast("list[int]", fed.tolist()), view)
            return logits
        if self._penalties is None:
            self._penalties = DevicePenalties([row.penalties for row in rows], logits.shape[1])
        return self._penalties.apply(fed, logits)

    def _plan(self, rows: Sequence[RowSampler]) -> None:
        """Sort the rows by kind, where they are not those of the last step."""
        if len(rows) == len(self._rows) and all(a is b for a, b in zip(rows, self._rows, strict=True)):
            return
        self._rows = tuple(rows)
        self._penalties = None
        self._greedy = [i for i, row in enumerate(rows) if row.is_greedy]
        self._truncating = [i for i, row in enumerate(rows) if row.truncates]
        self._plain = [i for i, row in enumerate(rows) if not row.is_greedy and not row.truncates]
        self._inverse_temperature = _column([1.0 / rows[i].params.temperature for i in self._plain])
        self._truncation = None
        if self._truncating:
            params = [rows[i].params for i in self._truncating]
            everything = 2**30
            self._truncation = _Truncation(
                inverse_temperature=_column([1.0 / p.temperature for p in params]),
                top_p=_column([p.top_p for p in params]),
                top_k=_column([float(p.top_k or everything) for p in params]),
                log_min_p=mx.log(_column([p.min_p for p in params])),
            )
        order = [*self._greedy, *self._plain, *self._truncating]
        is_sorted = order == sorted(order)
        # Position of every row in the concatenation of the three kinds.
        self._order = None if is_sorted else mx.argsort(mx.array(order))

    def _choose(self, rows: Sequence[RowSampler], logits: mx.array, masks: _Masks) -> mx.array:
        """Token ids of all rows, shape (rows,)."""
        if self._on_host and (masks or len(self._greedy) < len(rows)):
            return _choose_on_host(rows, logits, masks)
        if masks:
            logits = _masked(logits, masks)
        parts: list[mx.array] = []
        if self._greedy:
            parts.append(mx.argmax(_take(logits, self._greedy), axis=-1))
        if self._plain:
            noise = gumbel([rows[i].draw() for i in self._plain], logits.shape[1])
            parts.append(_sample_plain(_take(logits, self._plain), self._inverse_temperature, noise))
        if self._truncation is not None:
            noise = gumbel([rows[i].draw() for i in self._truncating], logits.shape[1])
            parts.append(_sample_truncated(_take(logits, self._truncating), self._truncation, noise))
        tokens = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        return tokens if self._order is None else tokens[self._order]


def _choose_on_host(rows: Sequence[RowSampler], logits: mx.array, masks: _Masks) -> mx.array:
    """Token ids of all rows, shape (rows,)."""
    tokens = []
    for i, (row, values) in enumerate(zip(rows, np.asarray(logits), strict=True)):
        if i in masks:
            allowed = np.unpackbits(_bytes(masks[i]), count=len(values), bitorder="little")
            values = np.where(allowed.view(np.bool_), values, np.float32(-np.inf))
        tokens.append(
            int(values.argmax())
            if row.is_greedy
            else host_sampling.draw_token(values, row.params, row.draw(), truncates=row.truncates)
        )
    return mx.array(tokens, dtype=mx.uint32)


def _masks(rows: Sequence[RowSampler]) -> _Masks:
    """What the constraints let through next, by row; without the rows of which that is everything."""
    masks = {i: row.guard.mask() for i, row in enumerate(rows) if row.guard is not None}
    return {i: mask for i, mask in masks.items() if mask is not None}


def _masked(logits: mx.array, masks: _Masks) -> mx.array:
    """Take out what masks forbid, of logits in float32, shape (rows, vocab_size)."""
    count, vocab_size = logits.shape
    words = np.full((count, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
    for i, mask in masks.items():
        words[i] = mask
    # Each byte of a mask, the lowest first, picks its eight summands of 0 or -inf.
    table = mx.array(np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 0.0, -np.inf), dtype=mx.float32)
    summands = table[mx.array(_bytes(words))]
    return logits + summands.reshape(count, -1)[:, :vocab_size]


def _bytes(mask: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """The bytes of a mask, the lowest of each word first."""
    return mask.astype("<u4").view(np.uint8)


def _column(values: Sequence[float]) -> mx.array:
    """float32, shape (len(values), 1)."""
    return mx.array(list(values), dtype=mx.float32).reshape(-1, 1)


def _details(rows: Sequence[RowSampler], logits: mx.array, tokens: mx.array) -> list[LogprobRow | None]:
    """Log-probabilities of the rows that asked, in one table."""
    details: list[LogprobRow | None] = [None] * len(rows)
    asking = [(i, row.top_logprobs) for i, row in enumerate(rows) if row.top_logprobs is not None]
    if asking:
        indices = [i for i, _ in asking]
        most = max(count for _, count in asking)
        table = LogprobTable(_take(logits, indices), _take(tokens, indices), most)
        for place, (i, count) in enumerate(asking):
            details[i] = LogprobRow(table, place, count)
    return details


def _take(logits: mx.array, indices: list[int]) -> mx.array:
    """The rows at indices, without a copy where that is all of them."""
    return logits if len(indices) == logits.shape[0] else logits[mx.array(indices)]


def gumbel(keys: Sequence[int], vocab_size: int) -> mx.array:
    """Gumbel noise of all tokens, a row a key of 64 bits. float32, shape (len(keys), vocab_size)."""
    uniform = mx.concatenate(
        [mx.random.uniform(shape=(1, vocab_size), key=mx.random.key(key)) for key in keys]
    )
    # The largest noise comes of the numbers near 0, which float32 tells apart, unlike those near 1.
    return -mx.log(-mx.log1p(-(uniform + _HALF_STEP)))


def _sample_plain(logits: mx.array, inverse_temperature: mx.array, noise: mx.array) -> mx.array:
    """Draw from the whole distribution. Shapes (rows, vocab_size), (rows, 1), (rows, vocab_size)."""
    scaled = (logits - mx.max(logits, axis=-1, keepdims=True)) * inverse_temperature
    return mx.argmax(scaled + noise, axis=-1)


def _sample_truncated(logits: mx.array, truncation: _Truncation, noise: mx.array) -> mx.array:
    """Draw from what top_k, top_p and min_p leave of the distribution at its temperature.

    top_p and min_p look at the probabilities before temperature, as mlx-lm's samplers do; each row
    keeps its most probable token whatever the settings.
    """
    order = mx.argsort(-logits, axis=-1)
    descending = mx.take_along_axis(logits, order, axis=-1)
    shifted = descending - descending[:, :1]
    probabilities = mx.exp(shifted)
    mass_before = mx.cumsum(probabilities, axis=-1, inclusive=False)
    total = mass_before[:, -1:] + probabilities[:, -1:]
    rank = mx.arange(logits.shape[-1])
    kept = (
        (rank < truncation.top_k)
        & (mass_before < truncation.top_p * total)
        & (shifted >= truncation.log_min_p)
    ) | (rank == 0)
    scores = shifted * truncation.inverse_temperature + mx.take_along_axis(noise, order, axis=-1)
    chosen = mx.argmax(mx.where(kept, scores, -mx.inf), axis=-1)
    return mx.take_along_axis(order, chosen[:, None], axis=-1)[:, 0]
