"""Ollama's chat stream: the core's events in, lines of JSON out.

A tool call goes out whole, since Ollama's clients take no pieces: when the next one begins, if its
arguments are whole by then, else at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import assert_never

from osaurus_grpc.v1 import chat_pb2, sampling_pb2
from rest_shim.errors import Refusal, ollama_body
from rest_shim.ollama import convert
from rest_shim.wire import dump, ndjson_line


class LineEncoder:
    """One stream's state.

    Args:
        model: The model's name as the client said it; every line repeats it.
        clock: Nanoseconds since the epoch.
    """

    def __init__(self, model: str, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._head = f'{{"model":{dump(model)},"created_at":"'
        self._calls: dict[int, chat_pb2.ToolCall] = {}
        self._sent_calls: set[int] = set()
        self._finish_reason = sampling_pb2.FINISH_REASON_UNSPECIFIED
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """Whether the stream has ended as its grammar wants."""
        return self._is_complete

    def encode(self, event: chat_pb2.ChatStreamResponse) -> bytes:
        """The lines of one event."""
        kind = event.WhichOneof("event")
        match kind:
            case "content":
                return self._content(event.content)
            case "reasoning":
                return self._reasoning(event.reasoning.text)
            case "tool_call":
                return self._tool_call(event.tool_call)
            case "choice_finished":
                self._finish_reason = event.choice_finished.finish_reason
                return b"".join(self._whole_call(index) for index in list(self._calls))
            case "completed":
                return self._complete(event.completed)
            case "started" | "prompt_progress" | None:
                # None: an event that a newer core knows and this shim does not.
                return b""
            case _:
                assert_never(kind)

    def failure(self, refusal: Refusal) -> bytes:
        """The error line."""
        return ndjson_line(ollama_body(refusal))

    def _content(self, delta: chat_pb2.ContentDelta) -> bytes:
        message = f'{{"role":"assistant","content":{dump(delta.text)}}}'
        if delta.logprobs:
            return self._line(message, f',"logprobs":{dump(convert.logprobs_json(delta.logprobs))}')
        return self._line(message) if delta.text else b""

    def _reasoning(self, text: str) -> bytes:
        return self._line(f'{{"role":"assistant","content":"","thinking":{dump(text)}}}') if text else b""

    def _tool_call(self, delta: chat_pb2.ToolCallDelta) -> bytes:
        lines = b""
        if delta.call_index in self._sent_calls:
            # Its arguments were whole: what comes is white space.
            return lines
        if delta.call_index not in self._calls:
            whole = [i for i, call in self._calls.items() if _is_json(call.function.arguments_json)]
            lines = b"".join(self._whole_call(index) for index in whole)
            self._calls[delta.call_index] = chat_pb2.ToolCall()
        call = self._calls[delta.call_index]
        call.id += delta.id
        call.function.name += delta.name
        call.function.arguments_json += delta.arguments_json
        return lines

    def _whole_call(self, index: int) -> bytes:
        self._sent_calls.add(index)
        calls = [convert.tool_call_json(self._calls.pop(index), index)]
        return self._line(dump({"role": "assistant", "content": "", "tool_calls": calls}))

    def _complete(self, completed: chat_pb2.ChatCompleted) -> bytes:
        self._is_complete = True
        metrics = convert.metrics_json(completed.usage, completed.timings)
        ending = {"done": True, "done_reason": convert.done_reason(self._finish_reason), **metrics}
        now = convert.timestamp(self._clock())
        message = '{"role":"assistant","content":""}'
        return f'{self._head}{now}","message":{message},{dump(ending)[1:]}\n'.encode("ascii")

    def _line(self, message: str, more: str = "") -> bytes:
        now = convert.timestamp(self._clock())
        return f'{self._head}{now}","message":{message},"done":false{more}}}\n'.encode("ascii")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
