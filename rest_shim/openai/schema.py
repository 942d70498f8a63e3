"""What an OpenAI chat request may hold.

Fields, types and ranges follow OpenAI's OpenAPI description (2.3.0), plus the sampling fields that
local servers share (top_k, min_p, repetition_penalty) and the limits of the gRPC contract. Service
fields (user, store, metadata and so on) mean nothing here and are ignored like unknown ones.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag

from rest_shim.bodies import TAG_PREFIX, Body, Integer
from rest_shim.openai.sampling import SamplingFields, TokenCount

MAX_CHOICES = 16
MAX_MESSAGES = 16_384
MAX_PARTS = 4_096
MAX_TOOLS = 1_024
MAX_TOP_LOGPROBS = 20

FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")]
ModelName = Annotated[str, StringConstraints(max_length=512)]


class TextPart(Body):
    """{"type": "text"}: a piece of a message."""

    text: str


class RefusalPart(Body):
    """{"type": "refusal"}: what the assistant said when it declined."""

    refusal: str


class ImageUrl(Body):
    """Where an image is; only data: URLs are taken."""

    url: str


class ImagePart(Body):
    """{"type": "image_url"}: an image."""

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
        custom_error_type="part",
        custom_error_message="A content part must be an object with the type 'text' or 'image_url'",
    ),
]


def _parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of content parts")
    return value


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

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[list[Part], BeforeValidator(_parts), Field(min_length=1, max_length=MAX_PARTS)] | None
    ) = None
    name: str = ""
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str = ""
    reasoning_content: str = ""


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
    """The function that a tool choice forces."""

    name: FunctionName


class ToolChoice(Body):
    """How tools are chosen; the plain strings are read as {"type": ...}."""

    type: Literal["auto", "none", "required", "function"]
    function: NamedFunction | None = None


def _tool_choice(value: object) -> object:
    if isinstance(value, str):
        if value not in {"auto", "none", "required"}:
            raise ValueError("must be 'auto', 'none', 'required' or an object that names a function")
        return {"type": value}
    return value


class JsonSchemaFormat(Body):
    """The schema of a json_schema response format."""

    name: str
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StreamOptions(Body):
    """Options that only a stream has."""

    include_usage: bool = False


class ChatBody(SamplingFields):
    """POST /chat/completions."""

    model: ModelName
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Annotated[ToolChoice, BeforeValidator(_tool_choice)] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    session_id: str = ""
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str = ""
