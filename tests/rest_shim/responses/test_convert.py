from __future__ import annotations

import base64
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.v1 import chat_pb2, sampling_pb2
from rest_shim.bodies import validate
from rest_shim.errors import Refusal
from rest_shim.responses import convert
from rest_shim.responses.conversation import HISTORY, Conversation, conversation
from rest_shim.responses.items import STORED_ITEMS, Ids, listed
from rest_shim.responses.schema import ResponseBody

PNG = b"\x89PNG\r\n\x1a\n data"
PNG_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}}
OTHER = {"type": "function", "name": "get_time"}
SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}


def body(**fields: object) -> ResponseBody:
    return validate(ResponseBody, {"model": "m", "input": "Hello", **fields})


def talk(given: object, history: list[object] | None = None, **fields: object) -> Conversation:
    earlier = STORED_ITEMS.validate_python(history or [])
    return conversation(body(input=given, **fields), earlier, {item.id: item for item in earlier})


def request(**fields: object) -> chat_pb2.ChatRequest:
    made = body(**fields)
    convert.check(made)
    return convert.chat_request(made, conversation(made, (), {}))


def message(role: str, *texts: str, **fields: object) -> chat_pb2.Message:
    return chat_pb2.Message(
        role=chat_pb2.Role.Value(f"ROLE_{role.upper()}"),
        content=[chat_pb2.ContentPart(text=text) for text in texts],
        **fields,  # type: ignore[arg-type]  # a test's keywords
    )


def call(call_id: str, name: str, arguments: str) -> chat_pb2.ToolCall:
    return chat_pb2.ToolCall(id=call_id, function=chat_pb2.FunctionCall(name=name, arguments_json=arguments))


def test_a_plain_request_leaves_every_setting_to_the_core() -> None:
    assert request() == chat_pb2.ChatRequest(
        model="m", messages=[message("user", "Hello")], sampling=sampling_pb2.SamplingParams()
    )
    assert request(model=None).model == ""


def test_settings() -> None:
    made = request(
        temperature=0, top_p=0.5, max_output_tokens=7, seed=3, parallel_tool_calls=False, tools=[TOOL],
        reasoning={"effort": "low"}, instructions="Be brief.", metadata={"a": "b"}, user="u",
        service_tier="auto", store=False, safety_identifier="s", prompt_cache_key="k", top_logprobs=2,
    )  # fmt: skip
    assert made.messages[0] == message("system", "Be brief.")
    assert made.sampling == sampling_pb2.SamplingParams(
        temperature=0, top_p=0.5, max_tokens=7, seed=3, top_logprobs=2
    )
    assert made.HasField("parallel_tool_calls")
    assert not made.parallel_tool_calls
    assert made.reasoning_effort == "low"
    assert made.tools == [
        chat_pb2.Tool(function=chat_pb2.FunctionTool(name="get_weather", parameters_json='{"type":"object"}'))
    ]
    assert request(include=["message.output_text.logprobs"]).sampling.HasField("top_logprobs")
    assert not request(include=["reasoning.encrypted_content"]).sampling.HasField("top_logprobs")
    off = request(reasoning={"effort": "none"})
    assert off.HasField("reasoning_enabled")
    assert not off.reasoning_enabled


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"type": "text"}, {}),
        ({"type": "json_object"}, {"json_object": chat_pb2.JsonObjectFormat()}),
        (
            {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True, "description": "d"},
            {
                "json_schema": chat_pb2.JsonSchemaFormat(
                    name="n", schema_json='{"type":"object","properties":{"b":{},"a":{}}}', strict=True
                )
            },
        ),
    ],
)
def test_formats(form: dict[str, object], expected: dict[str, object]) -> None:
    assert request(text={"format": form, "verbosity": "low"}).response_format == chat_pb2.ResponseFormat(
        **expected  # type: ignore[arg-type]  # a table
    )


@pytest.mark.parametrize(
    ("choice", "mode", "name", "offered"),
    [
        ("auto", "AUTO", "", 2),
        ("none", "NONE", "", 2),
        ("required", "REQUIRED", "", 2),
        ({"type": "function", "name": "get_time"}, "FUNCTION", "get_time", 2),
        ({"type": "allowed_tools", "mode": "required", "tools": [TOOL]}, "REQUIRED", "", 1),
        ({"type": "allowed_tools", "tools": [OTHER]}, "AUTO", "", 1),
    ],
)
def test_tool_choices(choice: object, mode: str, name: str, offered: int) -> None:
    made = request(tools=[TOOL, OTHER], tool_choice=choice)
    assert made.tool_choice.mode == chat_pb2.ToolChoiceMode.Value(f"TOOL_CHOICE_MODE_{mode}")
    assert made.tool_choice.function_name == name
    assert len(made.tools) == offered


class TestConversations:
    def test_messages_in_both_forms(self) -> None:
        made = talk(
            [
                {"role": "developer", "content": "Be brief."},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {
                    "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                    "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}],
                },
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                {"role": "user", "content": [
                    {"type": "input_text", "text": "c"}, {"type": "input_image", "image_url": PNG_URL}
                ]},
            ]
        )  # fmt: skip
        last = message("user", "c")
        last.content.add().image.CopyFrom(chat_pb2.ImageContent(data=PNG, mime_type="image/png"))
        assert made.messages == [
            message("developer", "Be brief."),
            message("user", "a"),
            message("assistant", "b"),
            message("assistant", "no"),
            last,
        ]

    def test_reasoning_text_and_calls_are_one_turn(self) -> None:
        made = talk(
            [
                {"role": "user", "content": "a"},
                {"type": "reasoning", "id": "rs_1", "summary": [],
                 "content": [{"type": "reasoning_text", "text": "hm"}], "encrypted_content": None},
                {"role": "assistant", "content": "b"},
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
                {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "one"},
                {"type": "function_call_output", "call_id": "c2", "output": ""},
                {"type": "function_call", "call_id": "c3", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c3",
                 "output": [{"type": "input_text", "text": "three"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "in short"}]},
                {"role": "assistant", "content": "d"},
                {"role": "assistant", "content": "e"},
            ]
        )  # fmt: skip
        calls = [call("c1", "f", '{"x": 1}'), call("c2", "g", "{}")]
        assert made.messages == [
            message("user", "a"),
            message("assistant", "b", reasoning="hm", tool_calls=calls),
            message("tool", "one", tool_call_id="c1"),
            message("tool", "", tool_call_id="c2"),
            message("assistant", tool_calls=[call("c3", "f", "{}")]),
            message("tool", "three", tool_call_id="c3"),
            message("assistant", "d", reasoning="in short"),
            message("assistant", "e"),
        ]
        assert [origin[""] for origin in made.origins[:4]] == ["input[0]", "input[1]", "input[5]", "input[6]"]
        assert made.json_path("messages[1].content[0].image") == "input[2].content[0].image_url"
        assert made.json_path("messages[1].tool_calls[1].function.name") == "input[4].name"
        assert made.json_path("messages[1].tool_calls[0].function.arguments_json") == "input[3].arguments"
        assert made.json_path("messages[3].tool_call_id") == "input[6].call_id"
        assert made.json_path("messages[5].content") == "input[8].output"

    def test_reasoning_that_led_to_nothing_is_dropped(self) -> None:
        thought = {"type": "reasoning", "summary": [], "content": [{"type": "text", "text": "hm"}]}
        made = talk([{"role": "user", "content": "a"}, thought, {"role": "user", "content": "b"}])
        assert made.messages == [message("user", "a"), message("user", "b")]

    def test_history_comes_first_and_instructions_before_it(self) -> None:
        earlier: list[object] = [
            {"type": "message", "id": "msg_1", "role": "user", "content": "a"},
            {"type": "message", "id": "msg_2", "role": "assistant", "content": "b"},
        ]
        made = talk("c", earlier, instructions="Be brief.")
        assert [one.content[0].text for one in made.messages] == ["Be brief.", "a", "b", "c"]
        assert [origin[""] for origin in made.origins] == ["instructions", HISTORY, HISTORY, "input[0]"]

    def test_a_reference_stands_for_its_item(self) -> None:
        earlier: list[object] = [{"type": "message", "id": "msg_1", "role": "user", "content": "a"}]
        for reference in ({"type": "item_reference", "id": "msg_1"}, {"id": "msg_1"}):
            assert talk([reference], earlier).messages == [message("user", "a")] * 2
        with pytest.raises(Refusal) as caught:
            talk([{"role": "user", "content": "x"}, {"type": "item_reference", "id": "msg_9"}], earlier)
        assert (caught.value.status, caught.value.param) == (400, "input[1].id")

    @pytest.mark.parametrize(
        ("field", "param"),
        [
            ("messages", "input"),
            ("messages[0].content", "instructions"),
            ("messages[1].content", "previous_response_id"),
            ("messages[2].content[1].image", "input[0].content[1].image_url"),
            ("messages[99]", "input"),
            ("sampling.max_tokens", "max_output_tokens"),
            ("sampling.temperature", "temperature"),
            ("tools[2].function.parameters_json", "tools[2].parameters"),
            ("tool_choice.function_name", "tool_choice.name"),
            ("response_format.json_schema.schema_json", "text.format.schema"),
            ("response_format.json_object", "text.format.json_object"),
            ("response_format", "text.format"),
            ("reasoning_effort", "reasoning.effort"),
            ("chat_template_kwargs_json", "chat_template_kwargs"),
            ("chat.model", "model"),
        ],
    )
    def test_field_names_of_the_core(self, field: str, param: str) -> None:
        earlier: list[object] = [{"type": "message", "id": "msg_1", "role": "user", "content": "a"}]
        assert talk("b", earlier, instructions="c").json_path(field) == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 1}, "model"),
        ({"input": []}, "input"),
        ({"input": 1}, "input"),
        ({"input": {"role": "user"}}, "input"),
        ({"input": [1]}, "input[0]"),
        ({"input": [{}]}, "input[0]"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type"),
        ({"input": [{"type": []}]}, "input[0].type"),
        ({"input": [{"role": "alien", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": 1}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y"}]}]},
            "input[0].content[0].image_url",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": [OTHER]}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"truncation": "sometimes"}, "truncation"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(index): "" for index in range(17)}}, "metadata"),
        ({"metadata": {"a" * 65: "b"}}, "metadata." + "a" * 64 + "..."),
        ({"metadata": {"a": "b" * 513}}, "metadata.a"),
        ({"include": ["message.output_text.logprobs", "everything"]}, "include[1]"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"previous_response_id": 1}, "previous_response_id"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, object], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        request(**fields)
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")
    assert caught.value.param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["message", "user", "reasoning"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "id", "output", "call_id", "summary", "text"]), inner
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_input_gives_a_request_or_a_refusal(given: object) -> None:
    # Any other exception is a server error.
    with contextlib.suppress(Refusal):
        assert request(input=given).messages


def test_what_is_stored_reads_back_as_the_same_conversation() -> None:
    given: list[object] = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "b"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c1", "output": []},
        {"role": "user", "content": [{"type": "input_image", "image_url": PNG_URL}]},
    ]
    stored = list(listed(body(input=given).input or (), Ids()))
    assert all(str(item["id"]).split("_")[0] in {"msg", "fc", "rs"} for item in stored)
    assert talk("end", list(stored)).messages == talk([*given, {"role": "user", "content": "end"}]).messages
