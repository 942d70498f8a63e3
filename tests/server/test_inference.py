"""InferenceService on a real engine: what each call answers."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from osaurus_grpc.server.app import Core
from osaurus_grpc.server.fold import ChatFold
from osaurus_grpc.v1 import chat_pb2, inference_service_pb2, model_pb2, sampling_pb2
from tests.server.cores import TINY, chat_request, running_core, stream_request, text_of, token_counts, user
from tests.server.cores import inference_stub as connect

pytestmark = pytest.mark.asyncio(loop_scope="session")

LENGTH = sampling_pb2.FINISH_REASON_LENGTH


async def events_of(inference: Any, chat: chat_pb2.ChatRequest, *, progress: bool = False) -> list[Any]:
    return [event async for event in inference.ChatStream(stream_request(chat, progress=progress))]


async def test_a_model_is_listed_with_its_facts(inference: Any, tiny_dir: Path) -> None:
    response = await inference.ListModels(inference_service_pb2.ListModelsRequest())

    (model,) = response.models
    files = [file for file in (tiny_dir / TINY).iterdir() if file.is_file()]
    assert response.next_page_token == ""
    assert model.id == TINY
    assert model.is_default
    assert model.architecture == "llama"
    assert 0 < model.size_bytes <= sum(file.stat().st_size for file in files)
    assert len(model.digest) == 64
    assert model.parameter_count > 0
    assert model_pb2.CAPABILITY_CHAT in model.capabilities
    assert model.chat_template == ""
    assert model.modify_time.ToDatetime(UTC) <= datetime.now(UTC)


async def test_get_model_shows_the_chat_template_and_knows_the_default(inference: Any) -> None:
    by_id = await inference.GetModel(inference_service_pb2.GetModelRequest(model=TINY))
    by_default = await inference.GetModel(inference_service_pb2.GetModelRequest(model=""))

    assert by_id == by_default
    assert "messages" in by_id.model.chat_template


async def test_models_are_listed_by_the_page(tiny_dir: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        (tmp_path / name).symlink_to(tiny_dir / TINY)
    async with running_core(tmp_path) as core, connect(core.address) as inference:
        token, pages = "", []
        while True:
            page = await inference.ListModels(
                inference_service_pb2.ListModelsRequest(page_size=2, page_token=token)
            )
            pages.append([model.id for model in page.models])
            token = page.next_page_token
            if not token:
                break
        assert pages == [["a", "b"], ["c", "d"], ["e"]]
        whole = await inference.ListModels(inference_service_pb2.ListModelsRequest(page_size=5))
        assert len(whole.models) == 5
        assert whole.next_page_token == ""


async def test_a_stream_keeps_the_grammar(inference: Any) -> None:
    events = await events_of(inference, chat_request(max_tokens=6))

    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert set(kinds[1:-2]) == {"content"}
    assert kinds[-2:] == ["choice_finished", "completed"]
    assert events[0].started.id.startswith("chatcmpl-")
    assert len(events[0].started.id) >= len("chatcmpl-") + 24
    assert events[0].started.model == TINY
    assert events[-2].choice_finished.finish_reason == LENGTH


async def test_usage_and_timings_are_real(inference: Any) -> None:
    chat = chat_request(max_tokens=6)
    counted = await inference.CountTokens(inference_service_pb2.CountTokensRequest(chat=chat))

    events = await events_of(inference, chat)
    completed = events[-1].completed

    assert completed.usage.prompt_tokens == counted.token_count == events[0].started.prompt_tokens
    assert completed.usage.completion_tokens == 6
    timings = completed.timings
    phases = [timings.queue_duration, timings.prompt_duration, timings.decode_duration]
    assert all(phase.ToNanoseconds() > 0 for phase in phases)
    assert timings.total_duration.ToNanoseconds() >= sum(phase.ToNanoseconds() for phase in phases)
    assert not timings.HasField("load_duration")


async def test_cached_prompt_tokens_are_counted(inference: Any) -> None:
    chat = chat_request("A prompt that no other test sends. " * 20)

    first, second = await inference.Chat(chat), await inference.Chat(chat)

    assert 0 <= first.usage.cached_prompt_tokens < second.usage.cached_prompt_tokens
    assert second.usage.cached_prompt_tokens < second.usage.prompt_tokens == first.usage.prompt_tokens
    assert text_of(first) == text_of(second)


async def test_one_token_answers_have_no_zero_timings(inference: Any) -> None:
    response = await inference.Chat(chat_request(max_tokens=1))

    assert response.usage.completion_tokens == 1
    assert response.timings.decode_duration.ToNanoseconds() > 0


async def test_the_first_use_loads_the_model_and_says_so(tiny_dir: Path) -> None:
    async with running_core(tiny_dir) as core, connect(core.address) as inference:
        listing = inference_service_pb2.ListModelsRequest()
        before = (await inference.ListModels(listing)).models[0]
        first = await inference.Chat(chat_request())
        after = (await inference.ListModels(listing)).models[0]
        second = await inference.Chat(chat_request())

    assert before.state == model_pb2.MODEL_STATE_AVAILABLE
    assert after.state == model_pb2.MODEL_STATE_LOADED
    assert after.resident_bytes > 0
    assert first.timings.load_duration.ToNanoseconds() > 0
    assert not second.timings.HasField("load_duration")
    assert text_of(first) == text_of(second)


async def test_a_load_is_shared_and_survives_who_asked_for_it(tiny_dir: Path) -> None:
    async with running_core(tiny_dir) as core, connect(core.address) as inference:
        first = inference.Chat(chat_request())
        others = [inference.Chat(chat_request()) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        texts = {text_of(response) for response in await asyncio.gather(*others)}

        assert len(texts) == 1
        assert core.engine.stats().running == 0


async def test_keep_alive_travels_to_residency(tiny_dir: Path) -> None:
    async with running_core(tiny_dir) as core, connect(core.address) as inference:
        chat = chat_request()
        chat.keep_alive.CopyFrom(Duration(seconds=1000))
        await inference.Chat(chat)
        model = (await inference.GetModel(inference_service_pb2.GetModelRequest(model=TINY))).model
        left = model.expire_time.ToDatetime(UTC) - datetime.now(UTC)
        assert 900 < left.total_seconds() <= 1000

        # The second is the longest that there is; its end is beyond the last year of a date.
        for forever in (-1, 315_576_000_000):
            chat.keep_alive.CopyFrom(Duration(seconds=forever))
            await inference.Chat(chat)
            model = (await inference.GetModel(inference_service_pb2.GetModelRequest(model=TINY))).model
            assert not model.HasField("expire_time")


def taken_logprobs(response: chat_pb2.ChatResponse) -> list[float]:
    """The log-probabilities in an answer, each of which is 0 there afterwards."""
    places = [place for choice in response.choices for place in choice.logprobs.tokens]
    tokens = [token for place in places for token in (place.chosen, *place.top)]
    taken = [token.logprob for token in tokens]
    for token in tokens:
        token.ClearField("logprob")
    return taken


async def test_chat_is_the_fold_of_its_stream(inference: Any) -> None:
    chat = chat_request(temperature=1.0, seed=7, max_tokens=24, top_logprobs=2)
    chat.choice_count = 3

    fold = ChatFold(wants_logprobs=True)
    for event in await events_of(inference, chat):
        fold.feed(event)
    folded, whole = fold.response(), await inference.Chat(chat)

    for response in (folded, whole):
        response.ClearField("id")
        response.ClearField("timings")
        response.usage.ClearField("cached_prompt_tokens")
    # How much of the prompt is kept, and which choices share a step, moves the last digits.
    wanted = taken_logprobs(whole)
    assert len(wanted) == 3 * 24 * 3
    assert taken_logprobs(folded) == pytest.approx(wanted, abs=1e-3)
    assert folded == whole
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.system_fingerprint.startswith("fp_")


async def test_deltas_cover_their_tokens(inference: Any) -> None:
    events = await events_of(inference, chat_request(temperature=1.0, seed=3, max_tokens=64))

    covered = sum(event.content.token_count for event in events if event.WhichOneof("event") == "content")
    assert 0 < covered <= events[-1].completed.usage.completion_tokens == 64


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
async def test_a_seed_repeats_its_text(inference: Any, seed: int) -> None:
    chat = chat_request(temperature=1.0, seed=seed, max_tokens=16)

    first, second = await asyncio.gather(inference.Chat(chat), inference.Chat(chat))

    assert text_of(first) == text_of(second)


async def test_choice_i_has_seed_plus_i(inference: Any) -> None:
    chat = chat_request(temperature=1.0, seed=40, max_tokens=16)
    chat.choice_count = 3
    together = await inference.Chat(chat)

    chat.ClearField("choice_count")
    for i in range(3):
        chat.sampling.seed = 40 + i
        assert text_of(await inference.Chat(chat)) == text_of(together, i)
    assert len({text_of(together, i) for i in range(3)}) == 3


async def test_choices_count_their_tokens_together(inference: Any) -> None:
    chat = chat_request(max_tokens=5)
    chat.choice_count = 4
    response = await inference.Chat(chat)

    assert response.usage.completion_tokens == 20
    assert len({text_of(response, i) for i in range(4)}) == 1  # greedy
    single = await inference.Chat(chat_request(max_tokens=5))
    assert response.usage.prompt_tokens == single.usage.prompt_tokens


async def test_logprobs_are_of_the_chosen_tokens_and_join_to_the_text(inference: Any) -> None:
    response = await inference.Chat(chat_request(max_tokens=12, top_logprobs=3))

    tokens = response.choices[0].logprobs.tokens
    assert len(tokens) == 12
    for token in tokens:
        assert token.chosen.logprob <= 0
        assert len(token.top) == 3
        assert token.top[0].token_id == token.chosen.token_id  # greedy
        logprobs = [other.logprob for other in token.top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert sum(math.exp(logprob) for logprob in logprobs) <= 1.0001
    joined = b"".join(token.chosen.token for token in tokens).decode(errors="ignore")
    assert joined.startswith(text_of(response).rstrip("�"))


async def test_logprobs_without_alternatives(inference: Any) -> None:
    response = await inference.Chat(chat_request(top_logprobs=0))

    assert len(response.choices[0].logprobs.tokens) == 8
    assert all(not token.top for token in response.choices[0].logprobs.tokens)


async def test_logprobs_come_with_their_deltas(inference: Any) -> None:
    events = await events_of(inference, chat_request(temperature=1.0, seed=2, max_tokens=48, top_logprobs=0))

    deltas = [event.content for event in events if event.WhichOneof("event") == "content"]
    assert all(len(delta.logprobs) == delta.token_count for delta in deltas)
    assert sum(delta.token_count for delta in deltas) == 48
    assert all(delta.text for delta in deltas[:-1])


async def test_an_answer_without_a_token_has_logprobs_all_the_same(inference: Any) -> None:
    first = text_of(await inference.Chat(chat_request(max_tokens=1)))
    response = await inference.Chat(chat_request(top_logprobs=0, stop=[first]))

    assert text_of(response) == ""
    assert response.choices[0].HasField("logprobs")
    assert not response.choices[0].logprobs.tokens


async def test_no_logprobs_where_none_were_asked_for(inference: Any) -> None:
    response = await inference.Chat(chat_request())

    assert not response.choices[0].HasField("logprobs")


async def _plain_text(inference: Any, tokens: int) -> str:
    return text_of(await inference.Chat(chat_request(temperature=1.0, seed=11, max_tokens=tokens)))


async def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(inference: Any, core: Core) -> None:
    text = await _plain_text(inference, 40)
    stop = text[len(text) // 2 : len(text) // 2 + 5]
    chat = chat_request(temperature=1.0, seed=11, max_tokens=40, stop=[stop], top_logprobs=0)

    first, second = await inference.Chat(chat), await inference.Chat(chat)

    choice = first.choices[0]
    assert text_of(first) == text[: text.index(stop)]
    assert choice.finish_reason == sampling_pb2.FINISH_REASON_STOP_SEQUENCE
    assert choice.stop_sequence == stop
    assert len(choice.logprobs.tokens) <= first.usage.completion_tokens < 40
    # However the tokens came, the same ones are counted.
    assert token_counts(first.usage) == token_counts(second.usage)
    assert first.timings.decode_duration.ToNanoseconds() > 0
    assert core.engine.stats().running == 0


async def test_a_stop_ends_one_choice_and_not_the_others(inference: Any) -> None:
    chat = chat_request(temperature=1.0, seed=11, max_tokens=40)
    chat.choice_count = 2
    plain = await inference.Chat(chat)
    first, second = text_of(plain, 0), text_of(plain, 1)
    chat.sampling.stop.append(next(first[i : i + 6] for i in range(10, 40) if first[i : i + 6] not in second))

    response = await inference.Chat(chat)

    assert response.choices[0].finish_reason == sampling_pb2.FINISH_REASON_STOP_SEQUENCE
    assert text_of(response, 1) != ""
    assert response.choices[1].finish_reason == LENGTH


async def test_max_tokens_is_clipped_to_the_context(inference: Any) -> None:
    chat = chat_request()
    chat.sampling.ClearField("max_tokens")
    prompt = (await inference.CountTokens(inference_service_pb2.CountTokensRequest(chat=chat))).token_count
    chat.max_context_tokens = prompt + 5
    chat.sampling.ignore_eos = True

    response = await inference.Chat(chat)

    assert response.usage.completion_tokens == 5
    assert response.choices[0].finish_reason == sampling_pb2.FINISH_REASON_CONTEXT_LENGTH


async def test_the_servers_cap_is_a_length(tiny_dir: Path) -> None:
    async with running_core(tiny_dir, max_output_tokens=3) as core, connect(core.address) as inference:
        response = await inference.Chat(chat_request(max_tokens=30))

    assert response.usage.completion_tokens == 3
    assert response.choices[0].finish_reason == LENGTH


async def test_prompt_progress_only_where_asked_for(inference: Any) -> None:
    chat = chat_request("word " * 700, max_tokens=2)

    events = await events_of(inference, chat, progress=True)
    silent = await events_of(inference, chat)

    progress = [e.prompt_progress for e in events if e.WhichOneof("event") == "prompt_progress"]
    total = events[0].started.prompt_tokens
    assert progress
    assert all(step.total_tokens == total for step in progress)
    processed = [step.processed_tokens for step in progress]
    assert processed == sorted(processed)
    assert all(e.WhichOneof("event") != "prompt_progress" for e in silent)


async def test_a_top_k_beyond_the_vocabulary_is_off(inference: Any) -> None:
    free = chat_request(temperature=1.0, seed=5, max_tokens=16)
    wide = chat_request(temperature=1.0, seed=5, max_tokens=16, top_k=2**31 - 1)

    assert text_of(await inference.Chat(free)) == text_of(await inference.Chat(wide))


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-38, 1e-7])
async def test_a_tiny_temperature_is_greedy(inference: Any, temperature: float) -> None:
    greedy = text_of(await inference.Chat(chat_request()))

    assert text_of(await inference.Chat(chat_request(temperature=temperature))) == greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [1e-45, 1e-38, 10.0])
async def test_logprobs_are_numbers_whatever_the_penalty(
    inference: Any, penalty: float, temperature: float
) -> None:
    chat = chat_request(
        repetition_penalty=penalty, repetition_context=-1, temperature=temperature, top_p=0.9, top_logprobs=20
    )
    chat.sampling.ignore_eos = True
    tokens = (await inference.Chat(chat)).choices[0].logprobs.tokens

    assert len(tokens) == 8
    assert all(math.isfinite(other.logprob) for token in tokens for other in (token.chosen, *token.top))


async def test_logit_bias_steers(inference: Any) -> None:
    plain = await inference.Chat(chat_request(max_tokens=1, top_logprobs=0))
    chosen = plain.choices[0].logprobs.tokens[0].chosen.token_id

    banned = await inference.Chat(chat_request(max_tokens=1, top_logprobs=0, logit_bias={chosen: -100}))

    assert banned.choices[0].logprobs.tokens[0].chosen.token_id != chosen


async def test_text_parts_are_joined(inference: Any) -> None:
    parted = chat_request()
    del parted.messages[:]
    message = parted.messages.add(role=chat_pb2.ROLE_USER)
    message.content.extend([chat_pb2.ContentPart(text="Hel"), chat_pb2.ContentPart(text="lo")])

    first, second = await inference.Chat(parted), await inference.Chat(chat_request("Hello"))

    assert text_of(first) == text_of(second)
    assert token_counts(first.usage) == token_counts(second.usage)


async def test_count_tokens_of_text_has_no_template(inference: Any) -> None:
    text = inference_service_pb2.CountTokensRequest(model=TINY, text="Hello, world")
    chat = inference_service_pb2.CountTokensRequest(chat=chat_request("Hello, world"))

    bare, templated = await inference.CountTokens(text), await inference.CountTokens(chat)

    assert 0 < bare.token_count < templated.token_count
    assert bare.context_length == templated.context_length > 0


async def test_hidden_tools_are_no_obstacle(inference: Any) -> None:
    chat = chat_request()
    chat.tools.add(function=chat_pb2.FunctionTool(name="clock"))
    chat.tool_choice.mode = chat_pb2.TOOL_CHOICE_MODE_NONE

    assert text_of(await inference.Chat(chat)) == text_of(await inference.Chat(chat_request()))


async def test_thirty_streams_at_once_agree_with_one(inference: Any) -> None:
    requests = [chat_request(f"Number {i}", max_tokens=12) for i in range(30)]

    together = await asyncio.gather(*(inference.Chat(request) for request in requests))

    assert len({response.id for response in together}) == 30
    assert all(response.usage.completion_tokens == 12 for response in together)
    alone = await inference.Chat(requests[7])
    assert text_of(alone) == text_of(together[7])


async def test_a_request_id_is_echoed(inference: Any) -> None:
    given = inference.Chat(chat_request(), metadata=(("x-request-id", "abc-123"),))
    await given
    assert ("x-request-id", "abc-123") in list(await given.trailing_metadata())

    made = inference.Chat(chat_request(), metadata=(("x-request-id", "no spaces allowed"),))
    await made
    (request_id,) = [value for key, value in await made.trailing_metadata() if key == "x-request-id"]
    assert request_id.isalnum()


async def test_a_conversation_with_every_role(inference: Any) -> None:
    chat = chat_request()
    del chat.messages[:]
    chat.messages.add(role=chat_pb2.ROLE_SYSTEM).content.add(text="Be short.")
    chat.messages.append(user("What time is it?"))
    chat.messages.add(role=chat_pb2.ROLE_ASSISTANT).content.add(text="Noon.")
    chat.messages.append(user("Thanks"))

    response = await inference.Chat(chat)

    assert response.usage.completion_tokens == 8
