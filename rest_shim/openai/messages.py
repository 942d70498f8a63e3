"""The messages of a chat: what they may hold, and their conversion to the core's."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Annotated, Literal, assert_never

from pydantic import BeforeValidator, Discriminator, Field, Tag

from osaurus_grpc.v1 import chat_pb2
from rest_shim.bodies import TAG_PREFIX, UNKNOWN_VARIANT, Body
from rest_shim.errors import Refusal
from rest_shim.remote_images import ImageReference, is_remote

MAX_PARTS = 4_096
MAX_CALLS = 1_024

ROLES = {
    "system": chat_pb2.ROLE_SYSTEM,
    "developer": chat_pb2.ROLE_DEVELOPER,
    "user": chat_pb2.ROLE_USER,
    "assistant": chat_pb2.ROLE_ASSISTANT,
    "tool": chat_pb2.ROLE_TOOL,
    # The older form of a tool's result, which names the function and not the call.
    "function": chat_pb2.ROLE_TOOL,
}

_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """What the assistant said when it declined."""

    type: Literal["refusal"]
    refusal: str


class ImageUrl(ImageReference):
    """Where an image is: a data: URL, or where that is allowed, a remote one."""

    url: str

    @property
    def remote_url(self) -> str:
        """As ImageReference says."""
        return self.url if is_remote(self.url) else ""

    @property
    def url_path(self) -> str:
        """As ImageReference says."""
        return ".url"

    def holding(self, kind: str, encoded: str) -> ImageUrl:
        """As ImageReference says."""
        return ImageUrl(url=f"data:{kind};base64,{encoded}")


class ImagePart(Body):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


_PART_TYPES = frozenset({"text", "refusal", "image_url"})


def _part_tag(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"{TAG_PREFIX}{kind}" if isinstance(kind, str) and kind in _PART_TYPES else None


Part = Annotated[
    Annotated[TextPart, Tag("~text")]
    | Annotated[RefusalPart, Tag("~refusal")]
    | Annotated[ImagePart, Tag("~image_url")],
    Discriminator(
        _part_tag,
        custom_error_type=UNKNOWN_VARIANT,
        custom_error_message="A content part must be an object with the type 'text' or 'image_url'",
    ),
]


def _parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of content parts")
    return value


_PartList = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]
Parts = Annotated[_PartList, BeforeValidator(_parts, json_schema_input_type=str | _PartList)]


class FunctionCall(Body):
    """A call as it stands in the history."""

    name: str
    arguments: str = ""


class ToolCall(Body):
    """One call of an assistant message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Parts | None = None
    name: str = ""
    tool_calls: list[ToolCall] = Field(default_factory=list, max_length=MAX_CALLS)
    tool_call_id: str = ""
    # The older form of a single tool call.
    function_call: FunctionCall | None = None
    refusal: str = ""
    reasoning_content: str = ""


def convert_messages(messages: Sequence[Message]) -> Sequence[chat_pb2.Message]:
    """The core's messages.

    Raises:
        Refusal: A message lacks what its role needs, or an image is not usable.
    """
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Message, path: str) -> chat_pb2.Message:
    _check(message, path)
    content = [_part(part, f"{path}.content[{index}]") for index, part in enumerate(message.content or ())]
    if not content and message.refusal:
        content = [chat_pb2.ContentPart(text=message.refusal)]
    is_legacy_result = message.role == "function"
    return chat_pb2.Message(
        role=ROLES[message.role],
        content=content,
        name=message.name,
        tool_calls=_calls(message),
        tool_call_id=_legacy_id(message.name) if is_legacy_result else message.tool_call_id,
        reasoning=message.reasoning_content,
    )


def _check(message: Message, path: str) -> None:
    has_call = bool(message.tool_calls) or message.function_call is not None
    may_be_silent = message.role == "assistant" and (has_call or message.refusal)
    if message.content is None and not may_be_silent:
        raise _missing(f"{path}.content")
    if message.role == "tool" and not message.tool_call_id:
        raise _missing(f"{path}.tool_call_id")
    if message.role == "function" and not message.name:
        raise _missing(f"{path}.name")


def _missing(path: str) -> Refusal:
    return Refusal(400, f"Missing required parameter: '{path}'.", param=path)


def _calls(message: Message) -> Sequence[chat_pb2.ToolCall]:
    calls = [_call(call.id, call.function) for call in message.tool_calls]
    if message.function_call is not None and not calls:
        calls = [_call(_legacy_id(message.function_call.name), message.function_call)]
    return calls


def _call(call_id: str, function: FunctionCall) -> chat_pb2.ToolCall:
    return chat_pb2.ToolCall(
        id=call_id,
        function=chat_pb2.FunctionCall(name=function.name, arguments_json=function.arguments),
    )


def _legacy_id(name: str) -> str:
    """Ties a result to its call where both name the function only."""
    return f"call_{name}"


def _part(part: Part, path: str) -> chat_pb2.ContentPart:
    match part:
        case TextPart():
            return chat_pb2.ContentPart(text=part.text)
        case RefusalPart():
            return chat_pb2.ContentPart(text=part.refusal)
        case ImagePart():
            return chat_pb2.ContentPart(image=image_from_url(part.image_url.url, f"{path}.image_url.url"))
        case _:
            assert_never(part)


def image_from_url(url: str, path: str) -> chat_pb2.ImageContent:
    """The image inside a data: URL (RFC 2397, base64 only).

    Raises:
        Refusal: With path as its param: the URL is remote or malformed.
    """
    head = _DATA_URL.match(url)
    if head is None:
        text = (
            "Remote images are not fetched, unless the server was started with --allow-image-urls; send the "
            "image as a 'data:IMAGE_TYPE;base64,...' URL."
        )
        raise Refusal(400, text, param=path)
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, f"Invalid '{path}': the data is not valid base64.", param=path) from None
    return chat_pb2.ImageContent(data=data, mime_type=head[1] or "application/octet-stream")
