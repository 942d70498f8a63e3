"""What a request for a response may hold.

Fields follow OpenAI's OpenAPI description and the Open Responses specification, plus the sampling
fields that local servers share. What belongs to OpenAI's own service (service_tier, prompt_cache_key,
safety_identifier and so on) is echoed where the response has a place for it, and changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema

from rest_shim.bodies import Body, Integer
from rest_shim.openai.sampling import MAX_INT32, SamplingFields, TokenCount
from rest_shim.openai.schema import MAX_TOP_LOGPROBS, ModelName, ReasoningEffort
from rest_shim.openai.tools import MAX_TOOLS, ChoiceMode, FunctionName
from rest_shim.responses.items import Items

MAX_METADATA = 16

ResponseId = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class FunctionTool(Body):
    """A function that may be called; unlike in chat completions its fields are not nested."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Body):
    """A tool, named in a choice."""

    type: Literal["function"]
    name: FunctionName


class ToolChoice(Body):
    """How tools are chosen; the plain strings are read as {"type": ...}."""

    type: Literal["auto", "none", "required", "function", "allowed_tools"]
    name: FunctionName | None = None
    mode: Literal["auto", "required", "none"] = "auto"
    tools: list[NamedTool] = Field(default_factory=list, max_length=MAX_TOOLS)


def _tool_choice(value: object) -> object:
    if isinstance(value, str):
        if value not in {"auto", "none", "required"}:
            raise ValueError("must be 'auto', 'none', 'required' or an object that names functions")
        return {"type": value}
    return value


class TextFormat(Body):
    """The form of the answer; unlike in chat completions its fields are not nested."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    definition: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
    """Options of the text of an answer."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Body):
    """Options of the reasoning before an answer."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(Body):
    """Options that only a stream has."""

    include_obfuscation: bool = False


# Of these only log-probabilities are made here; the others belong to tools that the server itself would run,
# and encrypted reasoning is null, since reasoning is shown as it is and is read back in that form.
Includable = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


# What is refused with words of its own; nothing but null is taken.
_NOT_HERE = WithJsonSchema({"type": "null"})


class PromptBody(Body):
    """What makes up the prompt of a response; all of POST /responses/input_tokens."""

    model: ModelName = ""
    input: Items | None = None
    instructions: str | None = None
    previous_response_id: ResponseId | None = None
    tools: list[FunctionTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Annotated[
        ToolChoice, BeforeValidator(_tool_choice, json_schema_input_type=ChoiceMode | ToolChoice)
    ] = Field(default_factory=lambda: ToolChoice(type="auto"))
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    conversation: Annotated[Any, _NOT_HERE] = None
    prompt: Annotated[Any, _NOT_HERE] = None
    chat_template_kwargs: dict[str, Any] | None = None


class ResponseBody(PromptBody, SamplingFields):
    """POST /responses."""

    store: bool = True
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    max_tool_calls: Annotated[Integer, Field(ge=1, le=MAX_INT32)] | None = None
    max_output_tokens: TokenCount | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[Includable] = Field(default_factory=list, max_length=64)
    background: Annotated[bool, WithJsonSchema({"type": "boolean", "const": False})] = False
    metadata: dict[
        Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]
    ] = Field(default_factory=dict, max_length=MAX_METADATA)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
