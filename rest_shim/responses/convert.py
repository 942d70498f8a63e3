"""A request for a response to the core's chat request; pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from osaurus_grpc.v1 import chat_pb2
from rest_shim.errors import Refusal
from rest_shim.openai.sampling import sampling_params
from rest_shim.openai.tools import TOOL_CHOICE_MODES
from rest_shim.responses import schema
from rest_shim.responses.conversation import Conversation
from rest_shim.wire import dump

LOGPROBS = "message.output_text.logprobs"


def check(body: schema.ResponseBody) -> None:
    """Refuse what is not done, and fields that contradict each other.

    Raises:
        Refusal: Naming the field.
    """
    if body.background:
        raise _unsupported("background", "Responses in the background are not supported.")
    if body.stream_options is not None and not body.stream:
        raise _unsupported("stream_options", "'stream_options' is only allowed when 'stream' is true.")
    check_prompt(body)


def check_prompt(body: schema.PromptBody) -> None:
    """The same for what makes up the prompt.

    Raises:
        Refusal: Naming the field.
    """
    if body.conversation is not None:
        raise _unsupported(
            "conversation", "'conversation' is not supported; send 'previous_response_id' or the whole input."
        )
    if body.prompt is not None:
        raise _unsupported(
            "prompt",
            "'prompt' is not supported, since templates are not kept; send 'instructions' and 'input'.",
        )
    if body.input is not None and not body.input and body.previous_response_id is None:
        raise _unsupported("input", "Missing required parameter: 'input'.")
    form = body.text.format if body.text is not None else None
    if form is not None and form.type == "json_schema" and form.definition is None:
        raise _unsupported("text.format.schema", "Missing required parameter: 'text.format.schema'.")
    _check_choice(body)


def _unsupported(param: str, text: str) -> Refusal:
    return Refusal(400, text, param=param)


def _check_choice(body: schema.PromptBody) -> None:
    choice = body.tool_choice
    known = {tool.name for tool in body.tools}
    if choice.type == "function" and choice.name is None:
        raise _unsupported("tool_choice.name", "Missing required parameter: 'tool_choice.name'.")
    if choice.type == "allowed_tools" and not choice.tools:
        raise _unsupported("tool_choice.tools", "Missing required parameter: 'tool_choice.tools'.")
    if choice.type in {"required", "function", "allowed_tools"} and not body.tools:
        raise _unsupported("tool_choice", "'tool_choice' is only allowed when 'tools' are given.")
    named = [choice.name or ""] if choice.type == "function" else [tool.name for tool in choice.tools]
    for name in named if choice.type in {"function", "allowed_tools"} else ():
        if name not in known:
            raise _unsupported("tool_choice", f"'tool_choice' names '{name}', which is not in 'tools'.")


def chat_request(body: schema.ResponseBody, talk: Conversation) -> chat_pb2.ChatRequest:
    """The core's request for a response.

    Raises:
        Refusal: A key of logit_bias is no token id.
    """
    wants_logprobs = LOGPROBS in body.include or body.top_logprobs is not None
    request = prompt_request(body, talk)
    request.sampling.CopyFrom(
        sampling_params(
            body,
            max_tokens=body.max_output_tokens,
            top_logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        )
    )
    return request


def prompt_request(body: schema.PromptBody, talk: Conversation) -> chat_pb2.ChatRequest:
    """The core's request as far as the prompt depends on it."""
    request = chat_pb2.ChatRequest(
        model=body.model,
        messages=talk.messages,
        tools=[_tool(tool) for tool in _offered(body)],
        parallel_tool_calls=None if body.parallel_tool_calls else False,
    )
    if request.tools:
        _set_tool_choice(request.tool_choice, body.tool_choice)
    if body.text is not None and body.text.format is not None:
        _set_format(request.response_format, body.text.format)
    if body.chat_template_kwargs is not None:
        request.chat_template_kwargs_json = dump(body.chat_template_kwargs)
    effort = body.reasoning.effort if body.reasoning is not None else None
    if effort is not None:
        request.reasoning_effort = effort
    if effort == "none":
        request.reasoning_enabled = False
    return request


def _offered(body: schema.PromptBody) -> Sequence[schema.FunctionTool]:
    """The tools the model sees: of allowed_tools, those that are allowed."""
    if body.tool_choice.type != "allowed_tools":
        return body.tools
    allowed = {tool.name for tool in body.tool_choice.tools}
    return [tool for tool in body.tools if tool.name in allowed]


def _tool(tool: schema.FunctionTool) -> chat_pb2.Tool:
    return chat_pb2.Tool(
        function=chat_pb2.FunctionTool(
            name=tool.name,
            description=tool.description or "",
            parameters_json="" if tool.parameters is None else dump(tool.parameters),
            strict=tool.strict,
        )
    )


def _set_tool_choice(target: chat_pb2.ToolChoice, choice: schema.ToolChoice) -> None:
    target.mode = TOOL_CHOICE_MODES[choice.mode if choice.type == "allowed_tools" else choice.type]
    if choice.type == "function" and choice.name is not None:
        target.function_name = choice.name


def _set_format(target: chat_pb2.ResponseFormat, form: schema.TextFormat) -> None:
    match form.type:
        case "text":
            return
        case "json_object":
            target.json_object.SetInParent()
        case "json_schema":
            target.json_schema.CopyFrom(
                chat_pb2.JsonSchemaFormat(
                    name=form.name or "response", schema_json=dump(form.definition), strict=form.strict
                )
            )
        case _:
            assert_never(form.type)
