"""Messages as chat templates expect them: dicts in the form of OpenAI's API."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

from osaurus_grpc.chat.content_parts import parts_of
from osaurus_grpc.chat.types import JSON, Message, Role, ToolCall
from osaurus_grpc.errors import InvalidRequestError

_MAX_NESTING = 64
# Far from anything that conversations hold.
_FIRST_STAND_IN = 7_310_992_644_018_523_001
# Mistral's templates refuse call ids of another form than their own servers make.
_SHORT_CALL_IDS = re.compile(r"length\s*!=\s*9")


def check_texts(messages: Sequence[Message]) -> None:
    """Refuses texts that no tokenizer can encode, before a template mixes them.

    Raises:
        InvalidRequestError: A text holds an unpaired surrogate; names the text.
    """
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
            if not is_encodable(text):
                raise InvalidRequestError("The text holds an unpaired surrogate.", field=f"{path}.{field}")


class Numbers:
    """Keeps the form of numbers that Python would write otherwise, such as 1.50 and 1e5.

    Such a number goes through the template as an integer that stands for it, and what the template
    wrote is given the number's own form again.
    """

    def __init__(self) -> None:
        self._forms: dict[str, str] = {}

    def parse(self, literal: str) -> float:
        """A number that is no integer, from its JSON text."""
        number = float(literal)
        if repr(number) == literal:
            return number
        stand_in = _FIRST_STAND_IN + len(self._forms)
        self._forms[str(stand_in)] = literal
        return stand_in

    def restore(self, rendered: str) -> str:
        """What a template wrote, with the numbers in their own form."""
        for stand_in, literal in self._forms.items():
            rendered = rendered.replace(stand_in, literal)
        return rendered


def template_turns(
    messages: Sequence[Message],
    template: str,
    *,
    as_objects: bool,
    numbers: Numbers | None = None,
    as_parts: bool = False,
) -> list[JSON]:
    """The messages as templates expect them: dicts in the form of OpenAI's API.

    Args:
        messages: The conversation.
        template: The text of the template.
        as_objects: Whether arguments of calls are objects, where they can be, or JSON text.
        numbers: Keeps the form of numbers in objects.
        as_parts: Whether all contents are lists, or only those with images.
    """
    numbers = numbers or Numbers()
    developer = Role.DEVELOPER if "developer" in template else Role.SYSTEM
    shortens_ids = bool(_SHORT_CALL_IDS.search(template))
    called = {call.id: call.name for message in messages for call in message.tool_calls}
    turns: list[JSON] = []
    for message in messages:
        role = developer if message.role is Role.DEVELOPER else message.role
        turn = _turn(message, role, called.get(message.tool_call_id, ""), shortens_ids=shortens_ids)
        if message.tool_calls:
            turn["tool_calls"] = [
                _call(call, numbers if as_objects else None, shortens_ids=shortens_ids)
                for call in message.tool_calls
            ]
        if as_parts or message.images:
            turn["content"] = parts_of(message)
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


def _call(call: ToolCall, numbers: Numbers | None, *, shortens_ids: bool) -> dict[str, JSON]:
    arguments: JSON = call.arguments_json.strip() or "{}"
    if numbers is not None:
        arguments = _call_arguments(call.arguments_json, numbers)
    return {
        "id": _call_id(call.id, shortens_ids),
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _call_id(call_id: str, shortens: bool) -> str:
    if not shortens or (len(call_id) == 9 and call_id.isalnum()):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _call_arguments(arguments_json: str, numbers: Numbers) -> JSON:
    """The arguments as an object, or the text as it is where it is none that JSON can hold."""
    if not arguments_json.strip():
        return {}
    try:
        arguments = json.loads(arguments_json, parse_constant=_refuse, parse_float=numbers.parse)
        is_sound = (
            isinstance(arguments, dict)
            and not is_deep(arguments)
            and is_encodable(json.dumps(arguments, ensure_ascii=False))
        )
    except (ValueError, RecursionError):
        return arguments_json
    return arguments if is_sound else arguments_json


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def is_encodable(text: str) -> bool:
    """Whether the text is Unicode that UTF-8 can hold."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_deep(value: JSON, levels: int = _MAX_NESTING) -> bool:
    """Whether lists and objects are nested deeper than transformers' recursion can be trusted with."""
    if isinstance(value, str) or not isinstance(value, Mapping | Sequence):
        return False
    items = value.values() if isinstance(value, Mapping) else value
    return levels == 0 or any(is_deep(item, levels - 1) for item in items)
