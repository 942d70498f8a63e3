"""Ollama's routes and the shapes of their answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rest_shim.ollama import schema
from rest_shim.openai.embeddings import EmbeddingsBody
from rest_shim.openapi import openai
from rest_shim.openapi.operation import (
    BODY_ERRORS,
    COMMON_ERRORS,
    JSON,
    LINES,
    MODEL_ERRORS,
    Link,
    Operation,
    Shape,
)


class OllamaError(Shape):
    """An error."""

    error: str


class CalledOllamaFunction(Shape):
    """A call; its arguments are an object."""

    index: int
    name: str
    arguments: dict[str, Any]


class CalledOllamaTool(Shape):
    """One tool call."""

    id: str
    function: CalledOllamaFunction


class OllamaAnswerMessage(Shape):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    thinking: str = ""
    tool_calls: list[CalledOllamaTool] = Field(default_factory=list)


class Ending(Shape):
    """What an answer's end says."""

    model: str
    created_at: str
    done: Literal[True]
    done_reason: str
    logprobs: list[openai.TokenLogprob] = Field(default_factory=list)
    total_duration: int = 1
    load_duration: int = 1
    prompt_eval_count: int = 1
    prompt_eval_cached_count: int = 0
    prompt_eval_duration: int = 1
    eval_count: int = 1
    eval_duration: int = 1


class ChatAnswer(Ending):
    """The answer to a chat."""

    message: OllamaAnswerMessage


class GenerateAnswer(Ending):
    """The answer to a prompt."""

    response: str
    thinking: str = ""
    context: list[int] = Field(default_factory=list)


class EmbedAnswer(Shape):
    """Vectors of length 1."""

    model: str
    embeddings: list[list[float]]
    total_duration: int = 1
    load_duration: int = 1
    prompt_eval_count: int = 1


class LegacyEmbedding(Shape):
    """One vector."""

    embedding: list[float]


class ModelDetails(Shape):
    """What kind of model it is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    context_length: int = 0
    embedding_length: int = 0


class OllamaModel(Shape):
    """An installed model."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: ModelDetails
    capabilities: list[str]


class OllamaModelList(Shape):
    """All installed models."""

    models: list[OllamaModel]


class RunningModel(Shape):
    """A model in memory."""

    name: str
    model: str
    size: int
    digest: str
    details: ModelDetails
    expires_at: str
    size_vram: int
    context_length: int


class RunningModelList(Shape):
    """All models in memory."""

    models: list[RunningModel]


class ModelDescription(Shape):
    """What is known of one model."""

    modelfile: str
    parameters: str
    template: str
    details: ModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Version(Shape):
    """The release of Ollama whose API this is."""

    version: str


_ASKED = (*COMMON_ERRORS, *BODY_ERRORS, *MODEL_ERRORS)

OPERATIONS = (
    Operation(
        "POST", "/api/chat", "ollamaChat", "Answer a chat; without messages, load or unload",
        {JSON: ChatAnswer, LINES: None}, OllamaError, (*_ASKED, 409), schema.ChatBody,
    ),
    Operation(
        "POST", "/api/generate", "ollamaGenerate", "Answer a prompt; without one, load or unload",
        {JSON: GenerateAnswer, LINES: None}, OllamaError, (*_ASKED, 409), schema.GenerateBody,
    ),
    Operation(
        "POST", "/api/embed", "ollamaEmbed", "Give vectors of texts",
        {JSON: EmbedAnswer}, OllamaError, _ASKED, schema.EmbedBody,
    ),
    # With a prompt it is Ollama's older call, without one OpenAI's.
    Operation(
        "POST", "/api/embeddings", "ollamaEmbeddings", "Give the vector of one text",
        {JSON: LegacyEmbedding | openai.EmbeddingList}, OllamaError | openai.ErrorAnswer, _ASKED,
        schema.EmbeddingsBody | EmbeddingsBody,
    ),
    Operation(
        "GET", "/api/tags", "ollamaTags", "List the installed models", {JSON: OllamaModelList}, OllamaError,
        links={"describe": Link("ollamaShow", body={"model": "$response.body#/models/0/model"})},
    ),
    Operation(
        "GET", "/api/ps", "ollamaPs", "List the models in memory", {JSON: RunningModelList}, OllamaError
    ),
    Operation("GET", "/api/version", "ollamaVersion", "Tell the API's release", {JSON: Version}, OllamaError),
    Operation(
        "POST", "/api/show", "ollamaShow", "Describe a model",
        {JSON: ModelDescription}, OllamaError, _ASKED, schema.NameBody,
    ),
    Operation(
        "POST", "/api/copy", "ollamaCopy", "Give a model a second name",
        {}, OllamaError, (*_ASKED, 409), schema.CopyBody,
        links={
            "describe": Link("ollamaShow", body={"model": "$request.body#/destination"}),
            "use": Link("ollamaChat", body={"model": "$request.body#/destination"}),
            "delete": Link("ollamaDelete", body={"model": "$request.body#/destination"}),
        },
    ),
    Operation(
        "DELETE", "/api/delete", "ollamaDelete", "Delete a model's second name",
        {}, OllamaError, (*_ASKED, 409), schema.NameBody,
    ),
)  # fmt: skip
