"""What a request may hold: a ChatRequest or a CompleteRequest in, a list of field violations out. Pure.

Field paths are protobuf paths relative to that request ("messages[2].content[0].text"), also where it
came inside a ChatStreamRequest or a CountTokensRequest. Ranges are those of the comments in the
protos; what they leave open is bounded here, so that no field is unbounded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Never

from google.protobuf.duration_pb2 import Duration

from osaurus_grpc.chat.turns import is_encodable
from osaurus_grpc.errors import CapabilityError, InvalidRequestError
from osaurus_grpc.models.catalog import Capability, ModelEntry
from osaurus_grpc.models.vision import families
from osaurus_grpc.v1 import chat_pb2, completion_pb2, sampling_pb2

MAX_MODEL_NAME_CHARACTERS: Final = 512
MAX_MESSAGES: Final = 16_384
MAX_NAME_CHARACTERS: Final = 256
MAX_CHOICES: Final = 16
MAX_STOPS: Final = 64
MAX_STOP_CHARACTERS: Final = 1_024
MAX_TOP_LOGPROBS: Final = 20
# More than any model's context.
MAX_TOKEN_IDS: Final = 2**24
MAX_TOOLS: Final = 1_024
MAX_IMAGES: Final = 64
MAX_TEMPLATE_ARGUMENTS_CHARACTERS: Final = 65_536
# google.protobuf.Duration's own bounds.
MAX_DURATION_SECONDS: Final = 315_576_000_000
MAX_DURATION_NANOS: Final = 999_999_999

_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
# Of JSON schema's types, those that no call's arguments have.
_OTHER_TYPES: Final = ("null", "boolean", "integer", "number", "string", "array")
_KNOWN_ROLES: Final = frozenset(chat_pb2.Role.values()) - {chat_pb2.ROLE_UNSPECIFIED}
_SEEING_ROLES: Final = frozenset({chat_pb2.ROLE_USER, chat_pb2.ROLE_TOOL})
_KNOWN_TOOL_CHOICES: Final = frozenset(chat_pb2.ToolChoiceMode.values())
_FORCED_TOOL_CHOICES: Final = frozenset(
    {chat_pb2.TOOL_CHOICE_MODE_REQUIRED, chat_pb2.TOOL_CHOICE_MODE_FUNCTION}
)


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One thing that is wrong with a request: the field's path and a whole sentence about it."""

    field: str
    description: str


class FieldViolationsError(InvalidRequestError):
    """A request with at least one field violation; `field` is the first one's."""

    def __init__(self, violations: list[FieldViolation]) -> None:
        super().__init__(" ".join(v.description for v in violations), field=violations[0].field)
        self.violations = tuple(violations)


def require_valid(violations: list[FieldViolation]) -> None:
    """Raise FieldViolationsError where there is a violation."""
    if violations:
        raise FieldViolationsError(violations)


def _violation(field: str, what: str) -> FieldViolation:
    # People know sampling fields by their bare names, in every dialect.
    return FieldViolation(field, f"{field.removeprefix('sampling.')} {what}")


@dataclass(frozen=True, slots=True)
class _Range:
    """A closed interval, open at the low end where is_above is set."""

    name: str
    low: float
    high: float
    is_above: bool = False

    def violation(self, value: float) -> FieldViolation | None:
        # NaN fails every comparison, infinities the bounds.
        is_in = self.low <= value <= self.high and not (self.is_above and value == self.low)
        if is_in:
            return None
        low = f"above {self.low:g}" if self.is_above else f"at least {self.low:g}"
        bound = low if math.isinf(self.high) else f"{low} and at most {self.high:g}"
        return _violation(f"sampling.{self.name}", f"must be {bound}.")


_SAMPLING_RANGES: Final = (
    _Range("temperature", 0, 2),
    _Range("top_p", 0, 1, is_above=True),
    _Range("top_k", 0, math.inf),
    _Range("min_p", 0, 1),
    _Range("repetition_penalty", 0, 10, is_above=True),
    _Range("repetition_context", -1, math.inf),
    _Range("presence_penalty", -2, 2),
    _Range("frequency_penalty", -2, 2),
    _Range("top_logprobs", 0, MAX_TOP_LOGPROBS),
)


def sampling_violations(
    sampling: sampling_pb2.SamplingParams, *, least_tokens: int = 1
) -> Iterator[FieldViolation]:
    """What is wrong with sampling settings, as far as that can be told without the model.

    Args:
        sampling: The settings.
        least_tokens: What max_tokens must be at least.
    """
    by_name = {descriptor.name: value for descriptor, value in sampling.ListFields()}
    for bounds in (*_SAMPLING_RANGES, _Range("max_tokens", least_tokens, math.inf)):
        if bounds.name in by_name and (violation := bounds.violation(by_name[bounds.name])):
            yield violation
    # The first one of each kind: a request may hold very many.
    negative = next((token_id for token_id in sampling.logit_bias if token_id < 0), None)
    if negative is not None:
        yield _violation("sampling.logit_bias", f"names {negative}, which is no token id.")
    if not all(-100 <= bias <= 100 for bias in sampling.logit_bias.values()):
        yield _violation("sampling.logit_bias", "values must be at least -100 and at most 100.")
    if len(sampling.stop) > MAX_STOPS:
        yield _violation("sampling.stop", f"must have at most {MAX_STOPS} entries.")
    for i, stop in enumerate(sampling.stop[: MAX_STOPS + 1]):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            yield _violation(f"sampling.stop[{i}]", f"must have 1 to {MAX_STOP_CHARACTERS} characters.")


def vocabulary_violations(sampling: sampling_pb2.SamplingParams, vocab_size: int) -> Iterator[FieldViolation]:
    """What is wrong with sampling settings for a model whose logits are vocab_size wide."""
    largest = max(sampling.logit_bias, default=0)
    if largest >= vocab_size:
        what = f"names token {largest}; the model's token ids end at {vocab_size - 1}."
        yield _violation("sampling.logit_bias", what)


def token_violations(field: str, token_ids: Sequence[int], vocab_size: int) -> Iterator[FieldViolation]:
    """The first of some token ids that a model does not have."""
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    for i, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            what = f"is {token_id}; the model's token ids go from 0 to {vocab_size - 1}."
            yield _violation(f"{field}[{i}]", what)
            return


def model_violations(
    request: chat_pb2.ChatRequest | completion_pb2.CompleteRequest, vocab_size: int
) -> list[FieldViolation]:
    """What is wrong with a request for a model whose logits are vocab_size wide."""
    found = [*vocabulary_violations(request.sampling, vocab_size)]
    if isinstance(request, chat_pb2.ChatRequest):
        found.extend(token_violations("context_token_ids", request.context_token_ids, vocab_size))
    else:
        found.extend(token_violations("tokens.token_ids", request.tokens.token_ids, vocab_size))
    return found


def duration_violations(field: str, value: Duration) -> Iterator[FieldViolation]:
    """What makes a Duration malformed by the rules of its own type."""
    is_bounded = abs(value.seconds) <= MAX_DURATION_SECONDS and abs(value.nanos) <= MAX_DURATION_NANOS
    if not is_bounded or value.seconds * value.nanos < 0:
        yield _violation(field, "is not a valid duration.")


def name_violations(field: str, name: str) -> Iterator[FieldViolation]:
    """What is wrong with a model's name before it is looked up."""
    if len(name) > MAX_MODEL_NAME_CHARACTERS:
        yield _violation(field, f"must have at most {MAX_MODEL_NAME_CHARACTERS} characters.")


def _text_violations(field: str, text: str, limit: int) -> Iterator[FieldViolation]:
    if len(text) > limit:
        yield _violation(field, f"must have at most {limit} characters.")


def _content_violations(path: str, message: chat_pb2.Message) -> Iterator[FieldViolation]:
    if not message.content:
        if not (message.role == chat_pb2.ROLE_ASSISTANT and message.tool_calls):
            yield _violation(f"{path}.content", "must not be empty.")
        return
    # A text may be empty: clients send empty system prompts, tools give empty results, and what one
    # agent has not said is the next one's question.
    for j, part in enumerate(message.content):
        kind = part.WhichOneof("part")
        if kind is None:
            yield _violation(f"{path}.content[{j}]", "must be text or an image.")
        if kind == "image" and message.role not in _SEEING_ROLES:
            yield _violation(f"{path}.content[{j}].image", "is for user and tool messages only.")


def _message_violations(path: str, message: chat_pb2.Message) -> Iterator[FieldViolation]:
    if message.role not in _KNOWN_ROLES:
        yield _violation(f"{path}.role", "must be system, developer, user, assistant or tool.")
    yield from _content_violations(path, message)
    yield from _text_violations(f"{path}.name", message.name, MAX_NAME_CHARACTERS)
    yield from _text_violations(f"{path}.tool_call_id", message.tool_call_id, MAX_NAME_CHARACTERS)
    if message.tool_calls and message.role != chat_pb2.ROLE_ASSISTANT:
        yield _violation(f"{path}.tool_calls", "are for assistant messages only.")
    for j, call in enumerate(message.tool_calls):
        if not call.function.name:
            yield _violation(f"{path}.tool_calls[{j}].function.name", "must not be empty.")


def _refuse_constant(name: str) -> Never:
    raise ValueError(name)


def _json_object(text: str) -> dict[str, object] | None:
    """A JSON object from its text; None where it is none."""
    try:
        # NaN and Infinity are Python's own; JSON has none.
        value = json.loads(text, parse_constant=_refuse_constant)
        # A half of a surrogate pair is no text that a prompt could hold.
        is_whole = isinstance(value, dict) and is_encodable(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError):
        return None
    return value if is_whole else None


def _parameters_fault(text: str) -> str:
    """What makes a text no schema of a call's arguments, which are an object; "" where it may be one."""
    schema = _json_object(text)
    if schema is None:
        return "must be a JSON object."
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    # What is no type at all is told by the grammar's compiler, with its place.
    if all(kind in _OTHER_TYPES for kind in kinds):
        return 'must be the schema of an object: its "type" must be "object".'
    return ""


def _tool_violations(request: chat_pb2.ChatRequest) -> Iterator[FieldViolation]:
    if len(request.tools) > MAX_TOOLS:
        yield _violation("tools", f"must have at most {MAX_TOOLS} entries.")
        return
    seen: set[str] = set()
    for i, tool in enumerate(request.tools):
        path = f"tools[{i}].function"
        if tool.function.name in seen:
            yield _violation(f"{path}.name", "is that of another tool.")
        seen.add(tool.function.name)
        if not _TOOL_NAME.fullmatch(tool.function.name):
            yield _violation(f"{path}.name", 'must have 1 to 128 characters of A-Z, a-z, 0-9, "_", "-", ".".')
        if tool.function.parameters_json and (wrong := _parameters_fault(tool.function.parameters_json)):
            yield _violation(f"{path}.parameters_json", wrong)
    choice = request.tool_choice
    if choice.mode not in _KNOWN_TOOL_CHOICES:
        yield _violation("tool_choice.mode", "is not a known mode.")
    if choice.mode in _FORCED_TOOL_CHOICES and not request.tools:
        yield _violation("tool_choice", "asks for a call, but there are no tools.")
    names = {tool.function.name for tool in request.tools}
    if (
        choice.mode == chat_pb2.TOOL_CHOICE_MODE_FUNCTION
        and request.tools
        and choice.function_name not in names
    ):
        yield _violation("tool_choice.function_name", "is not among the tools.")


def _result_violations(request: chat_pb2.ChatRequest) -> Iterator[FieldViolation]:
    """Results that name a call which nobody made.

    Only a conversation that is here in full can be checked. A result without an id is matched by its
    tool's name and its place, since Ollama's clients know no ids.
    """
    has_calls = any(message.role == chat_pb2.ROLE_ASSISTANT for message in request.messages)
    if (request.session_id or request.context_token_ids) and not has_calls:
        return
    made: set[str] = set()
    for i, message in enumerate(request.messages):
        made.update(call.id for call in message.tool_calls)
        if message.role == chat_pb2.ROLE_TOOL and message.tool_call_id and message.tool_call_id not in made:
            yield _violation(f"messages[{i}].tool_call_id", "answers no call of an earlier message.")


def _template_violations(request: chat_pb2.ChatRequest) -> Iterator[FieldViolation]:
    arguments = request.chat_template_kwargs_json
    field = "chat_template_kwargs_json"
    if len(arguments) > MAX_TEMPLATE_ARGUMENTS_CHARACTERS:
        yield _violation(field, f"must have at most {MAX_TEMPLATE_ARGUMENTS_CHARACTERS} characters.")
    elif arguments and _json_object(arguments) is None:
        yield _violation(field, "must be a JSON object.")
    yield from _text_violations("reasoning_effort", request.reasoning_effort, MAX_NAME_CHARACTERS)


def _image_violations(request: chat_pb2.ChatRequest) -> Iterator[FieldViolation]:
    count = sum(part.HasField("image") for message in request.messages for part in message.content)
    if count > MAX_IMAGES:
        yield _violation("messages", f"must have at most {MAX_IMAGES} images.")


def chat_violations(request: chat_pb2.ChatRequest) -> list[FieldViolation]:
    """Everything that is wrong with a request, as far as that can be told without the model."""
    found = [*name_violations("model", request.model)]
    if not request.messages:
        found.append(_violation("messages", "must have at least one message."))
    elif len(request.messages) > MAX_MESSAGES:
        found.append(_violation("messages", f"must have at most {MAX_MESSAGES} messages."))
    else:
        for i, message in enumerate(request.messages):
            found.extend(_message_violations(f"messages[{i}]", message))
        found.extend(_image_violations(request))
    found.extend(sampling_violations(request.sampling))
    found.extend(_tool_violations(request))
    found.extend(_result_violations(request))
    found.extend(_template_violations(request))
    found.extend(_text_violations("session_id", request.session_id, MAX_NAME_CHARACTERS))
    if len(request.context_token_ids) > MAX_TOKEN_IDS:
        found.append(_violation("context_token_ids", f"must have at most {MAX_TOKEN_IDS} tokens."))
    if request.session_id and request.context_token_ids:
        found.append(_violation("context_token_ids", "cannot be given together with session_id."))
    if request.HasField("max_reasoning_tokens") and request.max_reasoning_tokens < 1:
        found.append(_violation("max_reasoning_tokens", "must be at least 1."))
    found.extend(_run_violations(request))
    return found


def completion_violations(request: completion_pb2.CompleteRequest) -> list[FieldViolation]:
    """Everything that is wrong with a request, as far as that can be told without the model."""
    found = [*name_violations("model", request.model)]
    kind = request.WhichOneof("prompt")
    if kind is None:
        found.append(_violation("prompt", "must be set: text or tokens."))
    elif kind == "tokens" and not request.tokens.token_ids:
        found.append(_violation("tokens.token_ids", "must have at least one token."))
    if len(request.tokens.token_ids) > MAX_TOKEN_IDS:
        found.append(_violation("tokens.token_ids", f"must have at most {MAX_TOKEN_IDS} tokens."))
    if kind == "tokens" and request.suffix:
        found.append(_violation("suffix", "needs a prompt of text."))
    if request.HasField("prompt_logprobs") and not 0 <= request.prompt_logprobs <= MAX_TOP_LOGPROBS:
        found.append(_violation("prompt_logprobs", f"must be at least 0 and at most {MAX_TOP_LOGPROBS}."))
    found.extend(sampling_violations(request.sampling, least_tokens=0))
    found.extend(_run_violations(request))
    return found


def _run_violations(
    request: chat_pb2.ChatRequest | completion_pb2.CompleteRequest,
) -> Iterator[FieldViolation]:
    """What chat and completion share."""
    if request.HasField("choice_count") and not 1 <= request.choice_count <= MAX_CHOICES:
        yield _violation("choice_count", f"must be at least 1 and at most {MAX_CHOICES}.")
    if request.HasField("max_context_tokens") and request.max_context_tokens < 1:
        yield _violation("max_context_tokens", "must be at least 1.")
    if request.HasField("keep_alive"):
        yield from duration_violations("keep_alive", request.keep_alive)


def require_images_taken(request: chat_pb2.ChatRequest, entry: ModelEntry) -> None:
    """Refuse images for a model that takes none, before it is loaded.

    Raises:
        CapabilityError: There is one.
    """
    if Capability.VISION in entry.capabilities:
        return
    for i, message in enumerate(request.messages):
        for j, part in enumerate(message.content):
            if part.WhichOneof("part") == "image":
                text = f"Model '{entry.id}' does not take images."
                if families.is_missing_for(entry.architecture):
                    text = f"Model '{entry.id}' takes images with mlx-vlm only: {families.INSTALL_HINT}"
                raise CapabilityError(text, capability="vision", field=f"messages[{i}].content[{j}].image")
