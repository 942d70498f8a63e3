"""The response resource: what a request asked for, echoed, and what came of it.

Every field of the Open Responses specification's ResponseResource is always there, if null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from osaurus_grpc.v1 import chat_pb2, sampling_pb2, usage_pb2
from rest_shim.errors import Refusal
from rest_shim.openai.convert import logprobs_json
from rest_shim.responses import schema
from rest_shim.responses.items import Ids

ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]

# What the core does where a request leaves these out.
DEFAULT_TEMPERATURE = 0.7
DEFAULT_TOP_P = 1.0

# OpenAI's words for why a response failed.
_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class Draft:
    """A response in the making.

    Args:
        body: The request.
        created: Unix seconds.
    """

    def __init__(self, body: schema.ResponseBody, created: int) -> None:
        self._body = body
        self._created = created
        self.ids = Ids()
        self.model = body.model
        # Set to False where the core would not keep it: the response says what is so.
        self.is_stored = body.store

    def resource(
        self,
        status: ResponseStatus,
        output: Sequence[object] = (),
        *,
        usage: usage_pb2.Usage | None = None,
        completed: int | None = None,
        failure: Refusal | None = None,
    ) -> dict[str, object]:
        """The resource as it stands; completed is in Unix seconds."""
        body = self._body
        return {
            "id": self.ids.response,
            "object": "response",
            "created_at": self._created,
            "completed_at": completed if status == "completed" else None,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model,
            "previous_response_id": body.previous_response_id,
            "instructions": body.instructions,
            "output": list(output),
            "error": None if failure is None else _error_json(failure),
            "tools": [
                {
                    "type": "function",
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                    "strict": tool.strict,
                }
                for tool in body.tools
            ],
            "tool_choice": _tool_choice_json(body.tool_choice),
            "truncation": body.truncation,
            "parallel_tool_calls": body.parallel_tool_calls,
            "text": _text_json(body.text),
            "top_p": DEFAULT_TOP_P if body.top_p is None else body.top_p,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "top_logprobs": body.top_logprobs or 0,
            "temperature": DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
            "reasoning": {
                "effort": body.reasoning.effort if body.reasoning else None,
                "summary": body.reasoning.summary if body.reasoning else None,
            },
            "usage": None if usage is None else usage_json(usage),
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "store": self.is_stored,
            "background": False,
            "service_tier": "default",
            "metadata": body.metadata,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
        }


def _error_json(failure: Refusal) -> dict[str, object]:
    return {"code": _ERROR_CODES.get(failure.status, "server_error"), "message": failure.message}


def _tool_choice_json(choice: schema.ToolChoice) -> object:
    match choice.type:
        case "function":
            return {"type": "function", "name": choice.name}
        case "allowed_tools":
            tools = [{"type": "function", "name": tool.name} for tool in choice.tools]
            return {"type": "allowed_tools", "mode": choice.mode, "tools": tools}
        case _:
            return choice.type


def _text_json(text: schema.TextOptions | None) -> dict[str, object]:
    form = text.format if text is not None else None
    shown: dict[str, object] = {"type": "text" if form is None else form.type}
    if form is not None and form.type == "json_schema":
        shown |= {
            "name": form.name or "response",
            "description": form.description,
            "schema": form.definition,
            "strict": bool(form.strict),
        }
    verbosity = text.verbosity if text is not None else None
    return {"format": shown} if verbosity is None else {"format": shown, "verbosity": verbosity}


def usage_json(usage: usage_pb2.Usage) -> dict[str, object]:
    """Token counts in the words of this API."""
    return {
        "input_tokens": usage.prompt_tokens,
        # openai-python requires cache_write_tokens; nothing here charges for writing a cache.
        "input_tokens_details": {"cached_tokens": usage.cached_prompt_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def status_of(reason: sampling_pb2.FinishReason.ValueType) -> Literal["completed", "incomplete"]:
    """Whether the answer was cut off."""
    cut = (sampling_pb2.FINISH_REASON_LENGTH, sampling_pb2.FINISH_REASON_CONTEXT_LENGTH)
    return "incomplete" if reason in cut else "completed"


def text_part(text: str, logprobs: Sequence[object] = ()) -> dict[str, object]:
    """The content part that holds an answer's text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def message_item(item_id: str, status: str, parts: Sequence[object]) -> dict[str, object]:
    """An assistant's message."""
    return {
        "id": item_id,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": list(parts),
    }


def reasoning_item(item_id: str, status: str, text: str | None) -> dict[str, object]:
    """The reasoning before an answer; no summary is made of it."""
    content = [] if text is None else [{"type": "reasoning_text", "text": text}]
    return {
        "id": item_id,
        "type": "reasoning",
        "summary": [],
        "content": content,
        "encrypted_content": None,
        "status": status,
    }


def call_item(item_id: str, status: str, call_id: str, name: str, arguments: str) -> dict[str, object]:
    """A call of a function."""
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def token_logprobs(tokens: Sequence[sampling_pb2.ChosenTokenLogprob]) -> Sequence[object]:
    """Log-probabilities as this API nests them."""
    content = logprobs_json(tokens)["content"]
    return content if isinstance(content, list) else ()


def output_items(choice: chat_pb2.ChatChoice, ids: Ids) -> Sequence[dict[str, object]]:
    """The items of a whole answer: reasoning, text, calls.

    An answer without any is an empty text. Only its last item can be cut off.
    """
    message = choice.message
    text = "".join(part.text for part in message.content)
    made: list[dict[str, object]] = []
    if message.reasoning:
        made.append(reasoning_item(ids.new("rs"), "completed", message.reasoning))
    if text or not (message.tool_calls or message.reasoning):
        part = text_part(text, token_logprobs(choice.logprobs.tokens))
        made.append(message_item(ids.new("msg"), "completed", [part]))
    made.extend(
        call_item(ids.new("fc"), "completed", call.id, call.function.name, call.function.arguments_json)
        for call in message.tool_calls
    )
    made[-1]["status"] = status_of(choice.finish_reason)
    return made
