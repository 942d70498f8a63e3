"""OpenAI's chat stream: the core's events in, server-sent events out.

Content chunks are almost all of a stream, so everything around their text is formatted once, when
the stream starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from osaurus_grpc.v1 import chat_pb2, usage_pb2
from rest_shim.errors import Refusal, openai_body
from rest_shim.openai.convert import finish_reason, logprobs_json, usage_json
from rest_shim.wire import SSE_DONE, dump, sse_frame


class ChunkEncoder:
    """One stream's state.

    Args:
        choice_count: Answers that were asked for.
        include_usage: Whether a chunk with the usage comes last.
        created: Unix seconds; OpenAI stamps one value on every chunk of a stream.
    """

    def __init__(self, *, choice_count: int, include_usage: bool, created: int) -> None:
        self._choice_count = choice_count
        self._include_usage = include_usage
        self._created = created
        self._head = ""
        self._closing = ""
        self._tail = ""
        self._content_heads: Sequence[str] = ()
        self._content_tail = ""
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """Whether the stream has ended as its grammar wants."""
        return self._is_complete

    def encode(self, event: chat_pb2.ChatStreamResponse) -> bytes:
        """The frames of one event."""
        kind = event.WhichOneof("event")
        match kind:
            case "content":
                return self._content(event.content)
            case "reasoning":
                reasoning = event.reasoning
                return self._chunk(reasoning.choice_index, f'{{"reasoning_content":{dump(reasoning.text)}}}')
            case "tool_call":
                return self._tool_call(event.tool_call)
            case "started":
                return self._start(event.started)
            case "choice_finished":
                finished = event.choice_finished
                return self._chunk(finished.choice_index, "{}", f'"{finish_reason(finished.finish_reason)}"')
            case "completed":
                return self._complete(event.completed.usage)
            case "prompt_progress" | None:
                # None: an event that a newer core knows and this shim does not.
                return b""
            case _:
                assert_never(kind)

    def failure(self, refusal: Refusal) -> bytes:
        """The error event; openai-python raises APIError on it."""
        return sse_frame(openai_body(refusal))

    def _start(self, started: chat_pb2.ChatStarted) -> bytes:
        self._head = (
            f'data: {{"id":{dump(started.id)},"object":"chat.completion.chunk","created":{self._created},'
            f'"model":{dump(started.model)},"choices":['
        )
        self._closing = f'],"system_fingerprint":{dump(started.system_fingerprint)}'
        self._tail = self._closing + (',"usage":null}\n\n' if self._include_usage else "}\n\n")
        self._content_heads = [
            f'{self._head}{{"index":{index},"delta":{{"content":' for index in range(self._choice_count)
        ]
        self._content_tail = f'}},"finish_reason":null,"logprobs":null}}{self._tail}'
        first = '{"role":"assistant","content":"","refusal":null}'
        return b"".join(self._chunk(index, first) for index in range(self._choice_count))

    def _content(self, delta: chat_pb2.ContentDelta) -> bytes:
        if delta.logprobs:
            text, logprobs = dump(delta.text), dump(logprobs_json(delta.logprobs))
            return self._chunk(delta.choice_index, f'{{"content":{text}}}', logprobs=logprobs)
        if not delta.text:
            return b""
        head = self._content_heads[delta.choice_index]
        return f"{head}{dump(delta.text)}{self._content_tail}".encode("ascii")

    def _tool_call(self, delta: chat_pb2.ToolCallDelta) -> bytes:
        """A call's first chunk has the name and no arguments; some clients refuse other forms."""
        frames = b""
        if delta.id or delta.name:
            call = {
                "index": delta.call_index,
                "id": delta.id,
                "type": "function",
                "function": {"name": delta.name, "arguments": ""},
            }
            frames = self._chunk(delta.choice_index, dump({"tool_calls": [call]}))
        if delta.arguments_json:
            more = {"index": delta.call_index, "function": {"arguments": delta.arguments_json}}
            frames += self._chunk(delta.choice_index, dump({"tool_calls": [more]}))
        return frames

    def _chunk(self, index: int, delta: str, reason: str = "null", logprobs: str = "null") -> bytes:
        choice = f'{{"index":{index},"delta":{delta},"finish_reason":{reason},"logprobs":{logprobs}}}'
        return f"{self._head}{choice}{self._tail}".encode("ascii")

    def _complete(self, usage: usage_pb2.Usage) -> bytes:
        self._is_complete = True
        if not self._include_usage:
            return SSE_DONE
        chunk = f'{self._head}{self._closing},"usage":{dump(usage_json(usage))}}}\n\n'
        return chunk.encode("ascii") + SSE_DONE
