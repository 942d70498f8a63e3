"""How templates are told to reason: the variables that each reads, with the values that it takes."""

from __future__ import annotations

import pytest

from osaurus_grpc.chat.reasoning_switch import reasoning_variables, switched
from osaurus_grpc.chat.types import JSON, Message, Role

HUNYUAN = "{% if reasoning_effort not in ['high', 'low', 'no_think'] %}{{ raise_exception('') }}{% endif %}"
KIMI_3 = "{% if thinking and thinking_effort not in ['low', 'high', 'max'] %}{% endif %}"
HARMONY = "{% if reasoning_effort is not defined %}{% endif %}{{ message.thinking }}"
SEED = "{% if thinking_budget == 0 %}{% endif %}"
MINIMAX_3 = '{% if thinking_mode is defined and thinking_mode == "disabled" %}{% endif %}'
NEMOTRON = "{% set ns = namespace(enable_thinking=true) %}{% if '/no_think' in m.content %}{% endif %}"


@pytest.mark.parametrize(
    ("template", "effort", "enabled", "expected"),
    [
        (HUNYUAN, "", True, {"reasoning_effort": "high"}),
        (HUNYUAN, "", False, {"reasoning_effort": "no_think"}),
        (HUNYUAN, "none", None, {"reasoning_effort": "no_think"}),
        (HUNYUAN, "minimal", None, {"reasoning_effort": "low"}),
        (HUNYUAN, "medium", None, {"reasoning_effort": "high"}),
        (KIMI_3, "medium", None, {"thinking_effort": "high", "reasoning_effort": "medium"}),
        (KIMI_3, "max", None, {"thinking_effort": "max", "reasoning_effort": "max"}),
        (KIMI_3, "", False, {}),
        (HARMONY, "high", None, {"reasoning_effort": "high"}),
        (HARMONY, "none", None, {"reasoning_effort": "low"}),
        (SEED, "", False, {"thinking_budget": 0}),
        (SEED, "", True, {}),
        (MINIMAX_3, "", False, {"thinking_mode": "disabled"}),
        (MINIMAX_3, "low", None, {"thinking_mode": "enabled", "reasoning_effort": "low"}),
        ("", "", None, {}),
    ],
)
def test_variables(template: str, effort: str, enabled: bool | None, expected: dict[str, JSON]) -> None:
    found = reasoning_variables(template, effort, enabled)
    is_on = enabled if enabled is not None else effort != "none" if effort else None
    common = {} if is_on is None else {"enable_thinking": is_on, "thinking": is_on}
    assert found == common | expected


def test_a_word_in_the_system_message() -> None:
    ask = Message(Role.USER, "Hi")
    off = reasoning_variables(NEMOTRON, "", False)
    assert [turn.content for turn in switched([ask], NEMOTRON, off)] == ["/no_think", "Hi"]
    system = Message(Role.SYSTEM, "Be brief.")
    assert switched([system, ask], NEMOTRON, off)[0].content == "Be brief. /no_think"
    assert switched([ask], NEMOTRON, reasoning_variables(NEMOTRON, "", True)) == [ask]
    both = NEMOTRON + "{% if enable_thinking is defined %}{% endif %}"
    assert switched([ask], both, off) == [ask]
