from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from osaurus_grpc.v1 import chat_pb2, sampling_pb2
from rest_shim.anthropic import answer as whole_answer
from rest_shim.anthropic.stream import PING, MessageEncoder
from rest_shim.errors import Refusal

from ..scripted_core import answer, completed, content, finished, started

Event = chat_pb2.ChatStreamResponse

_EVENTS: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)


def encoder(*, shows: bool = True, omits: bool = False) -> MessageEncoder:
    return MessageEncoder("req_1", shows_thinking=shows, omits_thinking=omits)


def reasoning(text: str) -> Event:
    return Event(reasoning=chat_pb2.ReasoningDelta(text=text))


def tool(index: int, arguments: str = "", **first: str) -> Event:
    return Event(tool_call=chat_pb2.ToolCallDelta(call_index=index, arguments_json=arguments, **first))


def frames(made: MessageEncoder, events: Iterable[Event]) -> list[dict[str, object]]:
    data = b"".join(made.encode(event) for event in events).decode("ascii")
    parsed = []
    for frame in data.split("\n\n")[:-1]:
        name, payload = frame.split("\n")
        body = json.loads(payload.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        parsed.append(body)
    return parsed


def accumulated(events: Iterable[dict[str, object]]) -> Message:
    """The message as Anthropic's own SDK puts it together."""
    snapshot = None
    buffers: dict[int, bytes] = {}
    for event in events:
        if event["type"] != "ping":
            parsed = _EVENTS.validate_python(event)
            snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=buffers)
    assert snapshot is not None
    return snapshot


def test_the_bytes_of_a_whole_stream() -> None:
    made = encoder()
    data = b"".join(made.encode(event) for event in answer("I'm", " doing"))
    usage = (
        '"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":{},'
        '"output_tokens_details":{{"thinking_tokens":0}}}}'
    )
    assert data.decode("ascii").split("\n\n")[:-1] == [
        'event: message_start\ndata: {"type":"message_start","message":'
        '{"id":"msg_0123456789abcdef01234567","type":"message","role":"assistant",'
        '"model":"llama-3.2-3b-instruct-4bit","content":[],"stop_reason":null,"stop_sequence":null,'
        '"usage":{"input_tokens":25,' + usage.format(0) + "}}",
        'event: ping\ndata: {"type":"ping"}',
        'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        '"content_block":{"type":"text","text":""}}',
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"text_delta","text":"I\'m"}}',
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"text_delta","text":" doing"}}',
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}',
        'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn",'
        '"stop_sequence":null},"usage":{"input_tokens":25,' + usage.format(15) + "}",
        'event: message_stop\ndata: {"type":"message_stop"}',
    ]
    assert made.is_complete


def test_thinking_then_text_then_calls() -> None:
    events = [
        started(), reasoning("h"), reasoning("m"), content("Let me see."),
        tool(0, id="call_1", name="f"), tool(0, '{"a":'), tool(0, "1}"), tool(1, id="call_2", name="g"),
        tool(1, "{}"), finished(sampling_pb2.FINISH_REASON_TOOL_CALLS), completed(),
    ]  # fmt: skip
    made = frames(encoder(), events)
    assert [(event["type"], event.get("index")) for event in made] == [
        ("message_start", None), ("ping", None),
        ("content_block_start", 0), ("content_block_delta", 0), ("content_block_delta", 0),
        ("content_block_delta", 0), ("content_block_stop", 0),
        ("content_block_start", 1), ("content_block_delta", 1), ("content_block_stop", 1),
        ("content_block_start", 2), ("content_block_delta", 2), ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("content_block_start", 3), ("content_block_delta", 3), ("content_block_stop", 3),
        ("message_delta", None), ("message_stop", None),
    ]  # fmt: skip
    message = accumulated(made)
    assert [block.to_dict() for block in message.content] == [
        {"type": "thinking", "thinking": "hm", "signature": whole_answer.signature("hm")},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}},
    ]
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens == 15


def test_thinking_that_was_not_asked_for_is_not_shown() -> None:
    made = frames(encoder(shows=False), [started(), reasoning("hm"), content("Hi"), finished(), completed()])
    assert [block.to_dict() for block in accumulated(made).content] == [{"type": "text", "text": "Hi"}]


def test_omitted_thinking_leaves_its_signature() -> None:
    made = frames(encoder(omits=True), [started(), reasoning("hm"), finished(), completed()])
    assert [block.to_dict() for block in accumulated(made).content] == [
        {"type": "thinking", "thinking": "", "signature": whole_answer.signature("hm")}
    ]


def test_a_stop_sequence_is_told() -> None:
    end = finished(sampling_pb2.FINISH_REASON_STOP_SEQUENCE)
    end.choice_finished.stop_sequence = "END"
    message = accumulated(frames(encoder(), [started(), end, completed()]))
    assert (message.stop_reason, message.stop_sequence, message.content) == ("stop_sequence", "END", [])


def test_cached_tokens_are_in_the_end() -> None:
    end = completed(prompt=100)
    end.completed.usage.cached_prompt_tokens = 90
    usage = accumulated(frames(encoder(), [started(), finished(), end])).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (10, 90)


def test_a_failure_is_an_event() -> None:
    data = encoder().failure(Refusal(503, "gone")).decode()
    name, payload = data.rstrip("\n").split("\n")
    assert name == "event: error"
    assert json.loads(payload.removeprefix("data: ")) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "gone"},
        "request_id": "req_1",
    }


def test_nothing_is_sent_for_what_has_no_text() -> None:
    made = encoder()
    for event in (content(""), reasoning(""), Event(), Event(prompt_progress=chat_pb2.PromptProgress())):
        assert made.encode(event) == b""
    assert not made.is_complete


def test_a_ping_is_an_event() -> None:
    assert PING == b'event: ping\ndata: {"type":"ping"}\n\n'


@st.composite
def deltas(draw: st.DrawFn) -> list[Event]:
    """Any order of deltas that the proto allows: calls may be written side by side."""
    made: list[Event] = []
    rest: dict[int, str] = {}
    call_count = 0
    for step in draw(st.lists(st.sampled_from(("text", "reasoning", "call", "more", "none")), max_size=20)):
        match step:
            case "text":
                made.append(content(draw(st.text(st.characters(exclude_categories=("Cs",)), max_size=4))))
            case "reasoning":
                made.append(reasoning(draw(st.text(st.characters(exclude_categories=("Cs",)), max_size=4))))
            case "call":
                arguments = json.dumps(draw(st.dictionaries(st.text("ab{}", max_size=2), st.integers(0, 99))))
                cut = draw(st.integers(0, len(arguments)))
                made.append(tool(call_count, arguments[:cut], id=f"call_{call_count}", name="f"))
                rest[call_count] = arguments[cut:]
                call_count += 1
            case "more" if rest:
                index = draw(st.sampled_from(sorted(rest)))
                cut = draw(st.integers(0, len(rest[index])))
                made.append(tool(index, rest[index][:cut]))
                rest[index] = rest[index][cut:]
            case _:
                made.append(Event())
    made += [tool(index, left) for index, left in rest.items() if left]
    return made


def _joined(events: Sequence[Event], kind: str) -> str:
    if kind == "text":
        return "".join(event.content.text for event in events)
    return "".join(event.reasoning.text for event in events)


@given(deltas())
def test_every_order_of_events_keeps_the_grammar_and_loses_nothing(events: list[Event]) -> None:
    made = frames(encoder(), [started(), *events, finished(), completed()])
    open_blocks: set[object] = set()
    begun: list[object] = []
    for event in made:
        match event["type"]:
            case "content_block_start":
                begun.append(event["index"])
                open_blocks.add(event["index"])
            case "content_block_delta":
                assert event["index"] in open_blocks
            case "content_block_stop":
                open_blocks.remove(event["index"])
    assert begun == list(range(len(begun)))
    assert not open_blocks
    assert [made[0]["type"], made[-2]["type"], made[-1]["type"]] == [
        "message_start", "message_delta", "message_stop",
    ]  # fmt: skip
    message = accumulated(made)
    texts = {"text": "", "thinking": ""}
    inputs: dict[str, object] = {}
    for block in message.content:
        if block.type == "text":
            texts["text"] += block.text
        elif block.type == "thinking":
            texts["thinking"] += block.thinking
            assert block.signature
        elif block.type == "tool_use":
            inputs[block.id] = block.input
    assert texts == {"text": _joined(events, "text"), "thinking": _joined(events, "reasoning")}
    written: dict[str, str] = {}
    for event in events:
        if event.HasField("tool_call"):
            name = f"toolu_{event.tool_call.call_index}"
            written[name] = written.get(name, "") + event.tool_call.arguments_json
    assert inputs == {name: json.loads(text) for name, text in written.items()}


@pytest.mark.parametrize("text", ["a\u2028b\u0085c", "\x00", "emoji 🍪", 'quote " \\'])
def test_any_text_is_one_ascii_event(text: str) -> None:
    made = frames(encoder(), [started(), content(text)])
    assert made[-1]["delta"] == {"type": "text_delta", "text": text}
