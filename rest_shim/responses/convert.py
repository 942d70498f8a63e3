"""A request for a response to the core's chat request; pure functions.

A conversation of items becomes one of messages: reasoning, text and calls that follow each other
are one turn of the assistant. Each message remembers where it came from, so that an error of the
core names the client's own field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from osaurus_grpc.v1 import chat_pb2
from rest_shim.errors import Refusal
from rest_shim.openai.messages import ROLES, image_from_url
from rest_shim.openai.sampling import sampling_params
from rest_shim.openai.tools import TOOL_CHOICE_MODES
from rest_shim.responses import items, schema
from rest_shim.wire import dump

LOGPROBS = "message.output_text.logprobs"
HISTORY = "previous_response_id"

_FIELDS = {
    "messages": "input",
    "sampling.max_tokens": "max_output_tokens",
    "tool_choice.function_name": "tool_choice.name",
    "reasoning_effort": "reasoning.effort",
    "chat_template_kwargs_json": "chat_template_kwargs",
}


@dataclass(slots=True)
class Conversation:
    """Messages, and the JSON path that each came from."""

    messages: list[chat_pb2.Message] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)

    def add(self, message: chat_pb2.Message, origin: str) -> None:
        """Append a message."""
        self.messages.append(message)
        self.origins.append(origin)

    def json_path(self, path: str) -> str:
        """A field of the protobuf request as the path in the client's JSON."""
        bare = path.removeprefix("chat.")
        if bare in _FIELDS:
            return _FIELDS[bare]
        found = re.match(r"messages\[(\d+)\](.*)", bare)
        if found:
            origin = self.origins[int(found[1])] if int(found[1]) < len(self.origins) else "input"
            return origin if origin == HISTORY else f"{origin}{found[2].replace('.image', '.image_url')}"
        if bare.startswith("response_format"):
            rest = bare.removeprefix("response_format").removeprefix(".json_schema").removesuffix("_json")
            return f"text.format{rest}"
        bare = re.sub(r"^(tools\[\d+\])\.function", r"\1", bare)
        return bare.removeprefix("sampling.").removesuffix("_json")


def check(body: schema.ResponseBody) -> None:
    """Refuse what is not done, and fields that contradict each other.

    Raises:
        Refusal: Naming the field.
    """
    if body.background:
        raise _unsupported("background", "Responses in the background are not supported.")
    if body.conversation is not None:
        raise _unsupported(
            "conversation", "Conversations are not kept here; send 'previous_response_id' or the whole input."
        )
    if body.prompt is not None:
        raise _unsupported("prompt", "Prompt templates are not kept here; send 'instructions' and 'input'.")
    if body.stream_options is not None and not body.stream:
        raise _unsupported("stream_options", "'stream_options' is only allowed when 'stream' is true.")
    if body.input is not None and not body.input and body.previous_response_id is None:
        raise _unsupported("input", "Missing required parameter: 'input'.")
    form = body.text.format if body.text is not None else None
    if form is not None and form.type == "json_schema" and form.definition is None:
        raise _unsupported("text.format.schema", "Missing required parameter: 'text.format.schema'.")
    _check_choice(body)


def _unsupported(param: str, text: str) -> Refusal:
    return Refusal(400, text, param=param)


def _check_choice(body: schema.ResponseBody) -> None:
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


def conversation(
    body: schema.ResponseBody, history: Sequence[items.Item], known: Mapping[str, items.Item]
) -> Conversation:
    """The messages of a request.

    Args:
        body: The request.
        history: Items of the earlier turns, oldest first.
        known: What an item_reference may name, by id.

    Raises:
        Refusal: An item is not usable, or a reference names none.
    """
    made = Conversation()
    if body.instructions:
        text = chat_pb2.ContentPart(text=body.instructions)
        made.add(chat_pb2.Message(role=chat_pb2.ROLE_SYSTEM, content=[text]), "instructions")
    turns = _Turns(made)
    for item in history:
        turns.take(item, HISTORY)
    for index, item in enumerate(resolved(given(body), known)):
        turns.take(item, f"input[{index}]")
    turns.end()
    if not made.messages:
        raise _unsupported("input", "There is no message to answer.")
    return made


def given(body: schema.ResponseBody) -> Sequence[items.Item]:
    """The items of a request's input.

    OpenAI's schema asks for none: a request with nothing to answer is a user's turn without words. It
    holds a blank, since there is no turn without text.
    """
    if body.input is None and body.previous_response_id is None:
        blank = items.TextPart(type="input_text", text=" ")
        return (items.MessageItem(role="user", content=[blank]),)
    return body.input or ()


def resolved(given: Sequence[items.Item], known: Mapping[str, items.Item]) -> Sequence[items.Item]:
    """Items with every reference replaced by what it names.

    Raises:
        Refusal: A reference names nothing that is known.
    """
    found: list[items.Item] = []
    for index, item in enumerate(given):
        if not isinstance(item, items.ItemReference):
            found.append(item)
        elif item.id in known:
            found.append(known[item.id])
        else:
            text = f"Item with id '{item.id}' not found; only items of 'previous_response_id' are known."
            raise _unsupported(f"input[{index}].id", text)
    return found


class _Turns:
    """Gathers an assistant's items into one message."""

    def __init__(self, target: Conversation) -> None:
        self._target = target
        self._turn: chat_pb2.Message | None = None
        self._origin = ""

    def take(self, item: items.Item, origin: str) -> None:
        match item:
            case items.ReasoningItem():
                self._reason(item, origin)
            case items.MessageItem(role="assistant"):
                turn = self._assistant(origin, is_new=lambda turn: bool(turn.content or turn.tool_calls))
                turn.content.extend(_parts(item.content, f"{origin}.content"))
            case items.FunctionCallItem():
                call = chat_pb2.FunctionCall(name=item.name, arguments_json=item.arguments)
                self._assistant(origin).tool_calls.append(chat_pb2.ToolCall(id=item.call_id, function=call))
            case items.MessageItem():
                self.end()
                content = _parts(item.content, f"{origin}.content")
                self._target.add(chat_pb2.Message(role=ROLES[item.role], content=content), origin)
            case items.FunctionOutputItem():
                self.end()
                content = _parts(item.output, f"{origin}.output")
                message = chat_pb2.Message(
                    role=chat_pb2.ROLE_TOOL,
                    # A function may give nothing, but a tool message says something, if only "".
                    content=content or [chat_pb2.ContentPart(text="")],
                    tool_call_id=item.call_id,
                )
                self._target.add(message, origin)
            case items.ItemReference():
                raise AssertionError("references are resolved before")
            case _:
                assert_never(item)

    def end(self) -> None:
        """The assistant's turn is over; reasoning that led to nothing is dropped."""
        turn, self._turn = self._turn, None
        if turn is not None and (turn.content or turn.tool_calls):
            self._target.add(turn, self._origin)

    def _reason(self, item: items.ReasoningItem, origin: str) -> None:
        text = "".join(piece.text for piece in item.content or item.summary)
        turn = self._assistant(origin, is_new=lambda turn: bool(turn.content or turn.tool_calls))
        turn.reasoning += text

    def _assistant(
        self, origin: str, is_new: Callable[[chat_pb2.Message], bool] = lambda _turn: False
    ) -> chat_pb2.Message:
        if self._turn is not None and is_new(self._turn):
            self.end()
        if self._turn is None:
            self._turn = chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT)
            self._origin = origin
        return self._turn


def _parts(parts: Sequence[items.Part], path: str) -> list[chat_pb2.ContentPart]:
    return [_part(part, f"{path}[{index}]") for index, part in enumerate(parts)]


def _part(part: items.Part, path: str) -> chat_pb2.ContentPart:
    match part:
        case items.TextPart():
            return chat_pb2.ContentPart(text=part.text)
        case items.RefusalPart():
            return chat_pb2.ContentPart(text=part.refusal)
        case items.ImagePart():
            return chat_pb2.ContentPart(image=image_from_url(part.image_url, f"{path}.image_url"))
        case _:
            assert_never(part)


def chat_request(body: schema.ResponseBody, talk: Conversation) -> chat_pb2.ChatRequest:
    """The core's request for a response.

    Raises:
        Refusal: A key of logit_bias is no token id.
    """
    wants_logprobs = LOGPROBS in body.include or body.top_logprobs is not None
    request = chat_pb2.ChatRequest(
        model=body.model,
        messages=talk.messages,
        sampling=sampling_params(
            body,
            max_tokens=body.max_output_tokens,
            top_logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        ),
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


def _offered(body: schema.ResponseBody) -> Sequence[schema.FunctionTool]:
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
