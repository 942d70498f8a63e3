"""What an Anthropic request may hold.

Fields are those of Anthropic's Messages API as its Python SDK (2.12) declares them. What only their
service can use (cache_control, metadata, service_tier, betas and so on) is ignored like unknown keys;
what asks their service to do something (server tools, remote files) is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag

from rest_shim.bodies import TAG_PREFIX, UNKNOWN_VARIANT, Body, Integer, verbatim
from rest_shim.remote_images import ImageReference

MAX_INT32 = 2**31 - 1
MAX_MESSAGES = 16_384
MAX_BLOCKS = 16_384
MAX_TOOLS = 1_024
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024

_MAX_ECHO_CHARACTERS = 100

ModelName = Annotated[str, StringConstraints(max_length=512)]
CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]


class TextBlock(Body):
    """A paragraph."""

    type: Literal["text"]
    text: str


class ImageSource(ImageReference):
    """Where an image is: in base64, or where that is allowed, at a URL."""

    type: str
    media_type: str = ""
    data: str = ""
    url: str = ""

    @property
    def remote_url(self) -> str:
        """As ImageReference says."""
        return self.url if self.type == "url" else ""

    @property
    def url_path(self) -> str:
        """As ImageReference says."""
        return ".url"

    def holding(self, kind: str, encoded: str) -> ImageSource:
        """As ImageReference says."""
        return ImageSource(type="base64", media_type=kind, data=encoded)


class ImageBlock(Body):
    """An image."""

    type: Literal["image"]
    source: ImageSource


def _blocks(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of content blocks")
    return value


class DocumentSource(Body):
    """Where a document is; only plain text and lists of blocks are taken."""

    type: str
    data: str = ""
    content: Annotated[
        list[TextBlock], BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock])
    ] = Field(default_factory=list)


class DocumentBlock(Body):
    """Text that stands beside the conversation."""

    type: Literal["document"]
    source: DocumentSource
    title: str = ""
    context: str = ""


class SearchResultBlock(Body):
    """What a client's own search found."""

    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]


class ToolUseBlock(Body):
    """A call the assistant made."""

    type: Literal["tool_use"]
    id: CallId
    name: Annotated[str, StringConstraints(min_length=1)]
    input: dict[str, Any]


class ThinkingBlock(Body):
    """The assistant's reasoning; its signature is not looked at."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Body):
    """Reasoning that only Anthropic can read."""

    type: Literal["redacted_thinking"]


def _tag_of(kinds: frozenset[str], value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"{TAG_PREFIX}{kind}" if isinstance(kind, str) and kind in kinds else None


_RESULT_KINDS = frozenset({"text", "image", "document", "search_result"})
_MESSAGE_KINDS = _RESULT_KINDS | {"tool_use", "tool_result", "thinking", "redacted_thinking"}

ResultBlock = Annotated[
    Annotated[TextBlock, Tag("~text")]
    | Annotated[ImageBlock, Tag("~image")]
    | Annotated[DocumentBlock, Tag("~document")]
    | Annotated[SearchResultBlock, Tag("~search_result")],
    Discriminator(
        lambda value: _tag_of(_RESULT_KINDS, value),
        custom_error_type=UNKNOWN_VARIANT,
        custom_error_message="a tool result's block must be an object of the type 'text', 'image', "
        "'document' or 'search_result'",
    ),
]


_ResultBlocks = Annotated[list[ResultBlock], Field(max_length=MAX_BLOCKS)]


class ToolResultBlock(Body):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Annotated[
        _ResultBlocks, BeforeValidator(_blocks, json_schema_input_type=str | _ResultBlocks)
    ] = Field(default_factory=list)
    is_error: bool = False


MessageBlock = (
    TextBlock
    | ImageBlock
    | DocumentBlock
    | SearchResultBlock
    | ToolUseBlock
    | ToolResultBlock
    | ThinkingBlock
    | RedactedThinkingBlock
)

_TaggedBlock = Annotated[
    Annotated[TextBlock, Tag("~text")]
    | Annotated[ImageBlock, Tag("~image")]
    | Annotated[DocumentBlock, Tag("~document")]
    | Annotated[SearchResultBlock, Tag("~search_result")]
    | Annotated[ToolUseBlock, Tag("~tool_use")]
    | Annotated[ToolResultBlock, Tag("~tool_result")]
    | Annotated[ThinkingBlock, Tag("~thinking")]
    | Annotated[RedactedThinkingBlock, Tag("~redacted_thinking")],
    Discriminator(
        lambda value: _tag_of(_MESSAGE_KINDS, value),
        custom_error_type=UNKNOWN_VARIANT,
        custom_error_message="a content block must be an object of the type 'text', 'image', 'document', "
        "'search_result', 'tool_use', 'tool_result', 'thinking' or 'redacted_thinking'; blocks of "
        "Anthropic's server tools are not supported by this server",
    ),
]


_TaggedBlocks = Annotated[list[_TaggedBlock], Field(max_length=MAX_BLOCKS)]
_TextBlocks = Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS)]


class Message(Body):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[_TaggedBlocks, BeforeValidator(_blocks, json_schema_input_type=str | _TaggedBlocks)]


def _tool_kind(value: object) -> object:
    if value != "custom":
        shown = value[:_MAX_ECHO_CHARACTERS] if isinstance(value, str) else "that is no text"
        raise verbatim(
            f"Tools of the type '{shown}' are not supported by this server, only custom tools "
            "with an 'input_schema'."
        )
    return value


class Tool(Body):
    """A tool that the client runs."""

    # The first field, so that a server tool is named as one before its missing schema is.
    type: Annotated[str, BeforeValidator(_tool_kind, json_schema_input_type=Literal["custom"])] = "custom"
    name: ToolName
    description: str = ""
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Body):
    """How tools are chosen."""

    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    """Whether the model reasons first, for how many tokens, and whether the client sees it."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[Integer, Field(ge=1, le=MAX_INT32)] | None = None
    display: Literal["summarized", "omitted"] = "summarized"


class OutputFormat(Body):
    """A JSON Schema that the answer must satisfy."""

    type: Literal["json_schema"]
    definition: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    """How much effort an answer is worth, and its form."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


def _no_servers(value: object) -> object:
    if value:
        raise verbatim("MCP servers are not called by this server; give their tools as 'tools'.")
    return value


_StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class CountBody(Body):
    """POST /messages/count_tokens, and what POST /messages shares with it."""

    model: ModelName
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Annotated[_TextBlocks, BeforeValidator(_blocks, json_schema_input_type=str | _TextBlocks)] = (
        Field(default_factory=list)
    )
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    # The key of the beta, before output_config had it.
    output_format: OutputFormat | None = None
    mcp_servers: Annotated[list[Any], BeforeValidator(_no_servers)] = Field(default_factory=list)


class MessagesBody(CountBody):
    """POST /messages."""

    max_tokens: Annotated[Integer, Field(ge=1, le=MAX_INT32)]
    stop_sequences: list[_StopText] = Field(default_factory=list, max_length=MAX_STOPS)
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1, le=MAX_INT32)] | None = None
    # A conversation that the server holds between turns; see the refusal.
    thread: Any = None
