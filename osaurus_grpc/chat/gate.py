"""Reasoning first: lets an answer reason before a grammar begins, and ends reasoning that is too long.

The engine asks; see engine.types.Constraint, whose form this has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.uint32]

_WORD_BITS = 32


class TokenConstraint(Protocol):
    """What engine.types.Constraint is, for a room that does not know the engine."""

    def accept(self, token_id: int) -> None:
        """A token was generated."""

    def mask(self) -> Mask | None:
        """Which tokens may come next."""

    @property
    def is_done(self) -> bool:
        """Nothing but the end may follow."""

    def fork(self) -> TokenConstraint:
        """A copy in the initial state."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How an answer reasons.

    Attributes:
        open_ids: Tokens of the mark before it; empty where the answer cannot open it by itself.
        close_ids: Tokens of the mark behind it, at least one.
        close: The same as bytes.
        is_open: The prompt opened it.
        max_tokens: After so many tokens it is closed; None is no limit.
    """

    open_ids: tuple[int, ...]
    close_ids: tuple[int, ...]
    close: bytes
    is_open: bool
    max_tokens: int | None = None


class ReasoningGate:
    """Holds a constraint back until the reasoning is over.

    An answer that may open its reasoning by itself chooses with its first token: the opening mark, or
    what the constraint lets through.

    Args:
        reasoning: How the answer reasons.
        inner: What holds behind it; None lets anything through.
        end_ids: Tokens that end an answer.
        vocab_size: Width of the logits.
        token_bytes: Gives a token's bytes.
        may_end: The answer may end before the constraint begins.
    """

    def __init__(
        self,
        reasoning: Reasoning,
        inner: TokenConstraint | None,
        *,
        end_ids: Sequence[int],
        vocab_size: int,
        token_bytes: Callable[[int], bytes],
        may_end: bool = False,
    ) -> None:
        self._reasoning = reasoning
        self._inner = inner
        self._end_ids = tuple(end_ids)
        self._vocab_size = vocab_size
        self._token_bytes = token_bytes
        self._may_end = may_end
        self._is_over = not reasoning.is_open and not reasoning.open_ids
        self._is_open = reasoning.is_open
        self._opened = 0  # tokens of the opening mark that are there
        self._count = 0
        self._forced = 0  # tokens of the closing mark that were forced
        self._tail = b""

    @property
    def is_done(self) -> bool:
        """Nothing but the end may follow."""
        return self._is_over and self._inner is not None and self._inner.is_done

    def accept(self, token_id: int) -> None:
        """A token was generated."""
        if self._is_over:
            if self._inner is not None:
                self._inner.accept(token_id)
        elif self._is_open:
            self._reason(token_id)
        elif token_id == self._reasoning.open_ids[self._opened]:
            self._opened += 1
            self._is_open = self._opened == len(self._reasoning.open_ids)
        else:
            self._is_over = True
            self.accept(token_id)

    def mask(self) -> Mask | None:
        """Which tokens may come next; see engine.types.Constraint."""
        if self._is_over:
            return None if self._inner is None else self._inner.mask()
        if not self._is_open:
            return self._opening_mask()
        limit = self._reasoning.max_tokens
        if self._forced or (limit is not None and self._count >= limit):
            return self._only(self._reasoning.close_ids[self._forced])
        if self._inner is None or self._may_end:
            return None
        mask = np.full(self._words, 0xFFFFFFFF, np.uint32)
        for token_id in self._end_ids:
            if token_id < self._vocab_size:
                mask[token_id // _WORD_BITS] &= np.uint32(0xFFFFFFFF ^ (1 << token_id % _WORD_BITS))
        return mask

    def fork(self) -> ReasoningGate:
        """A copy in the initial state."""
        return ReasoningGate(
            self._reasoning,
            None if self._inner is None else self._inner.fork(),
            end_ids=self._end_ids,
            vocab_size=self._vocab_size,
            token_bytes=self._token_bytes,
            may_end=self._may_end,
        )

    @property
    def _words(self) -> int:
        return -(-self._vocab_size // _WORD_BITS)

    def _opening_mask(self) -> Mask | None:
        if self._inner is None:
            return None
        mark = self._only(self._reasoning.open_ids[self._opened])
        if self._opened:
            # Only the mark can be meant, since a constraint takes its first token for nothing else.
            return mark
        inner = self._inner.mask()
        return None if inner is None else inner | mark

    def _reason(self, token_id: int) -> None:
        self._count += 1
        limit = self._reasoning.max_tokens
        if self._forced or (limit is not None and self._count > limit):
            self._forced += 1
            self._is_over = self._forced == len(self._reasoning.close_ids)
            return
        close = self._reasoning.close
        text = self._tail + self._token_bytes(token_id)
        self._tail = text[-len(close) :]
        self._is_over = close in text

    def _only(self, token_id: int) -> Mask:
        mask = np.zeros(self._words, np.uint32)
        mask[token_id // _WORD_BITS] = np.uint32(1 << token_id % _WORD_BITS)
        return mask
