"""A conversation of items as one of messages; pure functions.

Reasoning, text and calls that follow each other are one turn of the assistant. Each message remembers
where it and its pieces came from, so that an error of the core names the client's own field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, assert_never

from osaurus_grpc.v1 import chat_pb2
from rest_shim.errors import Refusal
from rest_shim.openai.messages import ROLES, image_from_url
from rest_shim.responses import items
from rest_shim.responses.schema import PromptBody

HISTORY = "previous_response_id"

_FIELDS = {
    "messages": "input",
    "sampling.max_tokens": "max_output_tokens",
    "tool_choice.function_name": "tool_choice.name",
    "reasoning_effort": "reasoning.effort",
    "chat_template_kwargs_json": "chat_template_kwargs",
}
# The rest of a path, below a message or one of its pieces.
_PIECES = {
    ".image": ".image_url",
    ".tool_call_id": ".call_id",
    ".id": ".call_id",
    ".function.name": ".name",
    ".function.arguments_json": ".arguments",
}
_PIECE = re.compile(r"messages\[(\d+)\](?:\.(content(?:\[\d+\])?|tool_calls\[\d+\]))?(.*)")


@dataclass(slots=True)
class Conversation:
    """Messages, and where they came from.

    Attributes:
        messages: In the order of the conversation.
        origins: For each message the JSON path it came from, under "", and those of its pieces, under
            their paths below the message.
    """

    messages: list[chat_pb2.Message] = field(default_factory=list)
    origins: list[Mapping[str, str]] = field(default_factory=list)

    def add(self, message: chat_pb2.Message, origin: str, pieces: Mapping[str, str] | None = None) -> None:
        """Append a message."""
        self.messages.append(message)
        self.origins.append({"": origin, **(pieces or {})})

    def without(self, start: int, stop: int) -> Self:
        """The conversation but for the messages from start to stop."""
        return type(self)(
            self.messages[:start] + self.messages[stop:], self.origins[:start] + self.origins[stop:]
        )

    def json_path(self, path: str) -> str:
        """A field of the protobuf request as the path in the client's JSON."""
        bare = path.removeprefix("chat.")
        if bare in _FIELDS:
            return _FIELDS[bare]
        found = _PIECE.match(bare)
        if found:
            return self._origin(int(found[1]), found[2] or "", found[3])
        if bare.startswith("response_format"):
            rest = bare.removeprefix("response_format").removeprefix(".json_schema").removesuffix("_json")
            return f"text.format{rest}"
        bare = re.sub(r"^(tools\[\d+\])\.function", r"\1", bare)
        return bare.removeprefix("sampling.").removesuffix("_json")

    def _origin(self, index: int, piece: str, rest: str) -> str:
        if index >= len(self.origins):
            return "input"
        known = self.origins[index]
        if known[""] == HISTORY:
            return HISTORY
        origin = known.get(piece) or f"{known['']}.{piece}"
        return origin + _PIECES.get(rest, rest)


def conversation(
    body: PromptBody, history: Sequence[items.Item], known: Mapping[str, items.Item]
) -> Conversation:
    """The messages of a request.

    Args:
        body: The request.
        history: Items of the earlier turns, oldest first.
        known: What an item_reference may name, by id.

    Raises:
        Refusal: An item is not usable, or a reference names none.
    """
    made = Conversation()
    if body.instructions:
        text = chat_pb2.ContentPart(text=body.instructions)
        message = chat_pb2.Message(role=chat_pb2.ROLE_SYSTEM, content=[text])
        made.add(message, "instructions", {"content": "instructions", "content[0]": "instructions"})
    turns = _Turns(made)
    for item in history:
        turns.take(item, HISTORY)
    for index, item in enumerate(resolved(given(body), known)):
        turns.take(item, f"input[{index}]")
    turns.end()
    if not made.messages:
        raise Refusal(400, "There is no message to answer.", param="input")
    return made


def references(body: PromptBody) -> Sequence[str]:
    """The ids of the items that a request names and does not hold."""
    return [item.id for item in body.input or () if isinstance(item, items.ItemReference)]


def given(body: PromptBody) -> Sequence[items.Item]:
    """The items of a request's input.

    OpenAI's schema asks for none: a request with nothing to answer is a user's turn without words. It
    holds a blank, since there is no turn without text.
    """
    if body.input is None and body.previous_response_id is None:
        blank = items.TextPart(type="input_text", text=" ")
        return (items.MessageItem(role="user", content=[blank]),)
    return body.input or ()


def resolved(given: Sequence[items.Item], known: Mapping[str, items.Item]) -> Sequence[items.Item]:
    """Items with every reference replaced by what it names.

    Raises:
        Refusal: A reference names nothing that is known.
    """
    found: list[items.Item] = []
    for index, item in enumerate(given):
        if not isinstance(item, items.ItemReference):
            found.append(item)
        elif item.id in known:
            found.append(known[item.id])
        else:
            text = f"Item with id '{item.id}' not found; a response's items are kept unless 'store' is false."
            raise Refusal(400, text, param=f"input[{index}].id")
    return found


class _Turns:
    """Gathers an assistant's items into one message."""

    def __init__(self, target: Conversation) -> None:
        self._target = target
        self._turn: chat_pb2.Message | None = None
        self._origin = ""
        self._pieces: dict[str, str] = {}

    def take(self, item: items.Item, origin: str) -> None:
        match item:
            case items.ReasoningItem():
                self._reason(item, origin)
            case items.MessageItem(role="assistant"):
                turn = self._assistant(origin, is_new=lambda turn: bool(turn.content or turn.tool_calls))
                turn.content.extend(_parts(item.content, f"{origin}.content"))
                self._pieces |= _places(item.content, f"{origin}.content")
            case items.FunctionCallItem():
                call = chat_pb2.FunctionCall(name=item.name, arguments_json=item.arguments)
                calls = self._assistant(origin).tool_calls
                self._pieces[f"tool_calls[{len(calls)}]"] = origin
                calls.append(chat_pb2.ToolCall(id=item.call_id, function=call))
            case items.MessageItem():
                self.end()
                content = _parts(item.content, f"{origin}.content")
                message = chat_pb2.Message(role=ROLES[item.role], content=content)
                self._target.add(message, origin, _places(item.content, f"{origin}.content"))
            case items.FunctionOutputItem():
                self.end()
                content = _parts(item.output, f"{origin}.output")
                message = chat_pb2.Message(
                    role=chat_pb2.ROLE_TOOL,
                    # A function may give nothing, but a tool message says something, if only "".
                    content=content or [chat_pb2.ContentPart(text="")],
                    tool_call_id=item.call_id,
                )
                self._target.add(message, origin, _places(item.output, f"{origin}.output"))
            case items.ItemReference():
                raise AssertionError("references are resolved before")
            case _:
                assert_never(item)

    def end(self) -> None:
        """The assistant's turn is over; reasoning that led to nothing is dropped."""
        turn, self._turn = self._turn, None
        if turn is not None and (turn.content or turn.tool_calls):
            self._target.add(turn, self._origin, self._pieces)

    def _reason(self, item: items.ReasoningItem, origin: str) -> None:
        text = "".join(piece.text for piece in item.content or item.summary)
        turn = self._assistant(origin, is_new=lambda turn: bool(turn.content or turn.tool_calls))
        turn.reasoning += text

    def _assistant(
        self, origin: str, is_new: Callable[[chat_pb2.Message], bool] = lambda _turn: False
    ) -> chat_pb2.Message:
        if self._turn is not None and is_new(self._turn):
            self.end()
        if self._turn is None:
            self._turn = chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT)
            self._origin = origin
            self._pieces = {}
        return self._turn


def _places(parts: Sequence[items.Part], path: str) -> dict[str, str]:
    """Where a message's content came from."""
    return {"content": path} | {f"content[{index}]": f"{path}[{index}]" for index in range(len(parts))}


def _parts(parts: Sequence[items.Part], path: str) -> list[chat_pb2.ContentPart]:
    return [_part(part, f"{path}[{index}]") for index, part in enumerate(parts)]


def _part(part: items.Part, path: str) -> chat_pb2.ContentPart:
    match part:
        case items.TextPart():
            return chat_pb2.ContentPart(text=part.text)
        case items.RefusalPart():
            return chat_pb2.ContentPart(text=part.refusal)
        case items.ImagePart():
            return chat_pb2.ContentPart(image=image_from_url(part.image_url, f"{path}.image_url"))
        case _:
            assert_never(part)
