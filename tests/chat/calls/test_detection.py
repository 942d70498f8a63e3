"""Which syntax a template asks for, where no package brings the template of a family."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.calls import families
from osaurus_grpc.chat.calls.families import detect
from osaurus_grpc.chat.template import apply_template, chat_style
from osaurus_grpc.chat.types import Message, Role, ToolCall, ToolSpec

# The form in which Llama 4 and Llama 3.2 are asked for calls as in a program, and what templates that do
# show of earlier ones: strings without quotes.
PYTHONIC_TEMPLATE = """\
{%- if tools %}System: answer with calls: [func_name1(param1=value1), func_name2(...)]
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
{%- endif %}
{%- for message in messages %}
<{{ message.role }}>
{%- if message.tool_calls %}[
{%- for call in message.tool_calls %}{{ call.function.name }}(
{%- for name in call.function.arguments %}{{ name }}={{ call.function.arguments[name] }}{% endfor -%}
){% endfor %}]
{%- else %}{{ message.content }}{% endif %}
{%- endfor %}"""
LLAMA_TEMPLATE = """{{- '{"name": function name, "parameters": dictionary}' }}<|python_start|>"""


@pytest.fixture
def pythonic(tokenizer: PreTrainedTokenizerBase) -> Iterator[PreTrainedTokenizerBase]:
    template = tokenizer.chat_template
    tokenizer.chat_template = PYTHONIC_TEMPLATE
    yield tokenizer
    tokenizer.chat_template = template


def test_the_form_that_the_template_asks_for(tokenizer: PreTrainedTokenizerBase) -> None:
    assert detect(tokenizer, PYTHONIC_TEMPLATE) is families.PYTHONIC
    assert detect(tokenizer, LLAMA_TEMPLATE) is families.LLAMA
    # Unsloth's template has the mark of Functionary's, for something else.
    assert detect(tokenizer, "{{ '>>> User: ' + message['content'] }}") is families.FALLBACK


def test_earlier_calls_have_their_quotes(pythonic: PreTrainedTokenizerBase) -> None:
    tool = ToolSpec("f", parameters_json=json.dumps({"properties": {"a": {"type": "string"}}}))
    turns = [
        Message(Role.USER, "Do."),
        Message(Role.ASSISTANT, "", tool_calls=(ToolCall("1", "f", '{"a": "x \\"y\\"", "n": 1.50}'),)),
        Message(Role.TOOL, "Done.", tool_call_id="1"),
    ]
    text = apply_template(pythonic, turns, tools=[tool]).plain_text

    assert chat_style(pythonic, with_tools=True).syntax is families.PYTHONIC
    assert '<assistant>[f(a="x \\"y\\"", n=1.50)]' in text
    assert "<tool>Done." in text
