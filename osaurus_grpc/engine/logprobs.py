"""Log-probabilities of tokens, and the most probable tokens beside them: many rows in one go.

A table is built lazily from logits and read once they are computed. Where the device is the CPU, its
logits lie in the host's memory and numpy makes the figures when they are read, while the next pass
runs: MLX's own sort of a vocabulary of 49,152 tokens takes milliseconds there. Elsewhere the device
makes them, all rows at once.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import Device, device, mx  # isort: skip  # first: it loads the BLAS

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from osaurus_grpc.engine.types import Token, TokenLogprob

# Tokens that share a maximum while the most probable ones are looked for.
_STRIDE_TOKENS = 64
# Logits of a prompt's tokens that are in memory at once, in bytes.
_PROMPT_LOGITS_BYTES = 64 * 2**20
# Positions of a prompt whose figures are made together.
_PROMPT_ROWS = 64

_Floats = npt.NDArray[np.float32]
_Ids = npt.NDArray[np.integer]


class LogprobTable:
    """Log-probabilities of one token a row, and of the row's most probable ones.

    Args:
        logits: float32, shape (rows, vocab_size).
        tokens: Token ids, shape (rows,).
        count: Most probable tokens of each row; the vocabulary's size at most.
        on_host: Make the figures on the host; None does so where the device is the host.
    """

    def __init__(
        self, logits: mx.array, tokens: mx.array, count: int, *, on_host: bool | None = None
    ) -> None:
        self._count = count
        self._rows: list[tuple[float, list[int], list[float]]] | None = None
        self._on_host = device() is Device.CPU if on_host is None else on_host
        self._arrays = [logits, tokens] if self._on_host else _on_device(logits, tokens, count)

    def arrays(self) -> list[mx.array]:
        """What must be computed before the table is read."""
        return self._arrays

    def token(self, row: int, token_id: int, count: int) -> Token:
        """A row's token with its figures.

        Args:
            row: From 0.
            token_id: The row's token.
            count: Most probable tokens to tell, as many as the table has at most.
        """
        if self._rows is None:
            values = [np.asarray(array) for array in self._arrays]
            self._rows = _on_host(values[0], values[1], self._count) if self._on_host else _read(*values)
            self._arrays = []
        chosen, ids, top = self._rows[row]
        pairs = zip(ids[:count], top[:count], strict=True)
        return Token(token_id, chosen, tuple(TokenLogprob(i, value) for i, value in pairs))


@dataclass(frozen=True, slots=True)
class LogprobRow:
    """One row of a table.

    Attributes:
        table: The table.
        index: Which of its rows.
        count: Most probable tokens that this row's request asked for.
    """

    table: LogprobTable
    index: int
    count: int

    def arrays(self) -> list[mx.array]:
        """What must be computed before the row is read."""
        return self.table.arrays()

    def token(self, token_id: int) -> Token:
        """The row's token with its figures."""
        return self.table.token(self.index, token_id, self.count)


@dataclass(slots=True, eq=False)
class PromptScores:
    """Log-probabilities of a prompt's own tokens, made while it is processed from its beginning.

    Attributes:
        prompt: Its tokens.
        count: Most probable tokens at each place; the vocabulary's size at most.
        vocab_size: Width of the logits.
        told: Tokens whose figures have been taken, from the first; after an error it goes on there.
    """

    prompt: Sequence[int]
    count: int
    vocab_size: int
    told: int = 0
    _made: list[Token] = field(default_factory=list)

    @property
    def most_positions(self) -> int:
        """Positions of a pass at most, since all their logits are in memory at once."""
        return max(_PROMPT_ROWS, _PROMPT_LOGITS_BYTES // (4 * self.vocab_size))

    def note(self, logits: mx.array, first: int) -> None:
        """Make the figures of the tokens that follow some positions.

        Args:
            logits: Of the model's dtype, shape (positions, vocab_size).
            first: The first of these positions, from 0.
        """
        known = self.told + len(self._made)
        if known == 0:
            self._made.append(Token(self.prompt[0]))
            known = 1
        last = min(first + logits.shape[0] + 1, len(self.prompt))
        for begin in range(max(known, first + 1), last, _PROMPT_ROWS):
            targets = self.prompt[begin : min(begin + _PROMPT_ROWS, last)]
            place = begin - first - 1
            rows = logits[place : place + len(targets)].astype(mx.float32)
            table = LogprobTable(rows, mx.array(list(targets)), self.count)
            self._made.extend(table.token(i, target, self.count) for i, target in enumerate(targets))

    def take(self) -> tuple[Token, ...]:
        """What was made since the last call; the prompt's first token has no log-probability."""
        made, self._made = tuple(self._made), []
        self.told += len(made)
        return made


def _on_device(logits: mx.array, tokens: mx.array, count: int) -> list[mx.array]:
    """Log-probabilities of the tokens, ids and log-probabilities of the most probable ones. Lazy."""
    normaliser = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, tokens[:, None].astype(mx.int32), axis=-1) - normaliser
    if count == 0:
        nothing = mx.zeros((logits.shape[0], 0))
        return [chosen, nothing.astype(mx.int32), nothing]
    candidates = mx.argpartition(-logits, kth=count - 1, axis=-1)[:, :count]
    values = mx.take_along_axis(logits, candidates, axis=-1)
    order = mx.argsort(-values, axis=-1)
    ids = mx.take_along_axis(candidates, order, axis=-1).astype(mx.int32)
    return [chosen, ids, mx.take_along_axis(values, order, axis=-1) - normaliser]


def _read(chosen: _Floats, ids: _Ids, top: _Floats) -> list[tuple[float, list[int], list[float]]]:
    return list(zip(chosen[:, 0].tolist(), ids.tolist(), top.tolist(), strict=True))


def _on_host(logits: _Floats, tokens: _Ids, count: int) -> list[tuple[float, list[int], list[float]]]:
    """The same figures by numpy: a row at a time, which stays in the processor's cache."""
    rows = []
    scratch = np.empty(logits.shape[1], np.float32)
    for row, token in zip(logits, tokens, strict=True):
        largest = row.max()
        np.subtract(row, largest, out=scratch)
        np.exp(scratch, out=scratch)
        normaliser = largest + np.log(scratch.sum())
        ids = most_probable(row, count)
        rows.append((float(row[token] - normaliser), ids.tolist(), (row[ids] - normaliser).tolist()))
    return rows


def most_probable(logits: _Floats, count: int) -> _Ids:
    """Ids of the largest logits in descending order, equal ones in ascending order of their ids.

    The count-th largest of the maxima of disjoint parts is a bound that count logits reach; few others
    do, so that only those few are sorted.

    Args:
        logits: Shape (vocab_size,).
        count: At most vocab_size.
    """
    if count == 0:
        return np.zeros(0, np.intp)
    strides = len(logits) // _STRIDE_TOKENS
    candidates: _Ids = np.zeros(0, np.intp)
    if count <= strides:
        # Neighbours are in different parts: numpy takes the maximum of whole lines at once.
        maxima = logits[: strides * _STRIDE_TOKENS].reshape(_STRIDE_TOKENS, strides).max(axis=0)
        bound = np.partition(maxima, strides - count)[strides - count]
        candidates = np.flatnonzero(logits >= bound)
    if len(candidates) < count:  # a small vocabulary, or logits that are no numbers
        candidates = np.arange(len(logits))
    return candidates[np.argsort(-logits[candidates], kind="stable")[:count]]
