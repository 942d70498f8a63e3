"""The rows of a batch whose prompts are being processed.

A row keeps caches of its own, without padding, until its prompt's last pass; that pass also gives
the logits of its first token. Prompts of like length whose rest fits into a step go through it
together. Of the others the oldest goes on alone, a chunk a step, no further than to its next pause.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from osaurus_grpc.engine import layers
from osaurus_grpc.engine.batch_row import BatchRow
from osaurus_grpc.engine.decoding import DecodeBatch
from osaurus_grpc.engine.head import OutputHead

# The oldest prompt advances by so many tokens a step at least, however many short ones pass it.
_LEAST_ADVANCE = 32
# Positions a padded pass may compute for each that is a token: a pass of its own costs a row more.
_PADDING = 1.5
_FREE_PADDING = 32
# Freed buffers are given back after a pass over so many positions: its temporaries were large.
_LARGE_PASS = 256


class Prefill:
    """Rows on their way into a decode batch.

    Args:
        model: An mlx-lm model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[BatchRow] = []
        self._model = model
        self._head = OutputHead(model)

    def step(self, budget: int, decoding: DecodeBatch) -> list[BatchRow]:
        """Process about so many tokens, padding included; rows whose prompts are done move to decoding.

        Returns:
            The rows that advanced.
        """
        advanced: list[BatchRow] = []
        oldest = self.rows[0] if self.rows else None
        while self.rows and budget > 0:
            group = self._group(budget)
            if not group:
                break
            budget -= len(group) * max(len(row.pending) for row in group)
            self._finish(group, decoding)
            advanced.extend(group)
        if oldest is not None and oldest in self.rows:
            self._advance(oldest, max(budget, _LEAST_ADVANCE))
            advanced.append(oldest)
        return advanced

    def _group(self, budget: int) -> list[BatchRow]:
        """The shortest rows whose rest goes through one pass within the budget."""
        group: list[BatchRow] = []
        total = 0
        ready = (row for row in self.rows if row.before_pause == len(row.pending))
        for row in sorted(ready, key=lambda row: len(row.pending)):
            total += len(row.pending)
            positions = len(row.pending) * (len(group) + 1)
            if positions > budget or positions > _PADDING * total + _FREE_PADDING:
                break
            if group and not self._head.spares(len(row.pending)):
                break
            group.append(row)
        return group

    def _finish(self, group: Sequence[BatchRow], decoding: DecodeBatch) -> None:
        """The last pass of some prompts, and their first tokens."""
        if len(group) == 1 and not self._head.spares(len(group[0].pending)):
            self._advance(group[0], len(group[0].pending) - 1)
        lengths = [len(row.pending) for row in group]
        longest = max(lengths)
        ids = mx.array([row.pending + [0] * (longest - len(row.pending)) for row in group])
        caches: list[Any] = group[0].caches
        if len(group) > 1:
            caches = layers.merge([row.caches for row in group])
            layers.prepare(caches, lengths)
        logits = self._head.logits(ids, caches, [length - 1 for length in lengths])
        if len(group) > 1:
            layers.finalize(caches, lengths)
        for row in group:
            row.tokens.extend(row.pending)
            row.pending = []
            self.rows.remove(row)
        decoding.join(group, caches, mx.array([row.tokens[-1] for row in group]), logits)
        if len(group) * longest >= _LARGE_PASS:
            mx.clear_cache()

    def _advance(self, row: BatchRow, count: int) -> None:
        """A pass over tokens of one prompt, its last one left for _finish()."""
        taken = row.pending[: min(count, row.before_pause, len(row.pending) - 1)]
        if not taken:
            return
        self._model(mx.array([taken]), cache=row.caches)
        layers.evaluate(row.caches)
        row.tokens.extend(taken)
        row.pending = row.pending[len(taken) :]
        layers.reserve(row.caches, row.prompt_tokens + 1)
        if len(taken) >= _LARGE_PASS:
            mx.clear_cache()

    def clear(self) -> None:
        """Drop all rows, whatever state an exception left them in."""
        self.rows = []
