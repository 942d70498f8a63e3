from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from openresponses_types import types as spec
from pydantic import TypeAdapter

from osaurus_grpc.v1 import chat_pb2, sampling_pb2
from rest_shim.bodies import validate
from rest_shim.errors import Refusal
from rest_shim.responses.items import Ids
from rest_shim.responses.resource import Draft, output_items
from rest_shim.responses.schema import ResponseBody
from rest_shim.responses.stream import ResponseEncoder

from ..scripted_core import completed, content, finished, started

Event = dict[str, object]

# Without the reasoning events, whose names differ between the specification and OpenAI's SDKs.
SPECIFIED: TypeAdapter[object] = TypeAdapter(
    spec.ResponseCreatedStreamingEvent
    | spec.ResponseInProgressStreamingEvent
    | spec.ResponseCompletedStreamingEvent
    | spec.ResponseIncompleteStreamingEvent
    | spec.ResponseFailedStreamingEvent
    | spec.ResponseOutputItemAddedStreamingEvent
    | spec.ResponseOutputItemDoneStreamingEvent
    | spec.ResponseContentPartAddedStreamingEvent
    | spec.ResponseContentPartDoneStreamingEvent
    | spec.ResponseOutputTextDeltaStreamingEvent
    | spec.ResponseOutputTextDoneStreamingEvent
    | spec.ResponseFunctionCallArgumentsDeltaStreamingEvent
    | spec.ResponseFunctionCallArgumentsDoneStreamingEvent
    | spec.ErrorStreamingEvent
)
OF_SDK: TypeAdapter[object] = TypeAdapter(ResponseStreamEvent)


def encoder(**fields: object) -> ResponseEncoder:
    body = validate(ResponseBody, {"model": "m", "input": "Hello", **fields})
    return ResponseEncoder(Draft(body, created=1234567890))


def parsed(data: bytes) -> list[Event]:
    """The events of a stream, each checked against both descriptions of them."""
    events = []
    for frame in data.decode("ascii").removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
        name, line = frame.split("\n")
        event = json.loads(line.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == len(events)
        OF_SDK.validate_python(event)
        if not event["type"].startswith("response.reasoning_text"):
            SPECIFIED.validate_python(event)
        events.append(event)
    return events


def run(*events: chat_pb2.ChatStreamResponse, made: ResponseEncoder | None = None) -> list[Event]:
    made = made or encoder()
    data = b"".join(made.encode(event) for event in (started("tiny"), *events))
    assert made.is_complete
    assert data.endswith(b"\n\ndata: [DONE]\n\n")
    return parsed(data)


def reasoning(text: str) -> chat_pb2.ChatStreamResponse:
    return chat_pb2.ChatStreamResponse(reasoning=chat_pb2.ReasoningDelta(text=text, token_count=1))


def tool(
    index: int, arguments: str = "", *, call_id: str = "", name: str = ""
) -> chat_pb2.ChatStreamResponse:
    return chat_pb2.ChatStreamResponse(
        tool_call=chat_pb2.ToolCallDelta(call_index=index, id=call_id, name=name, arguments_json=arguments)
    )


def kinds(events: list[Event]) -> list[str]:
    return [str(event["type"]).removeprefix("response.") for event in events]


TEXT = ["output_item.added", "content_part.added"]
TEXT_END = ["output_text.done", "content_part.done", "output_item.done"]


def test_a_text() -> None:
    events = run(content("I'm"), content(" doing"), finished(), completed())
    assert kinds(events) == [
        "created", "in_progress", *TEXT, "output_text.delta", "output_text.delta", *TEXT_END, "completed",
    ]  # fmt: skip
    first, last = events[0]["response"], events[-1]["response"]
    assert isinstance(first, dict)
    assert isinstance(last, dict)
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert (last["status"], last["model"], last["incomplete_details"]) == ("completed", "tiny", None)
    assert last["completed_at"] >= 1234567890
    assert last["usage"] == {
        "input_tokens": 25,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 15,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 40,
    }
    (item,) = last["output"]
    assert item["content"][0]["text"] == "I'm doing"
    assert events[2]["item"]["content"] == []  # type: ignore[index]  # JSON
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}


def test_what_is_kept_is_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1234567890)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    made = encoder()
    for event in (started("tiny"), content("Hi"), finished()):
        made.encode(event)
    kept = made.final(completed().completed)
    (told,) = [frame for frame in made.encode(completed()).decode().splitlines() if '"response"' in frame]
    assert json.loads(told.removeprefix("data: "))["response"] == kept


def test_reasoning_text_and_calls_follow_each_other() -> None:
    events = run(
        reasoning("hm"), reasoning("!"), content("Let me see."),
        tool(0, call_id="call_1", name="f"), tool(0, '{"a":'), tool(0, "1}"),
        tool(1, "{}", call_id="call_2", name="g"),
        finished(sampling_pb2.FINISH_REASON_TOOL_CALLS), completed(),
    )  # fmt: skip
    assert kinds(events) == [
        "created", "in_progress",
        *TEXT, "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        *TEXT, "output_text.delta", *TEXT_END,
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    output = events[-1]["response"]["output"]  # type: ignore[index]  # JSON
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "hm!"}]
    assert (output[2]["call_id"], output[2]["name"], output[2]["arguments"]) == ("call_1", "f", '{"a":1}')
    assert all(item["status"] == "completed" for item in output)
    done = [event for event in events if str(event["type"]).endswith("arguments.done")]
    assert [(event["name"], event["arguments"]) for event in done] == [("f", '{"a":1}'), ("g", "{}")]


def test_an_answer_that_is_cut_off() -> None:
    events = run(content("a"), finished(sampling_pb2.FINISH_REASON_LENGTH), completed())
    assert kinds(events)[-2:] == ["output_item.done", "incomplete"]
    last = events[-1]["response"]
    assert isinstance(last, dict)
    assert (last["status"], last["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert last["completed_at"] is None
    assert last["output"][0]["status"] == "incomplete"


def test_an_answer_without_anything_is_an_empty_text() -> None:
    events = run(finished(), completed())
    assert kinds(events) == ["created", "in_progress", *TEXT, *TEXT_END, "completed"]


def test_logprobs_are_in_the_deltas_and_at_the_end() -> None:
    entry = sampling_pb2.TokenLogprob(token=b"a", token_id=1, logprob=-0.5)
    chosen = sampling_pb2.ChosenTokenLogprob(chosen=entry, top=[entry])
    delta = chat_pb2.ContentDelta(text="a", logprobs=[chosen])
    events = run(chat_pb2.ChatStreamResponse(content=delta), finished(), completed())
    shown = {"token": "a", "logprob": -0.5, "bytes": [97]}
    expected = [{**shown, "top_logprobs": [shown]}]
    by_kind = {str(event["type"]): event for event in events}
    assert by_kind["response.output_text.delta"]["logprobs"] == expected
    assert by_kind["response.output_text.done"]["logprobs"] == expected
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == expected  # type: ignore[index]  # JSON


def test_a_failure() -> None:
    made = encoder()
    data = made.encode(started()) + made.encode(content("a"))
    data += made.failure(Refusal(500, "It failed.", kind="server_error", code="internal_server_error"))
    assert data.endswith(b"\n\ndata: [DONE]\n\n")
    *_, error, last = parsed(data)
    assert (error["type"], error["message"], last["type"]) == ("error", "It failed.", "response.failed")
    response = last["response"]
    assert isinstance(response, dict)
    assert response["status"] == "failed"
    assert response["error"] == {"code": "server_error", "message": "It failed."}
    assert not made.is_complete


def test_a_failure_before_there_is_a_response() -> None:
    made = encoder()
    (event,) = parsed(made.failure(Refusal(400, "It is wrong.", param="input")))
    assert event == {
        "type": "error",
        "sequence_number": 0,
        "code": "invalid_request",
        "message": "It is wrong.",
        "param": "input",
        "error": {
            "type": "invalid_request_error",
            "code": "invalid_request",
            "message": "It is wrong.",
            "param": "input",
        },
    }


def test_what_a_newer_core_sends_is_skipped() -> None:
    made = encoder()
    assert made.encode(chat_pb2.ChatStreamResponse()) == b""
    progress = chat_pb2.PromptProgress(processed_tokens=1, total_tokens=2)
    assert made.encode(chat_pb2.ChatStreamResponse(prompt_progress=progress)) == b""


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "instructions": "Be brief.", "temperature": 0, "top_p": 0.5, "max_output_tokens": 9,
            "metadata": {"a": "b"}, "truncation": "auto", "reasoning": {"effort": "low", "summary": "auto"},
            "text": {"format": {"type": "json_object"}, "verbosity": "low"}, "parallel_tool_calls": False,
            "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}],
            "tool_choice": {"type": "function", "name": "f"}, "max_tool_calls": 3, "top_logprobs": 4,
            "safety_identifier": "s", "prompt_cache_key": "k", "previous_response_id": "resp_1",
            "store": False, "presence_penalty": 1, "frequency_penalty": -1,
        },
        {"tools": [{"type": "function", "name": "f"}],
         "tool_choice": {"type": "allowed_tools", "tools": [{"type": "function", "name": "f"}]}},
    ],
)  # fmt: skip
def test_the_resource_has_every_field_of_the_specification(fields: dict[str, object]) -> None:
    body = validate(ResponseBody, {"model": "m", "input": "Hello", **fields})
    made = Draft(body, created=7).resource("completed", [], completed=8)
    required = {name for name, field in spec.ResponseResource.model_fields.items() if field.is_required()}
    assert len(required) == 31
    assert set(made) == required
    spec.ResponseResource.model_validate(made)
    for name in set(fields) - {"tools", "text", "tool_choice"}:
        assert made[name] == fields[name]


@given(
    st.lists(st.tuples(st.sampled_from("rt"), st.text(min_size=1, max_size=3)), max_size=6),
    st.lists(st.lists(st.text(max_size=3), min_size=1, max_size=3), max_size=3),
)
def test_the_streamed_and_the_whole_answer_agree(
    texts: list[tuple[str, str]], calls: list[list[str]]
) -> None:
    # A model thinks, then answers, then calls.
    texts = sorted(texts, key=lambda entry: entry[0])
    events = [reasoning(text) if kind == "r" else content(text) for kind, text in texts]
    for index, pieces in enumerate(calls):
        events.append(tool(index, call_id=f"call_{index}", name="f"))
        events.extend(tool(index, piece) for piece in pieces)
    streamed = run(*events, finished(), completed())[-1]["response"]["output"]  # type: ignore[index]  # JSON
    text = "".join(text for kind, text in texts if kind == "t")
    message = chat_pb2.Message(
        content=[chat_pb2.ContentPart(text=text)] if text else [],
        reasoning="".join(text for kind, text in texts if kind == "r"),
        tool_calls=[
            chat_pb2.ToolCall(
                id=f"call_{index}", function=chat_pb2.FunctionCall(name="f", arguments_json="".join(pieces))
            )
            for index, pieces in enumerate(calls)
        ],
    )
    choice = chat_pb2.ChatChoice(message=message, finish_reason=sampling_pb2.FINISH_REASON_STOP)
    whole = [{**item, "id": ""} for item in output_items(choice, Ids())]
    assert [{**item, "id": ""} for item in streamed] == whole
