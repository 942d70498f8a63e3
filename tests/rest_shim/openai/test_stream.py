from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.v1 import chat_pb2, sampling_pb2
from rest_shim.errors import Refusal
from rest_shim.openai.stream import ChunkEncoder

from ..scripted_core import FINGERPRINT, ID, MODEL, answer, completed, content, finished, started


def encoder(choice_count: int = 1, include_usage: bool = False) -> ChunkEncoder:
    return ChunkEncoder(choice_count=choice_count, include_usage=include_usage, created=1234567890)


def frames(data: bytes) -> list[str]:
    """The data of each event; every event is one data line and a blank line."""
    assert data.endswith(b"\n\n") or not data
    events = data.decode("ascii").split("\n\n")[:-1]
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


def chunks(data: bytes) -> list[dict[str, object]]:
    return [json.loads(frame) for frame in frames(data) if frame != "[DONE]"]


def started_encoder(**options: object) -> ChunkEncoder:
    made = encoder(**options)  # type: ignore[arg-type]  # a test's keywords
    made.encode(started())
    return made


def test_the_bytes_of_a_whole_stream() -> None:
    made = encoder()
    data = b"".join(made.encode(event) for event in answer("I'm", " doing"))
    head = f'{{"id":"{ID}","object":"chat.completion.chunk","created":1234567890,"model":"{MODEL}","choices":'
    tail = f',"system_fingerprint":"{FINGERPRINT}"}}'
    assert frames(data) == [
        head
        + '[{"index":0,"delta":{"role":"assistant","content":"","refusal":null},'
        + '"finish_reason":null,"logprobs":null}]'
        + tail,
        head + '[{"index":0,"delta":{"content":"I\'m"},"finish_reason":null,"logprobs":null}]' + tail,
        head + '[{"index":0,"delta":{"content":" doing"},"finish_reason":null,"logprobs":null}]' + tail,
        head + '[{"index":0,"delta":{},"finish_reason":"stop","logprobs":null}]' + tail,
        "[DONE]",
    ]
    assert made.is_complete


def test_usage_comes_last_and_is_null_before() -> None:
    made = encoder(include_usage=True)
    data = b"".join(made.encode(event) for event in answer("a"))
    parsed = chunks(data)
    assert [chunk["usage"] for chunk in parsed[:-1]] == [None, None, None]
    assert parsed[-1]["choices"] == []
    assert parsed[-1]["usage"]["total_tokens"] == 40  # type: ignore[index]  # a dict
    assert frames(data)[-1] == "[DONE]"
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in parsed}) == 1


def test_without_include_usage_no_chunk_has_the_key() -> None:
    made = encoder()
    assert all("usage" not in chunk for chunk in chunks(b"".join(made.encode(e) for e in answer("a"))))


def test_choices_are_kept_apart() -> None:
    made = encoder(choice_count=2)
    events = [
        started(), content("a", 1), content("b", 0), finished(choice_index=1),
        finished(sampling_pb2.FINISH_REASON_LENGTH, 0), completed(),
    ]  # fmt: skip
    choices = [chunk["choices"][0] for event in events for chunk in chunks(made.encode(event))]  # type: ignore[index]  # a list
    assert [(c["index"], c["delta"].get("content"), c["finish_reason"]) for c in choices] == [
        (0, "", None), (1, "", None), (1, "a", None), (0, "b", None), (1, None, "stop"), (0, None, "length"),
    ]  # fmt: skip


def test_a_tool_call_has_its_name_first_and_its_arguments_after() -> None:
    made = started_encoder()
    deltas = [
        chat_pb2.ToolCallDelta(call_index=0, id="call_1", name="f"),
        chat_pb2.ToolCallDelta(call_index=0, arguments_json='{"a":'),
        chat_pb2.ToolCallDelta(call_index=1, id="call_2", name="g", arguments_json="{}"),
    ]
    data = b"".join(made.encode(chat_pb2.ChatStreamResponse(tool_call=delta)) for delta in deltas)
    assert [chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in chunks(data)] == [  # type: ignore[index]  # a list
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"a":'}},
        {"index": 1, "id": "call_2", "type": "function", "function": {"name": "g", "arguments": ""}},
        {"index": 1, "function": {"arguments": "{}"}},
    ]


def test_reasoning_has_its_own_key() -> None:
    event = chat_pb2.ChatStreamResponse(reasoning=chat_pb2.ReasoningDelta(text="hm"))
    assert chunks(started_encoder().encode(event))[0]["choices"][0]["delta"] == {"reasoning_content": "hm"}  # type: ignore[index]  # a list


def test_logprobs_travel_with_their_chunk_even_without_text() -> None:
    token = sampling_pb2.ChosenTokenLogprob(chosen=sampling_pb2.TokenLogprob(token=b"\xe2", logprob=-1.0))
    event = chat_pb2.ChatStreamResponse(content=chat_pb2.ContentDelta(logprobs=[token]))
    choice = chunks(started_encoder().encode(event))[0]["choices"][0]  # type: ignore[index]  # a list
    assert choice["delta"] == {"content": ""}
    assert choice["logprobs"]["content"][0]["bytes"] == [0xE2]


@pytest.mark.parametrize(
    "event",
    [
        chat_pb2.ChatStreamResponse(),
        chat_pb2.ChatStreamResponse(prompt_progress=chat_pb2.PromptProgress(processed_tokens=1)),
        content(""),
    ],
)
def test_what_clients_do_not_need_is_skipped(event: chat_pb2.ChatStreamResponse) -> None:
    assert started_encoder().encode(event) == b""


def test_a_failure_is_one_event_without_done() -> None:
    data = started_encoder().failure(Refusal(503, "gone", kind="server_error", code="service_unavailable"))
    assert chunks(data) == [
        {"error": {"message": "gone", "type": "server_error", "param": None, "code": "service_unavailable"}}
    ]
    assert b"[DONE]" not in data


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1))
def test_any_text_arrives_as_it_is(text: str) -> None:
    parsed = chunks(started_encoder(include_usage=True).encode(content(text)))
    assert parsed[0]["choices"][0]["delta"] == {"content": text}  # type: ignore[index]  # a list
