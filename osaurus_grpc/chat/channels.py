"""Reasoning in Harmony's analysis channel: ended where it is too long, and no place for calls.

https://cookbook.openai.com/articles/openai-harmony. Reasoning is a message of its own there, so that a
grammar of whole answers has a place for it, other than the marks that gate.py knows. The engine asks; see
engine.types.Constraint, whose form this has.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np

from osaurus_grpc.chat.gate import Mask, TokenConstraint

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

_WORD_BITS = 32
_ALL = 0xFFFFFFFF


class _Place(Enum):
    """Where in a message an answer is."""

    OUTSIDE = auto()
    CHANNEL = auto()  # behind <|channel|>
    HEADER = auto()  # behind "analysis"
    ANALYSIS = auto()


class ChannelGate:
    """Watches an answer's channels.

    Args:
        tokenizer: A model's that writes Harmony.
        inner: What holds the answer to its form; None lets anything through.
        vocab_size: Width of the logits.
        max_tokens: Tokens of analysis after which it is ended and not begun again; None is no limit.
        waits: The inner constraint waits for a call, for which it does not look in an analysis. Else it has
            a place for analyses itself.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        inner: TokenConstraint | None,
        *,
        vocab_size: int,
        max_tokens: int | None,
        waits: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._inner = inner
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._waits = waits
        self._place = _Place.OUTSIDE
        self._count = 0
        marks = ("<|channel|>", "analysis", "<|message|>", "<|end|>")
        ids = (tokenizer.encode(mark, add_special_tokens=False)[0] for mark in marks)
        self._channel_id, self._analysis_id, self._message_id, self._end_id = ids

    @property
    def is_done(self) -> bool:
        """Nothing but the end may follow."""
        return self._inner is not None and self._inner.is_done

    def accept(self, token_id: int) -> None:
        """A token was generated."""
        is_held = self._waits and self._place is _Place.ANALYSIS
        self._move(token_id)
        if self._inner is not None and not is_held:
            self._inner.accept(token_id)

    def mask(self) -> Mask | None:
        """Which tokens may come next; see engine.types.Constraint."""
        is_spent = self._max_tokens is not None and self._count >= self._max_tokens
        if self._place is _Place.ANALYSIS and is_spent:
            mask = self._filled(0)
            mask[self._end_id // _WORD_BITS] = np.uint32(1 << self._end_id % _WORD_BITS)
            return mask
        if self._inner is None or (self._waits and self._place is _Place.ANALYSIS):
            inner = None
        else:
            inner = self._inner.mask()
        if self._place is not _Place.CHANNEL or not is_spent:
            return inner
        mask = self._filled(_ALL) if inner is None else inner.copy()
        mask[self._analysis_id // _WORD_BITS] &= np.uint32(_ALL ^ (1 << self._analysis_id % _WORD_BITS))
        return mask

    def fork(self) -> ChannelGate:
        """A copy in the initial state."""
        return ChannelGate(
            self._tokenizer,
            None if self._inner is None else self._inner.fork(),
            vocab_size=self._vocab_size,
            max_tokens=self._max_tokens,
            waits=self._waits,
        )

    def _move(self, token_id: int) -> None:
        if token_id == self._channel_id:
            self._place = _Place.CHANNEL
        elif self._place is _Place.CHANNEL:
            self._place = _Place.HEADER if token_id == self._analysis_id else _Place.OUTSIDE
        elif self._place is _Place.HEADER and token_id == self._message_id:
            self._place = _Place.ANALYSIS
        elif self._place is _Place.ANALYSIS:
            if token_id == self._end_id:
                self._place = _Place.OUTSIDE
            else:
                self._count += 1

    def _filled(self, word: int) -> Mask:
        return np.full(-(-self._vocab_size // _WORD_BITS), word, np.uint32)
