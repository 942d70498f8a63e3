"""What templates show of tools, found out by trying them."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.abilities import Abilities, abilities_of

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
CALLS = """{% for c in m.tool_calls or [] %}{{ c.function.name }}
{%- for k, v in c.function.arguments.items() %}{{ k }}{{ v }}{% endfor %}{% endfor %}"""
FIRST_CALL = "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments }}{% endif %}"
ONE_CALL = """{% if m.tool_calls and m.tool_calls|length > 1 %}{{ raise_exception('One call.') }}{% endif %}
{%- if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}"""
TOOLS = "{{ tools | tojson if tools }}"
DESCRIBED = """{% for t in tools or [] %}{{ t.function.name }}
{%- for k, v in t.function.parameters.properties.items() %}{{ k + v.description }}{% endfor %}{% endfor %}"""
END = "{% endfor %}"
NO_SYSTEM = """{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}"""


def abilities(tokenizer: PreTrainedTokenizerBase, template: str) -> Abilities:
    other = copy.copy(tokenizer)
    return abilities_of(other, template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURNS + END, Abilities(False, False, True, False, True)),
        (TOOLS + TURNS + CALLS + END, Abilities(True, True, True, True, True)),
        (TOOLS + TURNS + FIRST_CALL + END, Abilities(True, True, True, False, True)),
        (TOOLS + TURNS + ONE_CALL + END, Abilities(True, True, True, False, True)),
        (NO_SYSTEM + TURNS + END, Abilities(False, False, True, False, False)),
        (DESCRIBED + TURNS + CALLS + END, Abilities(True, True, True, True, True, undescribed=False)),
        ("{{ tools[0].name + messages[0].content }}", Abilities(False, False, True, True, True)),
        ("{{ nothing.at.all }}", Abilities(False, False, True, True, True)),
    ],
    ids=["plain", "whole", "first call", "one call", "no system", "described", "own tools", "broken"],
)
def test_abilities(tokenizer: PreTrainedTokenizerBase, template: str, expected: Abilities) -> None:
    assert abilities(tokenizer, template) == expected


def test_a_template_for_tools_that_takes_none_is_tried_with_them(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + TURNS + CALLS + END
    assert abilities(tokenizer, template) == Abilities(True, True, True, True, True)


def test_two_templates_of_one_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    other = copy.copy(tokenizer)
    for _ in range(2):
        assert abilities_of(other, TURNS + END).tools is False
        assert abilities_of(other, TOOLS + TURNS + END).tools is True
