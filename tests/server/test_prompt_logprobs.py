"""Log-probabilities of prompts through Complete and CompleteStream, on a real engine."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest

from osaurus_grpc.server import prompts
from osaurus_grpc.server.fold import CompletionFold
from osaurus_grpc.v1 import completion_pb2, inference_service_pb2, sampling_pb2
from tests.server.cores import TINY, failure

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEXT = "Once upon a time there was a dinosaur."


def request_of(text: str = TEXT, *, prompt_logprobs: int | None = 2, **sampling: Any) -> Any:
    values = {"temperature": 0.0, "max_tokens": 4, "top_logprobs": 2, **sampling}
    return completion_pb2.CompleteRequest(
        model=TINY,
        text=text,
        sampling=sampling_pb2.SamplingParams(**values),
        include_token_ids=True,
        prompt_logprobs=prompt_logprobs,
    )


async def events_of(inference: Any, request: completion_pb2.CompleteRequest) -> Any:
    return [
        event
        async for event in inference.CompleteStream(completion_pb2.CompleteStreamRequest(completion=request))
    ]


async def test_every_token_of_the_prompt_is_told(inference: Any) -> None:
    plain = await inference.Complete(request_of(prompt_logprobs=None))

    response = await inference.Complete(request_of())

    scored = response.prompt_logprobs
    assert [token.token_id for token in scored] == list(response.prompt_token_ids)
    assert b"".join(token.token for token in scored).decode() == TEXT
    assert not scored[0].HasField("logprob")
    assert not scored[0].top
    for token in scored[1:]:
        assert token.logprob < 0
        assert len(token.top) == 2
        assert token.top[0].logprob >= max(token.top[1].logprob, token.logprob)
    assert response.choices[0].token_ids == plain.choices[0].token_ids
    assert not plain.prompt_logprobs


async def test_they_are_those_of_answers(inference: Any) -> None:
    """What was generated, as a prompt, has the figures that it had when it was generated."""
    answered = await inference.Complete(request_of(prompt_logprobs=None, max_tokens=12))
    request = request_of(max_tokens=0, prompt_logprobs=1)
    request.tokens.token_ids.extend([*answered.prompt_token_ids, *answered.choices[0].token_ids])

    response = await inference.Complete(request)

    said = answered.choices[0].logprobs.tokens
    again = response.prompt_logprobs[-12:]
    assert [token.token_id for token in again] == [token.chosen.token_id for token in said]
    for token, before in zip(again, said, strict=True):
        assert token.logprob == pytest.approx(before.chosen.logprob, abs=1e-3)
        # Greedy: the token is the most probable one, to the last bit.
        assert token.logprob == token.top[0].logprob


async def test_no_token_may_be_asked_for(inference: Any) -> None:
    request = request_of(max_tokens=0)
    request.echo = True

    response = await inference.Complete(request)

    (choice,) = response.choices
    assert (choice.text, list(choice.logprobs.tokens)) == (TEXT, [])
    assert choice.finish_reason == sampling_pb2.FINISH_REASON_LENGTH
    assert response.usage.completion_tokens == 0
    assert response.usage.prompt_tokens == len(response.prompt_logprobs)
    request.ClearField("prompt_logprobs")
    bare = await inference.Complete(request)
    assert (bare.choices[0].text, len(bare.prompt_logprobs)) == (TEXT, 0)
    # The whole context may be the prompt then.
    request.max_context_tokens = response.usage.prompt_tokens
    assert (await inference.Complete(request)).choices[0].text == TEXT


async def test_a_stream_tells_the_prompt_before_its_answers(inference: Any) -> None:
    request = request_of("word " * 1_500, temperature=1.0, seed=3)
    request.choice_count = 3
    request.echo = True

    events = await events_of(inference, request)

    kinds = [event.WhichOneof("event") for event in events]
    scores = kinds.count("prompt_logprobs")
    assert scores > 1
    assert kinds[: scores + 1] == ["started"] + ["prompt_logprobs"] * scores
    echoes = [event.content for event in events[scores + 1 : scores + 4]]
    assert [(echo.choice_index, echo.text, len(echo.logprobs)) for echo in echoes] == [
        (index, request.text, 0) for index in range(3)
    ]
    fold = CompletionFold(wants_logprobs=True)
    for event in events:
        fold.feed(event)
    folded, whole = fold.response(), await inference.Complete(request)
    for one, other in zip(folded.choices, whole.choices, strict=True):
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
    assert [token.token_id for token in folded.prompt_logprobs] == list(folded.prompt_token_ids)
    for one, other in zip(folded.prompt_logprobs[1:], whole.prompt_logprobs[1:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


async def test_the_end_token_is_told_where_it_ended_the_answer(inference: Any) -> None:
    # A bias that makes the model end its answer, and nothing else could.
    (end,) = (
        await inference.Complete(request_of("<|im_end|>", max_tokens=0, prompt_logprobs=None))
    ).prompt_token_ids
    request = request_of(max_tokens=1, top_logprobs=1)
    request.sampling.logit_bias[end] = 100.0

    response = await inference.Complete(request)

    (choice,) = response.choices
    assert choice.finish_reason == sampling_pb2.FINISH_REASON_STOP
    assert list(choice.logprobs.tokens) == []
    assert (choice.end_logprob.chosen.token, choice.end_logprob.chosen.token_id) == (b"<|im_end|>", end)
    assert math.isclose(choice.end_logprob.chosen.logprob, 0.0, abs_tol=1e-3)
    request.sampling.ClearField("top_logprobs")
    assert not (await inference.Complete(request)).choices[0].HasField("end_logprob")
    request.sampling.ignore_eos = True
    request.sampling.top_logprobs = 1
    assert not (await inference.Complete(request)).choices[0].HasField("end_logprob")


@pytest.mark.parametrize(("value", "field"), [(-1, "prompt_logprobs"), (21, "prompt_logprobs")])
async def test_how_many_are_told_is_bounded(inference: Any, value: int, field: str) -> None:
    error = await failure(inference.Complete(request_of(prompt_logprobs=value)))

    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


async def test_the_message_is_bounded(inference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = await inference.CountTokens(inference_service_pb2.CountTokensRequest(model=TINY, text=TEXT))
    monkeypatch.setattr(prompts, "MAX_PROMPT_LOGPROBS", 3 * counted.token_count)

    assert (await inference.Complete(request_of())).prompt_logprobs
    error = await failure(inference.Complete(request_of(prompt_logprobs=3)))

    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["prompt_logprobs"])
