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
