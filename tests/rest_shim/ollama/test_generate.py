from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.v1 import chat_pb2, completion_pb2, sampling_pb2
from rest_shim.bodies import validate
from rest_shim.errors import Refusal
from rest_shim.ollama import convert, generate, go_template, schema
from rest_shim.ollama.generate import GenerateEncoder

from ..scripted_core import answer, completed, content, finished, response, started, timings, usage

NOW = 1795353951_755_236_989
HEAD = '{"model":"SmolLM2:LATEST","created_at":"2026-11-22T13:25:51.755236989Z","response":'
METRICS = (
    '"total_duration":1234567890,"load_duration":1,"prompt_eval_count":25,'
    '"prompt_eval_duration":12345678,"eval_count":15,"eval_duration":234567890'
)
LOGPROB = sampling_pb2.ChosenTokenLogprob(chosen=sampling_pb2.TokenLogprob(token=b"I", logprob=-1.0))


def body(**fields: object) -> schema.GenerateBody:
    return validate(schema.GenerateBody, {"model": "m", "prompt": "Hi", **fields})


def refused(**fields: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        generate.complete_request(body(**fields))
    assert caught.value.status == 400
    return caught.value


def test_a_prompt_is_a_conversation_of_one_turn() -> None:
    assert not generate.is_completion(body())
    assert generate.chat_request(body()) == chat_pb2.ChatRequest(
        model="m",
        messages=[chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text="Hi")])],
        sampling=sampling_pb2.SamplingParams(),
        include_token_ids=True,
    )


def test_a_conversation_with_everything() -> None:
    made = generate.chat_request(
        body(
            system="Be nice.",
            context=[1, 2.0, 3],
            images=["iVBORw0KGgo="],
            format="json",
            think="low",
            keep_alive="5m",
            options={"num_predict": 3, "num_ctx": 64},
            logprobs=True,
        )
    )
    assert [turn.role for turn in made.messages] == [chat_pb2.ROLE_SYSTEM, chat_pb2.ROLE_USER]
    assert made.messages[1].content[1].image.mime_type == "image/png"
    assert list(made.context_token_ids) == [1, 2, 3]
    assert made.response_format.HasField("json_object")
    assert (made.reasoning_enabled, made.reasoning_effort) == (True, "low")
    assert (made.keep_alive.seconds, made.sampling.max_tokens, made.max_context_tokens) == (300, 3, 64)
    assert made.sampling.HasField("top_logprobs")


def test_raw_is_a_text_to_continue() -> None:
    raw = body(raw=True, options={"num_predict": 0}, format={"type": "object"})
    assert generate.is_completion(raw)
    made = generate.complete_request(raw)
    assert (made.text, made.sampling.max_tokens, made.include_token_ids) == ("Hi", 2**31 - 1, False)
    assert json.loads(made.response_format.json_schema.schema_json) == {"type": "object"}


def test_a_template_is_run() -> None:
    templated = body(system="Be nice.", template="{{ .System }} | {{ .Prompt }}")
    assert generate.is_completion(templated)
    made = generate.complete_request(templated)
    assert (made.text, made.include_token_ids, made.HasField("suffix")) == ("Be nice. | Hi", True, False)


def test_a_suffix_is_the_end_of_a_gap() -> None:
    assert generate.complete_request(body(suffix="end")).suffix == "end"
    templated = generate.complete_request(body(suffix="end", template="<P>{{ .Prompt }}<S>{{ .Suffix }}<M>"))
    assert (templated.text, templated.HasField("suffix")) == ("<P>Hi<S>end<M>", False)


@pytest.mark.parametrize("field", [{"system": "s"}, {"template": "t"}, {"context": [1]}])
def test_raw_excludes_what_makes_a_prompt(field: dict[str, object]) -> None:
    # As recorded from Ollama's own server.
    text = "raw mode does not support template, system, or context"
    assert refused(raw=True, **field).message == text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"template": "t", "context": [1]}, "context"),
        ({"raw": True, "images": ["iVBORw0KGgo="]}, "images"),
        ({"suffix": "x", "system": "s"}, "system"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, object], param: str) -> None:
    assert refused(**fields).param == param


def test_a_template_that_is_not_run_here() -> None:
    refusal = refused(template="{{ range .Messages }}{{ end }}")
    assert refusal.param == "template"
    assert go_template.SUPPORTED in refusal.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"context": [-1]}, "context[0]"),
        ({"context": [2**31]}, "context[0]"),
        ({"context": "x"}, "context"),
        ({"raw": "yes"}, "raw"),
        ({"images": [5]}, "images[0]"),
        ({"options": {"num_predict": "5"}}, "options.num_predict"),
    ],
)
def test_the_field_that_is_wrong_is_named(fields: dict[str, object], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        body(**fields)
    assert caught.value.param == param


def test_images_that_are_none() -> None:
    with pytest.raises(Refusal) as caught:
        generate.chat_request(body(images=["@@@"]))
    assert caught.value.param == "images[0]"


def test_a_whole_answer_of_a_conversation() -> None:
    whole = response("Hello")
    whole.prompt_token_ids.extend([1, 2])
    choice = whole.choices[0]
    choice.token_ids.extend([3])
    choice.message.reasoning = "hm"
    choice.logprobs.tokens.append(LOGPROB)
    made = generate.generate_json(whole, body(), NOW)
    assert list(made) == [
        "model", "created_at", "response", "thinking", "done", "done_reason", "context", "total_duration",
        "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration",
        "logprobs",
    ]  # fmt: skip
    assert (made["response"], made["thinking"], made["context"]) == ("Hello", "hm", [1, 2, 3])


@pytest.mark.parametrize(("raw", "keys"), [(True, []), (False, ["context"])])
def test_a_whole_answer_of_a_continuation(raw: bool, keys: list[str]) -> None:
    choice = completion_pb2.CompletionChoice(
        text="Hello", finish_reason=sampling_pb2.FINISH_REASON_LENGTH, token_ids=[3]
    )
    whole = completion_pb2.CompleteResponse(
        choices=[choice], usage=usage(), timings=timings(), prompt_token_ids=[1, 2]
    )
    made = generate.generate_json(whole, body(raw=raw, template="" if raw else "{{ .Prompt }}"), NOW)
    assert list(made) == [
        "model", "created_at", "response", "done", "done_reason", *keys, "total_duration", "load_duration",
        "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration",
    ]  # fmt: skip
    assert (made["response"], made["done_reason"]) == ("Hello", "length")


def encoder(*, is_raw: bool = False) -> GenerateEncoder:
    return GenerateEncoder("SmolLM2:LATEST", is_raw=is_raw, clock=lambda: NOW)


@pytest.mark.parametrize(("is_raw", "context"), [(False, '"context":[1,2,3,4],'), (True, "")])
def test_the_bytes_of_a_whole_stream(is_raw: bool, context: str) -> None:
    events = list(answer("I'm", " doing"))
    events[0].started.prompt_token_ids.extend([1, 2])
    events[-2].choice_finished.token_ids.extend([3, 4])
    made = encoder(is_raw=is_raw)
    data = b"".join(made.encode(event) for event in events)
    assert data.decode("ascii").splitlines() == [
        HEAD + '"I\'m","done":false}',
        HEAD + '" doing","done":false}',
        HEAD + '"","done":true,"done_reason":"stop",' + context + METRICS + "}",
    ]
    assert made.is_complete


def test_the_events_of_a_continuation() -> None:
    made = encoder(is_raw=True)
    events = [
        completion_pb2.CompleteStreamResponse(started=chat_pb2.ChatStarted(id="x")),
        completion_pb2.CompleteStreamResponse(prompt_progress=chat_pb2.PromptProgress()),
        completion_pb2.CompleteStreamResponse(content=chat_pb2.ContentDelta(text="a", logprobs=[LOGPROB])),
        completion_pb2.CompleteStreamResponse(
            choice_finished=chat_pb2.ChoiceFinished(finish_reason=sampling_pb2.FINISH_REASON_LENGTH)
        ),
        completion_pb2.CompleteStreamResponse(
            completed=chat_pb2.ChatCompleted(usage=usage(), timings=timings())
        ),
    ]
    lines = [json.loads(line) for line in b"".join(made.encode(event) for event in events).splitlines()]
    assert list(lines[0]) == ["model", "created_at", "response", "done", "logprobs"]
    assert lines[1]["done_reason"] == "length"


def test_thinking_has_its_own_key() -> None:
    event = chat_pb2.ChatStreamResponse(reasoning=chat_pb2.ReasoningDelta(text="hm"))
    assert encoder().encode(event).decode() == HEAD + '"","thinking":"hm","done":false}\n'


def test_residence() -> None:
    made = generate.residence_json("m", "load", NOW)
    assert list(made) == ["model", "created_at", "response", "done", "done_reason"]
    assert made["response"] == ""


_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=4)
_DELTA = st.one_of(
    _TEXT.map(content),
    _TEXT.map(lambda text: chat_pb2.ChatStreamResponse(reasoning=chat_pb2.ReasoningDelta(text=text))),
    st.just(chat_pb2.ChatStreamResponse()),
    st.just(chat_pb2.ChatStreamResponse(prompt_progress=chat_pb2.PromptProgress(total_tokens=3))),
)


def _joined(lines: Iterable[dict[str, object]], key: str) -> str:
    return "".join(str(line.get(key, "")) for line in lines)


@given(st.lists(_DELTA, max_size=12))
def test_every_order_of_events_keeps_the_form_and_loses_nothing(
    events: list[chat_pb2.ChatStreamResponse],
) -> None:
    made = encoder()
    data = b"".join(made.encode(event) for event in [started(), *events, finished(), completed()]).decode()
    # ollama-python cuts lines as str.splitlines does, which knows more line ends than "\n".
    lines = [json.loads(line) for line in data.splitlines()]
    assert data.count("\n") == len(lines)
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert _joined(lines, "response") == "".join(event.content.text for event in events)
    assert _joined(lines, "thinking") == "".join(event.reasoning.text for event in events)
    assert made.is_complete


def test_a_failure_is_one_line() -> None:
    assert encoder().failure(Refusal(503, "gone\nfor good")) == b'{"error":"gone for good"}\n'


def test_the_time_is_in_nanoseconds() -> None:
    assert convert.timestamp(NOW) == "2026-11-22T13:25:51.755236989Z"


_SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
_KEYS = st.sampled_from(("temperature", "stop", "num_ctx", "type", "num_predict", "seed"))
_ANY = st.recursive(
    _SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(schema.GenerateBody.model_fields)), _ANY, max_size=6))
def test_any_json_gives_a_request_or_a_refusal(fields: dict[str, object]) -> None:
    try:
        asked = validate(schema.GenerateBody, {"model": "m", "prompt": "p", **fields})
        completes = generate.is_completion(asked)
        made = generate.complete_request(asked) if completes else generate.chat_request(asked)
    except Refusal as refusal:
        assert refusal.param  # noqa: PT017 - either outcome is right
    else:
        assert made.SerializeToString() is not None
