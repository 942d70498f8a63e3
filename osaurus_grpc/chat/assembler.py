"""Tokens in, events of an answer out: one assembler per choice, without clocks or waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from osaurus_grpc.chat.detokenize import Detokenizer
from osaurus_grpc.chat.stop import StopMatcher
from osaurus_grpc.chat.types import AnswerEnd, AnswerEvent, AnswerFinished, TextDelta

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase


class Assembler:
    """Turns the tokens of one answer into events, however the tokens are cut into calls.

    Args:
        tokenizer: The model's tokenizer.
        stop: Stop strings; see StopMatcher for which one wins.
        skip_special_tokens: Leave special tokens out of the text.
        context: Where the answer continues a text (see template.is_continuation), the prompt's last
            tokens, a handful; see Detokenizer.

    Raises:
        InvalidRequestError: A stop string is empty.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens, context=context)
        self._matcher = StopMatcher(stop) if stop else None
        self._is_finished = False
        # Tokens fed whose text is not out: a number without a matcher, where text never waits; with
        # one, the length of all text decoded before each of them.
        self._silent_count = 0
        self._starts: deque[int] = deque()
        self._decoded_length = 0
        self._sent_length = 0

    @property
    def is_finished(self) -> bool:
        """Whether AnswerFinished is out."""
        return self._is_finished

    def feed(self, token_ids: Sequence[int]) -> list[AnswerEvent]:
        """Takes generated tokens, the end-of-sequence token not among them.

        Returns:
            One delta at most, and the end where a stop string was met; nothing once finished.
        """
        if self._is_finished:
            return []
        if self._matcher is None:
            return self._feed_freely(token_ids)
        return self._feed_matched(token_ids, self._matcher)

    def finish(self, end: AnswerEnd) -> list[AnswerEvent]:
        """Lets go what is held back and ends the answer; nothing where it has ended already.

        Args:
            end: Why the engine ended; a stop string that the last text completes wins over it.
        """
        if self._is_finished:
            return []
        tail = self._detokenizer.finish()
        matched = None
        if self._matcher is not None:
            result = self._matcher.feed(tail)
            matched = result.matched
            tail = result.text + self._matcher.flush()
        events = self._deltas(tail)
        self._is_finished = True
        if matched is not None:
            return [*events, AnswerFinished(AnswerEnd.STOP_SEQUENCE, matched)]
        return [*events, AnswerFinished(end)]

    def _feed_freely(self, token_ids: Sequence[int]) -> list[AnswerEvent]:
        step = self._detokenizer.step
        texts: list[str] = []
        out_count = 0
        silent_count = self._silent_count
        for token_id in token_ids:
            silent_count += 1
            if text := step(token_id):
                texts.append(text)
                out_count += silent_count
                silent_count = 0
        self._silent_count = silent_count
        return [TextDelta("".join(texts), out_count)] if texts else []

    def _feed_matched(self, token_ids: Sequence[int], matcher: StopMatcher) -> list[AnswerEvent]:
        texts: list[str] = []
        for token_id in token_ids:
            text = self._detokenizer.step(token_id)
            self._starts.append(self._decoded_length)
            if not text:
                continue
            self._decoded_length += len(text)
            result = matcher.feed(text)
            texts.append(result.text)
            if result.matched is not None:
                self._is_finished = True
                ended = AnswerFinished(AnswerEnd.STOP_SEQUENCE, result.matched)
                return [*self._deltas("".join(texts)), ended]
        return self._deltas("".join(texts))

    def _deltas(self, text: str) -> list[AnswerEvent]:
        if not text:
            return []
        count, self._silent_count = self._silent_count, 0
        self._sent_length += len(text)
        while self._starts and self._starts[0] < self._sent_length:
            self._starts.popleft()
            count += 1
        return [TextDelta(text, count)]
