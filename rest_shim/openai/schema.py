"""What an OpenAI chat request may hold.

Fields, types and ranges follow OpenAI's OpenAPI description (2.3.0), plus the sampling fields that
local servers share (top_k, min_p, repetition_penalty) and the limits of the gRPC contract. Service
fields (user, store, metadata and so on) mean nothing here and are ignored like unknown ones.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from rest_shim.bodies import Body, Integer
from rest_shim.openai.messages import Message
from rest_shim.openai.sampling import SamplingFields, TokenCount
from rest_shim.openai.tools import MAX_TOOLS, AnyToolChoice, Tool

MAX_CHOICES = 16
MAX_MESSAGES = 16_384
MAX_TOP_LOGPROBS = 20

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ModelName = Annotated[str, StringConstraints(max_length=512)]


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
    tool_choice: AnyToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    session_id: str = ""
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    modalities: list[str] = Field(default_factory=list, max_length=8)
    # The older form of tools; see the refusal.
    functions: Any = None
