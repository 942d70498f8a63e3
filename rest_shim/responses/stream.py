"""The stream of a response: the core's events in, named server-sent events out.

Each output item is opened, filled and closed before the next one begins. As the Open Responses
specification has it, the stream ends with [DONE], and an error is followed by response.failed. Reasoning
uses OpenAI's event names (response.reasoning_text.*), which its SDKs know and which are those that the
specification's text makes of the content's type; its schema calls them response.reasoning.*.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import assert_never

from osaurus_grpc.v1 import chat_pb2, sampling_pb2
from rest_shim.errors import Refusal
from rest_shim.responses import resource
from rest_shim.responses.items import Ids
from rest_shim.responses.resource import Draft
from rest_shim.wire import SSE_DONE, dump


class _OpenItem:
    """An output item that is being written."""

    kind = ""

    def __init__(self, item_id: str, index: int) -> None:
        self.id = item_id
        self.index = index
        self.pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def place(self) -> dict[str, object]:
        """Where an event belongs."""
        return {"item_id": self.id, "output_index": self.index}

    def json(self, status: str) -> dict[str, object]:
        raise NotImplementedError


class _Message(_OpenItem):
    kind = "output_text"

    def __init__(self, ids: Ids, index: int) -> None:
        super().__init__(ids.new("msg"), index)
        self.logprobs: list[object] = []

    def part(self) -> dict[str, object]:
        return resource.text_part(self.text, self.logprobs)

    def json(self, status: str) -> dict[str, object]:
        return resource.message_item(self.id, status, [self.part()])


class _Reasoning(_OpenItem):
    kind = "reasoning_text"

    def __init__(self, ids: Ids, index: int) -> None:
        super().__init__(ids.new("rs"), index)

    def part(self) -> dict[str, object]:
        return {"type": "reasoning_text", "text": self.text}

    def json(self, status: str) -> dict[str, object]:
        return resource.reasoning_item(self.id, status, self.text)


class _Call(_OpenItem):
    kind = "function_call"

    def __init__(self, ids: Ids, index: int, call_index: int, call_id: str, name: str) -> None:
        super().__init__(ids.new("fc"), index)
        self.call_index = call_index
        self.call_id = call_id
        self.name = name

    def json(self, status: str) -> dict[str, object]:
        return resource.call_item(self.id, status, self.call_id, self.name, self.text)


class ResponseEncoder:
    """One stream's state.

    Args:
        draft: The response that the stream tells of.
    """

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._sequence = 0
        self._output: list[dict[str, object]] = []
        self._open: _Message | _Reasoning | _Call | None = None
        self._status: resource.ResponseStatus = "completed"
        self._completed: int | None = None
        self._is_begun = False
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """Whether the stream has ended as its grammar wants."""
        return self._is_complete

    def final(self, completed: chat_pb2.ChatCompleted) -> dict[str, object]:
        """The resource at the end, once the answer has finished; the same however often it is asked for."""
        return self._draft.resource(
            self._status, self._output, usage=completed.usage, completed=self._completed
        )

    def encode(self, event: chat_pb2.ChatStreamResponse) -> bytes:
        """The frames of one event."""
        kind = event.WhichOneof("event")
        match kind:
            case "content":
                return self._content(event.content)
            case "reasoning":
                return self._reasoning(event.reasoning.text)
            case "tool_call":
                return self._tool_call(event.tool_call)
            case "started":
                return self._start(event.started)
            case "choice_finished":
                return self._finish(event.choice_finished.finish_reason)
            case "completed":
                self._is_complete = True
                last = self._frame(f"response.{self._status}", {"response": self.final(event.completed)})
                return last + SSE_DONE
            case "prompt_progress" | None:
                # None: an event that a newer core knows and this shim does not.
                return b""
            case _:
                assert_never(kind)

    def failure(self, refusal: Refusal) -> bytes:
        """The events that end a begun stream: error, and response.failed where there is a response."""
        # OpenAI's SDKs look at the outer fields, the Open Responses specification at the inner ones.
        said = {"code": refusal.code, "message": refusal.message, "param": refusal.param}
        frames = self._frame("error", {**said, "error": {"type": refusal.kind, **said}})
        if self._is_begun:
            failed = self._draft.resource("failed", self._output, failure=refusal)
            frames += self._frame("response.failed", {"response": failed})
        return frames + SSE_DONE

    def _start(self, started: chat_pb2.ChatStarted) -> bytes:
        self._is_begun = True
        self._draft.model = started.model
        body = {"response": self._draft.resource("in_progress")}
        return self._frame("response.created", body) + self._frame("response.in_progress", body)

    def _content(self, delta: chat_pb2.ContentDelta) -> bytes:
        if not delta.text and not delta.logprobs:
            return b""
        frames = b""
        if not isinstance(self._open, _Message):
            frames = self._close("completed") + self._open_part(_Message(self._draft.ids, len(self._output)))
        assert isinstance(self._open, _Message)
        logprobs = list(resource.token_logprobs(delta.logprobs))
        self._open.logprobs += logprobs
        self._open.pieces.append(delta.text)
        body = {**self._open.place, "content_index": 0, "delta": delta.text, "logprobs": logprobs}
        return frames + self._frame("response.output_text.delta", body)

    def _reasoning(self, text: str) -> bytes:
        if not text:
            return b""
        frames = b""
        if not isinstance(self._open, _Reasoning):
            frames = self._close("completed") + self._open_part(
                _Reasoning(self._draft.ids, len(self._output))
            )
        assert self._open is not None
        self._open.pieces.append(text)
        body = {**self._open.place, "content_index": 0, "delta": text}
        return frames + self._frame("response.reasoning_text.delta", body)

    def _tool_call(self, delta: chat_pb2.ToolCallDelta) -> bytes:
        frames = b""
        if not isinstance(self._open, _Call) or self._open.call_index != delta.call_index:
            frames = self._close("completed")
            self._open = _Call(self._draft.ids, len(self._output), delta.call_index, delta.id, delta.name)
            frames += self._added(self._open)
        if delta.arguments_json:
            self._open.pieces.append(delta.arguments_json)
            body = {**self._open.place, "delta": delta.arguments_json}
            frames += self._frame("response.function_call_arguments.delta", body)
        return frames

    def _added(self, item: _Message | _Reasoning | _Call) -> bytes:
        shown = item.json("in_progress")
        if not isinstance(item, _Call):
            # Its one part is added by an event of its own.
            shown["content"] = []
        return self._frame("response.output_item.added", {"output_index": item.index, "item": shown})

    def _open_part(self, item: _Message | _Reasoning) -> bytes:
        self._open = item
        body = {**item.place, "content_index": 0, "part": item.part()}
        return self._added(item) + self._frame("response.content_part.added", body)

    def _close(self, status: str) -> bytes:
        """The events that end the open item, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return b""
        if isinstance(item, _Call):
            body = {**item.place, "name": item.name, "arguments": item.text}
            frames = self._frame("response.function_call_arguments.done", body)
        else:
            place = {**item.place, "content_index": 0}
            done: dict[str, object] = {**place, "text": item.text}
            if isinstance(item, _Message):
                done["logprobs"] = item.logprobs
            frames = self._frame(f"response.{item.kind}.done", done)
            frames += self._frame("response.content_part.done", {**place, "part": item.part()})
        whole = item.json(status)
        self._output.append(whole)
        return frames + self._frame("response.output_item.done", {"output_index": item.index, "item": whole})

    def _finish(self, reason: sampling_pb2.FinishReason.ValueType) -> bytes:
        status = resource.status_of(reason)
        self._status = status
        self._completed = int(time.time())
        frames = b""
        if self._open is None and not self._output:
            # An answer without anything is an empty text.
            frames = self._open_part(_Message(self._draft.ids, 0))
        return frames + self._close(status)

    def _frame(self, kind: str, body: Mapping[str, object]) -> bytes:
        data = dump({"type": kind, "sequence_number": self._sequence, **body})
        self._sequence += 1
        return f"event: {kind}\ndata: {data}\n\n".encode("ascii")
