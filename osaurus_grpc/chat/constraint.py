"""A grammar at work on one answer: which tokens may come next, from the token where it begins.

The engine asks; see engine.types.Constraint, whose form this has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import llguidance
import numpy as np
import numpy.typing as npt

from osaurus_grpc.chat.gate import TokenConstraint
from osaurus_grpc.chat.vocabulary import Vocabulary, forbid
from osaurus_grpc.errors import InvalidRequestError

# What the library's error begins with where no token continues a text that is not whole.
_DEAD_END: Final = "NoExtension"


@dataclass(frozen=True, slots=True)
class Trigger:
    """What must be generated before a grammar begins; either token ids or a text.

    Attributes:
        token_ids: The grammar begins after these tokens in a row, for example the one of `</think>`.
        text: The grammar begins after this text, however it is split into tokens. Blanks that come in
            the same token as its end are not the grammar's; tokens that hold anything else behind it
            are not let through.
        is_required: The answer may not end before.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    is_required: bool = True

    def __post_init__(self) -> None:
        if bool(self.token_ids) == bool(self.text):
            raise ValueError("a trigger is token ids or a text")


class GrammarConstraint:
    """Holds one answer to a grammar. Made by Grammar.constraint().

    Args:
        vocabulary: The model's.
        make_matcher: Gives a matcher at the grammar's beginning.
        field: The request field that the grammar comes from, for errors.
        begin: None begins with the first token.
        repeats: Once the grammar is done, wait for begin again and do not end the answer; from then
            on the answer may also end before it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        make_matcher: Callable[[], llguidance.LLMatcher],
        *,
        field: str,
        begin: Trigger | None,
        repeats: bool,
    ) -> None:
        if repeats and begin is None:
            raise ValueError("a grammar that repeats needs a trigger")
        self._vocabulary = vocabulary
        self._make_matcher = make_matcher
        self._field = field
        self._begin = begin
        self._repeats = repeats
        self._watch: _TokenWatch | _TextWatch | None = None
        self._matcher: llguidance.LLMatcher | None = None
        self.is_done = False
        """Nothing but the end may follow."""
        if begin is None:
            self._matcher = make_matcher()
        else:
            self._watch = _watch(vocabulary, begin, begin.is_required)

    @property
    def is_active(self) -> bool:
        """Whether the grammar has begun and is not done."""
        return self._matcher is not None and not self.is_done

    def accept(self, token_id: int) -> None:
        """Take a generated token.

        Raises:
            InvalidRequestError: Following the grammar takes more work than a step may.
        """
        if self._watch is not None:
            if self._watch.has_begun(token_id):
                self._watch = None
                self._matcher = self._make_matcher()
            return
        assert self._matcher is not None
        self._matcher.consume_token(token_id)
        self._require_sound(self._matcher)
        if not self._matcher.is_stopped():
            return
        if self._repeats:
            assert self._begin is not None
            self._matcher = None
            self._watch = _watch(self._vocabulary, self._begin, False)
        else:
            self.is_done = True

    def mask(self) -> npt.NDArray[np.uint32] | None:
        """Which tokens may come next; see engine.types.Constraint.

        Raises:
            InvalidRequestError: Following the grammar takes more work than a step may, or no token of
                the model can continue it.
        """
        if self._watch is not None:
            return self._watch.mask()
        assert self._matcher is not None
        mask = self._vocabulary.mask_of(self._matcher)
        self._require_sound(self._matcher)
        return mask

    def fork(self) -> GrammarConstraint:
        """A copy in the initial state."""
        return GrammarConstraint(
            self._vocabulary,
            self._make_matcher,
            field=self._field,
            begin=self._begin,
            repeats=self._repeats,
        )

    def _require_sound(self, matcher: llguidance.LLMatcher) -> None:
        if not matcher.is_error():
            return
        why = "following its grammar takes too much work. Simplify it."
        if matcher.get_error().startswith(_DEAD_END):
            why = "the model has no token for what must come next."
        # A token that was let through is never an error: one of the matcher's limits is reached, or the
        # vocabulary's.
        raise InvalidRequestError(f"The answer cannot go on: {why}", field=self._field)


class EitherConstraint:
    """Holds one answer to one of several forms; its tokens tell which.

    Args:
        options: Two or more, each of which begins with the first token and has a mask at every token.
    """

    def __init__(self, options: Sequence[TokenConstraint]) -> None:
        self._options = tuple(options)
        self._open = list(options)
        self._masks: list[npt.NDArray[np.uint32] | None] = []

    @property
    def is_done(self) -> bool:
        """Nothing but the end may follow."""
        return all(option.is_done for option in self._open)

    def accept(self, token_id: int) -> None:
        """Take a generated token; forms that do not admit it are ruled out."""
        masks = self._masks or [option.mask() for option in self._open]
        self._masks = []
        self._open = [
            option for option, mask in zip(self._open, masks, strict=True) if _admits(mask, token_id)
        ]
        for option in self._open:
            option.accept(token_id)

    def mask(self) -> npt.NDArray[np.uint32] | None:
        """Which tokens may come next; see engine.types.Constraint."""
        self._masks = [option.mask() for option in self._open]
        masks = [mask for mask in self._masks if mask is not None]
        if len(masks) < len(self._masks):
            return None
        union: npt.NDArray[np.uint32] = np.bitwise_or.reduce(masks)
        return union

    def fork(self) -> EitherConstraint:
        """A copy in the initial state."""
        return EitherConstraint([option.fork() for option in self._options])


def _admits(mask: npt.NDArray[np.uint32] | None, token_id: int) -> bool:
    return mask is None or bool(mask[token_id // 32] >> (token_id % 32) & 1)


def _watch(vocabulary: Vocabulary, begin: Trigger, is_required: bool) -> _TokenWatch | _TextWatch:
    if begin.token_ids:
        return _TokenWatch(vocabulary, begin.token_ids, is_required)
    return _TextWatch(vocabulary, begin.text, is_required)


class _TokenWatch:
    """Waits for tokens in a row."""

    def __init__(self, vocabulary: Vocabulary, awaited: tuple[int, ...], is_required: bool) -> None:
        self._mask = vocabulary.unended if is_required else None
        self._awaited = awaited
        self._seen: tuple[int, ...] = ()

    def has_begun(self, token_id: int) -> bool:
        self._seen = (*self._seen, token_id)[-len(self._awaited) :]
        return self._seen == self._awaited

    def mask(self) -> npt.NDArray[np.uint32] | None:
        return self._mask


class _TextWatch:
    """Waits for a text, and keeps tokens out that would run past its end."""

    def __init__(self, vocabulary: Vocabulary, awaited: str, is_required: bool) -> None:
        self._vocabulary = vocabulary
        self._awaited = awaited.encode()
        self._base = vocabulary.overrun_mask(self._awaited, may_end=not is_required)
        self._tail = b""

    def has_begun(self, token_id: int) -> bool:
        text = self._tail + self._vocabulary.bytes_of(token_id)
        keep = len(self._awaited) - 1
        self._tail = text[-keep:] if keep else b""
        return self._awaited in text

    def mask(self) -> npt.NDArray[np.uint32] | None:
        begun = [k for k in range(1, len(self._awaited)) if self._tail.endswith(self._awaited[:k])]
        if not begun:
            return self._base
        mask = self._base.copy()
        for k in begun:
            forbid(mask, self._vocabulary.running_past(self._awaited[k:]))
        return mask
