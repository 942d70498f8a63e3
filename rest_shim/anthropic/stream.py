"""Anthropic's message stream: the core's events in, server-sent events out.

    message_start  (content_block_start  content_block_delta*  content_block_stop)*
    message_delta  message_stop

A block is open until something of another kind comes. A tool call that another one follows stays open
until its arguments are whole, so that nothing is lost should calls be written side by side.
"""

from __future__ import annotations

import json
from typing import assert_never

from osaurus_grpc.v1 import chat_pb2, usage_pb2
from rest_shim.anthropic import answer
from rest_shim.errors import Refusal, anthropic_body
from rest_shim.wire import dump, sse_frame

PING = sse_frame({"type": "ping"}, "ping")

_TEXT, _THINKING = "text", "thinking"


class _Call:
    """A tool call's block."""

    def __init__(self, block_index: int) -> None:
        self.block_index = block_index
        self.is_open = True
        self._arguments = ""

    def add(self, arguments_json: str) -> None:
        """More of its arguments."""
        self._arguments += arguments_json

    @property
    def is_whole(self) -> bool:
        """Whether its arguments can have no more to come."""
        try:
            json.loads(self._arguments)
        except ValueError:
            return False
        return True


class MessageEncoder:
    """One stream's state.

    Args:
        request_id: The request's id, for an error in mid-stream.
        shows_thinking: Whether the model's reasoning is part of the answer.
        omits_thinking: Whether that part is empty but for its signature.
    """

    def __init__(self, request_id: str, *, shows_thinking: bool, omits_thinking: bool) -> None:
        self._request_id = request_id
        self._shows_thinking = shows_thinking
        self._omits_thinking = omits_thinking
        self._block_count = 0
        # Kind and index of the open block that is not a tool call's.
        self._open_kind = ""
        self._open_index = 0
        self._thinking = ""
        self._calls: dict[int, _Call] = {}
        self._delta: dict[str, object] = {"stop_reason": "end_turn", "stop_sequence": None}
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """Whether the stream has ended as its grammar wants."""
        return self._is_complete

    def encode(self, event: chat_pb2.ChatStreamResponse) -> bytes:
        """The events of one event."""
        kind = event.WhichOneof("event")
        match kind:
            case "content":
                return self._content(event.content.text)
            case "reasoning":
                return self._reasoning(event.reasoning.text)
            case "tool_call":
                return self._tool_call(event.tool_call)
            case "started":
                return self._start(event.started)
            case "choice_finished":
                return self._finish(event.choice_finished)
            case "completed":
                return self._complete(event.completed.usage)
            case "prompt_progress" | None:
                # None: an event that a newer core knows and this shim does not.
                return b""
            case _:
                assert_never(kind)

    def failure(self, refusal: Refusal) -> bytes:
        """The error event; Anthropic's SDKs raise on it."""
        return sse_frame(anthropic_body(refusal, self._request_id), "error")

    def _start(self, started: chat_pb2.ChatStarted) -> bytes:
        # How much of the prompt was cached is known at the end; message_delta has the final counts.
        usage = answer.usage_json(usage_pb2.Usage(prompt_tokens=started.prompt_tokens))
        message = {
            **answer.head_json(started.id, started.model),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return sse_frame({"type": "message_start", "message": message}, "message_start") + PING

    def _content(self, text: str) -> bytes:
        if not text:
            return b""
        frames = b""
        if self._open_kind != _TEXT:
            frames = self._settle() + self._begin({"type": "text", "text": ""})
            self._open_kind, self._open_index = _TEXT, self._block_count - 1
        return frames + _text_delta(self._open_index, text)

    def _reasoning(self, text: str) -> bytes:
        if not text or not self._shows_thinking:
            return b""
        frames = b""
        if self._open_kind != _THINKING:
            frames = self._settle() + self._begin({"type": "thinking", "thinking": "", "signature": ""})
            self._open_kind, self._open_index = _THINKING, self._block_count - 1
        self._thinking += text
        if not self._omits_thinking:
            delta = {"type": "thinking_delta", "thinking": text}
            frames += _block_event("content_block_delta", self._open_index, delta=delta)
        return frames

    def _tool_call(self, delta: chat_pb2.ToolCallDelta) -> bytes:
        frames = b""
        call = self._calls.get(delta.call_index)
        if call is None:
            frames = self._settle()
            call = self._calls[delta.call_index] = _Call(self._block_count)
            block_id = answer.call_id(delta.id)
            frames += self._begin({"type": "tool_use", "id": block_id, "name": delta.name, "input": {}})
        if delta.arguments_json and call.is_open:
            call.add(delta.arguments_json)
            more = {"type": "input_json_delta", "partial_json": delta.arguments_json}
            frames += _block_event("content_block_delta", call.block_index, delta=more)
        return frames

    def _begin(self, block: dict[str, object]) -> bytes:
        frame = _block_event("content_block_start", self._block_count, content_block=block)
        self._block_count += 1
        return frame

    def _settle(self) -> bytes:
        """End every block to which nothing more can come."""
        frames = b""
        if self._open_kind == _THINKING:
            delta = {"type": "signature_delta", "signature": answer.signature(self._thinking)}
            frames = _block_event("content_block_delta", self._open_index, delta=delta)
            self._thinking = ""
        if self._open_kind:
            frames += _block_event("content_block_stop", self._open_index)
            self._open_kind = ""
        return frames + b"".join(self._stop(call) for call in self._calls.values() if call.is_whole)

    def _stop(self, call: _Call) -> bytes:
        if not call.is_open:
            return b""
        call.is_open = False
        return _block_event("content_block_stop", call.block_index)

    def _finish(self, finished: chat_pb2.ChoiceFinished) -> bytes:
        self._delta = {
            "stop_reason": answer.stop_reason(finished.finish_reason),
            "stop_sequence": finished.stop_sequence or None,
        }
        return self._settle() + b"".join(self._stop(call) for call in self._calls.values())

    def _complete(self, usage: usage_pb2.Usage) -> bytes:
        self._is_complete = True
        event = {"type": "message_delta", "delta": self._delta, "usage": answer.usage_json(usage)}
        return sse_frame(event, "message_delta") + sse_frame({"type": "message_stop"}, "message_stop")


def _block_event(kind: str, index: int, **fields: object) -> bytes:
    return sse_frame({"type": kind, "index": index, **fields}, kind)


def _text_delta(index: int, text: str) -> bytes:
    """Almost all of a stream, so it is formatted and not built."""
    return (
        f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{index},'
        f'"delta":{{"type":"text_delta","text":{dump(text)}}}}}\n\n'
    ).encode("ascii")
