"""OpenAI's routes and ours about the server, and the shapes of their answers."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from rest_shim.openai.completions import CompletionBody
from rest_shim.openai.embeddings import EmbeddingsBody
from rest_shim.openai.schema import ChatBody
from rest_shim.openapi.operation import (
    BODY_ERRORS,
    COMMON_ERRORS,
    EVENTS,
    JSON,
    MODEL_ERRORS,
    TEXT,
    TEXT_SCHEMA,
    Link,
    Operation,
    Shape,
)


class ErrorDetail(Shape):
    """What is wrong."""

    message: str
    type: str
    param: str | None = Field()
    code: str | None = Field()


class ErrorAnswer(Shape):
    """An error."""

    error: ErrorDetail


class ModelEntry(Shape):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Shape):
    """All installed models."""

    object: Literal["list"]
    data: list[ModelEntry]


class PromptDetails(Shape):
    """Of the prompt's tokens."""

    cached_tokens: int
    audio_tokens: int


class CompletionDetails(Shape):
    """Of the answer's tokens."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class TokenUsage(Shape):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(Shape):
    """A token that might have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Shape):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob]
    refusal: None = Field()


class CalledFunction(Shape):
    """A call; its arguments are JSON text."""

    name: str
    arguments: str


class CalledTool(Shape):
    """One tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Shape):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None = Field()
    refusal: None = Field()
    annotations: list[object]
    reasoning_content: str = ""
    tool_calls: list[CalledTool] = Field(default_factory=list, min_length=1)


class ChatChoice(Shape):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChoiceLogprobs | None = Field()


class ChatCompletion(Shape):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    service_tier: str
    system_fingerprint: str


class LegacyLogprobs(Shape):
    """Log-probabilities of a text completion."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Shape):
    """One continuation."""

    text: str
    index: int
    logprobs: LegacyLogprobs | None = Field()
    finish_reason: Literal["stop", "length"]


class TextCompletion(Shape):
    """The continuations of one or several texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: TokenUsage
    system_fingerprint: str


class EmbeddingEntry(Shape):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Shape):
    """Token counts of inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Shape):
    """The vectors."""

    object: Literal["list"]
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingUsage


class Health(Shape):
    """Whether an answer can be had."""

    status: Literal["ok", "unavailable"]
    timestamp: str


class Description(Shape):
    """This description."""

    model_config = ConfigDict(extra="allow")

    openapi: str


_ASKED = (*COMMON_ERRORS, *BODY_ERRORS, *MODEL_ERRORS)

OPERATIONS = (
    Operation(
        "GET", "/", "running", "Say that the server runs", {TEXT: TEXT_SCHEMA}, ErrorAnswer, (403, 500)
    ),
    # A core that does not answer is a 503 of the same shape.
    Operation(
        "GET", "/health", "health", "Tell whether an answer can be had", {JSON: Health},
        ErrorAnswer | Health, (403, 500, 503),
    ),
    Operation(
        "GET", "/metrics", "metrics", "Metrics in Prometheus' text format", {TEXT: TEXT_SCHEMA},
        ErrorAnswer, (401, 403, 500),
    ),
    Operation(
        "GET", "/openapi.json", "describe", "This description", {JSON: Description}, ErrorAnswer, (403, 500)
    ),
    Operation(
        "POST", "/v1/chat/completions", "createChatCompletion", "Answer a chat",
        {JSON: ChatCompletion, EVENTS: None}, ErrorAnswer, _ASKED, ChatBody,
        links={"continue": Link("createChatCompletion", body={"session_id": "$request.body#/session_id"})},
    ),
    Operation(
        "POST", "/v1/completions", "createCompletion", "Continue texts",
        {JSON: TextCompletion, EVENTS: None}, ErrorAnswer, _ASKED, CompletionBody,
    ),
    Operation(
        "POST", "/v1/embeddings", "createEmbeddings", "Give vectors of texts",
        {JSON: EmbeddingList}, ErrorAnswer, _ASKED, EmbeddingsBody,
    ),
)  # fmt: skip
