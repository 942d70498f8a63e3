"""One answer of a request: engine tokens in, contract events out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, assert_never

from osaurus_grpc.chat.assembler import Assembler
from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.detokenize import token_bytes
from osaurus_grpc.chat.types import (
    AnswerEnd,
    AnswerEvent,
    AnswerFinished,
    ReasoningDelta,
    TextDelta,
    ToolArgumentsDelta,
    ToolCallStarted,
)
from osaurus_grpc.engine.types import GenerationFinished, PrefillStarted, StopCause, Token
from osaurus_grpc.server.convert import logprobs_to_proto
from osaurus_grpc.v1 import chat_pb2, sampling_pb2

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase


class Choice:
    """Assembles one answer and keeps its figures.

    Args:
        index: 0-based.
        tokenizer: The model's.
        stop: Texts that end the answer.
        wants_logprobs: Attach log-probabilities to the deltas.
        wants_token_ids: Report the tokens at the end.
        context: The prompt's last token ids where the answer continues the last message; see Assembler.
        shown: Special tokens that the reader has to see.
        reader: Finds reasoning and calls in the answer.
        end_tokens: Token ids that end the answer beside the model's own, which the engine knows.
        length_reason: Why an answer that used up its tokens ended: LENGTH or CONTEXT_LENGTH.

    Attributes:
        is_finished: The answer ended and its choice_finished event was made.
        token_ids: Tokens of the answer so far.
        cached_tokens: Prompt tokens whose KV cache was reused.
        queue_seconds: What it waited for a place in the batch.
        prompt_seconds: From its admission to its first token.
        decode_seconds: From its first token to its last.
    """

    def __init__(
        self,
        index: int,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop: Sequence[str],
        wants_logprobs: bool,
        wants_token_ids: bool,
        context: Sequence[int],
        shown: frozenset[int] = frozenset(),
        reader: AnswerReader | None = None,
        end_tokens: frozenset[int],
        length_reason: sampling_pb2.FinishReason.ValueType,
    ) -> None:
        self._index = index
        self._assembler = Assembler(tokenizer, stop=stop, context=context, shown=shown, reader=reader)
        self._has_stops = bool(stop)
        self._has_marks = reader is not None
        self._length_reason = length_reason
        self._end_tokens = end_tokens
        self._wants_logprobs = wants_logprobs
        self._wants_token_ids = wants_token_ids
        self._pending: deque[Token] = deque()
        self._end_token: Token | None = None
        self._token_bytes: Callable[[int], bytes] = lambda token_id: token_bytes(tokenizer, token_id)
        self._admitted = 0.0
        self._first_token = 0.0
        self.is_finished = False
        self.token_ids: list[int] = []
        self.cached_tokens = 0
        self.queue_seconds = 0.0
        self.prompt_seconds = 0.0
        self.decode_seconds = 0.0

    @property
    def completion_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids)

    @property
    def reasoning_tokens(self) -> int:
        """Those of them that lie between the marks around reasoning."""
        return self._assembler.reasoning_tokens

    def admitted(self, event: PrefillStarted) -> None:
        """The choice has a place in the batch."""
        self._admitted = time.perf_counter()
        self.queue_seconds = event.queue_seconds
        self.cached_tokens = event.cached_tokens

    def feed(self, tokens: Sequence[Token]) -> list[chat_pb2.ChatStreamResponse]:
        """New tokens: their deltas, and the end where a stop text or an end token appeared."""
        now = time.perf_counter()
        if not self.completion_tokens:
            self._first_token = now
            self.prompt_seconds = now - self._admitted
        self.decode_seconds = now - self._first_token
        kept = self._before_end(tokens)
        has_ended = len(kept) < len(tokens)
        tokens = kept
        answer: list[AnswerEvent] = []
        if self._has_stops:
            # One at a time, so that the tokens counted do not depend on how many came at once.
            used = 0
            for token in tokens:
                used += 1
                answer += self._assembler.feed((token.token_id,))
                if self._assembler.is_finished:
                    break
            tokens = tokens[:used]
        else:
            answer = self._assembler.feed([token.token_id for token in tokens])
        self.token_ids += [token.token_id for token in tokens]
        if self._wants_logprobs:
            self._pending.extend(tokens)
        if has_ended:
            answer += self._assembler.finish(AnswerEnd.STOP)
        return self._events(answer)

    def _before_end(self, tokens: Sequence[Token]) -> Sequence[Token]:
        """The tokens before the first end token."""
        if self._end_tokens:
            for index, token in enumerate(tokens):
                if token.token_id in self._end_tokens:
                    self._end_token = token
                    return tokens[:index]
        return tokens

    def finish(self, event: GenerationFinished) -> list[chat_pb2.ChatStreamResponse]:
        """The engine ended the sequence: what text is left, and the end."""
        self.prompt_seconds = event.prompt_seconds
        self.decode_seconds = event.decode_seconds
        self._end_token = event.end_token
        match event.cause:
            case StopCause.END_OF_SEQUENCE:
                end = AnswerEnd.STOP
            case StopCause.MAX_TOKENS:
                end = AnswerEnd.LENGTH
        return self._events(self._assembler.finish(end))

    def _events(self, answer: Sequence[AnswerEvent]) -> list[chat_pb2.ChatStreamResponse]:
        events: list[chat_pb2.ChatStreamResponse] = []
        text = ""
        count = marks = 0
        end: AnswerFinished | None = None
        for event in answer:
            if text and not (isinstance(event, TextDelta) and not event.mark_count):
                events.append(self._delta(text, count, marks))
                text, count, marks = "", 0, 0
            if isinstance(event, TextDelta):
                text += event.text
                count += event.token_count
                marks += event.mark_count
            elif isinstance(event, AnswerFinished):
                end = event
            else:
                events.append(self._other_delta(event))
        if text:
            events.append(self._delta(text, count, marks))
        if end is None:
            return events
        # Tokens cut off by a stop text stay unsent, and so do the marks at the end of a call or of what
        # was cut off to be one; any others had no text of their own.
        if self._pending and end.cause is not AnswerEnd.STOP_SEQUENCE and not self._has_marks:
            events.append(self._delta("", len(self._pending)))
        self.is_finished = True
        finished = chat_pb2.ChoiceFinished(
            choice_index=self._index,
            finish_reason=self._finish_reason(end.cause),
            stop_sequence=end.stop_sequence,
            token_ids=self.token_ids if self._wants_token_ids else (),
        )
        if self._wants_logprobs and self._end_token is not None:
            finished.end_logprob.CopyFrom(logprobs_to_proto(self._end_token, self._token_bytes))
        events.append(chat_pb2.ChatStreamResponse(choice_finished=finished))
        return events

    def _other_delta(
        self, event: ReasoningDelta | ToolCallStarted | ToolArgumentsDelta
    ) -> chat_pb2.ChatStreamResponse:
        self._pass_over(event.token_count)
        index = self._index
        match event:
            case ReasoningDelta(text, count):
                reasoning = chat_pb2.ReasoningDelta(choice_index=index, text=text, token_count=count)
                return chat_pb2.ChatStreamResponse(reasoning=reasoning)
            case ToolCallStarted(call, call_id, name, count):
                delta = chat_pb2.ToolCallDelta(
                    choice_index=index, call_index=call, id=call_id, name=name, token_count=count
                )
            case ToolArgumentsDelta(call, arguments, count):
                delta = chat_pb2.ToolCallDelta(
                    choice_index=index, call_index=call, arguments_json=arguments, token_count=count
                )
            case _ as unreachable:
                assert_never(unreachable)
        return chat_pb2.ChatStreamResponse(tool_call=delta)

    def _pass_over(self, count: int) -> None:
        """Log-probabilities are those of the content: not of these tokens."""
        for _ in range(min(count, len(self._pending))):
            self._pending.popleft()

    def _delta(self, text: str, count: int, marks: int = 0) -> chat_pb2.ChatStreamResponse:
        delta = chat_pb2.ContentDelta(choice_index=self._index, text=text, token_count=count)
        if self._wants_logprobs:
            pending = self._pending
            self._pass_over(marks)
            delta.logprobs.extend(
                logprobs_to_proto(pending.popleft(), self._token_bytes)
                for _ in range(min(count - marks, len(pending)))
            )
        return chat_pb2.ChatStreamResponse(content=delta)

    def _finish_reason(self, cause: AnswerEnd) -> sampling_pb2.FinishReason.ValueType:
        match cause:
            case AnswerEnd.STOP:
                return sampling_pb2.FINISH_REASON_STOP
            case AnswerEnd.STOP_SEQUENCE:
                return sampling_pb2.FINISH_REASON_STOP_SEQUENCE
            case AnswerEnd.LENGTH:
                return self._length_reason
            case AnswerEnd.TOOL_CALLS:
                return sampling_pb2.FINISH_REASON_TOOL_CALLS
