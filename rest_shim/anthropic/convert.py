"""Anthropic's JSON to protobuf; pure functions.

A user message of Anthropic's holds text and the results of tools, in any order; the core has a message
for each. The order is kept. Neighbouring user messages become one, as Anthropic does it; so do
neighbouring assistant messages. Blocks of text are paragraphs, except the assistant's: its blocks
are pieces of one answer, which it may be asked to continue.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import assert_never

from osaurus_grpc.v1 import chat_pb2, sampling_pb2
from rest_shim.anthropic import schema
from rest_shim.errors import Refusal
from rest_shim.wire import dump

# Keeps the most probable token only, which is what top_p 0 means; the core takes values above 0.
SMALLEST_TOP_P = 1e-6

_PARAGRAPH = "\n\n"
_ERROR_MARK = "Error: "

_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_TOOL_CHOICES = {
    "auto": chat_pb2.TOOL_CHOICE_MODE_AUTO,
    "any": chat_pb2.TOOL_CHOICE_MODE_REQUIRED,
    "tool": chat_pb2.TOOL_CHOICE_MODE_FUNCTION,
    "none": chat_pb2.TOOL_CHOICE_MODE_NONE,
}
_RESULT_TYPES = (schema.TextBlock, schema.ImageBlock, schema.DocumentBlock, schema.SearchResultBlock)


@dataclass(slots=True)
class _Turn:
    """A message of the core's, and where in the request it came from.

    Attributes:
        message: The message.
        path: The JSON path of what it was made of; neighbouring messages are one, and the first counts.
        parts: Those of its content.
        calls: Those of its calls.
    """

    message: chat_pb2.Message
    path: str
    parts: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def add(self, part: chat_pb2.ContentPart, path: str) -> None:
        """Append a part."""
        self.message.content.append(part)
        self.parts.append(path)

    def add_paragraph(self, part: chat_pb2.ContentPart, path: str) -> None:
        """Append a part; a text that follows a text begins a paragraph."""
        content = self.message.content
        if content and content[-1].WhichOneof("part") == part.WhichOneof("part") == "text":
            part.text = _PARAGRAPH + part.text
        self.add(part, path)


def _refused(path: str, reason: str) -> Refusal:
    return Refusal(400, f"Invalid '{path}': {reason}", param=path, reason=reason)


def chat_request(body: schema.MessagesBody) -> chat_pb2.ChatRequest:
    """The core's request for an answer.

    Raises:
        Refusal: A block stands where it must not, or cannot be used; or the request belongs to a thread.
    """
    if body.thread is not None:
        raise _thread_refusal()
    request = prompt_request(body)
    request.sampling.CopyFrom(
        sampling_pb2.SamplingParams(
            temperature=body.temperature,
            top_p=None if body.top_p is None else max(body.top_p, SMALLEST_TOP_P),
            top_k=None if body.top_k is None else max(body.top_k, 0),
            max_tokens=body.max_tokens,
            stop=body.stop_sequences,
        )
    )
    return request


def _thread_refusal() -> Refusal:
    # Anthropic's own clients read the details, and send the whole conversation with every turn instead.
    return Refusal(
        400,
        "Threads are not kept by this server; send the whole conversation in 'messages'.",
        param="thread",
        details={"error_code": "thread_unsupported_request", "unsupported": ["thread"]},
    )


def prompt_request(body: schema.CountBody) -> chat_pb2.ChatRequest:
    """The part of a request that the prompt is made of.

    Raises:
        Refusal: As chat_request.
    """
    request = chat_pb2.ChatRequest(
        model=body.model,
        messages=[turn.message for turn in _turns(body)],
        tools=[_tool(tool) for tool in body.tools],
    )
    _set_tool_choice(request, body)
    _set_thinking(request, body)
    output_format, _ = _output_format(body)
    if output_format is not None:
        request.response_format.json_schema.schema_json = dump(output_format.definition)
    return request


def _output_format(body: schema.CountBody) -> tuple[schema.OutputFormat | None, str]:
    """The form the answer must have, and its JSON path."""
    if body.output_config is not None and body.output_config.format is not None:
        return body.output_config.format, "output_config.format"
    return body.output_format, "output_format"


def shows_thinking(body: schema.CountBody) -> bool:
    """Whether reasoning is part of the answer.

    Only where it was asked for: a client that did not ask takes the first block to be the text.
    """
    return body.thinking is not None and body.thinking.type != "disabled"


def omits_thinking(body: schema.CountBody) -> bool:
    """Whether the blocks of reasoning are to be empty."""
    return body.thinking is not None and body.thinking.display == "omitted"


def _set_thinking(request: chat_pb2.ChatRequest, body: schema.CountBody) -> None:
    thinking = body.thinking
    if thinking is None or thinking.type == "disabled":
        request.reasoning_enabled = False
        return
    if thinking.type == "enabled":
        if thinking.budget_tokens is None:
            raise _refused("thinking.budget_tokens", "Field required")
        request.reasoning_enabled = True
        request.max_reasoning_tokens = thinking.budget_tokens
    # "adaptive" leaves it to the model, so to its template's default.
    if body.output_config is not None and body.output_config.effort is not None:
        request.reasoning_effort = _EFFORTS[body.output_config.effort]


def _set_tool_choice(request: chat_pb2.ChatRequest, body: schema.CountBody) -> None:
    choice = body.tool_choice
    if choice is None:
        return
    if choice.type in ("any", "tool") and not body.tools:
        raise _refused("tool_choice", "it is only allowed when 'tools' are given.")
    if choice.type == "tool" and choice.name not in {tool.name for tool in body.tools}:
        raise _refused("tool_choice.name", "it is not among the tools.")
    if not body.tools:
        return
    request.tool_choice.mode = _TOOL_CHOICES[choice.type]
    if choice.type == "tool":
        request.tool_choice.function_name = choice.name
    if choice.disable_parallel_tool_use:
        request.parallel_tool_calls = False


def _tool(tool: schema.Tool) -> chat_pb2.Tool:
    return chat_pb2.Tool(
        function=chat_pb2.FunctionTool(
            name=tool.name,
            description=tool.description,
            parameters_json=dump(tool.input_schema),
            strict=tool.strict,
        )
    )


def _turns(body: schema.CountBody) -> list[_Turn]:
    turns: list[_Turn] = []
    if any(block.text for block in body.system):
        text = _PARAGRAPH.join(block.text for block in body.system if block.text)
        turns.append(_said(chat_pb2.ROLE_SYSTEM, text, "system"))
    names: dict[str, str] = {}
    for role, group in groupby(enumerate(body.messages), key=lambda entry: entry[1].role):
        messages = list(group)
        path = f"messages[{messages[0][0]}]"
        match role:
            case "assistant":
                turns.append(_assistant_turn(path, _placed(messages), names))
            case "system":
                turns.extend(_system_turn(message.content, index) for index, message in messages)
            case "user":
                turns.extend(_user_turns(path, _placed(messages), names))
            case _:
                assert_never(role)
    return turns


def _placed(
    messages: Iterable[tuple[int, schema.Message]],
) -> Iterator[tuple[str, schema.MessageBlock]]:
    """All blocks of messages, each with its JSON path."""
    for index, message in messages:
        path = f"messages[{index}].content"
        is_user = message.role == "user"
        if is_user and all(
            isinstance(block, schema.TextBlock) and not block.text for block in message.content
        ):
            raise _refused(path, "it must not be empty.")
        for place, block in enumerate(message.content):
            yield f"{path}[{place}]", block


def _said(role: chat_pb2.Role.ValueType, text: str, path: str) -> _Turn:
    turn = _Turn(chat_pb2.Message(role=role), path)
    turn.add(chat_pb2.ContentPart(text=text), path)
    return turn


def _user_turns(
    message_path: str, blocks: Iterable[tuple[str, schema.MessageBlock]], names: dict[str, str]
) -> Iterator[_Turn]:
    """What the user says, and a turn for each tool result, in their order."""
    said = _Turn(chat_pb2.Message(role=chat_pb2.ROLE_USER), message_path)
    for path, block in blocks:
        if isinstance(block, schema.ToolResultBlock):
            if said.parts:
                yield said
                said = _Turn(chat_pb2.Message(role=chat_pb2.ROLE_USER), message_path)
            yield _tool_result(block, path, names)
        elif isinstance(block, _RESULT_TYPES):
            for part, place in _parts(block, path):
                said.add_paragraph(part, place)
        else:
            raise _refused(path, "only assistant messages have blocks of this type.")
    if said.parts:
        yield said


def _tool_result(block: schema.ToolResultBlock, path: str, names: dict[str, str]) -> _Turn:
    message = chat_pb2.Message(
        role=chat_pb2.ROLE_TOOL, tool_call_id=block.tool_use_id, name=names.get(block.tool_use_id, "")
    )
    turn = _Turn(message, path)
    if block.is_error:
        # Chat templates have no other way to say so.
        turn.add(chat_pb2.ContentPart(text=_ERROR_MARK), f"{path}.is_error")
    said = _Turn(chat_pb2.Message(), path)
    for index, item in enumerate(block.content):
        for part, place in _parts(item, f"{path}.content[{index}]"):
            said.add_paragraph(part, place)
    for part, place in zip(said.message.content, said.parts, strict=True):
        turn.add(part, place)
    if not turn.parts:
        turn.add(chat_pb2.ContentPart(text=""), f"{path}.content")
    return turn


def _system_turn(blocks: Sequence[schema.MessageBlock], index: int) -> _Turn:
    texts = []
    for place, block in enumerate(blocks):
        if not isinstance(block, schema.TextBlock):
            raise _refused(f"messages[{index}].content[{place}]", "system messages hold text only.")
        texts.append(block.text)
    return _said(chat_pb2.ROLE_SYSTEM, _PARAGRAPH.join(text for text in texts if text), f"messages[{index}]")


def _assistant_turn(
    message_path: str, blocks: Iterable[tuple[str, schema.MessageBlock]], names: dict[str, str]
) -> _Turn:
    turn = _Turn(chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT), message_path)
    reasoning = []
    for path, block in blocks:
        match block:
            case schema.TextBlock():
                turn.add(chat_pb2.ContentPart(text=block.text), f"{path}.text")
            case schema.ThinkingBlock():
                reasoning.append(block.thinking)
            case schema.RedactedThinkingBlock():
                pass
            case schema.ToolUseBlock():
                names[block.id] = block.name
                call = chat_pb2.FunctionCall(name=block.name, arguments_json=dump(block.input))
                turn.message.tool_calls.add(id=block.id, function=call)
                turn.calls.append(path)
            case _:
                raise _refused(path, "only user messages have blocks of this type.")
    turn.message.reasoning = "".join(reasoning)
    if not turn.parts and not turn.calls:
        turn.add(chat_pb2.ContentPart(text=""), f"{message_path}.content")
    return turn


def _parts(
    block: schema.TextBlock | schema.ImageBlock | schema.DocumentBlock | schema.SearchResultBlock, path: str
) -> Iterator[tuple[chat_pb2.ContentPart, str]]:
    """The parts of one block, each with its JSON path; none for an empty text."""
    match block:
        case schema.TextBlock():
            if block.text:
                yield chat_pb2.ContentPart(text=block.text), f"{path}.text"
        case schema.ImageBlock():
            yield chat_pb2.ContentPart(image=_image(block.source, f"{path}.source")), path
        case schema.DocumentBlock():
            yield chat_pb2.ContentPart(text=_document_text(block, f"{path}.source")), f"{path}.source"
        case schema.SearchResultBlock():
            texts = (block.title, block.source, *(part.text for part in block.content))
            yield chat_pb2.ContentPart(text="\n".join(text for text in texts if text)), path
        case _:
            assert_never(block)


def _image(source: schema.ImageSource, path: str) -> chat_pb2.ImageContent:
    if source.type == "url":
        raise _refused(
            path,
            "remote images are not fetched, unless the server was started with --allow-image-urls; send the "
            "image in base64.",
        )
    if source.type != "base64":
        raise _refused(f"{path}.type", "only images of the type 'base64' or 'url' are supported.")
    try:
        data = base64.b64decode(source.data, validate=True)
    except (binascii.Error, ValueError):
        raise _refused(f"{path}.data", "it is not valid base64.") from None
    return chat_pb2.ImageContent(data=data, mime_type=source.media_type or "application/octet-stream")


def _document_text(block: schema.DocumentBlock, path: str) -> str:
    match block.source.type:
        case "text":
            text = block.source.data
        case "content":
            text = _PARAGRAPH.join(part.text for part in block.source.content)
        case _:
            raise _refused(path, "of documents, only those of plain text are supported.")
    return "\n".join(part for part in (block.title, block.context, text) if part)


def json_path(body: schema.CountBody, field_path: str) -> str:
    """A field of the protobuf request that a body was made into, as a path in that body.

    Args:
        body: What chat_request() or prompt_request() read.
        field_path: The protobuf path, for example "messages[2].content[0].text".
    """
    path = field_path.removeprefix("chat.")
    if found := _MESSAGE_FIELD.match(path):
        turns = _turns(body)
        return _message_path(turns[int(found["index"])], found) if int(found["index"]) < len(turns) else path
    renamed = {
        "sampling.stop": "stop_sequences",
        "max_reasoning_tokens": "thinking.budget_tokens",
        "reasoning_effort": "output_config.effort",
        "tool_choice.function_name": "tool_choice.name",
        "response_format.json_schema.schema_json": f"{_output_format(body)[1]}.schema",
    }
    for ours, theirs in renamed.items():
        if path == ours or path.startswith(f"{ours}["):
            return theirs + path.removeprefix(ours)
    path = path.removeprefix("sampling.")
    if path.startswith("tools["):
        return path.replace("].function", "]", 1).replace("parameters_json", "input_schema", 1)
    return path


_MESSAGE_FIELD = re.compile(
    r"messages\[(?P<index>\d+)\](?:\.(?P<list>content|tool_calls)\[(?P<place>\d+)\])?\.?(?P<rest>.*)"
)
_CALL_FIELDS = {"id": ".id", "function.name": ".name", "function.arguments_json": ".input"}


def _message_path(turn: _Turn, found: re.Match[str]) -> str:
    if found["list"] == "content":
        return turn.parts[int(found["place"])]
    if found["list"] == "tool_calls":
        return turn.calls[int(found["place"])] + _CALL_FIELDS.get(found["rest"], "")
    if found["rest"] == "tool_call_id":
        return f"{turn.path}.tool_use_id"
    return f"{turn.path}.{found['rest']}" if found["rest"] in ("role", "content") else turn.path
