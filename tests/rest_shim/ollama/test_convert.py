from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.v1 import chat_pb2, sampling_pb2, usage_pb2
from rest_shim.bodies import validate
from rest_shim.errors import Refusal
from rest_shim.ollama import convert, schema
from rest_shim.ollama.duration import parse_seconds, to_proto

from ..scripted_core import response, timings, usage

USER = {"role": "user", "content": "Hello"}
NOW = 1795353951_755_236_989


def request(**fields: object) -> chat_pb2.ChatRequest:
    body = {"model": "m", "messages": [USER], **fields}
    return convert.chat_request(validate(schema.ChatBody, body))


def refused(**fields: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        request(**fields)
    assert caught.value.status == 400
    return caught.value


def test_a_plain_request_leaves_every_setting_to_the_core() -> None:
    assert request() == chat_pb2.ChatRequest(
        model="m",
        messages=[chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text="Hello")])],
        sampling=sampling_pb2.SamplingParams(),
    )
    assert request(options=None, tools=None, format="", think=None, keep_alive=None) == request()


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_p": 0}, {"top_p": convert.SMALLEST_TOP_P}),
        ({"top_k": 40.9}, {"top_k": 40}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_p": 0.25}, {"min_p": 0.25}),
        ({"num_predict": 5}, {"max_tokens": 5}),
        ({"num_predict": -1}, {"max_tokens": 2**31 - 1}),
        ({"num_predict": -2}, {"max_tokens": 2**31 - 1}),
        ({"num_predict": 0}, {"max_tokens": 2**31 - 1}),
        ({"stop": ["a"]}, {"stop": ["a"]}),
        # Editors send a model's special tokens and a language's keywords.
        ({"stop": [f"\n{i}" for i in range(64)]}, {"stop": [f"\n{i}" for i in range(64)]}),
        ({"seed": 7}, {"seed": 7}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -1}, {}),
        ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"repeat_last_n": -1}, {"repetition_context": -1}),
        ({"repeat_last_n": 0}, {"repetition_context": 0}),
        ({"presence_penalty": 1}, {"presence_penalty": 1.0}),
        ({"frequency_penalty": -1}, {"frequency_penalty": -1.0}),
        ({"mirostat": 2, "num_gpu": "x", "foo": 1, "low_vram": True, "temperature": None}, {}),
    ],
)
def test_options(options: dict[str, object], sampling: dict[str, object]) -> None:
    assert request(options=options).sampling == sampling_pb2.SamplingParams(**sampling)  # type: ignore[arg-type]  # a table


def test_num_ctx_bounds_the_context() -> None:
    assert request(options={"num_ctx": 4096}).max_context_tokens == 4096
    assert not request(options={"num_ctx": 0}).HasField("max_context_tokens")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        # As recorded from Ollama's own server.
        ({"options": {"temperature": "hot"}}, 'option "temperature" must be of type float32'),
        ({"options": {"num_predict": "5"}}, 'option "num_predict" must be of type integer'),
        ({"options": {"stop": " "}}, 'option "stop" must be of type array'),
        ({"options": {"top_k": True}}, 'option "top_k" must be of type integer'),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs must be between 0 and 20"),
        ({"keep_alive": "abc"}, 'time: invalid duration "abc"'),
        ({"keep_alive": "10 m"}, 'time: invalid duration "10 m"'),
        (
            {"think": "ultra"},
            'invalid think value: "ultra" (must be "high", "medium", "low", "max", true, or false)',
        ),
        (
            {"format": "xml"},
            'invalid format: "\\"xml\\""; expected "json" or a valid JSON Schema object',
        ),
    ],
)
def test_recorded_texts(fields: dict[str, object], text: str) -> None:
    assert refused(**fields).message == text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 1}, "model"),
        ({"messages": "x"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": 5, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "images": ["@@@"]}]}, "messages[0].images[0]"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"stream": "no"}, "stream"),
        ({"options": []}, "options"),
        ({"options": {"temperature": 3}}, "options.temperature"),
        ({"options": {"temperature": -1}}, "options.temperature"),
        ({"options": {"temperature": 10**400}}, "options.temperature"),
        ({"options": {"top_p": 2}}, "options.top_p"),
        ({"options": {"seed": 2**64}}, "options.seed"),
        ({"options": {"num_predict": 1e300}}, "options.num_predict"),
        ({"options": {"repeat_penalty": 0}}, "options.repeat_penalty"),
        ({"options": {"repeat_last_n": -2}}, "options.repeat_last_n"),
        ({"options": {"stop": [""]}}, "options.stop[0]"),
        ({"options": {"stop": ["a"] * 65}}, "options.stop"),
        ({"keep_alive": True}, "keep_alive"),
        ({"logprobs": "yes"}, "logprobs"),
        ({"format": 5}, "format"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ],
)
def test_the_field_that_is_wrong_is_named(fields: dict[str, object], param: str) -> None:
    assert refused(**fields).param == param


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10m", 600), ("1h30m", 5400), ("300ms", 0.3), ("-1s", -1), ("+2s", 2), ("0", 0), ("1.5h", 5400),
        (".5s", 0.5), ("5.s", 5), ("1µs", 1e-6), ("1us", 1e-6), ("2ns", 2e-9), ("-1h1m", -3660),
        ("10", 10), ("-1", -1), ("-", None),
        ("", None), ("abc", None), ("1 s", None), ("s", None), ("1d", None), (".s", None),
        ("1e3s", None), ("--1s", None), ("٣s", None), ("1" * 64 + "h", None),
        # With a pattern that backtracks this one takes days.
        ("1" * 10_000_000, None),
    ],
)  # fmt: skip
def test_go_durations(text: str, seconds: float | None) -> None:
    parsed = parse_seconds(text)
    assert parsed == pytest.approx(seconds) if seconds is not None else parsed is None


@pytest.mark.parametrize(
    ("value", "seconds"), [(5, 5), (-1, -1), (0.5, 0.5), ("10m", 600), (0, 0), (1e300, 315_576_000_000)]
)
def test_keep_alive(value: object, seconds: float) -> None:
    kept = convert.keep_alive(validate(schema.ChatBody, {"model": "m", "keep_alive": value}))
    assert kept is not None
    assert kept.ToNanoseconds() / 1e9 == seconds


def test_a_negative_duration_has_signs_that_agree() -> None:
    duration = to_proto(-0.5)
    assert (duration.seconds, duration.nanos) == (0, -500_000_000)


def test_history_with_tools_and_thinking() -> None:
    call = {"function": {"name": "f", "arguments": {"z": 1, "a": [2**70]}}}
    made = request(
        messages=[
            {"role": "USER", "content": "u"},
            {"role": "assistant", "thinking": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_name": "f", "content": "42"},
        ]
    ).messages
    assert made[0].role == chat_pb2.ROLE_USER
    assert not made[1].content
    assert made[1].reasoning == "hm"
    assert made[1].tool_calls[0].function.arguments_json == f'{{"z":1,"a":[{2**70}]}}'
    assert (made[2].name, made[2].content[0].text) == ("f", "42")


@pytest.mark.parametrize(
    ("magic", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF89a", "image/gif"),
        (b"RIFF....WEBP", "image/webp"), (b"hello", "application/octet-stream"),
    ],
)  # fmt: skip
def test_images(magic: bytes, kind: str) -> None:
    encoded = base64.b64encode(magic).decode()
    content = request(messages=[{"role": "user", "content": "x", "images": [encoded]}]).messages[0].content
    assert content[1].image == chat_pb2.ImageContent(data=magic, mime_type=kind)


def test_an_image_in_lines() -> None:
    """As base64's command and Python's encodebytes write it."""
    data = b"\xff\xd8\xff" + bytes(200)
    for encoded in (
        base64.encodebytes(data).decode(),
        base64.encodebytes(data).decode().replace("\n", "\r\n"),
    ):
        content = request(messages=[{"role": "user", "images": [encoded]}]).messages[0].content
        assert content[-1].image.data == data


def test_formats_tools_and_thinking_are_passed_on() -> None:
    assert request(format="json").response_format.WhichOneof("format") == "json_object"
    made = request(format={"type": "object", "b": 1, "a": 2}).response_format
    assert made.json_schema.schema_json == '{"type":"object","b":1,"a":2}'
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"z": 1, "a": 2}}}
    assert request(tools=[tool]).tools[0].function.parameters_json == '{"z":1,"a":2}'
    off, on, high = request(think=False), request(think=True), request(think="high")
    assert (off.HasField("reasoning_enabled"), off.reasoning_enabled) == (True, False)
    assert (on.reasoning_enabled, high.reasoning_enabled, high.reasoning_effort) == (True, True, "high")


def test_logprobs_only_where_asked_for() -> None:
    assert request(logprobs=True).sampling.top_logprobs == 0
    assert request(logprobs=True).sampling.HasField("top_logprobs")
    assert request(logprobs=True, top_logprobs=3).sampling.top_logprobs == 3
    assert not request(top_logprobs=3).sampling.HasField("top_logprobs")


def test_timestamps_have_nanoseconds_and_z() -> None:
    assert convert.timestamp(NOW) == "2026-11-22T13:25:51.755236989Z"
    assert convert.timestamp(5) == "1970-01-01T00:00:00.000000005Z"


def test_a_whole_answer_in_the_order_of_ollamas_keys() -> None:
    assert json.dumps(convert.chat_json(response("Hi"), "SmolLM2:LATEST", NOW)) == json.dumps(
        {
            "model": "SmolLM2:LATEST",
            "created_at": "2026-11-22T13:25:51.755236989Z",
            "message": {"role": "assistant", "content": "Hi"},
            "done": True,
            "done_reason": "stop",
            "total_duration": 1234567890,
            "load_duration": 1,
            "prompt_eval_count": 25,
            "prompt_eval_duration": 12345678,
            "eval_count": 15,
            "eval_duration": 234567890,
        }
    )


def test_no_count_and_no_duration_is_zero() -> None:
    made = convert.metrics_json(usage_pb2.Usage(), usage_pb2.Timings())
    assert all(isinstance(value, int) and value > 0 for value in made.values())
    assert convert.metrics_json(usage(), timings())["eval_duration"] == 234_567_890


@pytest.mark.parametrize(
    ("reason", "word"),
    [("STOP", "stop"), ("STOP_SEQUENCE", "stop"), ("LENGTH", "length"), ("CONTEXT_LENGTH", "length"),
     ("TOOL_CALLS", "stop"), ("UNSPECIFIED", "stop")],
)  # fmt: skip
def test_done_reasons(reason: str, word: str) -> None:
    assert convert.done_reason(sampling_pb2.FinishReason.Value(f"FINISH_REASON_{reason}")) == word


def test_tool_calls_have_their_arguments_as_an_object() -> None:
    answer = response("")
    call = answer.choices[0].message.tool_calls.add(id="call_1")
    call.function.name, call.function.arguments_json = "f", '{"b":1,"a":2}'
    message = convert.chat_json(answer, "m", NOW)["message"]
    assert message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call_1", "function": {"index": 0, "name": "f", "arguments": {"b": 1, "a": 2}}}
        ],
    }


@pytest.mark.parametrize(
    ("role", "ours"),
    [("User", "USER"), ("FUNCTION", "TOOL"), ("model", "ASSISTANT"), ("control", "USER"), ("", "USER")],
)
def test_strange_roles_are_taken(role: str, ours: str) -> None:
    made = request(messages=[{"role": role, "content": "x"}])
    assert made.messages[0].role == chat_pb2.Role.Value(f"ROLE_{ours}")


def test_logprobs_have_alternatives_only_where_asked_for() -> None:
    token = sampling_pb2.TokenLogprob(token=b"I", logprob=-0.5)
    plain = sampling_pb2.ChosenTokenLogprob(chosen=token)
    full = sampling_pb2.ChosenTokenLogprob(chosen=token, top=[token])
    entry = {"token": "I", "logprob": -0.5, "bytes": [73]}
    assert convert.logprobs_json([plain, full]) == [entry, {**entry, "top_logprobs": [entry]}]


_SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
_KEYS = st.sampled_from(("role", "content", "images", "function", "name", "temperature", "stop", "num_ctx"))
_ANY = st.recursive(
    _SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(schema.ChatBody.model_fields)), _ANY, max_size=6))
def test_any_json_gives_a_request_or_a_refusal(fields: dict[str, object]) -> None:
    try:
        made = convert.chat_request(validate(schema.ChatBody, {"model": "m", **fields}))
    except Refusal as refusal:
        assert refusal.param  # noqa: PT017 - either outcome is right
    else:
        assert made.SerializeToString() is not None


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("model", "model"),
        ("sampling.temperature", "options.temperature"),
        ("sampling.max_tokens", "options.num_predict"),
        ("sampling.stop[2]", "options.stop[2]"),
        ("max_context_tokens", "options.num_ctx"),
        ("messages[1].content[2].image", "messages[1].images"),
        ("messages[1].content[0].text", "messages[1].content"),
        ("messages[1].tool_calls[0].function.name", "messages[1].tool_calls[0].function.name"),
        ("messages[1].tool_call_id", "messages[1].tool_call_id"),
        ("tools[0].function.parameters_json", "tools[0].function.parameters"),
        ("response_format.json_schema.schema_json", "format"),
        ("keep_alive", "keep_alive"),
        ("inputs[3]", "input[3]"),
    ],
)
def test_paths(field: str, path: str) -> None:
    assert convert.json_path(field) == path
    if not path.startswith("messages"):
        assert convert.prompt_path(field) == path


def test_paths_of_a_prompt() -> None:
    assert convert.prompt_path("messages[1].content[1].image") == "images"
    assert convert.prompt_path("messages[0].content[0].text") == "prompt"
    assert convert.prompt_path("context_token_ids[0]") == "context[0]"
    assert convert.prompt_path("text") == "prompt"
