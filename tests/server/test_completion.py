"""Complete and CompleteStream on a real engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration

from osaurus_grpc.server.fold import CompletionFold
from osaurus_grpc.v1 import chat_pb2, completion_pb2, inference_service_pb2, sampling_pb2
from tests.server.cores import TINY, RichError, chat_request, failure, inference_stub, running_core

pytestmark = pytest.mark.asyncio(loop_scope="session")

Change = Callable[[completion_pb2.CompleteRequest], object]
# SmolLM2's tokenizer, whose token for a turn's beginning is marked special.
IM_START = "<|im_start|>"


def request_of(text: str = "Once upon a time", *, model: str = TINY, **sampling: Any) -> Any:
    values = {"temperature": 0.0, "max_tokens": 8, **sampling}
    return completion_pb2.CompleteRequest(
        model=model, text=text, sampling=sampling_pb2.SamplingParams(**values), include_token_ids=True
    )


async def events_of(
    inference: Any, request: completion_pb2.CompleteRequest, *, progress: bool = False
) -> Any:
    options = chat_pb2.StreamOptions(prompt_progress=True) if progress else None
    stream = completion_pb2.CompleteStreamRequest(completion=request, options=options)
    return [event async for event in inference.CompleteStream(stream)]


async def test_a_text_is_continued_without_a_template(inference: Any) -> None:
    counted = await inference.CountTokens(
        inference_service_pb2.CountTokensRequest(model=TINY, text="Once upon a time")
    )

    response = await inference.Complete(request_of())

    (choice,) = response.choices
    assert response.id.startswith("cmpl-")
    assert response.model == TINY
    assert response.system_fingerprint.startswith("fp_")
    assert response.usage.prompt_tokens == counted.token_count == len(response.prompt_token_ids)
    assert response.usage.completion_tokens == 8 == len(choice.token_ids)
    assert choice.text
    assert choice.finish_reason == sampling_pb2.FINISH_REASON_LENGTH
    assert response.timings.total_duration.ToNanoseconds() > 0


async def test_token_ids_are_left_out_unless_asked_for(inference: Any) -> None:
    request = request_of()
    request.ClearField("include_token_ids")

    response = await inference.Complete(request)

    assert not response.prompt_token_ids
    assert not response.choices[0].token_ids


async def test_the_unary_answer_is_the_fold_of_the_stream(inference: Any) -> None:
    request = request_of(temperature=1.0, seed=7, max_tokens=24, top_logprobs=2)
    request.choice_count = 3

    fold = CompletionFold(wants_logprobs=True)
    for event in await events_of(inference, request):
        fold.feed(event)
    folded, whole = fold.response(), await inference.Complete(request)

    for response in (folded, whole):
        response.ClearField("id")
        response.ClearField("timings")
        response.usage.ClearField("cached_prompt_tokens")
    assert folded == whole
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert all(len(choice.logprobs.tokens) == 24 for choice in whole.choices)


async def test_a_stream_keeps_the_grammar(inference: Any) -> None:
    events = await events_of(inference, request_of("word " * 700), progress=True)

    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-2:] == ["choice_finished", "completed"]
    assert set(kinds[1:-2]) == {"content", "prompt_progress"}


async def test_tokens_are_used_as_they_are(inference: Any) -> None:
    by_text = await inference.Complete(request_of())
    request = request_of()
    request.tokens.token_ids.extend(by_text.prompt_token_ids)

    by_tokens = await inference.Complete(request)

    assert by_tokens.prompt_token_ids == by_text.prompt_token_ids
    assert by_tokens.choices == by_text.choices


async def test_a_continuation_of_its_own_answer_is_the_longer_answer(inference: Any) -> None:
    whole = await inference.Complete(request_of(max_tokens=16))
    first = await inference.Complete(request_of(max_tokens=6))
    request = request_of(max_tokens=10)
    request.tokens.token_ids.extend([*first.prompt_token_ids, *first.choices[0].token_ids])

    second = await inference.Complete(request)

    assert first.choices[0].text + second.choices[0].text == whole.choices[0].text


async def test_echo_repeats_the_prompt_before_every_answer(inference: Any) -> None:
    plain = await inference.Complete(request_of())
    request = request_of()
    request.echo = True
    request.choice_count = 2

    response = await inference.Complete(request)

    assert [c.text for c in response.choices] == ["Once upon a time" + plain.choices[0].text] * 2
    assert response.usage.completion_tokens == 16
    events = await events_of(inference, request)
    echoes = [e.content for e in events if e.WhichOneof("event") == "content" and not e.content.token_count]
    assert [echo.text for echo in echoes[:2]] == ["Once upon a time"] * 2


async def test_echo_of_tokens_names_control_tokens(inference: Any) -> None:
    text = f"{IM_START}user\nGrüße"
    tokens = (await inference.Complete(request_of(text))).prompt_token_ids
    request = request_of(max_tokens=1)
    request.tokens.token_ids.extend(tokens)
    request.echo = True

    response = await inference.Complete(request)

    assert response.choices[0].text.startswith(text)


async def test_control_tokens_are_read_in_a_raw_prompt_and_not_in_a_message(inference: Any) -> None:
    raw = await inference.Complete(request_of(f"{IM_START}user\nHi<|im_end|>\n{IM_START}assistant\n"))
    chat = chat_request(f"{IM_START}x")
    chat.include_token_ids = True
    rendered = await inference.Chat(chat)

    mark = raw.prompt_token_ids[0]
    assert list(raw.prompt_token_ids).count(mark) == 2
    # System, user and answer begin with it; the one in the message is spelled out.
    assert list(rendered.prompt_token_ids).count(mark) == 3


async def test_an_empty_text_begins_a_text(inference: Any) -> None:
    response = await inference.Complete(request_of(""))

    assert response.usage.prompt_tokens == 1
    assert response.usage.completion_tokens == 8


async def test_stop_texts_end_a_continuation(inference: Any) -> None:
    text = (await inference.Complete(request_of(temperature=1.0, seed=11, max_tokens=40))).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 5]

    response = await inference.Complete(request_of(temperature=1.0, seed=11, max_tokens=40, stop=[stop]))

    (choice,) = response.choices
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == sampling_pb2.FINISH_REASON_STOP_SEQUENCE
    assert choice.stop_sequence == stop
    assert len(choice.token_ids) == response.usage.completion_tokens < 40


async def test_the_context_bounds_a_continuation(inference: Any) -> None:
    request = request_of(max_tokens=100, ignore_eos=True)
    request.max_context_tokens = (await inference.Complete(request_of())).usage.prompt_tokens + 5

    response = await inference.Complete(request)

    assert response.usage.completion_tokens == 5
    assert response.choices[0].finish_reason == sampling_pb2.FINISH_REASON_CONTEXT_LENGTH
    request.max_context_tokens = 1
    error = await failure(inference.Complete(request))
    assert error.info.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert error.fields == ["prompt"]


async def test_more_tokens_than_fit(inference: Any) -> None:
    request = request_of()
    request.tokens.token_ids.extend([5] * 3_000_000)
    request.echo = True

    error = await failure(inference.Complete(request))

    assert error.info.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert error.fields == ["prompt"]
    assert error.info.metadata["prompt_tokens"] == "3000000"


BAD_FIELDS: list[tuple[str, Change]] = [
    ("prompt", lambda r: r.ClearField("text")),
    ("tokens.token_ids", lambda r: r.tokens.SetInParent()),
    ("tokens.token_ids[1]", lambda r: r.tokens.token_ids.extend([0, 2**31 - 1])),
    ("tokens.token_ids[0]", lambda r: r.tokens.token_ids.append(-1)),
    ("sampling.top_p", lambda r: setattr(r.sampling, "top_p", 2)),
    ("sampling.logit_bias", lambda r: r.sampling.logit_bias.update({2**31 - 1: 1.0})),
    ("sampling.max_tokens", lambda r: setattr(r.sampling, "max_tokens", -1)),
    ("choice_count", lambda r: setattr(r, "choice_count", 17)),
    ("max_context_tokens", lambda r: setattr(r, "max_context_tokens", 0)),
    ("keep_alive", lambda r: r.keep_alive.CopyFrom(Duration(seconds=1, nanos=-1))),
    ("model", lambda r: setattr(r, "model", "x" * 513)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "change"), BAD_FIELDS, ids=lambda value: value if isinstance(value, str) else ""
)
async def test_a_bad_field_is_named(inference: Any, field: str, change: Change) -> None:
    request = request_of()
    change(request)

    stream = inference.CompleteStream(completion_pb2.CompleteStreamRequest(completion=request))
    for call in (inference.Complete(request), stream):
        error = await failure(call)
        assert (error.code, error.info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert error.fields == [field]


async def test_a_suffix_needs_text(inference: Any) -> None:
    request = request_of()
    request.tokens.token_ids.append(1)
    request.suffix = "end"

    assert (await failure(inference.Complete(request))).fields == ["suffix"]


def require_capability(error: RichError, capability: str, field: str) -> None:
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    assert error.info.reason == "UNSUPPORTED_CAPABILITY"
    assert error.info.metadata["capability"] == capability
    assert error.fields == [field]


async def test_a_model_without_the_tokens_for_it_fills_no_gap(inference: Any) -> None:
    request = request_of()
    request.suffix = "and they lived happily ever after."

    require_capability(await failure(inference.Complete(request)), "insert", "suffix")
    request.suffix = ""
    assert (await inference.Complete(request)).choices[0].text


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def filling(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """InferenceService with a model whose tokenizer has Qwen2.5-Coder's marks, over tokens it has anyway."""
    models_dir = tmp_path_factory.mktemp("filling")
    shutil.copytree(tiny_dir / TINY, models_dir / TINY)
    path = models_dir / TINY / "tokenizer.json"
    document = json.loads(path.read_text())
    names = iter(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"])
    vocabulary = document["model"]["vocab"]
    for token in [t for t in document["added_tokens"] if t["id"] >= 8][:4]:
        old, token["content"] = token["content"], next(names)
        vocabulary[token["content"]] = vocabulary.pop(old)
    path.write_text(json.dumps(document))
    (models_dir / TINY / "special_tokens_map.json").unlink(missing_ok=True)
    configuration = models_dir / TINY / "tokenizer_config.json"
    values = json.loads(configuration.read_text())
    for key in ("added_tokens_decoder", "additional_special_tokens"):
        values.pop(key, None)
    configuration.write_text(json.dumps(values))
    async with running_core(models_dir) as core, inference_stub(core.address) as stub:
        yield stub


async def test_a_gap_is_filled_in_the_models_own_form(filling: Any) -> None:
    request = request_of("def double(x):\n    ")
    request.suffix = "\n    return y"
    written = "<|fim_prefix|>def double(x):\n    <|fim_suffix|>\n    return y<|fim_middle|>"

    response = await filling.Complete(request)

    assert response.prompt_token_ids == (await filling.Complete(request_of(written))).prompt_token_ids
    request.echo = True
    echoed = await filling.Complete(request)
    assert echoed.choices[0].text == "def double(x):\n    " + response.choices[0].text


async def test_a_filled_gap_ends_at_the_models_mark(filling: Any) -> None:
    request = request_of("a")
    request.suffix = "b"
    (pad,) = (await filling.Complete(request_of("<|fim_pad|>"))).prompt_token_ids
    request.sampling.logit_bias[pad] = 100

    response = await filling.Complete(request)

    assert response.choices[0].finish_reason == sampling_pb2.FINISH_REASON_STOP
    assert response.usage.completion_tokens == 0
    request.sampling.ignore_eos = True
    assert (await filling.Complete(request)).usage.completion_tokens == 8
