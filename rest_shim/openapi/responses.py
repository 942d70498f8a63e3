"""The routes of the Responses API and the shapes of their answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from rest_shim.openapi.openai import ErrorAnswer, TokenLogprob
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
from rest_shim.responses.schema import PromptBody, ResponseBody

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Shape):
    """A piece of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[object]
    logprobs: list[TokenLogprob]


class ReasoningText(Shape):
    """A piece of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class OutputMessage(Shape):
    """What the assistant said."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(Shape):
    """What the assistant thought."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[object]
    content: list[ReasoningText]
    encrypted_content: None = Field()


class OutputCall(Shape):
    """A call of a function; its arguments are JSON text."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class InputTokens(Shape):
    """Of the prompt's tokens."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokens(Shape):
    """Of the answer's tokens."""

    reasoning_tokens: int


class ResponseUsage(Shape):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class IncompleteDetails(Shape):
    """Why an answer was cut off."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(Shape):
    """Why there is no answer."""

    code: str
    message: str


class ReasoningSettings(Shape):
    """How much the model was to think."""

    effort: str | None = Field()
    summary: str | None = Field()


class Response(Shape):
    """A response; every field is always there."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None = Field()
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    incomplete_details: IncompleteDetails | None = Field()
    model: str
    previous_response_id: str | None = Field()
    instructions: str | None = Field()
    output: list[OutputMessage | OutputReasoning | OutputCall]
    error: ResponseFailure | None = Field()
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    truncation: Literal["auto", "disabled"]
    parallel_tool_calls: bool
    text: dict[str, Any]
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    temperature: float
    reasoning: ReasoningSettings
    usage: ResponseUsage | None = Field()
    max_output_tokens: int | None = Field()
    max_tool_calls: int | None = Field()
    store: bool
    background: bool
    service_tier: str
    metadata: dict[str, str]
    safety_identifier: str | None = Field()
    prompt_cache_key: str | None = Field()


class InputTokenCount(Shape):
    """How many tokens a prompt has."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class DeletedResponse(Shape):
    """A response that is gone."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ListedItem(Shape):
    """An input item; its fields are those of its type."""

    model_config = ConfigDict(extra="allow")

    id: str
    type: str


class ItemList(Shape):
    """A page of input items."""

    object: Literal["list"]
    data: list[ListedItem]
    first_id: str | None = Field()
    last_id: str | None = Field()
    has_more: bool


_STORED = (*COMMON_ERRORS, 400, *MODEL_ERRORS)
_ASKED = (*COMMON_ERRORS, *BODY_ERRORS, *MODEL_ERRORS)
_ID = path_parameter("id", "resp_0123456789abcdef")
_THIS = {"id": "$response.body#/id"}

OPERATIONS = (
    Operation(
        "POST", "/v1/responses", "createResponse", "Answer a conversation of items",
        {JSON: Response, EVENTS: None}, ErrorAnswer, _ASKED, ResponseBody,
        links={
            "read": Link("getResponse", _THIS),
            "delete": Link("deleteResponse", _THIS),
            "inputItems": Link("listInputItems", _THIS),
            "cancel": Link("cancelResponse", _THIS),
            "continue": Link("createResponse", body={"previous_response_id": "$response.body#/id"}),
        },
    ),
    Operation(
        "POST", "/v1/responses/input_tokens", "countInputTokens", "Count the tokens of a response's input",
        {JSON: InputTokenCount}, ErrorAnswer, _ASKED, PromptBody,
    ),
    Operation(
        "GET", "/v1/responses/{id}", "getResponse", "Read a stored response",
        {JSON: Response}, ErrorAnswer, _STORED, parameters=(_ID,),
    ),
    Operation(
        "DELETE", "/v1/responses/{id}", "deleteResponse", "Drop a stored response",
        {JSON: DeletedResponse}, ErrorAnswer, _STORED, parameters=(_ID,),
    ),
    # No response runs in the background, so that this never answers 200.
    Operation(
        "POST", "/v1/responses/{id}/cancel", "cancelResponse", "Cancel a response in the background",
        {JSON: Response}, ErrorAnswer, _STORED, parameters=(_ID,),
    ),
    Operation(
        "GET", "/v1/responses/{id}/input_items", "listInputItems", "List the items of a response's input",
        {JSON: ItemList}, ErrorAnswer, _STORED,
        parameters=(
            _ID,
            query_parameter("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
            query_parameter("order", {"type": "string", "enum": ["asc", "desc"]}),
            query_parameter("after", {"type": "string", "minLength": 1}),
        ),
        links={
            "refer": Link(
                "createResponse",
                body={"input": [{"type": "item_reference", "id": "$response.body#/data/0/id"}]},
            ),
        },
    ),
)  # fmt: skip
