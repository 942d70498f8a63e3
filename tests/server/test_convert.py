"""Converters: what goes in comes out."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.chat.types import Role
from osaurus_grpc.engine.types import SamplingParams, Token, TokenLogprob
from osaurus_grpc.errors import ContextLengthError
from osaurus_grpc.models.catalog import Capability, ModelEntry
from osaurus_grpc.models.residency import Residence, ResidenceState
from osaurus_grpc.server import convert, run
from osaurus_grpc.v1 import chat_pb2, model_pb2, sampling_pb2

VOCAB = 1000


def sampling(**values: object) -> SamplingParams:
    return convert.sampling_from_proto(sampling_pb2.SamplingParams(**values), vocab_size=VOCAB)  # type: ignore[arg-type]


def test_unset_sampling_is_the_default_and_zero_is_not() -> None:
    assert sampling() == SamplingParams()
    assert sampling(temperature=0).temperature == 0
    assert sampling().temperature == 0.7


@given(
    temperature=st.floats(0, 2, width=32),
    top_p=st.floats(0, 1, width=32, exclude_min=True),
    min_p=st.floats(0, 1, width=32),
    penalty=st.floats(0, 10, width=32, exclude_min=True),
    presence=st.floats(-2, 2, width=32),
    frequency=st.floats(-2, 2, width=32),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32)),
)
def test_sampling_values_arrive(
    temperature: float,
    top_p: float,
    min_p: float,
    penalty: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
) -> None:
    params = sampling(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    assert params.temperature == temperature
    assert params.top_p == top_p
    assert params.min_p == min_p
    assert params.repetition_penalty == penalty
    assert params.presence_penalty == presence
    assert params.frequency_penalty == frequency
    assert dict(params.logit_bias) == bias
    assert params.seed is None


@given(top_k=st.integers(0, 2**31 - 1))
def test_a_top_k_that_keeps_everything_is_off(top_k: int) -> None:
    assert sampling(top_k=top_k).top_k == (top_k if top_k < VOCAB else 0)


def test_looking_back_at_nothing_is_no_penalty() -> None:
    assert sampling(repetition_penalty=1.5, repetition_context=0).repetition_penalty == 1.0
    params = sampling(repetition_penalty=1.5, repetition_context=-1)
    assert (params.repetition_penalty, params.repetition_context) == (1.5, -1)


@given(nanos=st.integers(-(10**18), 10**18))
def test_durations_round_to_the_nanosecond(nanos: int) -> None:
    duration = convert.duration_from_seconds(nanos / 1e9)
    assert abs(duration.ToNanoseconds() - nanos) <= max(1, abs(nanos) * 2**-52)
    assert convert.seconds_from_duration(duration) == pytest.approx(nanos / 1e9)


def test_a_measured_duration_is_never_zero() -> None:
    assert convert.measured_duration(0.0) == Duration(nanos=1)
    assert convert.measured_duration(1.5) == Duration(seconds=1, nanos=500_000_000)


@given(texts=st.lists(st.text(), max_size=5), role=st.sampled_from([1, 2, 3, 4, 5]))
def test_messages(texts: list[str], role: int) -> None:
    message = chat_pb2.Message(
        role=role,  # type: ignore[arg-type]
        content=[chat_pb2.ContentPart(text=text) for text in texts],
        name="n",
        reasoning="r",
        tool_calls=[
            chat_pb2.ToolCall(
                id="1", function=chat_pb2.FunctionCall(name="f", arguments_json='{"b": 1.0, "a":2}')
            )
        ],
    )
    converted = convert.message_from_proto(message)
    assert converted.content == "".join(texts)
    assert converted.role.value == chat_pb2.Role.Name(role).removeprefix("ROLE_").lower()  # type: ignore[arg-type]
    assert converted.name == "n"
    assert converted.reasoning == "r"
    assert converted.tool_calls[0].arguments_json == '{"b": 1.0, "a":2}'


def test_every_role_capability_and_state_has_a_name_on_the_wire() -> None:
    roles = {convert.message_from_proto(chat_pb2.Message(role=role)).role for role in (1, 2, 3, 4, 5)}
    assert roles == set(Role)
    for state in ResidenceState:
        model = convert.model_to_proto(_entry(), Residence(state), is_default=False)
        assert model_pb2.ModelState.Name(model.state) == f"MODEL_STATE_{state.name}"
    model = convert.model_to_proto(_entry(), Residence(ResidenceState.LOADED), is_default=True)
    named = [model_pb2.Capability.Name(capability) for capability in model.capabilities]
    assert sorted(named) == sorted(f"CAPABILITY_{capability.name}" for capability in Capability)


def _entry() -> ModelEntry:
    return ModelEntry(
        id="m",
        repo_id="o/M",
        path=Path("/nowhere"),
        size_bytes=2**40,
        digest="0" * 64,
        modify_time=datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC),
        architecture="llama",
        parameter_count=7 * 10**9,
        quantization="4bit",
        context_length=4096,
        embedding_length=64,
        capabilities=frozenset(Capability),
        is_managed=True,
    )


def test_a_model_with_its_times() -> None:
    expires = datetime(2026, 1, 3, tzinfo=UTC)
    model = convert.model_to_proto(
        _entry(),
        Residence(ResidenceState.LOADED, resident_bytes=5, expire_time=expires),
        is_default=True,
        chat_template="{{ x }}",
    )
    assert model.modify_time.ToDatetime(UTC) == _entry().modify_time
    assert model.expire_time.ToDatetime(UTC) == expires
    assert (model.size_bytes, model.parameter_count, model.resident_bytes) == (2**40, 7 * 10**9, 5)
    assert model.chat_template == "{{ x }}"


def test_logprobs_keep_bytes_that_are_no_text() -> None:
    token = Token(3, -0.5, (TokenLogprob(3, -0.5), TokenLogprob(4, -math.inf)))
    converted = convert.logprobs_to_proto(token, lambda token_id: bytes([0xF0 + token_id]))
    assert converted.chosen.token == b"\xf3"
    assert [top.token_id for top in converted.top] == [3, 4]
    assert converted.top[1].logprob == -math.inf


@given(
    prompt=st.integers(1, 3000),
    context=st.integers(1, 3000),
    asked=st.none() | st.integers(1, 5000),
    used=st.none() | st.integers(1, 5000),
    cap=st.integers(0, 5000),
)
def test_budgets(prompt: int, context: int, asked: int | None, used: int | None, cap: int) -> None:
    request = chat_pb2.ChatRequest(max_context_tokens=used)
    if asked is not None:
        request.sampling.max_tokens = asked
    limit = context if used is None else min(context, used)
    arguments = {"prompt_tokens": prompt, "context_length": context, "max_output_tokens": cap}
    if prompt >= limit:
        with pytest.raises(ContextLengthError):
            run.output_budget(request, **arguments)
        return

    budget = run.output_budget(request, **arguments)

    wanted = min(2048 if asked is None else asked, cap or 10**9)
    assert 1 <= budget.max_tokens <= wanted
    assert prompt + budget.max_tokens <= limit
    is_full = prompt + budget.max_tokens == limit and budget.max_tokens < wanted
    expected = sampling_pb2.FINISH_REASON_CONTEXT_LENGTH if is_full else sampling_pb2.FINISH_REASON_LENGTH
    assert budget.reason == expected
