"""OpenAI's JSON to protobuf and back; pure functions.

Response shapes follow OpenAI's OpenAPI description, in which `refusal`, `logprobs` and
`finish_reason` are required, if null.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, assert_never

from osaurus_grpc.v1 import chat_pb2, model_pb2, sampling_pb2, usage_pb2
from rest_shim.errors import Refusal
from rest_shim.openai import schema
from rest_shim.openai.messages import convert_messages
from rest_shim.openai.sampling import sampling_params
from rest_shim.openai.tools import check_choice, set_tools
from rest_shim.wire import dump

FinishReason = Literal["stop", "length", "tool_calls"]


def chat_request(body: schema.ChatBody) -> chat_pb2.ChatRequest:
    """The core's request for a chat completion.

    Raises:
        Refusal: Fields contradict each other, or an image is not usable.
    """
    _check(body)
    request = chat_pb2.ChatRequest(
        model=body.model,
        messages=convert_messages(body.messages),
        sampling=_sampling(body),
        parallel_tool_calls=body.parallel_tool_calls,
        choice_count=body.n,
        session_id=body.session_id,
        reasoning_effort=body.reasoning_effort or "",
    )
    set_tools(request, body.tools, body.tool_choice)
    if body.response_format is not None:
        set_response_format(request.response_format, body.response_format)
    if body.chat_template_kwargs is not None:
        request.chat_template_kwargs_json = dump(body.chat_template_kwargs)
    if body.reasoning_effort == "none":
        request.reasoning_enabled = False
    return request


def _check(body: schema.ChatBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
    if any(modality != "text" for modality in body.modalities):
        raise Refusal(400, "'modalities' may hold 'text' only; answers are texts.", param="modalities")
    if body.functions and not body.tools:
        raise Refusal(400, "'functions' is not supported; send them as 'tools'.", param="functions")
    if body.tool_choice is not None:
        check_choice(body.tool_choice, body.tools)


def _sampling(body: schema.ChatBody) -> sampling_pb2.SamplingParams:
    return sampling_params(
        body,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def set_response_format(target: chat_pb2.ResponseFormat, wanted: schema.ResponseFormat) -> None:
    """Fill in the form of the answer; free text leaves it unset.

    Raises:
        Refusal: A json_schema format without its definition.
    """
    match wanted.type:
        case "text":
            return
        case "json_object":
            target.json_object.SetInParent()
        case "json_schema":
            definition = wanted.json_schema
            if definition is None:
                path = "response_format.json_schema"
                raise Refusal(400, f"Missing required parameter: '{path}'.", param=path)
            target.json_schema.CopyFrom(
                chat_pb2.JsonSchemaFormat(
                    name=definition.name,
                    schema_json=dump(definition.definition),
                    strict=definition.strict,
                )
            )
        case _:
            assert_never(wanted.type)


_RENAMED = {
    "choice_count": "n",
    "tool_choice.function_name": "tool_choice.function.name",
    "response_format.json_schema.schema_json": "response_format.json_schema.schema",
}


def json_path(field: str) -> str:
    """A field of the protobuf request as the path in OpenAI's JSON, for an error's `param`."""
    if field in _RENAMED:
        return _RENAMED[field]
    path = field.removeprefix("chat.").removeprefix("sampling.").removesuffix("_json")
    return re.sub(r"(content\[\d+\])\.image\b", r"\1.image_url", path)


def finish_reason(reason: sampling_pb2.FinishReason.ValueType) -> FinishReason:
    """OpenAI's coarser reason; an unknown one comes from a newer core and reads as a plain end."""
    if reason in (sampling_pb2.FINISH_REASON_LENGTH, sampling_pb2.FINISH_REASON_CONTEXT_LENGTH):
        return "length"
    return "tool_calls" if reason == sampling_pb2.FINISH_REASON_TOOL_CALLS else "stop"


def usage_json(usage: usage_pb2.Usage) -> dict[str, object]:
    """Token counts."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def logprobs_json(tokens: Iterable[sampling_pb2.ChosenTokenLogprob]) -> dict[str, object]:
    """Log-probabilities of a choice or a chunk."""
    content = [
        {**_token_json(token.chosen), "top_logprobs": [_token_json(other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token_json(token: sampling_pb2.TokenLogprob) -> dict[str, object]:
    return {
        # A token need not be whole characters; `bytes` is exact where this is not.
        "token": token.token.decode("utf-8", "replace"),
        "logprob": token.logprob,
        "bytes": list(token.token),
    }


def tool_call_json(call: chat_pb2.ToolCall) -> dict[str, object]:
    """A whole tool call."""
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": call.function.arguments_json},
    }


def _choice_json(choice: chat_pb2.ChatChoice) -> dict[str, object]:
    text = "".join(part.text for part in choice.message.content)
    calls = [tool_call_json(call) for call in choice.message.tool_calls]
    message: dict[str, object] = {"role": "assistant", "content": text if text or not calls else None}
    if choice.message.reasoning:
        message["reasoning_content"] = choice.message.reasoning
    if calls:
        message["tool_calls"] = calls
    message |= {"refusal": None, "annotations": []}
    return {
        "index": choice.index,
        "message": message,
        "finish_reason": finish_reason(choice.finish_reason),
        "logprobs": logprobs_json(choice.logprobs.tokens) if choice.HasField("logprobs") else None,
    }


def chat_json(response: chat_pb2.ChatResponse, created: int) -> dict[str, object]:
    """A whole chat completion; created is in Unix seconds."""
    return {
        "id": response.id,
        "object": "chat.completion",
        "created": created,
        "model": response.model,
        "choices": [_choice_json(choice) for choice in response.choices],
        "usage": usage_json(response.usage),
        "service_tier": "default",
        "system_fingerprint": response.system_fingerprint,
    }


def model_json(model: model_pb2.Model) -> dict[str, object]:
    """One model of the list."""
    return {
        "id": model.id,
        "object": "model",
        "created": model.modify_time.seconds,
        "owned_by": "osaurus",
    }
