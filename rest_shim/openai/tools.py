"""The tools of a chat: what they may hold, how one is chosen, and their conversion to the core's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from osaurus_grpc.v1 import chat_pb2
from rest_shim.bodies import Body
from rest_shim.errors import Refusal
from rest_shim.wire import dump

MAX_TOOLS = 1_024

FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
ChoiceMode = Literal["auto", "none", "required"]

TOOL_CHOICE_MODES = {
    "auto": chat_pb2.TOOL_CHOICE_MODE_AUTO,
    "none": chat_pb2.TOOL_CHOICE_MODE_NONE,
    "required": chat_pb2.TOOL_CHOICE_MODE_REQUIRED,
    "function": chat_pb2.TOOL_CHOICE_MODE_FUNCTION,
}


class FunctionTool(Body):
    """A function that may be called."""

    name: FunctionName
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    """A function, named in a choice."""

    name: FunctionName


class NamedTool(Body):
    """A tool, named in a choice."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    """The tools that may be called, of those that are given."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class ToolChoice(Body):
    """How tools are chosen; the plain strings are read as {"type": ...}."""

    type: Literal["auto", "none", "required", "function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


def _from_string(value: object) -> object:
    if isinstance(value, str):
        if value not in {"auto", "none", "required"}:
            raise ValueError("must be 'auto', 'none', 'required' or an object that names a function")
        return {"type": value}
    return value


AnyToolChoice = Annotated[
    ToolChoice, BeforeValidator(_from_string, json_schema_input_type=ChoiceMode | ToolChoice)
]


def check_choice(choice: ToolChoice, tools: Sequence[Tool]) -> None:
    """Refuse a choice that names what is not there.

    Raises:
        Refusal: Naming the field.
    """
    if choice.type == "function" and choice.function is None:
        raise _missing("tool_choice.function")
    if choice.type == "allowed_tools" and choice.allowed_tools is None:
        raise _missing("tool_choice.allowed_tools")
    if choice.type in {"required", "function", "allowed_tools"} and not tools:
        raise Refusal(400, "'tool_choice' is only allowed when 'tools' are given.", param="tool_choice")
    known = {tool.function.name for tool in tools}
    for name in _named(choice):
        if name not in known:
            text = f"'tool_choice' names '{name}', which is not in 'tools'."
            raise Refusal(400, text, param="tool_choice")


def _missing(path: str) -> Refusal:
    return Refusal(400, f"Missing required parameter: '{path}'.", param=path)


def _named(choice: ToolChoice) -> Sequence[str]:
    if choice.type == "function" and choice.function is not None:
        return [choice.function.name]
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return ()


def set_tools(request: chat_pb2.ChatRequest, tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Fill in the tools that the model sees and how it chooses; of allowed tools, it sees those only."""
    allowed = set(_named(choice)) if choice is not None and choice.type == "allowed_tools" else None
    request.tools.extend(
        _tool(tool.function) for tool in tools if allowed is None or tool.function.name in allowed
    )
    if choice is None or not tools:
        return
    mode = choice.type
    if choice.allowed_tools is not None and mode == "allowed_tools":
        mode = choice.allowed_tools.mode
    request.tool_choice.mode = TOOL_CHOICE_MODES[mode]
    if choice.type == "function" and choice.function is not None:
        request.tool_choice.function_name = choice.function.name


def _tool(function: FunctionTool) -> chat_pb2.Tool:
    return chat_pb2.Tool(
        function=chat_pb2.FunctionTool(
            name=function.name,
            description=function.description,
            parameters_json="" if function.parameters is None else dump(function.parameters),
            strict=function.strict,
        )
    )
