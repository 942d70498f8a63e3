"""Proto to internal and back. Pure: no clock, no I/O, no state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Final, TypeAlias

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from osaurus_grpc.chat.types import JSON, Image, Message, Role, ToolCall, ToolSpec
from osaurus_grpc.engine.types import SamplingParams, Token, TokenLogprob
from osaurus_grpc.models.catalog import Capability, ModelEntry
from osaurus_grpc.models.residency import Residence, ResidenceState
from osaurus_grpc.v1 import chat_pb2, completion_pb2, model_pb2, sampling_pb2

DEFAULT_MAX_TOKENS: Final = 2048
_DEFAULT_SAMPLING: Final = SamplingParams()

_ROLES: Final[Mapping[int, Role]] = MappingProxyType(
    {
        chat_pb2.ROLE_SYSTEM: Role.SYSTEM,
        chat_pb2.ROLE_DEVELOPER: Role.DEVELOPER,
        chat_pb2.ROLE_USER: Role.USER,
        chat_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
        chat_pb2.ROLE_TOOL: Role.TOOL,
    }
)
_CAPABILITIES: Final[Mapping[Capability, model_pb2.Capability.ValueType]] = MappingProxyType(
    {
        Capability.CHAT: model_pb2.CAPABILITY_CHAT,
        Capability.COMPLETION: model_pb2.CAPABILITY_COMPLETION,
        Capability.TOOLS: model_pb2.CAPABILITY_TOOLS,
        Capability.REASONING: model_pb2.CAPABILITY_REASONING,
        Capability.VISION: model_pb2.CAPABILITY_VISION,
        Capability.EMBEDDING: model_pb2.CAPABILITY_EMBEDDING,
    }
)
_STATES: Final[Mapping[ResidenceState, model_pb2.ModelState.ValueType]] = MappingProxyType(
    {
        ResidenceState.AVAILABLE: model_pb2.MODEL_STATE_AVAILABLE,
        ResidenceState.LOADING: model_pb2.MODEL_STATE_LOADING,
        ResidenceState.LOADED: model_pb2.MODEL_STATE_LOADED,
    }
)


def message_from_proto(message: chat_pb2.Message, path: str = "") -> Message:
    """A validated message; its text parts joined in order.

    Args:
        message: The message.
        path: Where it is in the request.
    """
    content = "".join(part.text for part in message.content)
    images: list[Image] = []
    done = 0
    for index, part in enumerate(message.content):
        if part.HasField("image"):
            images.append(Image(part.image.data, len(content) - done, f"{path}.content[{index}].image"))
        done += len(part.text)
    return Message(
        role=_ROLES[message.role],
        content=content,
        images=tuple(images),
        name=message.name,
        tool_calls=tuple(
            ToolCall(id=call.id, name=call.function.name, arguments_json=call.function.arguments_json)
            for call in message.tool_calls
        ),
        tool_call_id=message.tool_call_id,
        reasoning=message.reasoning,
    )


def visible_tools(request: chat_pb2.ChatRequest) -> list[ToolSpec]:
    """The tools that a validated request shows to the model."""
    if request.tool_choice.mode == chat_pb2.TOOL_CHOICE_MODE_NONE:
        return []
    return [
        ToolSpec(
            name=tool.function.name,
            description=tool.function.description,
            parameters_json=tool.function.parameters_json,
            strict=tool.function.strict,
        )
        for tool in request.tools
    ]


def template_arguments(request: chat_pb2.ChatRequest) -> dict[str, JSON]:
    """The extra variables of a validated request's chat template."""
    text = request.chat_template_kwargs_json
    arguments: dict[str, JSON] = json.loads(text) if text else {}
    return arguments


def sampling_from_proto(sampling: sampling_pb2.SamplingParams, *, vocab_size: int) -> SamplingParams:
    """Validated sampling settings with the defaults filled in, without a seed.

    Args:
        sampling: What the client set; an unset field takes the default, never 0.
        vocab_size: Width of the model's logits; a top_k that keeps all of them is off.
    """
    default = _DEFAULT_SAMPLING

    def number(name: str, unset: float) -> float:
        return float(getattr(sampling, name)) if sampling.HasField(name) else unset  # type: ignore[arg-type]  # field names are literals in the stub

    top_k = sampling.top_k if sampling.HasField("top_k") else default.top_k
    context = (
        sampling.repetition_context if sampling.HasField("repetition_context") else default.repetition_context
    )
    return SamplingParams(
        temperature=number("temperature", default.temperature),
        top_p=number("top_p", default.top_p),
        top_k=top_k if top_k < vocab_size else 0,
        min_p=number("min_p", default.min_p),
        # Looking back at no token is no penalty.
        repetition_penalty=number("repetition_penalty", default.repetition_penalty) if context else 1.0,
        repetition_context=context or default.repetition_context,
        presence_penalty=number("presence_penalty", default.presence_penalty),
        frequency_penalty=number("frequency_penalty", default.frequency_penalty),
        logit_bias=MappingProxyType(dict(sampling.logit_bias)),
    )


def seconds_from_duration(duration: Duration) -> float:
    """A valid Duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


def duration_from_seconds(seconds: float) -> Duration:
    """Seconds as a Duration, to the nanosecond."""
    nanos = round(seconds * 1e9)
    whole, rest = divmod(abs(nanos), 1_000_000_000)
    return Duration(seconds=whole, nanos=rest) if nanos >= 0 else Duration(seconds=-whole, nanos=-rest)


def measured_duration(seconds: float) -> Duration:
    """A span of time that did pass: at least a nanosecond, since clients read 0 as "not measured"."""
    return duration_from_seconds(max(seconds, 1e-9))


def _logprob_to_proto(
    logprob: TokenLogprob, token_bytes: Callable[[int], bytes]
) -> sampling_pb2.TokenLogprob:
    return sampling_pb2.TokenLogprob(
        token=token_bytes(logprob.token_id), token_id=logprob.token_id, logprob=logprob.logprob
    )


def logprobs_to_proto(token: Token, token_bytes: Callable[[int], bytes]) -> sampling_pb2.ChosenTokenLogprob:
    """A generated token whose request asked for log-probabilities.

    Args:
        token: The token.
        token_bytes: Gives the bytes of a token id.
    """
    logprob = -math.inf if token.logprob is None else token.logprob
    return sampling_pb2.ChosenTokenLogprob(
        chosen=_logprob_to_proto(TokenLogprob(token.token_id, logprob), token_bytes),
        top=[_logprob_to_proto(other, token_bytes) for other in token.top],
    )


def prompt_logprobs_to_proto(
    tokens: Sequence[Token], token_bytes: Callable[[int], bytes]
) -> completion_pb2.PromptLogprobs:
    """Some of a prompt's tokens, with their log-probabilities but for the first of the prompt.

    Args:
        tokens: At least one.
        token_bytes: Gives the bytes of a token id.
    """
    return completion_pb2.PromptLogprobs(
        tokens=[
            sampling_pb2.PromptTokenLogprob(
                token=token_bytes(token.token_id),
                token_id=token.token_id,
                logprob=token.logprob,
                top=[_logprob_to_proto(other, token_bytes) for other in token.top],
            )
            for token in tokens
        ]
    )


# What an admitted request's events are made as, chat and completion alike.
RunEvent: TypeAlias = chat_pb2.ChatStreamResponse | completion_pb2.PromptLogprobs


def chat_event(event: RunEvent) -> chat_pb2.ChatStreamResponse:
    """An event of an answer to a conversation, whose prompt is not scored."""
    if isinstance(event, completion_pb2.PromptLogprobs):
        raise AssertionError("log-probabilities of a conversation's prompt")
    return event


def completion_event(event: RunEvent) -> completion_pb2.CompleteStreamResponse:
    """An event of an answer to a raw prompt, which holds no reasoning and no calls."""
    if isinstance(event, completion_pb2.PromptLogprobs):
        return completion_pb2.CompleteStreamResponse(prompt_logprobs=event)
    match event.WhichOneof("event"):
        case "content":
            return completion_pb2.CompleteStreamResponse(content=event.content)
        case "started":
            return completion_pb2.CompleteStreamResponse(started=event.started)
        case "prompt_progress":
            return completion_pb2.CompleteStreamResponse(prompt_progress=event.prompt_progress)
        case "choice_finished":
            return completion_pb2.CompleteStreamResponse(choice_finished=event.choice_finished)
        case "completed":
            return completion_pb2.CompleteStreamResponse(completed=event.completed)
        case "reasoning" | "tool_call" | None as kind:
            raise AssertionError(f"{kind} in a continuation")


def model_to_proto(
    entry: ModelEntry, residence: Residence, *, is_default: bool, chat_template: str = ""
) -> model_pb2.Model:
    """A catalog entry with what residency knows of it."""
    model = model_pb2.Model(
        id=entry.id,
        repo_id=entry.repo_id,
        alias_of=entry.alias_of,
        size_bytes=entry.size_bytes,
        digest=entry.digest,
        architecture=entry.architecture,
        parameter_count=entry.parameter_count,
        quantization=entry.quantization,
        context_length=entry.context_length,
        embedding_length=entry.embedding_length,
        capabilities=sorted(_CAPABILITIES[capability] for capability in entry.capabilities),
        state=_STATES[residence.state],
        resident_bytes=residence.resident_bytes,
        chat_template=chat_template,
        is_default=is_default,
        device=residence.device,
        draft_model=residence.draft_id,
    )
    model.modify_time.CopyFrom(_timestamp(entry.modify_time))
    if residence.expire_time is not None:
        model.expire_time.CopyFrom(_timestamp(residence.expire_time))
    return model


def _timestamp(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp
