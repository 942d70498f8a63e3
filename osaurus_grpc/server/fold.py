"""Streams folded into the unary answers. Pure: no clock, no I/O, no state but the fold's own."""

from __future__ import annotations

from dataclasses import dataclass, field

from osaurus_grpc.v1 import chat_pb2, completion_pb2, sampling_pb2


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


class ChatFold:
    """Folds the events of a chat stream into the unary answer.

    Args:
        wants_logprobs: Set every choice's logprobs, also where an answer has no token.
    """

    def __init__(self, *, wants_logprobs: bool = False) -> None:
        self._wants_logprobs = wants_logprobs
        self._response = chat_pb2.ChatResponse()
        self._texts: dict[int, list[str]] = {}
        self._reasoning: dict[int, list[str]] = {}
        self._calls: dict[int, dict[int, _Call]] = {}
        self._logprobs: dict[int, list[sampling_pb2.ChosenTokenLogprob]] = {}
        self._finished: dict[int, chat_pb2.ChoiceFinished] = {}

    def feed(self, event: chat_pb2.ChatStreamResponse) -> None:
        """Take the next event of a stream that keeps the grammar of ChatStreamResponse."""
        match event.WhichOneof("event"):
            case "content":
                delta = event.content
                self._texts.setdefault(delta.choice_index, []).append(delta.text)
                if delta.logprobs:
                    self._logprobs.setdefault(delta.choice_index, []).extend(delta.logprobs)
            case "started":
                self._response.id = event.started.id
                self._response.model = event.started.model
                self._response.system_fingerprint = event.started.system_fingerprint
                self._response.prompt_token_ids.extend(event.started.prompt_token_ids)
            case "choice_finished":
                self._finished[event.choice_finished.choice_index] = event.choice_finished
            case "completed":
                self._response.usage.CopyFrom(event.completed.usage)
                self._response.timings.CopyFrom(event.completed.timings)
            case "reasoning":
                self._reasoning.setdefault(event.reasoning.choice_index, []).append(event.reasoning.text)
            case "tool_call":
                self._fold_call(event.tool_call)
            case "prompt_progress" | None:
                pass

    def _fold_call(self, delta: chat_pb2.ToolCallDelta) -> None:
        calls = self._calls.setdefault(delta.choice_index, {})
        call = calls.setdefault(delta.call_index, _Call(delta.id, delta.name))
        call.arguments.append(delta.arguments_json)

    def response(self) -> chat_pb2.ChatResponse:
        """The answer, once the stream has ended; choices in the order of their index."""
        for index, finished in sorted(self._finished.items()):
            choice = self._response.choices.add(
                index=index,
                finish_reason=finished.finish_reason,
                stop_sequence=finished.stop_sequence,
                token_ids=finished.token_ids,
            )
            if finished.HasField("end_logprob"):
                choice.end_logprob.CopyFrom(finished.end_logprob)
            choice.message.role = chat_pb2.ROLE_ASSISTANT
            text = "".join(self._texts.get(index, ()))
            calls = self._calls.get(index, {})
            if text or not calls:
                choice.message.content.add(text=text)
            choice.message.reasoning = "".join(self._reasoning.get(index, ()))
            for _, call in sorted(calls.items()):
                function = chat_pb2.FunctionCall(name=call.name, arguments_json="".join(call.arguments))
                choice.message.tool_calls.add(id=call.id, function=function)
            if self._wants_logprobs:
                choice.logprobs.SetInParent()
                choice.logprobs.tokens.extend(self._logprobs.get(index, ()))
        return self._response


class CompletionFold:
    """Folds the events of a completion stream into the unary answer.

    Args:
        wants_logprobs: Set every choice's logprobs, also where an answer has no token.
    """

    def __init__(self, *, wants_logprobs: bool = False) -> None:
        self._wants_logprobs = wants_logprobs
        self._response = completion_pb2.CompleteResponse()
        self._texts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[sampling_pb2.ChosenTokenLogprob]] = {}
        self._finished: dict[int, chat_pb2.ChoiceFinished] = {}

    def feed(self, event: completion_pb2.CompleteStreamResponse) -> None:
        """Take the next event of a stream that keeps the grammar of CompleteStreamResponse."""
        match event.WhichOneof("event"):
            case "content":
                delta = event.content
                self._texts.setdefault(delta.choice_index, []).append(delta.text)
                if delta.logprobs:
                    self._logprobs.setdefault(delta.choice_index, []).extend(delta.logprobs)
            case "prompt_logprobs":
                self._response.prompt_logprobs.extend(event.prompt_logprobs.tokens)
            case "started":
                self._response.id = event.started.id
                self._response.model = event.started.model
                self._response.system_fingerprint = event.started.system_fingerprint
                self._response.prompt_token_ids.extend(event.started.prompt_token_ids)
            case "choice_finished":
                self._finished[event.choice_finished.choice_index] = event.choice_finished
            case "completed":
                self._response.usage.CopyFrom(event.completed.usage)
                self._response.timings.CopyFrom(event.completed.timings)
            case "prompt_progress" | None:
                pass

    def response(self) -> completion_pb2.CompleteResponse:
        """The answer, once the stream has ended; choices in the order of their index."""
        for index, finished in sorted(self._finished.items()):
            choice = self._response.choices.add(
                index=index,
                text="".join(self._texts.get(index, ())),
                finish_reason=finished.finish_reason,
                stop_sequence=finished.stop_sequence,
                token_ids=finished.token_ids,
            )
            if finished.HasField("end_logprob"):
                choice.end_logprob.CopyFrom(finished.end_logprob)
            if self._wants_logprobs:
                choice.logprobs.SetInParent()
                choice.logprobs.tokens.extend(self._logprobs.get(index, ()))
        return self._response
