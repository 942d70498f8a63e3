"""Messages to prompt tokens, through the model's own chat template.

The template runs in transformers' sandbox. What this module decides beside it:

* `developer` messages become `system` messages unless the template mentions developers.
* A conversation that ends with an assistant message is continued: the prompt ends with that
  message's text, and the answer is what follows it, as llama.cpp's server, Ollama and Anthropic's
  API have it. Where the template cannot leave the message open, a new assistant turn begins.
* A call's arguments reach the template as an object where they are one, since most templates
  expect that, and as the JSON text for templates that fail on objects.
* Control tokens in messages are text; see control_tokens.
* The beginning-of-sequence token is the template's to write; none is added.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, cast

from jinja2 import TemplateError

from osaurus_grpc.chat.control_tokens import Shield
from osaurus_grpc.chat.types import JSON, Message, Role
from osaurus_grpc.errors import CapabilityError, InvalidRequestError

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_ARGUMENTS_FIELD = "chat_template_kwargs_json"
_MAX_REFUSAL_LENGTH = 200
_MAX_NESTING = 64
# Mistral's templates refuse call ids of another form than their own servers make.
_SHORT_CALL_IDS = re.compile(r"length\s*!=\s*9")


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    template_arguments: Mapping[str, JSON] | None = None,
    reasoning_effort: str = "",
    reasoning_enabled: bool | None = None,
) -> list[int]:
    """Renders a conversation as the tokens of a prompt that the model's answer continues.

    CPU-bound and linear in the conversation: about a second for some megabytes of text.

    Args:
        tokenizer: The model's tokenizer, with its chat template.
        messages: The conversation, at least one message.
        template_arguments: Further variables of the template. They win over those that the two
            reasoning arguments set.
        reasoning_effort: "low", "medium", "high" or another value that the template knows; "none"
            turns reasoning off and anything else turns it on, where reasoning_enabled is not given.
        reasoning_enabled: Sets the variables by which templates turn reasoning on and off. None
            leaves it to the template, or to reasoning_effort.

    Returns:
        Token ids, at least one.

    Raises:
        InvalidRequestError: The template refuses the conversation, a text cannot be encoded, or a
            template argument has a reserved name.
        CapabilityError: The model has no chat template, or one that fails.
    """
    if not messages:
        raise InvalidRequestError("A conversation needs at least one message.", field="messages")
    template = template_text(tokenizer)
    if not template:
        raise CapabilityError(
            "The model has no chat template, so it cannot chat; use it for completions.", capability="chat"
        )
    variables = {
        **_reasoning_variables(template, reasoning_effort, reasoning_enabled),
        **_checked_arguments(tokenizer, template_arguments or {}),
    }
    _check_texts(messages)
    token_ids = _tokenize(tokenizer, template, messages, variables)
    if not token_ids:
        raise InvalidRequestError(
            "The model's chat template makes nothing of these messages.", field="messages"
        )
    return token_ids


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that `render` uses: of several named ones "default", else the only one; "" if none."""
    templates = tokenizer.chat_template
    if isinstance(templates, Mapping):
        named = {str(name): str(text) for name, text in templates.items()}
        return named.get("default", next(iter(named.values())) if len(named) == 1 else "")
    return str(templates or "")


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    variables: Mapping[str, JSON],
) -> list[int]:
    """Renders by the first form of the conversation that the template does not fail on."""
    # transformers types this for training code; JSON is what it takes.
    apply_chat_template = cast("Callable[..., str]", tokenizer.apply_chat_template)
    failure = ""
    for as_objects, continues in _forms(messages):
        turns = _turns(messages, template, as_objects=as_objects)
        shield = Shield(tokenizer, list(_strings([turns, variables])))
        try:
            rendered = apply_chat_template(
                shield.cut(turns),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                **{name: shield.cut(value) for name, value in variables.items()},
            )
        except Exception as error:  # noqa: BLE001  a template is a program: it can raise anything
            if type(error) is TemplateError:  # raise_exception's own; its subclasses are failures
                raise _refusal(str(error)) from None
            failure = type(error).__name__
        else:
            return shield.encode(rendered)
    _log.warning("chat_template_failed error=%s", failure)
    raise CapabilityError("The model's chat template fails on this conversation.", capability="chat")


def _forms(messages: Sequence[Message]) -> Iterator[tuple[bool, bool]]:
    """Forms to try in order: call arguments as objects or text; last message continued or closed."""
    last = messages[-1]
    continues = last.role is Role.ASSISTANT and not last.tool_calls and bool(last.content.strip())
    has_calls = any(message.tool_calls for message in messages)
    for continued in (True, False) if continues else (False,):
        for as_objects in (True, False) if has_calls else (True,):
            yield as_objects, continued


def _refusal(text: str) -> InvalidRequestError:
    """The template's own words where they are fit to show: one short, printable line."""
    is_shown = 0 < len(text) <= _MAX_REFUSAL_LENGTH and text.isprintable()
    reason = text if is_shown else "it gives no reason"
    return InvalidRequestError(
        f"The model's chat template refuses this conversation: {reason}", field="messages"
    )


def _checked_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, JSON]) -> dict[str, JSON]:
    """Refuses names that are transformers' parameters and not the template's variables.

    Raises:
        InvalidRequestError: As said, or a value that no template can take.
    """
    if not arguments:
        return {}
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters} - {"documents", "kwargs"}
    for name in arguments:
        if name in reserved or name in ("messages", "conversations", "self"):
            raise InvalidRequestError(
                f'"{name}" cannot be set as a template argument.', field=_ARGUMENTS_FIELD
            )
    if _is_deep(arguments):
        raise InvalidRequestError("The template arguments are nested too deeply.", field=_ARGUMENTS_FIELD)
    documents = arguments.get("documents")
    if documents is not None and not (
        isinstance(documents, list) and all(isinstance(document, dict) for document in documents)
    ):
        raise InvalidRequestError('"documents" must be a list of objects.', field=_ARGUMENTS_FIELD)
    if not _is_encodable(json.dumps(arguments, ensure_ascii=False)):
        raise InvalidRequestError("A text holds an unpaired surrogate.", field=_ARGUMENTS_FIELD)
    return dict(arguments)


def _reasoning_variables(template: str, effort: str, enabled: bool | None) -> dict[str, JSON]:
    """Variables by the names that templates use.

    `enable_thinking` is Qwen's, GLM's and SmolLM's; `thinking` DeepSeek's, Granite's and Kimi's;
    `reasoning_effort` gpt-oss's.
    """
    if enabled is None and effort:
        enabled = effort != "none"
    variables: dict[str, JSON] = {}
    if enabled is not None:
        variables = {"enable_thinking": enabled, "thinking": enabled}
    if effort == "minimal" and "minimal" not in template:
        effort = "low"
    if effort and effort != "none":
        variables["reasoning_effort"] = effort
    return variables


def _check_texts(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        texts = [("content", message.content), ("reasoning", message.reasoning), ("name", message.name)]
        texts.append(("tool_call_id", message.tool_call_id))
        for position, call in enumerate(message.tool_calls):
            function = f"tool_calls[{position}].function"
            texts.append((f"tool_calls[{position}].id", call.id))
            texts.append((f"{function}.name", call.name))
            texts.append((f"{function}.arguments_json", call.arguments_json))
        for field, text in texts:
            if not _is_encodable(text):
                raise InvalidRequestError("The text holds an unpaired surrogate.", field=f"{path}.{field}")


def _is_encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _turns(messages: Sequence[Message], template: str, *, as_objects: bool) -> list[JSON]:
    """The messages as templates expect them: dicts in the form of OpenAI's API."""
    developer = Role.DEVELOPER if "developer" in template else Role.SYSTEM
    shortens_ids = bool(_SHORT_CALL_IDS.search(template))
    called = {call.id: call.name for message in messages for call in message.tool_calls}
    turns: list[JSON] = []
    for message in messages:
        role = developer if message.role is Role.DEVELOPER else message.role
        turn = _turn(message, role, called.get(message.tool_call_id, ""), shortens_ids=shortens_ids)
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": _call_id(call.id, shortens_ids),
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": _call_arguments(call.arguments_json)
                        if as_objects
                        else call.arguments_json,
                    },
                }
                for call in message.tool_calls
            ]
        turns.append(turn)
    return turns


def _turn(message: Message, role: Role, called_name: str, *, shortens_ids: bool) -> dict[str, JSON]:
    turn: dict[str, JSON] = {"role": str(role), "content": message.content}
    name = message.name
    if role is Role.TOOL:
        name = name or called_name
        turn["tool_call_id"] = _call_id(message.tool_call_id, shortens_ids)
    if name:
        turn["name"] = name
    if message.reasoning:
        # The second is what gpt-oss templates read.
        turn["reasoning_content"] = turn["thinking"] = message.reasoning
    return turn


def _call_id(call_id: str, shortens: bool) -> str:
    if not shortens or (len(call_id) == 9 and call_id.isalnum()):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _call_arguments(arguments_json: str) -> JSON:
    """The arguments as an object, or the text as it is where it is none that JSON can hold."""
    if not arguments_json.strip():
        return {}
    try:
        arguments = json.loads(arguments_json, parse_constant=_refuse, parse_float=_finite)
        is_sound = (
            isinstance(arguments, dict)
            and not _is_deep(arguments)
            and _is_encodable(json.dumps(arguments, ensure_ascii=False))
        )
    except (ValueError, RecursionError):
        return arguments_json
    return arguments if is_sound else arguments_json


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _finite(literal: str) -> float:
    number = float(literal)
    if math.isinf(number):
        raise ValueError(literal)
    return number


def _is_deep(value: JSON, levels: int = _MAX_NESTING) -> bool:
    """Whether lists and objects are nested deeper than transformers' recursion can be trusted with."""
    if isinstance(value, str) or not isinstance(value, Mapping | Sequence):
        return False
    items = value.values() if isinstance(value, Mapping) else value
    return levels == 0 or any(_is_deep(item, levels - 1) for item in items)


def _strings(value: JSON) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)
