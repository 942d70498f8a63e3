"""Conversations with tools, for templates that show them and for those that would lose them."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.abilities import Abilities
from osaurus_grpc.chat.calls import families
from osaurus_grpc.chat.calls.writer import write_calls
from osaurus_grpc.chat.replay import Replay, matched, replayed
from osaurus_grpc.chat.template import apply_template
from osaurus_grpc.chat.turns import Numbers
from osaurus_grpc.chat.types import Message, Role, ToolCall, ToolSpec

ALL = Abilities(tools=True, calls=True, results=True, many_calls=True, system=True)
NONE = Abilities(tools=False, calls=False, results=False, many_calls=False, system=True)
PARIS = ToolCall("a", "weather", '{"city": "Paris"}')
ROME = ToolCall("b", "weather", '{"city": "Rome"}')
TOOL = ToolSpec("weather", "", '{"type": "object", "properties": {"city": {"type": "string"}}}')
ASK = Message(Role.USER, "Weather?")
CALLING = Message(Role.ASSISTANT, "", tool_calls=(PARIS, ROME))
SUN = Message(Role.TOOL, "sun", tool_call_id="a")
RAIN = Message(Role.TOOL, "rain", tool_call_id="b")
THANKS = Message(Role.USER, "Thanks.")


def replay(*messages: Message, abilities: Abilities = ALL, tools: tuple[ToolSpec, ...] = ()) -> Replay:
    return replayed(messages, tools, abilities, families.HERMES)


def texts(found: Replay) -> list[tuple[str, str]]:
    return [(str(message.role), message.content) for message in found.messages]


def test_a_template_that_shows_everything_gets_it_as_it_came() -> None:
    found = replay(ASK, CALLING, SUN, RAIN, tools=(TOOL,))
    assert [turn.tool_calls for turn in found.messages] == [(), (PARIS, ROME), (), ()]
    assert texts(found)[2:] == [("tool", "sun"), ("tool", "rain")]
    assert [tool["function"]["name"] for tool in found.tools] == ["weather"]  # type: ignore[index, call-overload]


def test_results_without_ids_answer_the_first_open_call_of_their_name() -> None:
    calls = (ToolCall("", "a", "{}"), ToolCall("", "b", "{}"), ToolCall("", "a", "{}"))
    turns = [
        Message(Role.ASSISTANT, "", tool_calls=calls),
        Message(Role.TOOL, "of b", name="b"),
        Message(Role.TOOL, "of the first a", name="a"),
        Message(Role.TOOL, "of the other a"),
    ]
    calling, *results = matched(turns)
    ids = [call.id for call in calling.tool_calls]
    assert len(set(ids)) == 3
    assert all(ids)
    assert [result.tool_call_id for result in results] == [ids[1], ids[0], ids[2]]
    assert [result.name for result in results] == ["b", "a", "a"]


def test_results_in_another_order_keep_their_ids() -> None:
    _, first, second = matched([CALLING, RAIN, SUN])
    assert [(turn.tool_call_id, turn.content) for turn in (first, second)] == [("b", "rain"), ("a", "sun")]


def test_several_calls_of_a_turn_as_several_turns() -> None:
    one = Abilities(tools=True, calls=True, results=True, many_calls=False, system=True)
    calling = Message(Role.ASSISTANT, "I look.", tool_calls=(PARIS, ROME))
    found = replay(ASK, calling, RAIN, SUN, THANKS, abilities=one)
    assert [(turn.content, [call.id for call in turn.tool_calls]) for turn in found.messages] == [
        ("Weather?", []),
        ("I look.", ["a"]),
        ("sun", []),
        ("", ["b"]),
        ("rain", []),
        ("Thanks.", []),
    ]


def test_a_template_that_knows_of_no_tools() -> None:
    found = replay(ASK, CALLING, SUN, RAIN, THANKS, abilities=NONE, tools=(TOOL,))
    (system, instructions), _, (assistant, calls), (user, results) = texts(found)
    assert (system, assistant, user) == ("system", "assistant", "user")
    assert json.dumps(json.loads(TOOL.parameters_json)) in instructions
    assert calls == str(write_calls(families.HERMES, [PARIS, ROME]))
    assert results.index("sun") < results.index("rain") < results.index("Thanks.")
    assert found.tools == []


def test_a_template_whose_syntax_is_not_known_shows_the_one_asked_for() -> None:
    found = replayed([ASK, CALLING, SUN, RAIN], [TOOL], ALL, families.FALLBACK)
    assert not any(turn.tool_calls for turn in found.messages)
    assert [role for role, _ in texts(found)] == ["system", "user", "assistant", "user"]
    assert str(write_calls(families.FALLBACK, [PARIS, ROME])) in texts(found)[2][1]
    assert found.tools == []


def test_instructions_follow_what_the_system_message_says() -> None:
    (_, content), _ = texts(replay(Message(Role.SYSTEM, "Be brief."), ASK, abilities=NONE, tools=(TOOL,)))
    assert content.startswith("Be brief.\n\nYou can call functions.")


def test_results_at_the_end_are_a_turn_of_their_own() -> None:
    *_, (role, content) = texts(replay(ASK, CALLING, SUN, RAIN, abilities=NONE))
    assert role == "user"
    assert [content.count(result) for result in ("sun", "rain")] == [1, 1]


def test_a_system_message_where_the_template_refuses_one() -> None:
    without = Abilities(tools=True, calls=True, results=True, many_calls=True, system=False)
    assert texts(replay(Message(Role.SYSTEM, "Be brief."), ASK, abilities=without)) == [
        ("user", "Be brief.\n\nWeather?")
    ]


def test_arguments_get_a_description_where_the_template_needs_one() -> None:
    strict = Abilities(True, True, True, True, True, undescribed=False)
    (tool,) = replay(ASK, abilities=strict, tools=(TOOL,)).tools
    assert tool["function"]["parameters"]["properties"] == {  # type: ignore[index, call-overload]
        "city": {"type": "string", "description": ""}
    }


DIGITS = st.integers(0, 10**20).map(str)
NUMBERS = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", "-"]),
        DIGITS,
        st.sampled_from(["", ".0", ".50", ".125"]),
        st.sampled_from(["", "e5", "E+2", "e-07", "e300"]),
    ),
)
TURNS = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ CALL }}{% endfor %}{% endfor %}"
OBJECTS = TURNS.replace("CALL", "c.function.arguments | tojson")
TEXTS = TURNS.replace("CALL", "'' + c.function.arguments")


@given(literals=st.lists(NUMBERS, min_size=1, max_size=5))
def test_numbers_keep_their_form(literals: list[str]) -> None:
    numbers = Numbers()
    text = f"[{', '.join(literals)}]"
    loaded = json.loads(text, parse_float=numbers.parse)
    written = numbers.restore(json.dumps(loaded))
    # Python's own form of an integer is JSON's but for the sign of nought.
    assert written.replace("-0,", "0,").replace("-0]", "0]") == text.replace("-0,", "0,").replace("-0]", "0]")


@pytest.mark.parametrize("template", [OBJECTS, TEXTS], ids=["objects", "texts"])
@pytest.mark.parametrize(
    "arguments",
    [
        '{"z": 1, "a": {"y": 2, "b": 3}}',
        '{"n": 123456789012345678}',
        '{"n": [1e5, 1.0, 1.50, -0.0, 1E+2, 123456789012345678.25]}',
        '{"é": "ü\\n", "null": null, "t": [true, false]}',
        "{}",
    ],
)
def test_arguments_keep_their_order_and_forms(
    tokenizer: PreTrainedTokenizerBase, template: str, arguments: str
) -> None:
    other = copy.copy(tokenizer)
    other.chat_template = template
    calling = Message(Role.ASSISTANT, "", tool_calls=(ToolCall("a", "f", arguments),))
    messages = [ASK, calling, Message(Role.TOOL, "x", tool_call_id="a")]
    assert apply_template(other, messages).plain_text.strip() == arguments


@pytest.mark.parametrize(
    ("syntax", "expected"),
    [
        (families.QWEN3_CODER, "<parameter=b>\n1.50\n</parameter>\n<parameter=a>\n[1e5, 1.0]\n</parameter>"),
        (families.LFM2, "[f(b=1.50, a=[1e5, 1.0])]"),
        (families.HERMES, '{"b": 1.50, "a": [1e5, 1.0]}'),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_calls_as_text_keep_their_order_and_forms(syntax: families.CallSyntax, expected: str) -> None:
    call = ToolCall("a", "f", '{"b": 1.50, "a": [1e5, 1.0]}')
    assert expected in write_calls(syntax, [call])
