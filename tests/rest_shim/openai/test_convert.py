from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.v1 import chat_pb2, sampling_pb2, usage_pb2
from rest_shim.bodies import validate
from rest_shim.errors import Refusal
from rest_shim.openai import convert, schema
from rest_shim.openai.sampling import SMALLEST_TOP_P

from ..scripted_core import ID, MODEL, model, response

USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
PNG = b"\x89PNG\r\n\x1a\n data"
PNG_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def request(**fields: object) -> chat_pb2.ChatRequest:
    body = {"model": "m", "messages": [USER], **fields}
    return convert.chat_request(validate(schema.ChatBody, body))


def allowed(name: str, mode: str = "auto") -> dict[str, object]:
    tools = [{"type": "function", "function": {"name": name}}]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def refused(**fields: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        request(**fields)
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")
    return caught.value


def test_a_plain_request_leaves_every_setting_to_the_core() -> None:
    assert request() == chat_pb2.ChatRequest(
        model="m",
        messages=[chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text="Hello")])],
        sampling=sampling_pb2.SamplingParams(),
    )


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 1.5}, {"temperature": 1.5}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_p": 0}, {"top_p": SMALLEST_TOP_P}),
        ({"top_k": 40}, {"top_k": 40}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 3.0}, {"top_k": 3}),
        ({"min_p": 0.25}, {"min_p": 0.25}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
        ({"frequency_penalty": 0}, {"frequency_penalty": 0.0}),
        ({"logit_bias": {"50256": -100, "0": 1}}, {"logit_bias": {50256: -100.0, 0: 1.0}}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -(2**63)}, {"seed": -(2**63)}),
        ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 8}, {"max_tokens": 8}),
        ({"max_tokens": 7, "max_completion_tokens": 8}, {"max_tokens": 8}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop": []}, {}),
        ({"logprobs": True}, {"top_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"top_logprobs": 20}),
        ({"logprobs": False}, {}),
        ({"temperature": None, "stop": None, "seed": None, "logit_bias": None, "max_tokens": None}, {}),
    ],
)
def test_sampling_fields(fields: dict[str, object], sampling: dict[str, object]) -> None:
    assert request(**fields).sampling == sampling_pb2.SamplingParams(**sampling)  # type: ignore[arg-type]  # a table


def test_explicit_zero_is_set_and_absence_is_not() -> None:
    assert request(temperature=0).sampling.HasField("temperature")
    assert not request().sampling.HasField("temperature")
    assert not request().HasField("choice_count")


def test_other_fields() -> None:
    made = request(
        n=2, session_id="s", reasoning_effort="low", chat_template_kwargs={"b": 1, "a": [2]},
        parallel_tool_calls=False,
    )  # fmt: skip
    assert (made.choice_count, made.session_id, made.reasoning_effort) == (2, "s", "low")
    assert made.chat_template_kwargs_json == '{"b":1,"a":[2]}'
    assert made.HasField("parallel_tool_calls")
    assert not made.parallel_tool_calls
    assert request(reasoning_effort="none").HasField("reasoning_enabled")


def test_service_fields_are_ignored() -> None:
    service = {
        "user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "x",
        "prompt_cache_key": "k", "verbosity": "low", "modalities": ["text"], "functions": [], "seed_": 1,
        "function_call": "none", "prompt_cache_retention": "24h", "moderation": {}, "logprobs": None,
        "stream_options": None, "web_search_options": {}, "prediction": None, "audio": None,
    }  # fmt: skip
    assert request(**service) == request()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 1}, "model"),
        ({"model": "x" * 513}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [123]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": 123, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "user", "content": 123}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": {"text": 1}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"min_p": -1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"foo": 0}}, "logit_bias"),
        ({"logit_bias": {"-1": 0}}, "logit_bias"),
        ({"logit_bias": {"²": 0}}, "logit_bias"),
        ({"logit_bias": {"4294967296": 0}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ({"logit_bias": []}, "logit_bias"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": 1}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 0}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": 1}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}},
            "tool_choice.allowed_tools.tools",
        ),
        ({"tools": [TOOL], "tool_choice": allowed("f")}, "tool_choice"),
        ({"tool_choice": allowed("get_weather")}, "tool_choice"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"modalities": ["image"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"messages": [USER, {"role": "function", "content": "x"}]}, "messages[1].name"),
        ({"messages": [{"role": "function", "name": "f"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "refusal": "no"}]}, "messages[0].content"),
        ({"session_id": 1}, "session_id"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_the_field_that_is_wrong_is_named(fields: dict[str, object], param: str) -> None:
    refusal = refused(**fields)
    assert refusal.param == param
    assert param.partition("[")[0].partition(".")[0] in refusal.message


def test_roles_names_and_tool_calls_of_the_history() -> None:
    arguments = '{"z": 1, "a": 12345678901234567890}'
    made = request(
        messages=[
            {"role": "developer", "content": "d"},
            {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "u", "name": "Ada"},
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "reasoning_content": "r",
                "tool_calls": [
                    {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        ]
    ).messages
    assert [chat_pb2.Role.Name(message.role) for message in made] == [
        "ROLE_DEVELOPER", "ROLE_SYSTEM", "ROLE_USER", "ROLE_ASSISTANT", "ROLE_TOOL",
    ]  # fmt: skip
    assert [part.text for part in made[1].content] == ["a", "b"]
    assert made[2].name == "Ada"
    assert not made[3].content
    assert made[3].reasoning == "r"
    assert made[3].tool_calls[0].function.arguments_json == arguments
    assert made[4].tool_call_id == "call_1"


def test_the_older_form_of_calls_and_refusals_of_the_history() -> None:
    made = request(
        messages=[
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "42"},
            {"role": "assistant", "content": None, "refusal": "I will not."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        ]
    ).messages
    (call,) = made[1].tool_calls
    assert (call.function.name, call.function.arguments_json) == ("f", "{}")
    assert (made[2].role, made[2].tool_call_id) == (chat_pb2.ROLE_TOOL, call.id)
    assert [message.content[0].text for message in made[3:]] == ["I will not.", "No."]


def test_of_allowed_tools_the_model_sees_those_only() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    for mode, expected in (("auto", "AUTO"), ("required", "REQUIRED")):
        made = request(tools=[other, TOOL], tool_choice=allowed("get_weather", mode))
        assert [tool.function.name for tool in made.tools] == ["get_weather"]
        assert made.tool_choice == chat_pb2.ToolChoice(
            mode=chat_pb2.ToolChoiceMode.Value(f"TOOL_CHOICE_MODE_{expected}")
        )


def test_a_data_url_becomes_an_image() -> None:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": PNG_URL}}]
    content = request(messages=[{"role": "user", "content": parts}]).messages[0].content
    assert content[0].text == "What is it?"
    assert content[1].image == chat_pb2.ImageContent(data=PNG, mime_type="image/png")


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/cat.png",
        "file:///etc/passwd",
        "data:image/png,raw",
        "data:image/png;base64,@@@",
        "",
    ],
)
def test_other_images_are_refused(url: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    refusal = refused(messages=[{"role": "user", "content": parts}])
    assert refusal.param == "messages[0].content[0].image_url.url"


def test_tools_and_formats_are_passed_on_with_their_key_order() -> None:
    parameters = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"const": 2**70}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
    made = request(tools=[tool], tool_choice={"type": "function", "function": {"name": "f"}})
    assert list(json.loads(made.tools[0].function.parameters_json)["properties"]) == ["z", "a"]
    assert json.loads(made.tools[0].function.parameters_json) == parameters
    assert made.tools[0].function.strict
    assert made.tool_choice == chat_pb2.ToolChoice(mode=chat_pb2.TOOL_CHOICE_MODE_FUNCTION, function_name="f")
    assert request(tools=[tool], tool_choice="none").tool_choice.mode == chat_pb2.TOOL_CHOICE_MODE_NONE
    assert request(tools=[], tool_choice="auto") == request()


def test_response_formats() -> None:
    assert not request(response_format={"type": "text"}).HasField("response_format")
    assert (
        request(response_format={"type": "json_object"}).response_format.WhichOneof("format") == "json_object"
    )
    definition = {"name": "n", "schema": {"type": "object", "b": 1, "a": 2}, "strict": True}
    made = request(response_format={"type": "json_schema", "json_schema": definition}).response_format
    assert made.json_schema.name == "n"
    assert made.json_schema.schema_json == '{"type":"object","b":1,"a":2}'
    assert made.json_schema.strict


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("sampling.temperature", "temperature"),
        ("sampling.stop[1]", "stop[1]"),
        ("choice_count", "n"),
        ("messages[2].content[0].image", "messages[2].content[0].image_url"),
        ("messages[2].content", "messages[2].content"),
        ("tools[0].function.parameters_json", "tools[0].function.parameters"),
        ("tool_choice.function_name", "tool_choice.function.name"),
        ("response_format.json_schema.schema_json", "response_format.json_schema.schema"),
        ("chat_template_kwargs_json", "chat_template_kwargs"),
        ("messages", "messages"),
    ],
)
def test_a_protobuf_path_in_json_terms(field: str, path: str) -> None:
    assert convert.json_path(field) == path


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("STOP", "stop"),
        ("STOP_SEQUENCE", "stop"),
        ("LENGTH", "length"),
        ("CONTEXT_LENGTH", "length"),
        ("TOOL_CALLS", "tool_calls"),
        ("UNSPECIFIED", "stop"),
    ],
)
def test_finish_reasons(reason: str, word: str) -> None:
    assert convert.finish_reason(sampling_pb2.FinishReason.Value(f"FINISH_REASON_{reason}")) == word


def test_a_whole_answer() -> None:
    assert convert.chat_json(response("Hi"), 1234567890) == {
        "id": ID,
        "object": "chat.completion",
        "created": 1234567890,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi", "refusal": None, "annotations": []},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 25,
            "completion_tokens": 15,
            "total_tokens": 40,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        "service_tier": "default",
        "system_fingerprint": "fp_0123456789",
    }


def test_an_answer_with_tool_calls_and_no_text_has_null_content() -> None:
    answer = response("")
    choice = answer.choices[0]
    choice.finish_reason = sampling_pb2.FINISH_REASON_TOOL_CALLS
    call = choice.message.tool_calls.add(id="call_1")
    call.function.name, call.function.arguments_json = "f", '{"a":1}'
    made = convert.chat_json(answer, 0)["choices"]
    assert made == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
                ],
                "refusal": None,
                "annotations": [],
            },
            "finish_reason": "tool_calls",
            "logprobs": None,
        }
    ]


def test_an_empty_answer_has_empty_content() -> None:
    assert json.dumps(convert.chat_json(response(""), 0)).count('"content": ""') == 1


def test_logprobs_carry_the_exact_bytes_of_partial_characters() -> None:
    token = sampling_pb2.TokenLogprob(token=b"\xf0\x9f", token_id=5, logprob=-0.5)
    chosen = sampling_pb2.ChosenTokenLogprob(chosen=token, top=[token])
    entry = {"token": "\ufffd", "logprob": -0.5, "bytes": [0xF0, 0x9F]}
    assert convert.logprobs_json([chosen]) == {
        "content": [{**entry, "top_logprobs": [entry]}],
        "refusal": None,
    }


def test_usage_sums_and_details() -> None:
    usage = usage_pb2.Usage(prompt_tokens=5, completion_tokens=7, cached_prompt_tokens=3, reasoning_tokens=2)
    made = convert.usage_json(usage)
    assert made["total_tokens"] == 12
    assert made["prompt_tokens_details"] == {"cached_tokens": 3, "audio_tokens": 0}
    assert made["completion_tokens_details"]["reasoning_tokens"] == 2  # type: ignore[index]  # a dict


def test_a_model_of_the_list() -> None:
    assert convert.model_json(model()) == {
        "id": MODEL,
        "object": "model",
        "created": 1710498645,
        "owned_by": "osaurus",
    }


_SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_ANY = st.recursive(
    _SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("type", "text", "role", "content", "function", "name", "url", "schema")),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(schema.ChatBody.model_fields)), _ANY, max_size=6))
def test_any_json_gives_a_request_or_a_refusal(fields: dict[str, object]) -> None:
    body = {"model": "m", "messages": [USER], **fields}
    try:
        made = convert.chat_request(validate(schema.ChatBody, body))
    except Refusal as refusal:
        assert refusal.param  # noqa: PT017 - either outcome is right
    else:
        assert made.messages
