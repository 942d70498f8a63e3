"""Messages to prompt tokens, through the model's own chat template.

The template runs in transformers' sandbox. What this module decides beside it:

* `developer` messages become `system` messages unless the template mentions developers.
* A conversation that ends with an assistant message is continued: the prompt ends with that
  message's text, and the answer is what follows it, as llama.cpp's server, Ollama and Anthropic's
  API have it. Where the template cannot leave the message open, a new assistant turn begins.
* A call's arguments reach the template as an object where they are one, since most templates
  expect that, and as the JSON text for templates that fail on objects.
* What the template would lose of tools, calls and results goes into messages that it shows; see
  replay.
* Control tokens in messages are text; see control_tokens.
* The beginning-of-sequence token is the template's to write; none is added.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from osaurus_grpc.chat.abilities import abilities_of
from osaurus_grpc.chat.content_parts import images_behind_results, needs_parts
from osaurus_grpc.chat.control_tokens import Shield
from osaurus_grpc.chat.reasoning_switch import reasoning_variables, switched
from osaurus_grpc.chat.replay import replayed
from osaurus_grpc.chat.style import ChatStyle, style_of
from osaurus_grpc.chat.turns import Numbers, check_texts, is_deep, is_encodable, template_turns
from osaurus_grpc.chat.types import JSON, Message, Role, ToolSpec
from osaurus_grpc.errors import CapabilityError, InvalidRequestError

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_ARGUMENTS_FIELD = "chat_template_kwargs_json"
_MAX_REFUSAL_LENGTH = 200


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[ToolSpec] = (),
    template_arguments: Mapping[str, JSON] | None = None,
    reasoning_effort: str = "",
    reasoning_enabled: bool | None = None,
) -> list[int]:
    """Renders a conversation as the tokens of a prompt; apply_template() and its encode() in one.

    Returns:
        Token ids, at least one.

    Raises:
        InvalidRequestError: As they do.
        CapabilityError: As they do.
    """
    return apply_template(
        tokenizer,
        messages,
        tools=tools,
        template_arguments=template_arguments,
        reasoning_effort=reasoning_effort,
        reasoning_enabled=reasoning_enabled,
    ).encode()


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as its template writes it, and the model's answer continues it.

    Attributes:
        text: What the template writes, with the shield's cuts.
        shield: Keeps control tokens in messages from being read as such.
    """

    text: str
    shield: Shield

    @property
    def plain_text(self) -> str:
        """The text without the shield's cuts."""
        return self.shield.uncut(self.text)

    def encode(self) -> list[int]:
        """The text as tokens, at least one.

        Raises:
            InvalidRequestError: The template made nothing of the conversation.
        """
        token_ids = self.shield.encode(self.text)
        if not token_ids:
            raise InvalidRequestError(
                "The model's chat template makes nothing of these messages.", field="messages"
            )
        return token_ids


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[ToolSpec] = (),
    template_arguments: Mapping[str, JSON] | None = None,
    reasoning_effort: str = "",
    reasoning_enabled: bool | None = None,
) -> Rendering:
    """Renders a conversation as text.

    CPU-bound and linear in the conversation: about a second for some megabytes of text.

    Args:
        tokenizer: The model's tokenizer, with its chat template.
        messages: The conversation, at least one message.
        tools: Functions that the model is told of.
        template_arguments: Further variables of the template. They win over those that the two
            reasoning arguments set.
        reasoning_effort: "low", "medium", "high" or another value that the template knows; "none"
            turns reasoning off and anything else turns it on, where reasoning_enabled is not given.
        reasoning_enabled: Sets the variables by which templates turn reasoning on and off. None
            leaves it to the template, or to reasoning_effort.

    Raises:
        InvalidRequestError: The template refuses the conversation, a text cannot be encoded, or a
            template argument has a reserved name or makes the template fail.
        CapabilityError: The model has no chat template, or one that fails.
    """
    if not messages:
        raise InvalidRequestError("A conversation needs at least one message.", field="messages")
    template = template_text(tokenizer, with_tools=bool(tools))
    if not template:
        raise CapabilityError(
            "The model has no chat template, so it cannot chat; use it for completions.", capability="chat"
        )
    own = reasoning_variables(template, reasoning_effort, reasoning_enabled)
    arguments = _checked_arguments(tokenizer, template_arguments or {})
    check_texts(messages)
    messages = images_behind_results(switched(messages, template, own))
    abilities = abilities_of(tokenizer, template)
    has_tool_turns = any(message.tool_calls or message.role is Role.TOOL for message in messages)
    tool_variables: dict[str, JSON] = {}
    if tools or has_tool_turns or not abilities.system:
        syntax = style_of(tokenizer, template, is_native=abilities.tools).syntax
        replay = replayed(messages, tools, abilities, syntax)
        messages = replay.messages
        if replay.tools:
            tool_variables["tools"] = replay.tools
    try:
        return _rendering(tokenizer, template, messages, {**own, **arguments, **tool_variables})
    except (CapabilityError, InvalidRequestError) as error:
        if arguments and _is_rendered(tokenizer, template, messages, {**own, **tool_variables}):
            raise InvalidRequestError(
                f"{error.message} Without the template arguments it does not.", field=_ARGUMENTS_FIELD
            ) from None
        raise


def _is_rendered(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    variables: Mapping[str, JSON],
) -> bool:
    try:
        _rendering(tokenizer, template, messages, variables)
    except (CapabilityError, InvalidRequestError):
        return False
    return True


def template_text(tokenizer: PreTrainedTokenizerBase, *, with_tools: bool = False) -> str:
    """The template that `render` uses; "" if there is none.

    Of several named ones it is "tool_use" where there are tools and it shows them, else "default", else the
    only one.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, Mapping):
        named = {str(name): str(text) for name, text in templates.items()}
        if with_tools and "tool_use" in named and abilities_of(tokenizer, named["tool_use"]).tools:
            return named["tool_use"]
        return named.get("default", next(iter(named.values())) if len(named) == 1 else "")
    return str(templates or "")


def chat_style(tokenizer: PreTrainedTokenizerBase, *, with_tools: bool) -> ChatStyle:
    """How the model answers a conversation that `render` has rendered."""
    template = template_text(tokenizer, with_tools=with_tools)
    return style_of(tokenizer, template, is_native=abilities_of(tokenizer, template).tools)


def is_continuation(messages: Sequence[Message]) -> bool:
    """Whether an answer continues the last message: an assistant's, with text and without calls."""
    last = messages[-1]
    return last.role is Role.ASSISTANT and not last.tool_calls and bool(last.content.strip())


def _rendering(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    variables: Mapping[str, JSON],
) -> Rendering:
    """Renders by the first form of the conversation that the template does not fail on."""
    # transformers types this for training code; JSON is what it takes.
    apply_chat_template = cast("Callable[..., str]", tokenizer.apply_chat_template)
    failure = ""
    as_parts = needs_parts(tokenizer, template)
    for as_objects, continues in _forms(messages):
        numbers = Numbers()
        turns = template_turns(messages, template, as_objects=as_objects, numbers=numbers, as_parts=as_parts)
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
            return Rendering(numbers.restore(rendered), shield)
    _log.warning("chat_template_failed error=%s", failure)
    raise CapabilityError("The model's chat template fails on this conversation.", capability="chat")


def _forms(messages: Sequence[Message]) -> Iterator[tuple[bool, bool]]:
    """Forms to try in order: call arguments as objects or text; last message continued or closed."""
    continues = is_continuation(messages)
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
    if is_deep(arguments):
        raise InvalidRequestError("The template arguments are nested too deeply.", field=_ARGUMENTS_FIELD)
    documents = arguments.get("documents")
    if documents is not None and not (
        isinstance(documents, list) and all(isinstance(document, dict) for document in documents)
    ):
        raise InvalidRequestError('"documents" must be a list of objects.', field=_ARGUMENTS_FIELD)
    if not is_encodable(json.dumps(arguments, ensure_ascii=False)):
        raise InvalidRequestError("A text holds an unpaired surrogate.", field=_ARGUMENTS_FIELD)
    return dict(arguments)


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
