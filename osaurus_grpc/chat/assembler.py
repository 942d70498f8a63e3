"""Tokens in, events of an answer out: one assembler per choice, without clocks or waiting."""

from __future__ import annotations

import itertools
import secrets
import string
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, assert_never

from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.calls.pieces import Piece, PieceKind
from osaurus_grpc.chat.detokenize import Detokenizer
from osaurus_grpc.chat.stop import StopMatcher
from osaurus_grpc.chat.types import (
    AnswerDelta,
    AnswerEnd,
    AnswerEvent,
    AnswerFinished,
    ReasoningDelta,
    TextDelta,
    ToolArgumentsDelta,
    ToolCallStarted,
)

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 24


def new_call_id() -> str:
    """A call's id: "call_" and 24 letters and digits at random."""
    return "call_" + "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))


class Assembler:
    """Turns the tokens of one answer into events, however the tokens are cut into calls.

    Args:
        tokenizer: The model's tokenizer.
        stop: Stop strings; see StopMatcher for which one wins. They are looked for in the content
            only, not in reasoning nor in calls.
        skip_special_tokens: Leave special tokens out of the text.
        context: Where the answer continues a text (see template.is_continuation), the prompt's last
            tokens, a handful; see Detokenizer.
        shown: Special tokens that the reader has to see; see Detokenizer.
        reader: Finds reasoning and calls in the text; without one all of it is content.
        make_id: Makes the ids of calls.

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
        shown: frozenset[int] = frozenset(),
        reader: AnswerReader | None = None,
        make_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, context=context, shown=shown
        )
        self._reader = reader
        self._matcher = StopMatcher(stop) if stop else None
        self._make_id = make_id
        self._is_finished = False
        self._call_count = 0
        self._whole_calls = 0
        # Tokens fed whose text is not out: a number where text never waits; else, for each of them,
        # the length of all text decoded before it.
        self._silent_count = 0
        self._starts: deque[int] = deque()
        self._decoded_length = 0
        # Tokens whose text is out, and how many came before the reasoning that goes on.
        self._out_count = 0
        self._before_reasoning: int | None = None
        self._reasoning_count = 0
        # Where the content begins that the matcher holds back.
        self._held_start = 0
        self._is_holding = False

    @property
    def is_finished(self) -> bool:
        """Whether AnswerFinished is out."""
        return self._is_finished

    @property
    def reasoning_tokens(self) -> int:
        """Tokens between the marks around reasoning, white space included, the marks themselves not.

        A token that holds the end of a mark and more is the mark's where it opens, and the reasoning's
        where it closes.
        """
        if self._before_reasoning is None:
            return self._reasoning_count
        return self._reasoning_count + self._out_count + len(self._starts) - self._before_reasoning

    def feed(self, token_ids: Sequence[int]) -> list[AnswerEvent]:
        """Takes generated tokens, the end-of-sequence token not among them.

        Returns:
            Deltas, no two neighbours of one kind but for texts with marks between them, and the end
            where a stop string was met; nothing once finished.
        """
        if self._is_finished:
            return []
        if self._matcher is None and self._reader is None:
            return [*self._feed_freely(token_ids)]
        events: list[AnswerDelta] = []
        for token_id in token_ids:
            text = self._detokenizer.step(token_id)
            self._starts.append(self._decoded_length)
            if text:
                matched = self._take(text, events)
                if matched is not None:
                    return self._stopped(events, matched)
        return [*_merged(events)]

    def finish(self, end: AnswerEnd) -> list[AnswerEvent]:
        """Lets go what is held back and ends the answer; nothing where it has ended already.

        Args:
            end: Why the engine ended; a stop string that the last text completes wins over it. An
                answer with whole calls that came to its own end ends in TOOL_CALLS.
        """
        if self._is_finished:
            return []
        events: list[AnswerDelta] = []
        tail = self._detokenizer.finish()
        if self._matcher is None and self._reader is None:
            if tail:
                events.append(TextDelta(tail, self._silent_count))
        else:
            matched = self._take(tail, events) if tail else None
            if matched is None and self._reader is not None:
                matched = self._dispatch(self._reader.finish(is_cut=end is AnswerEnd.LENGTH), events)
            if matched is not None:
                return self._stopped(events, matched)
            self._flush(events)
        self._is_finished = True
        if end is AnswerEnd.STOP and self._whole_calls:
            end = AnswerEnd.TOOL_CALLS
        return [*_merged(events), AnswerFinished(end)]

    def _feed_freely(self, token_ids: Sequence[int]) -> list[AnswerDelta]:
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

    def _stopped(self, events: list[AnswerDelta], matched: str) -> list[AnswerEvent]:
        self._is_finished = True
        return [*_merged(events), AnswerFinished(AnswerEnd.STOP_SEQUENCE, matched)]

    def _take(self, text: str, events: list[AnswerDelta]) -> str | None:
        """Takes decoded text; returns the stop string it completes, if it does."""
        start = self._decoded_length
        self._decoded_length += len(text)
        if self._reader is not None:
            return self._dispatch(self._reader.feed(text), events)
        return self._content(Piece(PieceKind.CONTENT, text, start, self._decoded_length), events)

    def _dispatch(self, pieces: Sequence[Piece], events: list[AnswerDelta]) -> str | None:
        for piece in pieces:
            if piece.kind is PieceKind.CONTENT:
                matched = self._content(piece, events)
                if matched is not None:
                    return matched
                continue
            self._flush(events)
            self._other(piece, events)
        return None

    def _content(self, piece: Piece, events: list[AnswerDelta]) -> str | None:
        if self._matcher is None:
            events.append(self._text(piece.text, piece.start, piece.end))
            return None
        if not self._is_holding:
            self._held_start = piece.start
        result = self._matcher.feed(piece.text)
        if result.text:
            start = self._held_start
            self._held_start += len(result.text)
            events.append(self._text(result.text, start, self._held_start))
        self._is_holding = self._held_start < piece.end
        return result.matched

    def _flush(self, events: list[AnswerDelta]) -> None:
        """Lets go the content that might have become a stop string."""
        if self._matcher is not None and self._is_holding:
            text = self._matcher.flush()
            start = self._held_start
            self._held_start += len(text)
            self._is_holding = False
            if text:
                events.append(self._text(text, start, self._held_start))

    def _other(self, piece: Piece, events: list[AnswerDelta]) -> None:
        match piece.kind:
            case PieceKind.REASONING_BEGIN:
                self._before_reasoning = self._tokens_before(piece.start)
            case PieceKind.REASONING_END:
                if self._before_reasoning is not None:
                    self._reasoning_count += self._tokens_before(piece.start) - self._before_reasoning
                    self._before_reasoning = None
            case PieceKind.REASONING:
                events.append(ReasoningDelta(piece.text, self._count(piece.end)))
            case PieceKind.CALL_NAME:
                started = ToolCallStarted(
                    self._call_count, self._make_id(), piece.text, self._count(piece.end)
                )
                events.append(started)
                self._call_count += 1
            case PieceKind.CALL_ARGUMENTS:
                events.append(ToolArgumentsDelta(self._call_count - 1, piece.text, self._count(piece.end)))
            case PieceKind.CALL_END:
                self._whole_calls += 1
            case PieceKind.CONTENT:
                raise AssertionError(piece)
            case _ as unreachable:
                assert_never(unreachable)

    def _text(self, text: str, start: int, end: int) -> TextDelta:
        """Content from one place to another; tokens that end before it, and are not out, are marks."""
        marks = 0
        for begin, following in itertools.pairwise(self._starts):
            if begin >= start or following > start:
                break
            marks += 1
        return TextDelta(text, self._count(end), marks)

    def _count(self, end: int) -> int:
        """Takes the tokens whose text begins before a place."""
        count = 0
        while self._starts and self._starts[0] < end:
            self._starts.popleft()
            count += 1
        self._out_count += count
        return count

    def _tokens_before(self, place: int) -> int:
        """Tokens whose text begins before a place that nothing is out of behind."""
        return self._out_count + sum(start < place for start in self._starts)


def _merged(events: Sequence[AnswerDelta]) -> list[AnswerDelta]:
    """Makes one of neighbouring deltas of one kind, and of one call."""
    merged: list[AnswerDelta] = []
    for event in events:
        last = merged[-1] if merged else None
        match last, event:
            case TextDelta(), TextDelta() if not event.mark_count:
                count = last.token_count + event.token_count
                merged[-1] = TextDelta(last.text + event.text, count, last.mark_count)
            case ReasoningDelta(), ReasoningDelta():
                merged[-1] = ReasoningDelta(last.text + event.text, last.token_count + event.token_count)
            case ToolArgumentsDelta(), ToolArgumentsDelta() if last.index == event.index:
                text = last.arguments_json + event.arguments_json
                merged[-1] = ToolArgumentsDelta(event.index, text, last.token_count + event.token_count)
            case _:
                merged.append(event)
    return merged
