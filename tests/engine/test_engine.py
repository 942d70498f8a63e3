"""The engine on tiny random models: batching changes nothing, and one request's trouble stays its own."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from osaurus_grpc.engine import sampling, worker
from osaurus_grpc.engine.types import (
    GenerationFinished,
    PrefillProgress,
    PrefillStarted,
    SamplingParams,
    StopCause,
    TokensGenerated,
)
from osaurus_grpc.errors import (
    DrainingError,
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
)
from osaurus_grpc.models.platform import mx

from .conftest import GREEDY, VOCAB, answer, collect, request, running_engine, token_ids, until


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = random.Random(seed)
    return [
        tuple(generator.randrange(VOCAB) for _ in range(generator.choice((1, 2, 5, 17, 40, 150))))
        for _ in range(count)
    ]


async def test_events_come_in_order(engine):
    events = await collect(engine, request(prompt=tuple(range(90)) * 2, max_tokens=5))
    kinds = [type(event) for event in events]
    assert kinds[0] is PrefillStarted
    assert kinds[-1] is GenerationFinished
    assert kinds.index(TokensGenerated) > max(i for i, k in enumerate(kinds) if k is PrefillProgress)
    assert events[-1].cause is StopCause.MAX_TOKENS
    assert events[-1].completion_tokens == len(token_ids(events)) == 5
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    assert len(progress) > 2
    assert progress[-1] == PrefillProgress(180, 180)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba2"])
async def test_greedy_is_the_same_alone_and_in_a_batch_of_eight(kind):
    async with running_engine(kind=kind) as engine:
        asked = [request(prompt=prompt, max_tokens=20) for prompt in prompts(8)]
        alone = [await answer(engine, one) for one in asked]
        together = await asyncio.gather(*(answer(engine, one) for one in asked))
        assert together == alone

        async def late(one: Any, delay: int) -> list[int]:
            for _ in range(delay):
                await asyncio.sleep(0.003)
            return await answer(engine, one)

        staggered = await asyncio.gather(*(late(one, i) for i, one in enumerate(asked)))
        assert staggered == alone


async def test_greedy_equals_mlx_lm(engine):
    from mlx_lm.generate import generate_step

    from .conftest import tiny_model

    prompt = tuple(random.Random(4).randrange(VOCAB) for _ in range(60))

    def reference() -> list[int]:
        steps = generate_step(mx.array(prompt), tiny_model(), max_tokens=30)
        return [token for token, _ in steps]

    assert await answer(engine, request(prompt=prompt, max_tokens=30)) == await engine.call(reference)


SETTINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(temperature=1.3, top_k=5),
    SamplingParams(temperature=0.9, min_p=0.4),
    SamplingParams(temperature=1.5, top_p=0.9, top_k=20, min_p=0.01),
    SamplingParams(temperature=1.0, presence_penalty=1.5, frequency_penalty=0.5),
    SamplingParams(temperature=1.0, repetition_penalty=1.5, repetition_context=8),
    SamplingParams(temperature=0.0, repetition_penalty=2.0, repetition_context=-1),
    SamplingParams(temperature=1.0, logit_bias={3: 4.0, 7: -100.0}),
]


@pytest.mark.parametrize("on_host", [True, False])
async def test_a_seeded_request_gives_the_same_whatever_runs_beside_it(engine, monkeypatch, on_host):
    """Drawn on the host, or by the device with a step in flight."""
    monkeypatch.setattr(sampling, "_IS_HOST", on_host)
    asked = [
        request(
            prompt=prompt,
            max_tokens=15,
            sampling=SamplingParams(**{f: getattr(s, f) for f in s.__dataclass_fields__} | {"seed": 5 + i}),
        )
        for i, (s, prompt) in enumerate(zip(SETTINGS, prompts(len(SETTINGS), 3), strict=True))
    ]
    alone = [await answer(engine, one) for one in asked]
    assert await asyncio.gather(*(answer(engine, one) for one in asked)) == alone
    assert await asyncio.gather(*(answer(engine, one) for one in reversed(asked))) == alone[::-1]


async def test_seeds_differ_and_no_seed_is_random(engine):
    sampled = SamplingParams(temperature=1.5)
    texts = {tuple(await answer(engine, request(max_tokens=20, sampling=sampled))) for _ in range(4)}
    assert len(texts) > 1


async def test_end_of_sequence_token_ends_and_is_not_part_of_the_answer():
    async with running_engine() as engine:
        full = await answer(engine, request(max_tokens=10))
    end = full[4]
    expected = full[: full.index(end)]
    async with running_engine(end_tokens=(end,)) as engine:
        events = await collect(engine, request(max_tokens=10))
        assert token_ids(events) == expected
        assert events[-1].cause is StopCause.END_OF_SEQUENCE
        assert events[-1].completion_tokens == len(expected)
        assert await answer(engine, request(max_tokens=10, ignore_eos=True)) == full


async def test_a_long_prompt_does_not_stall_running_streams():
    """Passes of the stream keep coming between the chunks of the prompt."""
    passes: list[int] = []

    def note(_: int, inputs: Any) -> bool:
        passes.append(inputs.shape[1])
        return False

    async with running_engine(wrap=lambda m: Faulty(m, note)) as engine, asyncio.timeout(60):
        stream = engine.generate(request(max_tokens=100_000))
        async for event in stream:
            if isinstance(event, TokensGenerated):
                break
        passes.clear()
        await answer(engine, request(prompt=(5,) * 1500, max_tokens=1))
        await stream.aclose()
    chunks = [i for i, width in enumerate(passes) if width > 1]
    assert len(chunks) >= 1500 // 64
    between = passes[chunks[0] : chunks[len(chunks) // 2]]
    assert between.count(1) >= sum(width > 1 for width in between) // 4


async def test_a_short_prompt_passes_a_long_one():
    order: list[str] = []

    def wait_for_loop(call: int, _: Any) -> bool:
        """Have the event loop keep up: the short one asks by the third chunk, and is told by the fortieth."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (
            (call == 3 and not engine.stats().waiting) or (call == 40 and not order)
        ):
            time.sleep(0.001)
        return False

    async def ask(name: str, length: int) -> None:
        await answer(engine, request(prompt=(5,) * length, max_tokens=1))
        order.append(name)

    async with running_engine(wrap=lambda m: Faulty(m, wait_for_loop)) as engine, asyncio.timeout(60):
        long_one = asyncio.create_task(ask("long", 4000))
        await until(lambda: engine.stats().running == 1)
        await ask("short", 10)
        await long_one
    assert order == ["short", "long"]


@pytest.mark.parametrize("stage", ["queue", "prefill", "decode"])
async def test_cancelling_frees_the_place(stage):
    async with running_engine(max_batch_size=1) as engine:
        blocker = None
        if stage == "queue":
            blocker = engine.generate(request(max_tokens=100_000))
            async for event in blocker:
                if isinstance(event, TokensGenerated):
                    break
        length = 3000 if stage == "prefill" else 3
        generation = engine.generate(request(prompt=(1,) * length, max_tokens=100_000))
        if stage != "queue":
            wanted = PrefillProgress if stage == "prefill" else TokensGenerated
            async for event in generation:
                if isinstance(event, wanted):
                    break
            await generation.aclose()
        else:
            waiting = asyncio.create_task(anext(generation))
            await until(lambda: engine.stats().waiting == 1)
            await engine.call(lambda: None)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert (engine.stats().running, engine.stats().waiting) == (1, 0)
            await anext(blocker)  # it goes on
            await blocker.aclose()
        async with asyncio.timeout(60):
            assert len(await answer(engine, request(max_tokens=4))) == 4
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)


async def test_cancelling_does_not_change_the_others(engine):
    asked = [request(prompt=prompt, max_tokens=40) for prompt in prompts(6, 9)]
    alone = [await answer(engine, one) for one in asked]

    async def leaver(one: Any, tokens: int) -> None:
        generation = engine.generate(one)
        seen = 0
        async for event in generation:
            seen += isinstance(event, TokensGenerated)
            if seen > tokens:
                break
        await generation.aclose()

    async with asyncio.timeout(60):
        results = await asyncio.gather(
            *(answer(engine, one) for one in asked),
            leaver(request(prompt=(9,) * 30, max_tokens=500), 3),
            leaver(request(prompt=(8,) * 3, max_tokens=500), 11),
        )
    assert list(results[:6]) == alone


async def test_the_queue_is_bounded():
    async with running_engine(max_batch_size=1, max_waiting_requests=2) as engine:
        running = engine.generate(request(max_tokens=100_000))
        async for event in running:
            if isinstance(event, TokensGenerated):
                break
        tasks = [asyncio.create_task(answer(engine, request(max_tokens=60))) for _ in range(2)]
        await until(lambda: engine.stats().waiting == 2)
        with pytest.raises(OverloadedError) as refused:
            await answer(engine, request())
        assert refused.value.retry_after_seconds
        await running.aclose()
        assert [len(await task) for task in tasks] == [60] * 2
        assert len(await answer(engine, request())) == 12


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"prompt": ()}, "prompt"),
        ({"prompt": (1, VOCAB)}, "prompt"),
        ({"prompt": (-1,)}, "prompt"),
        ({"max_tokens": -1}, "sampling.max_tokens"),
        ({"sampling": SamplingParams(logit_bias={VOCAB: 1.0})}, "sampling.logit_bias"),
        ({"sampling": SamplingParams(logit_bias={-1: 1.0})}, "sampling.logit_bias"),
    ],
)
async def test_a_bad_request_is_refused_and_poisons_nothing(engine, bad, field):
    running = asyncio.create_task(answer(engine, request(max_tokens=50)))
    with pytest.raises(InvalidRequestError) as refused:
        await answer(engine, request(**bad))
    assert refused.value.field == field
    assert len(await running) == 50


async def test_top_k_and_top_logprobs_beyond_the_vocabulary_mean_all(engine):
    sampling = SamplingParams(temperature=1.0, top_k=VOCAB * 10, seed=3)
    events = await collect(engine, request(sampling=sampling, max_tokens=2, top_logprobs=VOCAB + 5))
    first = next(event for event in events if isinstance(event, TokensGenerated)).tokens[0]
    assert len(first.top) == VOCAB
    same = SamplingParams(temperature=1.0, seed=3)
    assert token_ids(events) == await answer(engine, request(sampling=same, max_tokens=2))


async def test_an_unknown_model_is_an_error(engine):
    from dataclasses import replace

    with pytest.raises(ModelNotFoundError):
        await answer(engine, replace(request(), model_id="other"))


async def test_stopping_ends_running_requests():
    async with running_engine() as engine:
        generation = engine.generate(request(max_tokens=100_000))
        await anext(generation)
        stopping = asyncio.create_task(engine.stop())
        with pytest.raises(DrainingError):
            async for _ in generation:
                pass
        await stopping
        with pytest.raises(DrainingError):
            await answer(engine, request())


async def test_unloading_ends_running_requests_and_another_model_can_follow(engine):
    generation = engine.generate(request(max_tokens=100_000))
    await anext(generation)
    await engine.detach("tiny")
    with pytest.raises(DrainingError):
        async for _ in generation:
            pass
    with pytest.raises(ModelNotFoundError):
        await answer(engine, request())


class Faulty:
    """A model whose calls fail by plan, which the real one cannot be made to do."""

    def __init__(self, model: Any, plan: Any) -> None:
        # The first call measures the caches when the model is attached; it computes nothing.
        self._model, self._plan, self._calls = model, plan, -1

    def __call__(self, inputs: Any, cache: Any = None) -> Any:
        self._calls += 1
        # The caches advance before the failure, as they do when a device fails inside a step.
        logits = self._model(inputs, cache=cache)
        if self._calls and self._plan(self._calls, inputs):
            raise RuntimeError("device lost")
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


async def test_what_was_freed_is_given_back_when_nothing_comes_for_a_while(monkeypatch):
    given_back: list[None] = []
    monkeypatch.setattr(worker, "trim_memory", lambda: given_back.append(None))
    monkeypatch.setattr(worker, "_REST_SECONDS", 0.02)
    async with running_engine() as engine:
        before = len(given_back)
        for turn in range(1, 3):
            await answer(engine, request(max_tokens=3))
            await until(lambda turn=turn: len(given_back) == before + turn)
            # Once, as long as nothing runs.
            await asyncio.sleep(0.2)
            assert len(given_back) == before + turn


async def test_after_a_device_error_the_others_go_on_with_the_same_text():
    asked = [
        request(prompt=prompt, max_tokens=40, sampling=sampling)
        for prompt, sampling in zip(
            prompts(4, 2),
            [GREEDY, SamplingParams(temperature=1.0, seed=1), GREEDY,
             SamplingParams(temperature=1.0, presence_penalty=1.0, repetition_penalty=1.2, seed=2)],
            strict=True,
        )
    ]  # fmt: skip
    async with running_engine() as engine:
        expected = [await answer(engine, one) for one in asked]
    failing = {9, 10, 31}
    async with running_engine(wrap=lambda m: Faulty(m, lambda call, _: call in failing)) as engine:
        async with asyncio.timeout(60):
            assert await asyncio.gather(*(answer(engine, one) for one in asked)) == expected


async def test_a_request_that_kills_every_step_is_ended_and_the_others_finish():
    poison = 95

    def plan(_: int, inputs: Any) -> bool:
        return bool((inputs == poison).any().item())

    good = [request(prompt=(1, 2, 3 + i), max_tokens=30) for i in range(3)]
    banned = SamplingParams(temperature=0.0, logit_bias={poison: -100.0})
    good = [request(prompt=one.prompt, max_tokens=30, sampling=banned) for one in good]
    async with running_engine() as engine:
        expected = [await answer(engine, one) for one in good]
    async with running_engine(wrap=lambda m: Faulty(m, plan)) as engine:
        async with asyncio.timeout(60):
            results = await asyncio.gather(
                *(answer(engine, one) for one in good),
                answer(engine, request(prompt=(4, poison, 6))),
                return_exceptions=True,
            )
        assert results[:3] == expected
        assert isinstance(results[3], EngineError)
        assert len(await answer(engine, good[0])) == 30


async def test_a_dead_device_ends_every_request_and_does_not_spin():
    async with running_engine(wrap=lambda m: Faulty(m, lambda *_: True)) as engine:
        async with asyncio.timeout(60):
            results = await asyncio.gather(
                *(answer(engine, request(prompt=(1, 2, i))) for i in range(5)), return_exceptions=True
            )
        assert all(isinstance(result, EngineError) for result in results)
        assert engine.stats().running == 0
