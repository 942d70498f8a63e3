"""Anthropic's routes and the shapes of their answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rest_shim.anthropic.schema import CountBody, MessagesBody
from rest_shim.openapi import openai
from rest_shim.openapi.operation import (
    BODY_ERRORS,
    COMMON_ERRORS,
    EVENTS,
    JSON,
    MODEL_ERRORS,
    Link,
    Operation,
    Shape,
    path_parameter,
    query_parameter,
)


class AnthropicErrorDetail(Shape):
    """What is wrong."""

    type: str
    message: str
    details: dict[str, Any] | None = None


class AnthropicError(Shape):
    """An error."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


class TextAnswerBlock(Shape):
    """What the assistant said."""

    type: Literal["text"]
    text: str


class ThinkingAnswerBlock(Shape):
    """What the assistant thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseAnswerBlock(Shape):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingTokens(Shape):
    """Of the answer's tokens."""

    thinking_tokens: int


class MessageUsage(Shape):
    """Token counts; those read from a cache are not among the input's."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class MessageAnswer(Shape):
    """The assistant's message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextAnswerBlock | ThinkingAnswerBlock | ToolUseAnswerBlock]
    stop_reason: str
    stop_sequence: str | None = Field()
    usage: MessageUsage


class TokenCount(Shape):
    """How many tokens a prompt has."""

    input_tokens: int


class AnthropicModel(Shape):
    """A model."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: str
    deprecated_at: None = Field()
    retires_at: None = Field()
    line: None = Field()
    max_input_tokens: int | None = Field()
    max_tokens: int | None = Field()
    capabilities: None = Field()


class AnthropicModelList(Shape):
    """A page of the installed models."""

    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None = Field()
    last_id: str | None = Field()


_ASKED = (*COMMON_ERRORS, *BODY_ERRORS, *MODEL_ERRORS)
_VERSION = {
    "name": "anthropic-version",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "Where it is there, answers have Anthropic's shape, else OpenAI's.",
}
_PAGE = (
    query_parameter("limit", {"type": "integer", "minimum": 1, "maximum": 1000}),
    query_parameter("before_id", {"type": "string"}),
    query_parameter("after_id", {"type": "string"}),
)

OPERATIONS = (
    Operation(
        "POST", "/v1/messages", "createMessage", "Answer a conversation",
        {JSON: MessageAnswer, EVENTS: None}, AnthropicError, _ASKED, MessagesBody,
        links={"count": Link("countTokens", body={"messages": "$request.body#/messages"})},
    ),
    Operation(
        "POST", "/v1/messages/count_tokens", "countTokens", "Count a prompt's tokens",
        {JSON: TokenCount}, AnthropicError, _ASKED, CountBody,
    ),
    # OpenAI's and Anthropic's clients ask at the same paths.
    Operation(
        "GET", "/v1/models", "listModels", "List the installed models",
        {JSON: openai.ModelList | AnthropicModelList}, openai.ErrorAnswer | AnthropicError,
        (*COMMON_ERRORS, 400), parameters=(_VERSION, *_PAGE),
        links={
            "describe": Link("getModel", {"id": "$response.body#/data/0/id"}),
            "use": Link("createChatCompletion", body={"model": "$response.body#/data/0/id"}),
        },
    ),
    Operation(
        "GET", "/v1/models/{id}", "getModel", "Describe a model",
        {JSON: openai.ModelEntry | AnthropicModel}, openai.ErrorAnswer | AnthropicError,
        (*COMMON_ERRORS, *MODEL_ERRORS), parameters=(path_parameter("id", "smollm2-135m-instruct"), _VERSION),
    ),
)  # fmt: skip
