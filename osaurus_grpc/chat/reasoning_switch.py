"""How templates are told whether to let the model reason, and how hard.

There is no common way. Most read a variable; which one, and which values it may have, is found in the
template's text. Nemotron Nano 2's reads a word in the system message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from osaurus_grpc.chat.types import JSON, Message, Role

# From none to as much as can be; templates know some of them.
_LEVELS: Final = ("none", "no_think", "minimal", "low", "medium", "high", "xhigh", "max")
_OFF: Final = frozenset({"none", "no_think"})
# A template that refuses other values lists those it takes.
_LISTED: Final = r"\b{name} not in \[([^\]]*)\]"
# A variable, and no attribute, key, argument or part of another name.
_VARIABLE: Final = r"(?<![.\w\"'(]){name}\b(?![\w\"'])"
_NO_THINK: Final = "/no_think"


def reasoning_variables(template: str, effort: str, enabled: bool | None) -> dict[str, JSON]:
    """Variables by the names that templates use.

    `enable_thinking` is Qwen's, GLM's and SmolLM's; `thinking` DeepSeek's, Granite's and Kimi's;
    `reasoning_effort` gpt-oss's. Others are set for the templates only that read them.

    Args:
        template: The text of the template.
        effort: How hard to reason, by any API's word for it; "" leaves it to the template.
        enabled: Whether to reason; None leaves it to the effort, or to the template.
    """
    if enabled is None and effort:
        enabled = effort != "none"
    variables: dict[str, JSON] = {}
    if enabled is not None:
        variables = {"enable_thinking": enabled, "thinking": enabled}
        variables |= _family_switches(template, enabled)
    for name in ("reasoning_effort", "thinking_effort", "reasoning_strength"):
        if name == "reasoning_effort" or name in template:
            level = _level(template, name, effort, enabled)
            if level:
                variables[name] = level
    return variables


def _family_switches(template: str, enabled: bool) -> dict[str, JSON]:
    found: dict[str, JSON] = {}
    if "thinking_mode is defined" in template and '"disabled"' in template:  # MiniMax M3
        found["thinking_mode"] = "enabled" if enabled else "disabled"
    if not enabled and "thinking_budget" in template:  # Seed-OSS
        found["thinking_budget"] = 0
    if re.search(r"\breasoning is (?:not )?undefined", template):  # Command A+
        found["reasoning"] = enabled
    return found


def _level(template: str, name: str, effort: str, enabled: bool | None) -> str:
    """The value of a variable that says how hard to reason, "" to leave it to the template."""
    listed = re.search(_LISTED.format(name=name), template)
    known = re.findall(r"[\w-]+", listed[1]) if listed else []
    if enabled is False and effort in ("", "none"):
        off = next((level for level in known if level in _OFF), "")
        has_switch = any(_reads(template, switch) for switch in ("enable_thinking", "thinking"))
        if off or has_switch or name not in template:
            return off
        effort = "minimal"
    if not effort and enabled and _OFF & set(known):
        # It does not reason unless it is told how hard.
        effort = "high"
    if known and effort:
        return _nearest(effort, [level for level in known if level not in _OFF])
    if effort == "minimal" and "minimal" not in template:
        return "low"
    return "" if effort == "none" else effort


def _nearest(effort: str, known: Sequence[str]) -> str:
    """The known level that is as hard or the next harder one, else the hardest."""
    if effort not in _LEVELS:
        return effort
    ranked = sorted((level for level in known if level in _LEVELS), key=_LEVELS.index)
    harder = (level for level in ranked if _LEVELS.index(level) >= _LEVELS.index(effort))
    return next(harder, ranked[-1] if ranked else effort)


def _reads(template: str, name: str) -> bool:
    return re.search(_VARIABLE.format(name=name), template) is not None


def switched(messages: Sequence[Message], template: str, variables: dict[str, JSON]) -> Sequence[Message]:
    """The conversation with a word that turns reasoning off, for templates that read that and no variable.

    Args:
        messages: As they came.
        template: The text of the template.
        variables: What reasoning_variables() gave.
    """
    if variables.get("enable_thinking") is not False or _NO_THINK not in template:
        return messages
    if _reads(template, "enable_thinking"):
        return messages
    first = messages[0]
    if first.role in (Role.SYSTEM, Role.DEVELOPER):
        return [replace(first, content=f"{first.content} {_NO_THINK}".strip()), *messages[1:]]
    return [Message(Role.SYSTEM, _NO_THINK), *messages]
