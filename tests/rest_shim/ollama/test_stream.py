from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.v1 import chat_pb2, sampling_pb2
from rest_shim.errors import Refusal
from rest_shim.ollama.stream import LineEncoder

from ..scripted_core import answer, completed, content, finished, started

NOW = 1795353951_755_236_989


def encoder() -> LineEncoder:
    return LineEncoder("SmolLM2:LATEST", clock=lambda: NOW)


def test_the_bytes_of_a_whole_stream() -> None:
    made = encoder()
    data = b"".join(made.encode(event) for event in answer("I'm", " doing"))
    head = '{"model":"SmolLM2:LATEST","created_at":"2026-11-22T13:25:51.755236989Z","message":'
    assert data.decode("ascii").splitlines() == [
        head + '{"role":"assistant","content":"I\'m"},"done":false}',
        head + '{"role":"assistant","content":" doing"},"done":false}',
        head + '{"role":"assistant","content":""},"done":true,"done_reason":"stop",'
        '"total_duration":1234567890,"load_duration":1,"prompt_eval_count":25,'
        '"prompt_eval_duration":12345678,"eval_count":15,"eval_duration":234567890}',
    ]
    assert made.is_complete


def test_the_end_says_why() -> None:
    made = encoder()
    made.encode(finished(sampling_pb2.FINISH_REASON_LENGTH))
    assert json.loads(made.encode(completed()))["done_reason"] == "length"


def test_nothing_is_sent_for_what_has_no_text() -> None:
    made = encoder()
    assert made.encode(started()) == b""
    assert made.encode(content("")) == b""
    assert made.encode(chat_pb2.ChatStreamResponse()) == b""
    assert not made.is_complete


def test_logprobs_are_on_their_line() -> None:
    token = sampling_pb2.ChosenTokenLogprob(chosen=sampling_pb2.TokenLogprob(token=b"I", logprob=-1.0))
    delta = chat_pb2.ContentDelta(text="I", logprobs=[token])
    line = json.loads(encoder().encode(chat_pb2.ChatStreamResponse(content=delta)))
    assert line["logprobs"] == [{"token": "I", "logprob": -1.0, "bytes": [73]}]
    assert line["done"] is False


def test_thinking_has_its_own_key() -> None:
    event = chat_pb2.ChatStreamResponse(reasoning=chat_pb2.ReasoningDelta(text="hm"))
    assert json.loads(encoder().encode(event))["message"] == {
        "role": "assistant",
        "content": "",
        "thinking": "hm",
    }


def test_a_tool_call_comes_whole_in_one_line() -> None:
    made = encoder()
    deltas = [
        chat_pb2.ToolCallDelta(call_index=0, id="call_1", name="f"),
        chat_pb2.ToolCallDelta(call_index=0, arguments_json='{"b":1,'),
        chat_pb2.ToolCallDelta(call_index=0, arguments_json='"a":2}'),
        chat_pb2.ToolCallDelta(call_index=1, id="call_2", name="g", arguments_json="{}"),
    ]
    events = [chat_pb2.ChatStreamResponse(tool_call=delta) for delta in deltas]
    lines = [made.encode(event) for event in (*events, finished(), completed())]
    # The first goes out as soon as the second begins.
    assert [bool(line) for line in lines] == [False, False, False, True, True, True]
    first, second, last = (json.loads(line) for line in lines if line)
    assert first["message"]["tool_calls"] == [
        {"id": "call_1", "function": {"index": 0, "name": "f", "arguments": {"b": 1, "a": 2}}}
    ]
    assert second["message"]["tool_calls"][0]["function"] == {"index": 1, "name": "g", "arguments": {}}
    assert (first["done"], second["done"], last["done"]) == (False, False, True)


def test_arguments_that_were_cut_off_do_not_break_the_stream() -> None:
    made = encoder()
    made.encode(
        chat_pb2.ChatStreamResponse(
            tool_call=chat_pb2.ToolCallDelta(id="call_1", name="f", arguments_json='{"a":')
        )
    )
    line = json.loads(made.encode(finished(sampling_pb2.FINISH_REASON_LENGTH)))
    assert line["message"]["tool_calls"][0]["function"]["arguments"] == {}


def test_a_failure_is_one_line_of_one_string() -> None:
    assert encoder().failure(Refusal(503, "gone\nfor\u2028good")) == b'{"error":"gone for good"}\n'


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1))
def test_any_text_arrives_as_it_is_on_one_line(text: str) -> None:
    data = encoder().encode(content(text))
    # ollama-python cuts lines as str.splitlines does, which knows more line ends than "\n".
    assert len(data.decode().splitlines()) == 1
    assert json.loads(data)["message"]["content"] == text


_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=4)


@st.composite
def deltas(draw: st.DrawFn) -> list[chat_pb2.ChatStreamResponse]:
    """Any order of deltas that the proto allows: calls may be written side by side."""
    made: list[chat_pb2.ChatStreamResponse] = []
    rest: dict[int, str] = {}

    def tool(index: int, arguments: str, **first: str) -> None:
        delta = chat_pb2.ToolCallDelta(call_index=index, arguments_json=arguments, **first)
        made.append(chat_pb2.ChatStreamResponse(tool_call=delta))

    for step in draw(st.lists(st.sampled_from(("text", "reasoning", "call", "more", "none")), max_size=16)):
        match step:
            case "text":
                made.append(content(draw(_TEXT)))
            case "reasoning":
                made.append(chat_pb2.ChatStreamResponse(reasoning=chat_pb2.ReasoningDelta(text=draw(_TEXT))))
            case "call":
                arguments = json.dumps(draw(st.dictionaries(st.text("ab{}", max_size=2), st.integers(0, 99))))
                cut = draw(st.integers(0, len(arguments)))
                tool(len(rest), arguments[:cut], id=f"call_{len(rest)}", name="f")
                rest[len(rest)] = arguments[cut:]
            case "more" if rest:
                index = draw(st.sampled_from(sorted(rest)))
                cut = draw(st.integers(0, len(rest[index])))
                # A call that is whole gets no more pieces.
                if cut:
                    tool(index, rest[index][:cut])
                    rest[index] = rest[index][cut:]
            case _:
                made.append(chat_pb2.ChatStreamResponse())
    for index, left in rest.items():
        if left:
            tool(index, left)
    return made


@given(deltas())
def test_every_order_of_events_keeps_the_form_and_loses_nothing(
    events: list[chat_pb2.ChatStreamResponse],
) -> None:
    made = encoder()
    data = b"".join(made.encode(event) for event in [started(), *events, finished(), completed()]).decode()
    lines = [json.loads(line) for line in data.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    messages = [line["message"] for line in lines]
    assert all(message["role"] == "assistant" for message in messages)
    assert "".join(message["content"] for message in messages) == "".join(
        event.content.text for event in events
    )
    assert "".join(message.get("thinking", "") for message in messages) == "".join(
        event.reasoning.text for event in events
    )
    written: dict[str, str] = {}
    for event in events:
        if event.HasField("tool_call"):
            name = f"call_{event.tool_call.call_index}"
            written[name] = written.get(name, "") + event.tool_call.arguments_json
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    assert {call["id"]: call["function"]["arguments"] for call in calls} == {
        name: json.loads(text) for name, text in written.items()
    }
    assert len(calls) == len(written)
