"""Requests from plain Python values. Pure.

Conversations are a string, or messages in OpenAI's form; tools are OpenAI's too, with or without the
{"type": "function"} around them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias, TypedDict

from google.protobuf.duration_pb2 import Duration

from osaurus_grpc import errors
from osaurus_grpc.v1 import chat_pb2, embedding_pb2, sampling_pb2

MessageLike: TypeAlias = chat_pb2.Message | Mapping[str, Any]
Conversation: TypeAlias = str | Iterable[MessageLike]
ToolLike: TypeAlias = chat_pb2.Tool | Mapping[str, Any]

_ROLES: Final = {
    "system": chat_pb2.ROLE_SYSTEM,
    "developer": chat_pb2.ROLE_DEVELOPER,
    "user": chat_pb2.ROLE_USER,
    "assistant": chat_pb2.ROLE_ASSISTANT,
    "tool": chat_pb2.ROLE_TOOL,
}
_TOOL_MODES: Final = {
    "auto": chat_pb2.TOOL_CHOICE_MODE_AUTO,
    "none": chat_pb2.TOOL_CHOICE_MODE_NONE,
    "required": chat_pb2.TOOL_CHOICE_MODE_REQUIRED,
}


class ChatOptions(TypedDict, total=False):
    """What may be said about an answer; whatever is left out is the server's default.

    Keys:
        model: Any of a model's names; "" is the server's default model.
        system: Instructions, put before the conversation.
        temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
            logit_bias, seed, max_tokens, stop, top_logprobs, ignore_eos: As in sampling.proto.
        tools: Functions the model may call.
        tool_choice: "auto", "none", "required", or the name of the function to call.
        parallel_tool_calls: False allows one call at most.
        json_schema: A JSON Schema that the answer satisfies.
        json_object: True makes the answer any JSON object.
        regex, grammar: What the answer matches: a regular expression, a Lark grammar.
        choice_count: Answers wanted.
        session_id: Names a conversation that the server keeps; then only new turns need be sent.
        reasoning_effort, reasoning_enabled, max_reasoning_tokens: For models that reason.
        template_arguments: Extra variables of the chat template.
        keep_alive_seconds: How long the model stays loaded; negative is for ever.
        max_context_tokens: Of the model's context to use.
    """

    model: str
    system: str
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    max_tokens: int
    stop: str | Sequence[str]
    top_logprobs: int
    ignore_eos: bool
    tools: Sequence[ToolLike]
    tool_choice: str
    parallel_tool_calls: bool
    json_schema: Mapping[str, Any]
    json_object: bool
    regex: str
    grammar: str
    choice_count: int
    session_id: str
    reasoning_effort: str
    reasoning_enabled: bool
    max_reasoning_tokens: int
    template_arguments: Mapping[str, Any]
    keep_alive_seconds: float
    max_context_tokens: int


_SAMPLING: Final = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "max_tokens", "top_logprobs", "ignore_eos",
)  # fmt: skip
_PLAIN: Final = (
    "model", "parallel_tool_calls", "choice_count", "session_id", "reasoning_effort",
    "reasoning_enabled", "max_reasoning_tokens", "max_context_tokens",
)  # fmt: skip


def chat_request(conversation: Conversation, options: ChatOptions) -> chat_pb2.ChatRequest:
    """A request of a conversation and what is said about the answer.

    Raises:
        InvalidRequestError: A message or tool is of no known form.
        TypeError: An option is unknown, or of the wrong type.
    """
    if unknown := set(options) - set(ChatOptions.__annotations__):
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    request = chat_pb2.ChatRequest(
        **_given(options, _PLAIN),
        messages=messages(conversation, options.get("system", "")),
        sampling=_sampling(options),
        tools=[tool(each) for each in options.get("tools", ())],
    )
    if choice := options.get("tool_choice"):
        mode = _TOOL_MODES.get(choice, chat_pb2.TOOL_CHOICE_MODE_FUNCTION)
        request.tool_choice.mode = mode
        if mode == chat_pb2.TOOL_CHOICE_MODE_FUNCTION:
            request.tool_choice.function_name = choice
    _set_format(request.response_format, options)
    if "template_arguments" in options:
        request.chat_template_kwargs_json = json.dumps(options["template_arguments"])
    if "keep_alive_seconds" in options:
        request.keep_alive.CopyFrom(duration(options["keep_alive_seconds"]))
    return request


def _given(options: ChatOptions, names: Iterable[str]) -> dict[str, Any]:
    """The options of these names that were given."""
    values = dict(options)
    return {name: values[name] for name in names if name in values}


def _sampling(options: ChatOptions) -> sampling_pb2.SamplingParams:
    stop = options.get("stop", ())
    return sampling_pb2.SamplingParams(
        **_given(options, _SAMPLING),
        stop=[stop] if isinstance(stop, str) else stop,
        logit_bias=options.get("logit_bias", {}),
    )


def _set_format(target: chat_pb2.ResponseFormat, options: ChatOptions) -> None:
    if "json_schema" in options:
        target.json_schema.schema_json = json.dumps(options["json_schema"])
    elif options.get("json_object"):
        target.json_object.SetInParent()
    elif "regex" in options:
        target.regex = options["regex"]
    elif "grammar" in options:
        target.grammar = options["grammar"]


def messages(conversation: Conversation, system: str = "") -> list[chat_pb2.Message]:
    """A conversation as the contract has it."""
    said = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
    found = [message(each, f"messages[{i}]") for i, each in enumerate(said)]
    return [message({"role": "system", "content": system}, "system"), *found] if system else found


def message(value: MessageLike, field: str = "message") -> chat_pb2.Message:
    """One message; a Message of the contract is taken as it is.

    Raises InvalidRequestError where the role or the content is of no known form.
    """
    if isinstance(value, chat_pb2.Message):
        return value
    role = _ROLES.get(value.get("role", ""))
    if role is None:
        raise errors.InvalidRequestError(f"{field}.role must be one of {', '.join(_ROLES)}.", field=field)
    return chat_pb2.Message(
        role=role,
        content=[_part(each, field) for each in _parts(value.get("content"))],
        name=value.get("name") or "",
        tool_call_id=value.get("tool_call_id") or "",
        reasoning=value.get("reasoning") or value.get("reasoning_content") or "",
        tool_calls=[_call(each) for each in value.get("tool_calls") or ()],
    )


def _parts(content: Any) -> Iterable[Any]:
    if content is None:
        return ()
    return [content] if isinstance(content, (str, Mapping)) else content


def _part(value: Any, field: str) -> chat_pb2.ContentPart:
    match value:
        case chat_pb2.ContentPart():
            return value
        case str():
            return chat_pb2.ContentPart(text=value)
        case {"type": "text", "text": str(text)}:
            return chat_pb2.ContentPart(text=text)
        case {"type": "image", "data": bytes(data), "mime_type": str(mime_type)}:
            return chat_pb2.ContentPart(image=chat_pb2.ImageContent(data=data, mime_type=mime_type))
        case _:
            raise errors.InvalidRequestError(
                f'{field}.content must be text, or parts {{"type": "text", "text"}} and '
                f'{{"type": "image", "data", "mime_type"}}.',
                field=f"{field}.content",
            )


def _call(value: Any) -> chat_pb2.ToolCall:
    if isinstance(value, chat_pb2.ToolCall):
        return value
    function = value["function"]
    arguments = function["arguments"]
    return chat_pb2.ToolCall(
        id=value.get("id", ""),
        function=chat_pb2.FunctionCall(
            name=function["name"],
            arguments_json=arguments if isinstance(arguments, str) else json.dumps(arguments),
        ),
    )


def tool(value: ToolLike) -> chat_pb2.Tool:
    """One tool; a Tool of the contract is taken as it is."""
    if isinstance(value, chat_pb2.Tool):
        return value
    function = value.get("function", value)
    built = chat_pb2.FunctionTool(name=function["name"], description=function.get("description") or "")
    if function.get("parameters") is not None:
        built.parameters_json = json.dumps(function["parameters"])
    if function.get("strict") is not None:
        built.strict = function["strict"]
    return chat_pb2.Tool(function=built)


def embed_request(
    inputs: str | Sequence[str], model: str, dimensions: int | None, truncate: bool
) -> embedding_pb2.EmbedRequest:
    """A request for vectors."""
    request = embedding_pb2.EmbedRequest(
        model=model, inputs=[inputs] if isinstance(inputs, str) else inputs, truncate=truncate
    )
    if dimensions is not None:
        request.dimensions = dimensions
    return request


def duration(seconds: float) -> Duration:
    """Seconds as the contract has them."""
    value = Duration()
    value.FromNanoseconds(round(seconds * 1e9))
    return value
