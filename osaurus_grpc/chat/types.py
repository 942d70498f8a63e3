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
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What is said; may be empty.
        name: The speaker's name; on a tool result, the function's.
        tool_calls: Calls made in this turn, by the assistant only.
        tool_call_id: On a tool result, the call it answers.
        reasoning: The assistant's reasoning before this turn, for templates that replay it.
    """

    role: Role
    content: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    reasoning: str = ""


class AnswerEnd(Enum):
    """Why an answer ended."""

    STOP = "stop"
    STOP_SEQUENCE = "stop_sequence"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer.

    Attributes:
        text: Never empty.
        token_count: How many further generated tokens have their text out, wholly or in part, with
            this delta. Tokens count in the order they were generated, so the deltas of an answer
            partition a prefix of its tokens. A token that adds no text of its own (a special token,
            the first bytes of a character) counts with the text that follows it.
    """

    text: str
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


AnswerEvent: TypeAlias = TextDelta | AnswerFinished
