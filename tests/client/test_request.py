from __future__ import annotations

import json

import pytest

from osaurus_grpc import errors
from osaurus_grpc.client.request import chat_request, message, tool
from osaurus_grpc.v1 import chat_pb2

WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"zeta": {}, "alpha": {}}},
    "strict": True,
}


def test_a_text_is_what_the_user_says():
    request = chat_request("Hello", {"system": "Be brief.", "model": "m"})
    assert [(m.role, m.content[0].text) for m in request.messages] == [
        (chat_pb2.ROLE_SYSTEM, "Be brief."),
        (chat_pb2.ROLE_USER, "Hello"),
    ]
    assert request.model == "m"


def test_what_is_not_said_stays_unset_and_zero_is_said():
    bare = chat_request("Hello", {})
    assert not bare.sampling.ListFields()
    assert not bare.HasField("choice_count")
    cold = chat_request("Hello", {"temperature": 0, "seed": 0, "parallel_tool_calls": False})
    assert cold.sampling.HasField("temperature")
    assert cold.sampling.HasField("seed")
    assert cold.HasField("parallel_tool_calls")


def test_every_option_reaches_the_request():
    request = chat_request(
        "Hello",
        {
            "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5,
            "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {7: 1.0}, "seed": 4,
            "max_tokens": 5, "stop": "end", "top_logprobs": 2, "ignore_eos": True, "choice_count": 3,
            "session_id": "s", "reasoning_effort": "low", "reasoning_enabled": False,
            "max_reasoning_tokens": 9, "template_arguments": {"a": [1]}, "keep_alive_seconds": 1.5,
            "max_context_tokens": 64, "tools": [WEATHER], "tool_choice": "get_weather", "regex": "a+",
        },
    )  # fmt: skip
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p, sampling.seed) == (0.5, 3, 0.25, 4)
    assert list(sampling.stop) == ["end"]
    assert dict(sampling.logit_bias) == {7: 1.0}
    assert sampling.ignore_eos
    assert (request.choice_count, request.session_id, request.reasoning_effort) == (3, "s", "low")
    assert request.HasField("reasoning_enabled")
    assert not request.reasoning_enabled
    assert request.max_reasoning_tokens == 9
    assert json.loads(request.chat_template_kwargs_json) == {"a": [1]}
    assert request.keep_alive.ToMilliseconds() == 1500
    assert request.tool_choice.mode == chat_pb2.TOOL_CHOICE_MODE_FUNCTION
    assert request.tool_choice.function_name == "get_weather"
    assert request.response_format.regex == "a+"


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="temprature"):
        chat_request("Hello", {"temprature": 0.5})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize("form", [WEATHER, {"type": "function", "function": WEATHER}])
def test_tools_keep_the_order_of_their_schema(form):
    built = tool(form).function
    assert built.name == "get_weather"
    assert built.strict
    assert built.parameters_json.index("zeta") < built.parameters_json.index("alpha")


def test_messages_in_openais_form():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    said = message({"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"})
    assert said.tool_calls[0].function.arguments_json == '{"a": 1}'
    assert said.reasoning == "hm"
    answer = message({"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "ok"}]})
    assert (answer.tool_call_id, answer.content[0].text) == ("c1", "ok")
    picture = message(
        {"role": "user", "content": [{"type": "image", "data": b"x", "mime_type": "image/png"}]}
    )
    assert picture.content[0].image.data == b"x"


@pytest.mark.parametrize(
    "wrong",
    [{"role": "robot", "content": "x"}, {"role": "user", "content": [{"type": "video"}]}, {"content": "x"}],
)
def test_what_is_no_message_is_named(wrong):
    with pytest.raises(errors.InvalidRequestError, match="messages\\[0\\]"):
        chat_request([wrong], {})
