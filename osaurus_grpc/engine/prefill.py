"""The rows of a batch whose prompts are being processed.

A row keeps caches of its own, without padding, until its prompt's last pass; that pass also gives
the logits of its first token. Prompts of like length whose rest fits into a step go through it
together. Of the others the oldest goes on alone, a chunk a step, no further than to its next pause.
Prompts whose tokens are to be scored go alone: a pass gives the logits of all their positions. A row
that is to gain no token is done when its prompt is, and keeps its caches.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.nn as nn

from osaurus_grpc.engine import layers
from osaurus_grpc.engine.batch_row import BatchRow
from osaurus_grpc.engine.decoding import DecodeBatch
from osaurus_grpc.engine.head import OutputHead

# The oldest prompt advances by so many tokens a step at least, however many short ones pass it.
_LEAST_ADVANCE = 8
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

        Rows that gain no token leave with their caches, when their prompts are done.

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
            left = len(oldest.pending)
            self._advance(oldest, max(budget, _LEAST_ADVANCE))
            advanced.append(oldest)
            decoding.expect(oldest.prompt_tokens, (left - len(oldest.pending)) / left)
        else:
            decoding.expect(0)
        return advanced

    def _group(self, budget: int) -> list[BatchRow]:
        """The shortest rows whose rest goes through one pass within the budget."""
        group: list[BatchRow] = []
        total = 0
        ready = (row for row in self.rows if _reach(row) == len(row.pending))
        for row in sorted(ready, key=lambda row: len(row.pending)):
            if group and (row.images is not None or group[0].images is not None):
                continue  # embeddings are read in place of its tokens
            total += len(row.pending)
            positions = len(row.pending) * (len(group) + 1)
            if positions > budget or positions > _PADDING * total + _FREE_PADDING:
                break
            if group and not self._head.spares(len(row.pending)):
                break
            if _goes_alone(row):
                return group or [row]
            group.append(row)
        return group

    def _finish(self, group: Sequence[BatchRow], decoding: DecodeBatch) -> None:
        """The last pass of some prompts, and their first tokens."""
        if _goes_alone(group[0]):
            self._finish_alone(group[0], decoding)
            return
        if len(group) == 1 and not self._head.spares(len(group[0].pending)):
            self._advance(group[0], len(group[0].pending) - 1)
        lengths = [len(row.pending) for row in group]
        longest = max(lengths)
        inputs: Mapping[str, mx.array] = {}
        if (images := group[0].images) is not None:
            ids, inputs = images.inputs(self._model, len(group[0].tokens), group[0].pending)
        else:
            ids = mx.array([row.pending + [0] * (longest - len(row.pending)) for row in group])
        caches: list[Any] = group[0].caches
        if len(group) > 1:
            caches = layers.merge([row.caches for row in group], longest)
            layers.prepare(caches, lengths)
        logits = self._head.logits(ids, caches, [length - 1 for length in lengths], inputs)
        if len(group) > 1:
            layers.finalize(caches, lengths)
        for row in group:
            row.tokens.extend(row.pending)
            row.pending = []
            self.rows.remove(row)
        fed = mx.array([row.tokens[-1] for row in group]) if images is None else ids[:, -1]
        decoding.join(group, caches, fed, logits)
        if len(group) * longest >= _LARGE_PASS:
            mx.clear_cache()

    def _finish_alone(self, row: BatchRow, decoding: DecodeBatch) -> None:
        """The last pass of a prompt that is scored or gains no token."""
        self.rows.remove(row)
        logits = self._pass(row, row.pending)
        is_large = len(row.pending) >= _LARGE_PASS
        row.tokens.extend(row.pending)
        row.pending = []
        if row.tokens_left:
            decoding.join([row], row.caches, mx.array(row.tokens[-1:]), logits[-1:])
        else:
            layers.evaluate(row.caches)
        if is_large:
            mx.clear_cache()

    def _pass(self, row: BatchRow, taken: Sequence[int]) -> mx.array:
        """A pass over a prompt's next tokens; their logits, shape (tokens, vocab_size), lazy."""
        inputs: Mapping[str, mx.array] = {}
        if row.images is None:
            ids = mx.array([taken])
        else:
            ids, inputs = row.images.inputs(self._model, len(row.tokens), taken)
        logits: mx.array = self._model(ids, cache=row.caches, **inputs)[0]
        if row.scores is not None:
            mx.eval(logits)
            row.scores.note(logits, row.processed)
        return logits

    def _advance(self, row: BatchRow, count: int) -> None:
        """A pass over tokens of one prompt, its last one left for _finish()."""
        taken = row.pending[: min(count, _reach(row), len(row.pending) - 1)]
        if not taken:
            return
        self._pass(row, taken)
        layers.evaluate(row.caches)
        row.tokens.extend(taken)
        row.pending = row.pending[len(taken) :]
        layers.reserve(row.caches, row.prompt_tokens + 1)
        if len(taken) >= _LARGE_PASS:
            mx.clear_cache()

    def clear(self) -> None:
        """Drop all rows, whatever state an exception left them in."""
        self.rows = []


def _goes_alone(row: BatchRow) -> bool:
    """Whether a row's last pass is its own: all its logits are looked at, or its caches are kept."""
    return row.scores is not None or not row.tokens_left


def _reach(row: BatchRow) -> int:
    """Pending tokens that one pass may take."""
    return row.before_pause if row.scores is None else min(row.before_pause, row.scores.most_positions)
