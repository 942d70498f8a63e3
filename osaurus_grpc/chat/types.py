"""What goes into the chat room and what comes out of it: messages, and the events of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TypeAlias

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None


class Role(StrEnum):
    """Who speaks, by the name that chat templates know."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call the assistant made.

    Attributes:
        id: The client's or the server's id of the call.
        name: The function's name.
        arguments_json: Its arguments as the model wrote them; not necessarily valid JSON.
    """

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image in a message.

    Attributes:
        data: The file.
        text_behind: Characters of the message's content that stand behind it. Counted from the end, since
            what must be said of tools and by whom is put before a content.
        field: Where it is in the request.
    """

    data: bytes
    text_behind: int
    field: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What is said; may be empty.
        name: The speaker's name; on a tool result, the function's.
        tool_calls: Calls made in this turn, by the assistant only.
        tool_call_id: On a tool result, the call it answers.
        reasoning: The assistant's reasoning before this turn, for templates that replay it.
        images: Those in the content, in order.
    """

    role: Role
    content: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    reasoning: str = ""
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function the model may call.

    Attributes:
        name: Letters, digits, "_", "-" and "."; not empty.
        description: What it does, for the model.
        parameters_json: JSON Schema of its arguments, an object, as JSON text; "" is no arguments.
        strict: Refuse a schema that cannot be enforced in full, instead of enforcing what can be.
    """

    name: str
    description: str = ""
    parameters_json: str = ""
    strict: bool = False

    @property
    def schema_json(self) -> str:
        """The schema to hold arguments to, also where none was given."""
        return self.parameters_json or '{"type":"object","properties":{},"additionalProperties":false}'


class AnswerEnd(Enum):
    """Why an answer ended."""

    STOP = "stop"
    STOP_SEQUENCE = "stop_sequence"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer.

    Attributes:
        text: Never empty.
        token_count: How many further generated tokens have their text out, wholly or in part, with
            this delta. Tokens count in the order they were generated, so the deltas of an answer,
            of all kinds, partition a prefix of its tokens. A token that adds no text of its own (a
            special token, the first bytes of a character, a mark around a call) counts with what
            follows it.
        mark_count: How many of these, the first, are marks of something else, and white space around
            them.
    """

    text: str
    token_count: int
    mark_count: int = 0


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the model's reasoning; the fields are as TextDelta's."""

    text: str
    token_count: int


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """The model calls a tool.

    Attributes:
        index: 0-based, in the order of the calls.
        id: "call_" and 24 letters and digits.
        name: One of the request's tools.
        token_count: As TextDelta's.
    """

    index: int
    id: str
    name: str
    token_count: int


@dataclass(frozen=True, slots=True)
class ToolArgumentsDelta:
    """More of the JSON text of a call's arguments.

    Attributes:
        index: The call's, which has started.
        arguments_json: Never empty.
        token_count: As TextDelta's.
    """

    index: int
    arguments_json: str
    token_count: int


@dataclass(frozen=True, slots=True)
class AnswerFinished:
    """The answer ended. Always the last event.

    Attributes:
        cause: Why.
        stop_sequence: The stop string that was met, for STOP_SEQUENCE.
    """

    cause: AnswerEnd
    stop_sequence: str = ""


AnswerDelta: TypeAlias = TextDelta | ReasoningDelta | ToolCallStarted | ToolArgumentsDelta
AnswerEvent: TypeAlias = AnswerDelta | AnswerFinished
