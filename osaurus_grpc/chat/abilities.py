"""What a chat template can show of tools, found out by rendering small conversations with it.

Templates differ in whether they show tools to the model at all, and many of those that do lose the
calls or the results of earlier turns. Reading a template does not tell; trying it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

from osaurus_grpc.chat.types import JSON

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

_TOOL = "probe_tool"
_ASKED = "probe_question"
_VALUE = "probe_value"
_OTHER_VALUE = "probe_other_value"
_RESULT = "probe_result"
_OTHER_RESULT = "probe_other_result"
_SYSTEM = "probe_system"


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a template shows.

    Attributes:
        tools: The tools of a request.
        calls: The calls of an assistant's turn.
        results: The results of calls.
        many_calls: Several calls in one turn.
        system: A system message.
        undescribed: Tools whose arguments have no description.
    """

    tools: bool
    calls: bool
    results: bool
    many_calls: bool
    system: bool
    undescribed: bool = True


# By tokenizer and template: a model may have one template for conversations with tools and one without.
_known: WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, Abilities]] = WeakKeyDictionary()


def abilities_of(tokenizer: PreTrainedTokenizerBase, template: str) -> Abilities:
    """What a template shows; found out once for a tokenizer, in some milliseconds."""
    known = _known.setdefault(tokenizer, {})
    if template not in known:
        known[template] = _probe(tokenizer, template)
    return known[template]


def _probe(tokenizer: PreTrainedTokenizerBase, template: str) -> Abilities:
    apply_chat_template = cast("Callable[..., str]", tokenizer.apply_chat_template)

    def shows(messages: Sequence[JSON], *texts: str, with_tools: bool = True, tool: JSON = None) -> bool:
        tools = {"tools": [tool or _tool()]} if with_tools else {}
        try:
            rendered = apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True, **tools
            )
        except Exception:  # noqa: BLE001  a template is a program: it can raise anything
            return False
        return all(text in rendered for text in texts)

    def shows_calls(values: Sequence[str], results: Sequence[str], *texts: str) -> bool:
        return any(
            shows(_conversation(values, results, as_objects=as_objects), *texts)
            for as_objects in (True, False)
        )

    ask: JSON = {"role": "user", "content": _ASKED}
    if not shows([ask], _ASKED, with_tools=False) and not shows([ask], _ASKED):
        # It does not do what templates do, so that trying tells nothing, unless it fails on tools.
        has_calls = "tool_calls" in template
        has_tools = "tools" in template and shows([ask])
        return Abilities(tools=has_tools, calls=has_calls, results=True, many_calls=True, system=True)
    return Abilities(
        tools=shows([ask], _TOOL, _ASKED),
        calls=shows_calls([_VALUE], [_RESULT], _ASKED, _VALUE),
        results=shows_calls([_VALUE], [_RESULT], _ASKED, _RESULT),
        many_calls=shows_calls([_VALUE, _OTHER_VALUE], [_RESULT, _OTHER_RESULT], _VALUE, _OTHER_VALUE),
        system=any(
            shows([{"role": "system", "content": _SYSTEM}, ask], _SYSTEM, _ASKED, with_tools=with_tools)
            for with_tools in (False, True)
        ),
        # Command R+'s needs a description, Functionary's and others do not.
        undescribed=shows([ask], _TOOL, tool=_tool(key={"type": "string"})) or not shows([ask], _TOOL),
    )


def _tool(**properties: JSON) -> JSON:
    parameters: JSON = {
        "type": "object",
        "properties": properties or {"key": {"type": "string", "description": "d"}},
        "required": ["key"],
    }
    return {"type": "function", "function": {"name": _TOOL, "description": "d", "parameters": parameters}}


def _conversation(values: Sequence[str], results: Sequence[str], *, as_objects: bool) -> list[JSON]:
    ids = [f"abcdefgh{index}" for index in range(len(values))]
    calls: list[JSON] = [
        {
            "id": call_id,
            "type": "function",
            "function": {
                "name": _TOOL,
                "arguments": {"key": value} if as_objects else f'{{"key": "{value}"}}',
            },
        }
        for call_id, value in zip(ids, values, strict=True)
    ]
    turns: list[JSON] = [
        {"role": "user", "content": _ASKED},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    turns += [
        {"role": "tool", "content": result, "name": _TOOL, "tool_call_id": call_id}
        for call_id, result in zip(ids, results, strict=True)
    ]
    return turns
