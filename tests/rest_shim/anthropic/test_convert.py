from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.v1 import chat_pb2, sampling_pb2, usage_pb2
from rest_shim.anthropic import answer, convert, listing, schema
from rest_shim.bodies import validate
from rest_shim.errors import Refusal, anthropic_body

from ..scripted_core import model, response

HI = {"role": "user", "content": "Hi"}
TOOL = {"name": "get_weather", "description": "w", "input_schema": {"type": "object"}}
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


def parsed(**fields: object) -> schema.MessagesBody:
    return validate(schema.MessagesBody, {"model": "m", "max_tokens": 10, "messages": [HI], **fields})


def request(**fields: object) -> chat_pb2.ChatRequest:
    return convert.chat_request(parsed(**fields))


def refused(**fields: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        request(**fields)
    assert caught.value.status == 400
    return caught.value


def turns(*messages: object, **fields: object) -> list[tuple[str, str]]:
    """Roles and texts; an image is "<mime type>"."""
    made = request(messages=list(messages), **fields)
    return [
        (
            chat_pb2.Role.Name(turn.role).removeprefix("ROLE_").lower(),
            "".join(
                f"<{part.image.mime_type}>" if part.WhichOneof("part") == "image" else part.text
                for part in turn.content
            ),
        )
        for turn in made.messages
    ]


def test_a_plain_request() -> None:
    assert request() == chat_pb2.ChatRequest(
        model="m",
        messages=[chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text="Hi")])],
        sampling=sampling_pb2.SamplingParams(max_tokens=10),
        reasoning_enabled=False,
    )
    ignored = {
        "metadata": {"user_id": "u"}, "service_tier": "auto", "container": "c", "speed": "fast",
        "cache_control": {"type": "ephemeral"}, "context_management": {"edits": []}, "mcp_servers": [],
        "betas": ["x"], "system": "", "stop_sequences": [],
    }  # fmt: skip
    assert request(**ignored) == request()


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_p": 0}, {"top_p": convert.SMALLEST_TOP_P}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"stop_sequences": ["a", "\n"]}, {"stop": ["a", "\n"]}),
        ({"max_tokens": 7.0}, {"max_tokens": 7}),
    ],
)
def test_sampling(fields: dict[str, object], sampling: dict[str, object]) -> None:
    wanted = sampling_pb2.SamplingParams(**{"max_tokens": 10, **sampling})  # type: ignore[arg-type]  # a table
    assert request(**fields).sampling == wanted


def test_the_system_prompt_is_text_or_blocks() -> None:
    blocks = [
        {"type": "text", "text": "You are a coding agent.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be brief."},
    ]
    assert turns(HI, system="Be brief.")[0] == ("system", "Be brief.")
    assert turns(HI, system=blocks)[0] == ("system", "You are a coding agent.\n\nBe brief.")
    late = {"role": "system", "content": "Now be rude."}
    assert turns(HI, late, system="Be brief.") == [
        ("system", "Be brief."), ("user", "Hi"), ("system", "Now be rude."),
    ]  # fmt: skip


def test_results_and_text_of_one_message_keep_their_order() -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"b": 1, "a": 2}}
    content = [
        {"type": "text", "text": "First"},
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "11 C"},
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "x"}]},
        {"type": "tool_result", "tool_use_id": "toolu_3", "is_error": True, "content": "no"},
        {"type": "tool_result", "tool_use_id": "toolu_4"},
        {"type": "text", "text": "then"},
        {"type": "text", "text": "more"},
    ]
    messages = [HI, {"role": "assistant", "content": [call]}, {"role": "user", "content": content}]
    made = request(messages=messages)
    assert turns(*messages)[2:] == [
        ("user", "First"), ("tool", "11 C"), ("tool", "x"), ("tool", "Error: no"), ("tool", ""),
        ("user", "then\n\nmore"),
    ]  # fmt: skip
    assert made.messages[1].tool_calls[0] == chat_pb2.ToolCall(
        id="toolu_1",
        function=chat_pb2.FunctionCall(name="get_weather", arguments_json='{"b":1,"a":2}'),
    )
    assert [turn.tool_call_id for turn in made.messages[3:7]] == [f"toolu_{i}" for i in range(1, 5)]
    assert [turn.name for turn in made.messages[3:5]] == ["get_weather", ""]


def test_neighbours_of_one_side_become_one() -> None:
    said = [{"role": "assistant", "content": text} for text in ("Hel", "lo")]
    assert turns(HI, HI, *said, HI) == [("user", "Hi\n\nHi"), ("assistant", "Hello"), ("user", "Hi")]


def test_thinking_is_replayed_and_what_is_redacted_is_not() -> None:
    content = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "text", "text": "Hello"},
    ]
    turn = request(messages=[HI, {"role": "assistant", "content": content}]).messages[1]
    assert (turn.reasoning, turn.content[0].text) == ("hm", "Hello")


def test_other_blocks() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    document = {
        "type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"},
    }  # fmt: skip
    parts = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "P"}]}}
    found = {
        "type": "search_result", "source": "http://x", "title": "T",
        "content": [{"type": "text", "text": "S"}],
    }  # fmt: skip
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image, found]}
    assert turns({"role": "user", "content": [image, document, parts, result]}) == [
        ("user", "<image/png>T\nD\n\nP"), ("tool", "<image/png>T\nhttp://x\nS"),
    ]  # fmt: skip


def test_tools() -> None:
    made = request(tools=[{**TOOL, "type": "custom", "strict": True, "cache_control": {"type": "ephemeral"}}])
    assert made.tools[0].function == chat_pb2.FunctionTool(
        name="get_weather", description="w", parameters_json='{"type":"object"}', strict=True
    )


@pytest.mark.parametrize(
    ("choice", "mode", "name", "parallel"),
    [
        ({"type": "auto"}, chat_pb2.TOOL_CHOICE_MODE_AUTO, "", None),
        ({"type": "any"}, chat_pb2.TOOL_CHOICE_MODE_REQUIRED, "", None),
        ({"type": "none"}, chat_pb2.TOOL_CHOICE_MODE_NONE, "", None),
        ({"type": "tool", "name": "get_weather"}, chat_pb2.TOOL_CHOICE_MODE_FUNCTION, "get_weather", None),
        ({"type": "auto", "disable_parallel_tool_use": True}, chat_pb2.TOOL_CHOICE_MODE_AUTO, "", False),
    ],
)
def test_tool_choices(choice: object, mode: int, name: str, parallel: bool | None) -> None:
    made = request(tools=[TOOL], tool_choice=choice)
    assert (made.tool_choice.mode, made.tool_choice.function_name) == (mode, name)
    assert made.HasField("parallel_tool_calls") == (parallel is not None)
    assert made.parallel_tool_calls is bool(parallel)


def test_thinking_and_effort() -> None:
    made = request(thinking={"type": "enabled", "budget_tokens": 2048})
    assert (made.reasoning_enabled, made.max_reasoning_tokens) == (True, 2048)
    assert request(thinking={"type": "disabled"}) == request()
    adaptive = request(thinking={"type": "adaptive"}, output_config={"effort": "max"})
    assert not adaptive.HasField("reasoning_enabled")
    assert adaptive.reasoning_effort == "high"


def test_output_formats() -> None:
    output = {"type": "json_schema", "schema": {"type": "object"}}
    made = request(output_config={"format": output})
    assert json.loads(made.response_format.json_schema.schema_json) == {"type": "object"}
    # As clients of the beta say it.
    assert request(output_format=output) == made
    assert request(output_config={"effort": "low"}, output_format=output).response_format == (
        made.response_format
    )
    older = {"type": "json_schema", "schema": {"type": "array"}}
    assert request(output_config={"format": output}, output_format=older) == made


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "server_tool_use"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        (
            {"messages": [{"role": "system", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}]}]},
            "messages[0].content[0].source",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "image", "source": {"type": "file", "file_id": "file_1"}}]}]},
            "messages[0].content[0].source.type",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "@"}}]}]},
            "messages[0].content[0].source.data",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "document", "source": {"type": "base64", "data": "x"}}]}]},
            "messages[0].content[0].source",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "nope"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "sometimes"}}, "tool_choice.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"temperature": 3}, "temperature"),
        ({"mcp_servers": [{"type": "url", "url": "https://x"}]}, "mcp_servers"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_format": {"type": "xml"}}, "output_format.type"),
    ],
)  # fmt: skip
def test_refusals_name_the_place(fields: dict[str, object], param: str) -> None:
    refusal = refused(**fields)
    assert refusal.param == param
    # Anthropic's error object has no field for it.
    said = anthropic_body(refusal, "req_1")["error"]["message"]  # type: ignore[index]  # JSON
    assert said.startswith(param.replace("[", ".").replace("]", "") + ": ")


def test_server_tools_are_named() -> None:
    tool = {"type": "web_search_20250305", "name": "web_search"}
    assert "'web_search_20250305' are not supported" in refused(tools=[tool]).message


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("messages[0].content[0].text", "system"),
        ("messages[1].content[0].text", "messages[0].content[0].text"),
        ("messages[1].content[1].image", "messages[0].content[1]"),
        # The second message's text, which the first one's tool result keeps apart.
        ("messages[2].tool_call_id", "messages[0].content[2].tool_use_id"),
        ("messages[2].content[0].text", "messages[0].content[2].content[0].text"),
        ("messages[3].content[0].text", "messages[1].content[1].text"),
        ("messages[4].content[0]", "messages[2].content[0].text"),
        ("messages[4].tool_calls[0].function.name", "messages[2].content[1].name"),
        ("messages[4].tool_calls[0].function.arguments_json", "messages[2].content[1].input"),
        ("messages[4].role", "messages[2].role"),
        ("messages[9].role", "messages[9].role"),
        ("messages", "messages"),
        ("sampling.stop[0]", "stop_sequences[0]"),
        ("sampling.temperature", "temperature"),
        ("tools[1].function.parameters_json", "tools[1].input_schema"),
        ("tools[1].function.name", "tools[1].name"),
        ("max_reasoning_tokens", "thinking.budget_tokens"),
        ("response_format.json_schema.schema_json", "output_config.format.schema"),
        ("model", "model"),
    ],
)
def test_paths(field: str, path: str) -> None:
    image = {"type": "base64", "media_type": "image/png", "data": "aGk="}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "11 C"}
    body = parsed(
        system="Be brief.",
        output_config={"format": {"type": "json_schema", "schema": {}}},
        messages=[
            {"role": "user", "content": [
                {"type": "text", "text": "a"}, {"type": "image", "source": image}, result,
            ]},
            {"role": "user", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": [
                {"type": "text", "text": "c"},
                {"type": "tool_use", "id": "toolu_2", "name": "f", "input": {}},
            ]},
        ],
    )  # fmt: skip
    assert convert.json_path(body, field) == path


def test_the_path_of_an_older_output_format() -> None:
    body = parsed(output_format={"type": "json_schema", "schema": {}})
    assert convert.json_path(body, "response_format.json_schema.schema_json") == "output_format.schema"


def message(whole: chat_pb2.ChatResponse, *, shows: bool = True, omits: bool = False) -> dict[str, object]:
    return answer.message_json(whole, shows_thinking=shows, omits_thinking=omits)


def test_an_answer() -> None:
    assert message(response("Hello")) == {
        "id": "msg_0123456789abcdef01234567",
        "type": "message",
        "role": "assistant",
        "model": "llama-3.2-3b-instruct-4bit",
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 25,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 15,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


def test_an_answer_with_everything() -> None:
    whole = response("Hello")
    choice = whole.choices[0]
    choice.message.reasoning = "hm"
    call = choice.message.tool_calls.add(id="call_1")
    call.function.name, call.function.arguments_json = "f", '{"b":1,"a":2}'
    choice.finish_reason = sampling_pb2.FINISH_REASON_TOOL_CALLS
    made = message(whole)
    signature = answer.signature("hm")
    assert made["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": signature},
        {"type": "text", "text": "Hello"},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"b": 1, "a": 2}},
    ]
    assert signature
    assert made["stop_reason"] == "tool_use"
    kinds = [block["type"] for block in message(whole, shows=False)["content"]]  # type: ignore[index, attr-defined]  # JSON
    assert kinds == ["text", "tool_use"]
    first = message(whole, omits=True)["content"][0]  # type: ignore[index]  # JSON
    assert first == {"type": "thinking", "thinking": "", "signature": signature}


@pytest.mark.parametrize(
    ("reason", "word"),
    [("STOP", "end_turn"), ("STOP_SEQUENCE", "stop_sequence"), ("LENGTH", "max_tokens"),
     ("CONTEXT_LENGTH", "max_tokens"), ("TOOL_CALLS", "tool_use"), ("UNSPECIFIED", "end_turn")],
)  # fmt: skip
def test_stop_reasons(reason: str, word: str) -> None:
    assert answer.stop_reason(sampling_pb2.FinishReason.Value(f"FINISH_REASON_{reason}")) == word


def test_cached_tokens_are_counted_once() -> None:
    usage = usage_pb2.Usage(
        prompt_tokens=100, cached_prompt_tokens=90, completion_tokens=5, reasoning_tokens=3
    )
    made = answer.usage_json(usage)
    assert (made["input_tokens"], made["cache_read_input_tokens"], made["output_tokens"]) == (10, 90, 5)
    assert made["output_tokens_details"] == {"thinking_tokens": 3}


class TestListing:
    MODELS = tuple(model(f"m{index}") for index in range(5))

    def page(self, **query: str) -> tuple[list[str], bool]:
        made = listing.page_json(self.MODELS, query)
        ids = [entry["id"] for entry in made["data"]]  # type: ignore[attr-defined]  # JSON
        assert (made["first_id"], made["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
        return ids, bool(made["has_more"])

    def test_pages(self) -> None:
        assert self.page() == (["m0", "m1", "m2", "m3", "m4"], False)
        assert self.page(limit="2") == (["m0", "m1"], True)
        assert self.page(limit="2", after_id="m1") == (["m2", "m3"], True)
        assert self.page(limit="2", after_id="m3") == (["m4"], False)
        assert self.page(after_id="m4") == ([], False)
        assert self.page(limit="2", before_id="m3") == (["m1", "m2"], True)
        assert self.page(limit="9", before_id="m3") == (["m0", "m1", "m2"], False)
        assert self.page(limit="2", after_id="m0", before_id="m4") == (["m1", "m2"], True)
        assert self.page(after_id="m2", before_id="m2") == ([], False)

    def test_a_cursor_need_not_be_a_model(self):
        """One may be gone since the page before."""
        assert self.page(limit="2", after_id="m1x") == (["m2", "m3"], True)
        assert self.page(limit="2", before_id="m1x") == (["m0", "m1"], False)
        assert self.page(after_id="x") == ([], False)

    @pytest.mark.parametrize(
        "query",
        [{"limit": "0"}, {"limit": "1001"}, {"limit": "x"}, {"limit": "²"}, {"limit": "-1"}],
    )
    def test_refusals(self, query: dict[str, str]) -> None:
        with pytest.raises(Refusal) as caught:
            listing.page_json(self.MODELS, query)
        assert caught.value.status == 400

    def test_one_model(self) -> None:
        made = listing.model_json(self.MODELS[0])
        assert made["type"] == "model"
        assert made["created_at"] == "2024-03-15T10:30:45Z"
        assert (made["lifecycle"], made["max_input_tokens"]) == ("active", 131_072)


def test_long_histories_take_linear_time() -> None:
    """Ten thousand messages of one side: joined once, not once a message."""
    text = "word " * 200
    user = [{"role": "user", "content": text}] * 10_000
    thinking = [{"type": "thinking", "thinking": text, "signature": ""}, {"type": "text", "text": text}]
    made = request(messages=[*user, *[{"role": "assistant", "content": thinking}] * 5_000])
    assert [len(turn.content) for turn in made.messages] == [10_000, 5_000]
    assert len(made.messages[1].reasoning) == 5_000_000


_SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
_KEYS = st.sampled_from(("role", "content", "type", "text", "source", "name", "input_schema", "tool_use_id"))
_WORDS = st.sampled_from(("user", "assistant", "text", "image", "tool_result", "tool_use", "thinking"))
_ANY = st.recursive(
    _SCALAR | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(schema.MessagesBody.model_fields)), _ANY, max_size=6))
def test_any_json_gives_a_request_or_a_refusal(fields: dict[str, object]) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": [HI], **fields}
    try:
        made = convert.chat_request(validate(schema.MessagesBody, body))
    except Refusal as refusal:
        assert refusal.param  # noqa: PT017 - either outcome is right
    else:
        assert made.SerializeToString() is not None
