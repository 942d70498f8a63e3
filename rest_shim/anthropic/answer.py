"""A whole answer of the core as Anthropic's message; pure functions."""

from __future__ import annotations

import base64
import hashlib
import json

from osaurus_grpc.v1 import chat_pb2, sampling_pb2, usage_pb2

_STOP_REASONS = {
    sampling_pb2.FINISH_REASON_STOP_SEQUENCE: "stop_sequence",
    sampling_pb2.FINISH_REASON_LENGTH: "max_tokens",
    # Their word for it, model_context_window_exceeded, is newer than many clients.
    sampling_pb2.FINISH_REASON_CONTEXT_LENGTH: "max_tokens",
    sampling_pb2.FINISH_REASON_TOOL_CALLS: "tool_use",
}


def message_id(core_id: str) -> str:
    """The message's id, from the core's id of the answer."""
    return f"msg_{core_id.rpartition('-')[2]}"


def call_id(core_id: str) -> str:
    """A tool call's id, from the core's; the client says it again with the call's result."""
    return f"toolu_{core_id.removeprefix('call_')}"


def stop_reason(reason: sampling_pb2.FinishReason.ValueType) -> str:
    """Why an answer ended; an unknown reason comes from a newer core and reads as a plain end."""
    return _STOP_REASONS.get(reason, "end_turn")


def usage_json(usage: usage_pb2.Usage) -> dict[str, object]:
    """Token counts; input_tokens are those that were read neither from nor into a cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def signature(thinking: str) -> str:
    """What stands for Anthropic's signature of a block of reasoning.

    Clients need one and hand it back. It proves nothing and is not looked at again.
    """
    return base64.b64encode(hashlib.sha256(thinking.encode()).digest()).decode("ascii")


def tool_input(arguments_json: str) -> dict[str, object]:
    """A call's arguments as an object; {} where the answer was cut off in their middle."""
    try:
        arguments = json.loads(arguments_json or "{}")
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def head_json(core_id: str, model: str) -> dict[str, object]:
    """What a message begins with."""
    return {"id": message_id(core_id), "type": "message", "role": "assistant", "model": model}


def message_json(
    response: chat_pb2.ChatResponse, *, shows_thinking: bool, omits_thinking: bool
) -> dict[str, object]:
    """A whole answer.

    Args:
        response: The answer.
        shows_thinking: Whether the model's reasoning is part of it.
        omits_thinking: Whether that part is empty but for its signature.
    """
    choice = response.choices[0]
    content: list[dict[str, object]] = []
    reasoning = choice.message.reasoning
    if reasoning and shows_thinking:
        shown = "" if omits_thinking else reasoning
        content.append({"type": "thinking", "thinking": shown, "signature": signature(reasoning)})
    text = "".join(part.text for part in choice.message.content)
    if text:
        content.append({"type": "text", "text": text})
    for call in choice.message.tool_calls:
        arguments = tool_input(call.function.arguments_json)
        name = call.function.name
        content.append({"type": "tool_use", "id": call_id(call.id), "name": name, "input": arguments})
    return {
        **head_json(response.id, response.model),
        "content": content,
        "stop_reason": stop_reason(choice.finish_reason),
        "stop_sequence": choice.stop_sequence or None,
        "usage": usage_json(response.usage),
    }
