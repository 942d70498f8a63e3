"""What an Ollama request may hold.

Fields are those of Ollama's API types; texts of errors are Ollama's own where its server was
recorded. Options of other back ends (mirostat, num_gpu and so on) are ignored like unknown ones.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, ValidationInfo

from rest_shim.bodies import Body, Integer, verbatim
from rest_shim.ollama.duration import parse_seconds
from rest_shim.wire import dump

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
MAX_MESSAGES = 16_384
MAX_IMAGES = 4_096
MAX_TOOLS = 1_024
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_TOP_LOGPROBS = 20
MAX_INPUTS = 65_536
MAX_TEMPLATE_CHARACTERS = 65_536

_ROLES = ("system", "developer", "user", "assistant", "tool")
# Other dialects' words, which clients mix up.
_ROLE_NAMES = {"function": "tool", "model": "assistant", "ai": "assistant", "human": "user"}
_MAX_ECHO_CHARACTERS = 100

ModelName = Annotated[str, StringConstraints(max_length=512)]


def _float_option(value: object, info: ValidationInfo) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise verbatim(f'option "{info.field_name}" must be of type float32')
    return value


def _integer_option(value: object, info: ValidationInfo) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise verbatim(f'option "{info.field_name}" must be of type integer')
    # Ollama cuts the fraction off.
    return int(value)


def _array_option(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, list):
        raise verbatim(f'option "{info.field_name}" must be of type array')
    return value


_Float = BeforeValidator(_float_option)
_Whole = BeforeValidator(_integer_option)
_StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class Options(Body):
    """How tokens are chosen."""

    temperature: Annotated[float, _Float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, _Float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, _Whole, Field(ge=-MAX_INT32, le=MAX_INT32)] | None = None
    min_p: Annotated[float, _Float, Field(ge=0, le=1)] | None = None
    num_predict: Annotated[int, _Whole, Field(ge=-MAX_INT32, le=MAX_INT32)] | None = None
    num_ctx: Annotated[int, _Whole, Field(ge=-MAX_INT32, le=MAX_INT32)] | None = None
    stop: Annotated[
        list[_StopText], BeforeValidator(_array_option), Field(default_factory=list, max_length=MAX_STOPS)
    ]
    seed: Annotated[int, _Whole, Field(ge=-MAX_INT64 - 1, le=MAX_INT64)] | None = None
    repeat_penalty: Annotated[float, _Float, Field(gt=0, le=10)] | None = None
    repeat_last_n: Annotated[int, _Whole, Field(ge=-1, le=MAX_INT32)] | None = None
    presence_penalty: Annotated[float, _Float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, _Float, Field(ge=-2, le=2)] | None = None


class FunctionCall(Body):
    """A call as it stands in the history; arguments are an object here, never text."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class ToolCall(Body):
    """One call of an assistant message."""

    id: str = ""
    function: FunctionCall


def _role(value: object) -> object:
    """Ollama takes any role and leaves it to the template; here, strange ones speak as the user."""
    if not isinstance(value, str):
        return value
    role = _ROLE_NAMES.get(value.lower(), value.lower())
    return role if role in _ROLES else "user"


class Message(Body):
    """One turn."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        BeforeValidator(_role, json_schema_input_type=str),
    ]
    content: str = ""
    thinking: str = ""
    images: list[str] = Field(default_factory=list, max_length=MAX_IMAGES)
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_name: str = ""
    tool_call_id: str = ""


class FunctionTool(Body):
    """A function that may be called."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
    description: str = ""
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A tool; only functions are known."""

    type: Literal["function"] = "function"
    function: FunctionTool


def _keep_alive(value: object) -> object:
    if isinstance(value, str):
        seconds = parse_seconds(value)
        if seconds is None:
            raise verbatim(f'time: invalid duration "{value[:_MAX_ECHO_CHARACTERS]}"')
        return seconds
    return value


def _format(value: object) -> object:
    if isinstance(value, dict):
        return value
    if value == "json":
        return {}
    if value == "":
        return None
    shown = json.dumps(dump(value)[:_MAX_ECHO_CHARACTERS])
    raise verbatim(f'invalid format: {shown}; expected "json" or a valid JSON Schema object')


def _think(value: object) -> object:
    if isinstance(value, bool) or value in ("low", "medium", "high", "max"):
        return value
    shown = dump(value)[:_MAX_ECHO_CHARACTERS]
    raise verbatim(f'invalid think value: {shown} (must be "high", "medium", "low", "max", true, or false)')


def _top_logprobs(value: object) -> object:
    if isinstance(value, int | float) and not 0 <= value <= MAX_TOP_LOGPROBS:
        raise verbatim(f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}")
    return value


class ResidentBody(Body):
    """What requests that use a model share.

    Attributes:
        keep_alive: Seconds; negative is for ever.
    """

    model: ModelName = ""
    keep_alive: Annotated[float, BeforeValidator(_keep_alive, json_schema_input_type=float | str)] | None = (
        None
    )


class AnswerBody(ResidentBody):
    """What /chat and /generate share.

    Attributes:
        format: A JSON schema; {} is any JSON object ("json"), None is free text.
    """

    options: Options = Field(default_factory=lambda: Options.model_validate({}))
    format: Annotated[
        dict[str, Any] | None,
        BeforeValidator(_format, json_schema_input_type=dict[str, Any] | Literal["json", ""]),
    ] = None
    think: (
        Annotated[
            bool | str,
            BeforeValidator(_think, json_schema_input_type=bool | Literal["low", "medium", "high", "max"]),
        ]
        | None
    ) = None
    logprobs: bool = False
    top_logprobs: Annotated[Integer, BeforeValidator(_top_logprobs)] = 0


class ChatBody(AnswerBody):
    """POST /chat."""

    messages: list[Message] = Field(default_factory=list, max_length=MAX_MESSAGES)
    stream: bool = False
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)


TokenId = Annotated[Integer, Field(ge=0, le=MAX_INT32)]


class GenerateBody(AnswerBody):
    """POST /generate."""

    prompt: str = ""
    suffix: str = ""
    system: str = ""
    template: Annotated[str, StringConstraints(max_length=MAX_TEMPLATE_CHARACTERS)] = ""
    context: list[TokenId] = Field(default_factory=list)
    raw: bool = False
    images: list[str] = Field(default_factory=list, max_length=MAX_IMAGES)
    stream: bool = True


def _input(value: object) -> object:
    if isinstance(value, str):
        return [value] if value else []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise verbatim("invalid input type")
    return value


_Texts = Annotated[list[str], Field(max_length=MAX_INPUTS)]


class EmbedBody(ResidentBody):
    """POST /embed; the one text is read as a list of one."""

    input: Annotated[_Texts, BeforeValidator(_input, json_schema_input_type=str | _Texts)] = Field(
        default_factory=list
    )
    truncate: bool = True
    # What is not above 0 is all of them.
    dimensions: Annotated[Integer, Field(ge=-MAX_INT32, le=MAX_INT32)] = 0


class EmbeddingsBody(ResidentBody):
    """POST /embeddings."""

    prompt: str = ""


class NameBody(Body):
    """What names a model and no more; name is the older key."""

    model: ModelName = ""
    name: ModelName = ""

    @property
    def either(self) -> str:
        """The name under whichever key."""
        return self.model or self.name


class CopyBody(Body):
    """POST /copy."""

    source: ModelName = ""
    destination: ModelName = ""
