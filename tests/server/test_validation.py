"""Validation on requests nobody would write by hand."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.errors import ContextLengthError, OsaurusError
from osaurus_grpc.server import convert
from osaurus_grpc.server.status import status_from_error
from osaurus_grpc.server.validation import (
    FieldViolationsError,
    chat_violations,
    require_valid,
    vocabulary_violations,
)
from osaurus_grpc.v1 import chat_pb2, sampling_pb2

# Clients may refuse a call whose trailers are larger (8 KiB is gRPC's soft limit).
TRAILER_BYTES = 8 * 1024

any_float = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, 2.0, math.nan, math.inf, -math.inf])
any_int = st.integers(-(2**31), 2**31 - 1)
some_text = st.text(max_size=20)


@st.composite
def samplings(draw: st.DrawFn) -> sampling_pb2.SamplingParams:
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    values: dict[str, object] = {name: draw(any_float) for name in names if draw(st.booleans())}
    for name in ("top_k", "repetition_context", "max_tokens", "top_logprobs"):
        if draw(st.booleans()):
            values[name] = draw(any_int)
    values["logit_bias"] = draw(st.dictionaries(any_int, any_float, max_size=3))
    values["stop"] = draw(st.lists(some_text, max_size=20))
    return sampling_pb2.SamplingParams(**values)  # type: ignore[arg-type]


parts = st.sampled_from(["none", "text", "empty", "image"]).map(
    lambda kind: {
        "none": chat_pb2.ContentPart(),
        "text": chat_pb2.ContentPart(text="x"),
        "empty": chat_pb2.ContentPart(text=""),
        "image": chat_pb2.ContentPart(image=chat_pb2.ImageContent(data=b"x")),
    }[kind]
)
messages = st.builds(
    chat_pb2.Message,
    role=st.integers(-1, 7),
    content=st.lists(parts, max_size=3),
    name=some_text,
    tool_calls=st.lists(st.builds(chat_pb2.ToolCall, id=some_text), max_size=2),
)
requests = st.builds(
    chat_pb2.ChatRequest,
    model=st.text(max_size=600),
    messages=st.lists(messages, max_size=4),
    sampling=samplings(),
    choice_count=st.none() | any_int,
    max_context_tokens=st.none() | any_int,
    chat_template_kwargs_json=st.sampled_from(["", "{}", "[]", "{", '{"a": NaN}', "null"]) | some_text,
    tool_choice=st.builds(chat_pb2.ToolChoice, mode=st.integers(-1, 6)),
)


@given(requests)
def test_whatever_is_wrong_is_told_and_whatever_passes_converts(request: chat_pb2.ChatRequest) -> None:
    violations = chat_violations(request)
    if violations:
        assert all(violation.description.endswith(".") for violation in violations)
        # A field path leads to a field.
        for violation in violations:
            name = violation.field.partition(".")[0].partition("[")[0]
            assert name in chat_pb2.ChatRequest.DESCRIPTOR.fields_by_name
        return
    params = convert.sampling_from_proto(request.sampling, vocab_size=100)
    assert 0 <= params.temperature <= 2
    assert 0 < params.top_p <= 1
    assert 0 <= params.min_p <= 1
    assert 0 <= params.top_k < 100
    assert 0 < params.repetition_penalty <= 10
    assert all(-100 <= bias <= 100 for bias in params.logit_bias.values())
    for message in request.messages:
        convert.message_from_proto(message)
    assert isinstance(convert.template_arguments(request), dict)


@given(requests)
def test_every_refusal_fits_into_the_trailers(request: chat_pb2.ChatRequest) -> None:
    refusals: list[OsaurusError] = []
    try:
        require_valid(chat_violations(request))
    except FieldViolationsError as error:
        refusals.append(error)
    assert all(_trailer_bytes(refusal) < TRAILER_BYTES for refusal in refusals)


def _trailer_bytes(error: OsaurusError) -> int:
    status = status_from_error(error)
    ((_, details),) = status.trailing_metadata or ()
    # Binary trailers travel in base64, the message percent-encoded.
    return len(details) * 4 // 3 + 3 * len((status.details or "").encode())


def test_the_largest_refusals_fit_too() -> None:
    request = chat_pb2.ChatRequest(model="模" * 10_000)
    for _ in range(1_000):
        request.messages.add(name="模" * 1_000)
    assert _trailer_bytes(FieldViolationsError(chat_violations(request))) < TRAILER_BYTES
    assert _trailer_bytes(ContextLengthError(limit=2**31, prompt_tokens=2**31)) < TRAILER_BYTES


def test_ids_beyond_the_vocabulary() -> None:
    sampling = sampling_pb2.SamplingParams(logit_bias={99: 1.0, 100: 1.0})
    (violation,) = vocabulary_violations(sampling, 100)
    assert violation.field == "sampling.logit_bias"
    assert "100" in violation.description


def test_the_bounds_themselves_are_in_range() -> None:
    for values in (
        {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 10},
        {"temperature": 2, "min_p": 1, "repetition_context": -1, "presence_penalty": -2},
        {"frequency_penalty": 2, "max_tokens": 1, "top_logprobs": 20, "stop": ["x" * 1024] * 16},
        {"repetition_context": 0, "top_logprobs": 0, "logit_bias": {0: -100, 1: 100}},
    ):
        request = chat_pb2.ChatRequest(sampling=sampling_pb2.SamplingParams(**values))  # type: ignore[arg-type]
        request.messages.add(role=chat_pb2.ROLE_USER).content.add(text="x")
        assert chat_violations(request) == []
