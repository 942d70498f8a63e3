"""Answers as Python sees them: whole ones, and the events of one that streams. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from osaurus_grpc.v1 import chat_pb2, sampling_pb2, usage_pb2


class FinishReason(Enum):
    """Why an answer ended; values are those of sampling.proto."""

    UNKNOWN = sampling_pb2.FINISH_REASON_UNSPECIFIED
    STOP = sampling_pb2.FINISH_REASON_STOP
    STOP_SEQUENCE = sampling_pb2.FINISH_REASON_STOP_SEQUENCE
    LENGTH = sampling_pb2.FINISH_REASON_LENGTH
    CONTEXT_LENGTH = sampling_pb2.FINISH_REASON_CONTEXT_LENGTH
    TOOL_CALLS = sampling_pb2.FINISH_REASON_TOOL_CALLS

    @classmethod
    def _missing_(cls, value: object) -> FinishReason:
        return cls.UNKNOWN  # a newer server's


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted. Always the first event.

    Attributes:
        id: Of the response.
        model: The id of the model that answers.
        prompt_tokens: Tokens of the rendered prompt.
    """

    id: str
    model: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """Prompt tokens processed so far, of how many."""

    processed_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of an answer's text, with its tokens where log-probabilities were asked for."""

    text: str
    choice: int
    logprobs: tuple[sampling_pb2.ChosenTokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the model's reasoning."""

    text: str
    choice: int


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The start of a tool call, which has its id and name, or more of its arguments' JSON text."""

    call: int
    id: str
    name: str
    arguments_json: str
    choice: int


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """One answer ended."""

    choice: int
    finish_reason: FinishReason
    stop_sequence: str


@dataclass(frozen=True, slots=True)
class Completed:
    """All answers ended. Always the last event."""

    usage: usage_pb2.Usage
    timings: usage_pb2.Timings


Event: TypeAlias = (
    Started | PromptProgress | TextDelta | ReasoningDelta | ToolCallDelta | ChoiceFinished | Completed
)


def event_from_proto(response: chat_pb2.ChatStreamResponse) -> Event | None:
    """The event of a message; None for one of a newer server."""
    match response.WhichOneof("event"):
        case "content":
            delta = response.content
            return TextDelta(delta.text, delta.choice_index, tuple(delta.logprobs))
        case "reasoning":
            return ReasoningDelta(response.reasoning.text, response.reasoning.choice_index)
        case "tool_call":
            call = response.tool_call
            return ToolCallDelta(call.call_index, call.id, call.name, call.arguments_json, call.choice_index)
        case "started":
            return Started(response.started.id, response.started.model, response.started.prompt_tokens)
        case "prompt_progress":
            progress = response.prompt_progress
            return PromptProgress(progress.processed_tokens, progress.total_tokens)
        case "choice_finished":
            end = response.choice_finished
            return ChoiceFinished(end.choice_index, FinishReason(end.finish_reason), end.stop_sequence)
        case "completed":
            return Completed(response.completed.usage, response.completed.timings)
        case _:
            return None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made.

    Attributes:
        id: Name it in the tool message that answers it.
        name: The function.
        arguments_json: Its arguments as the model wrote them.
    """

    id: str
    name: str
    arguments_json: str

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments, parsed. ValueError where the answer was cut off inside them."""
        value: Mapping[str, Any] = json.loads(self.arguments_json)
        return value


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; str() of it is its text.

    Attributes:
        text: What the model said.
        reasoning: What it thought before, where it reasons.
        tool_calls: Calls it made.
        finish_reason: Why it ended.
        stop_sequence: The stop text that ended it.
        logprobs: One entry a token, where asked for.
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    stop_sequence: str
    logprobs: tuple[sampling_pb2.ChosenTokenLogprob, ...]

    def __str__(self) -> str:
        return self.text

    def message(self) -> dict[str, Any]:
        """The answer as the next turn's history holds it."""
        said: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            said["reasoning"] = self.reasoning
        if self.tool_calls:
            said["tool_calls"] = [
                {"id": call.id, "function": {"name": call.name, "arguments": call.arguments_json}}
                for call in self.tool_calls
            ]
        return said


@dataclass(frozen=True, slots=True)
class Reply(Answer):
    """The first answer to a request, with what there is beside it.

    Attributes:
        id: Of the response.
        model: The id of the model that answered.
        choices: All answers; as many as choice_count asked for.
        usage: Tokens over all answers.
        timings: Where the time went.
    """

    id: str
    model: str
    choices: tuple[Answer, ...]
    usage: usage_pb2.Usage
    timings: usage_pb2.Timings


def reply_from_proto(response: chat_pb2.ChatResponse) -> Reply:
    """A whole answer of the contract."""
    choices = tuple(_answer(choice) for choice in response.choices)
    first = choices[0]
    return Reply(
        text=first.text,
        reasoning=first.reasoning,
        tool_calls=first.tool_calls,
        finish_reason=first.finish_reason,
        stop_sequence=first.stop_sequence,
        logprobs=first.logprobs,
        id=response.id,
        model=response.model,
        choices=choices,
        usage=response.usage,
        timings=response.timings,
    )


def _answer(choice: chat_pb2.ChatChoice) -> Answer:
    said = choice.message
    return Answer(
        text="".join(part.text for part in said.content),
        reasoning=said.reasoning,
        tool_calls=tuple(
            ToolCall(call.id, call.function.name, call.function.arguments_json) for call in said.tool_calls
        ),
        finish_reason=FinishReason(choice.finish_reason),
        stop_sequence=choice.stop_sequence,
        logprobs=tuple(choice.logprobs.tokens),
    )
