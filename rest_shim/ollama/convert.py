"""Ollama's JSON to protobuf and back; pure functions.

Clients read a zero as a missing value (Go omits it), so no duration and no count is ever 0.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Iterable, Sequence

from google.protobuf.duration_pb2 import Duration

from osaurus_grpc.v1 import chat_pb2, sampling_pb2, usage_pb2
from rest_shim.errors import Refusal
from rest_shim.image_files import media_type
from rest_shim.ollama import schema
from rest_shim.ollama.duration import to_proto
from rest_shim.wire import dump

ROLES = {
    "system": chat_pb2.ROLE_SYSTEM,
    "developer": chat_pb2.ROLE_DEVELOPER,
    "user": chat_pb2.ROLE_USER,
    "assistant": chat_pb2.ROLE_ASSISTANT,
    "tool": chat_pb2.ROLE_TOOL,
}

# Keeps the most probable token only, which is what top_p 0 means; the core takes values above 0.
SMALLEST_TOP_P = 1e-6


def chat_request(body: schema.ChatBody) -> chat_pb2.ChatRequest:
    """The core's request for an answer.

    Raises:
        Refusal: An image is not base64.
    """
    request = chat_pb2.ChatRequest(
        model=body.model,
        messages=[
            message_proto(message, f"messages[{index}].", images=message.images)
            for index, message in enumerate(body.messages)
        ],
        sampling=sampling(body),
        tools=[_tool(tool) for tool in body.tools],
        max_context_tokens=context_limit(body),
        keep_alive=keep_alive(body),
        response_format=response_format(body),
    )
    set_thinking(request, body)
    return request


def context_limit(body: schema.AnswerBody) -> int | None:
    """Tokens of context to use at most; None is all of it."""
    context = body.options.num_ctx
    return context if context is not None and context > 0 else None


def response_format(body: schema.AnswerBody) -> chat_pb2.ResponseFormat | None:
    """The form the answer must have; None is free text."""
    if body.format is None:
        return None
    if not body.format:
        return chat_pb2.ResponseFormat(json_object=chat_pb2.JsonObjectFormat())
    return chat_pb2.ResponseFormat(json_schema=chat_pb2.JsonSchemaFormat(schema_json=dump(body.format)))


def set_thinking(request: chat_pb2.ChatRequest, body: schema.AnswerBody) -> None:
    """Say whether, and how hard, the model thinks first."""
    if body.think is None:
        return
    request.reasoning_enabled = body.think is not False
    if isinstance(body.think, str):
        request.reasoning_effort = body.think


def keep_alive(body: schema.ResidentBody) -> Duration | None:
    """How long the model stays loaded; None is the server's default."""
    return None if body.keep_alive is None else to_proto(body.keep_alive)


def sampling(body: schema.AnswerBody) -> sampling_pb2.SamplingParams:
    """How tokens are chosen."""
    options = body.options
    limit = options.num_predict
    if limit is not None and limit < 1:
        # To the end of the context; Ollama reads 0 as it reads -1.
        limit = schema.MAX_INT32
    return sampling_pb2.SamplingParams(
        temperature=options.temperature,
        top_p=None if options.top_p is None else max(options.top_p, SMALLEST_TOP_P),
        top_k=None if options.top_k is None else max(options.top_k, 0),
        min_p=options.min_p,
        repetition_penalty=options.repeat_penalty,
        repetition_context=options.repeat_last_n,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        # -1 is Ollama's way to say "at random".
        seed=None if options.seed == -1 else options.seed,
        max_tokens=limit,
        stop=options.stop,
        top_logprobs=body.top_logprobs if body.logprobs else None,
    )


def message_proto(message: schema.Message, path: str, *, images: Sequence[str]) -> chat_pb2.Message:
    """One turn.

    Args:
        message: What is said.
        path: The JSON path of what holds the images, with the dot at its end.
        images: Images in base64.

    Raises:
        Refusal: An image is not base64.
    """
    content = (
        [chat_pb2.ContentPart(text=message.content)] if message.content or not message.tool_calls else []
    )
    content += [
        chat_pb2.ContentPart(image=_image(image, f"{path}images[{place}]"))
        for place, image in enumerate(images)
    ]
    return chat_pb2.Message(
        role=ROLES[message.role],
        content=content,
        name=message.tool_name,
        tool_calls=[
            chat_pb2.ToolCall(
                id=call.id,
                function=chat_pb2.FunctionCall(
                    name=call.function.name, arguments_json=dump(call.function.arguments)
                ),
            )
            for call in message.tool_calls
        ],
        tool_call_id=message.tool_call_id,
        reasoning=message.thinking,
    )


_RENAMED = {
    "context_token_ids": "context",
    "max_context_tokens": "options.num_ctx",
    "response_format.json_schema.schema_json": "format",
    "reasoning_effort": "think",
    "reasoning_enabled": "think",
    "text": "prompt",
    "sampling.max_tokens": "options.num_predict",
    "sampling.repetition_penalty": "options.repeat_penalty",
    "sampling.repetition_context": "options.repeat_last_n",
    "sampling.top_logprobs": "top_logprobs",
    "inputs": "input",
}
_PARAMETERS = re.compile(r"(tools\[\d+\]\.function)\.parameters_json")
_ARGUMENTS = re.compile(r"(messages\[\d+\]\.tool_calls\[\d+\]\.function\.arguments)_json")
_PART = re.compile(r"(messages\[\d+\])\.content\[\d+\]\.(text|image)\b.*")


def json_path(field: str) -> str:
    """A field of the protobuf request as the path in Ollama's JSON."""
    path = field.removeprefix("chat.").removeprefix("completion.")
    for ours, theirs in _RENAMED.items():
        if path == ours or path.startswith(f"{ours}["):
            return theirs + path.removeprefix(ours)
    if path.startswith("sampling."):
        return f"options.{path.removeprefix('sampling.')}"
    if found := _PART.fullmatch(path):
        return f"{found[1]}.{'images' if found[2] == 'image' else 'content'}"
    return _ARGUMENTS.sub(r"\1", _PARAMETERS.sub(r"\1.parameters", path))


def prompt_path(field: str) -> str:
    """As json_path, for the one turn that /generate makes of its prompt."""
    path = json_path(field)
    if not path.startswith("messages"):
        return path
    return "images" if path.endswith(".images") else "prompt"


def _image(encoded: str, path: str) -> chat_pb2.ImageContent:
    try:
        # Many encoders break their lines; Go's decoder, so Ollama, skips the breaks.
        data = base64.b64decode(encoded.replace("\r", "").replace("\n", ""), validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, f"{path}: illegal base64 data", param=path) from None
    return chat_pb2.ImageContent(data=data, mime_type=media_type(data))


def _tool(tool: schema.Tool) -> chat_pb2.Tool:
    function = tool.function
    return chat_pb2.Tool(
        function=chat_pb2.FunctionTool(
            name=function.name,
            description=function.description,
            parameters_json="" if function.parameters is None else dump(function.parameters),
        )
    )


def timestamp(nanoseconds: int) -> str:
    """RFC 3339 with nanoseconds, UTC, from nanoseconds since the epoch."""
    seconds, fraction = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{fraction:09d}Z"


def done_reason(reason: sampling_pb2.FinishReason.ValueType) -> str:
    """Why an answer ended, in Ollama's words; a tool call is a stop here."""
    is_cut = reason in (sampling_pb2.FINISH_REASON_LENGTH, sampling_pb2.FINISH_REASON_CONTEXT_LENGTH)
    return "length" if is_cut else "stop"


def metrics_json(usage: usage_pb2.Usage, timings: usage_pb2.Timings) -> dict[str, object]:
    """The counts and the durations, in nanoseconds, of a finished answer."""
    return {
        "total_duration": max(1, timings.total_duration.ToNanoseconds()),
        "load_duration": max(1, timings.load_duration.ToNanoseconds()),
        "prompt_eval_count": max(1, usage.prompt_tokens),
        "prompt_eval_duration": max(1, timings.prompt_duration.ToNanoseconds()),
        # An answer that ends at once took one step, the one that chose its end.
        "eval_count": max(1, usage.completion_tokens),
        "eval_duration": max(1, timings.decode_duration.ToNanoseconds()),
    }


def logprobs_json(tokens: Iterable[sampling_pb2.ChosenTokenLogprob]) -> list[dict[str, object]]:
    """Log-probabilities; the alternatives only where some were asked for."""
    entries = []
    for token in tokens:
        entry = _token_json(token.chosen)
        if token.top:
            entry["top_logprobs"] = [_token_json(other) for other in token.top]
        entries.append(entry)
    return entries


def _token_json(token: sampling_pb2.TokenLogprob) -> dict[str, object]:
    return {
        "token": token.token.decode("utf-8", "replace"),
        "logprob": token.logprob,
        "bytes": list(token.token),
    }


def tool_call_json(call: chat_pb2.ToolCall, index: int) -> dict[str, object]:
    """A whole tool call, its arguments an object."""
    try:
        arguments = json.loads(call.function.arguments_json or "{}")
    except ValueError:
        # The answer was cut off in the middle of the arguments.
        arguments = {}
    if not isinstance(arguments, dict):
        # Clients take an object only.
        arguments = {}
    function = {"index": index, "name": call.function.name, "arguments": arguments}
    return {"id": call.id, "function": function}


def chat_json(response: chat_pb2.ChatResponse, model: str, now: int) -> dict[str, object]:
    """A whole answer; model is the name as the client said it, now is in nanoseconds."""
    choice = response.choices[0]
    message: dict[str, object] = {
        "role": "assistant",
        "content": "".join(part.text for part in choice.message.content),
    }
    if choice.message.reasoning:
        message["thinking"] = choice.message.reasoning
    if choice.message.tool_calls:
        message["tool_calls"] = [tool_call_json(call, i) for i, call in enumerate(choice.message.tool_calls)]
    answer: dict[str, object] = {
        "model": model,
        "created_at": timestamp(now),
        "message": message,
        "done": True,
        "done_reason": done_reason(choice.finish_reason),
    }
    if choice.logprobs.tokens:
        answer["logprobs"] = logprobs_json(choice.logprobs.tokens)
    return answer | metrics_json(response.usage, response.timings)


def residence_json(model: str, reason: str, now: int) -> dict[str, object]:
    """The answer to a chat without messages, which only loads or unloads."""
    return {
        "model": model,
        "created_at": timestamp(now),
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": reason,
    }
