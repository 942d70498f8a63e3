"""The engine where things go wrong between steps: starts and removals that fail, models that leave."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from dataclasses import replace
from typing import Any, Never

import pytest

from osaurus_grpc.engine import runner
from osaurus_grpc.engine.batch import Batch
from osaurus_grpc.engine.types import PrefillStarted, SamplingParams, TokensGenerated
from osaurus_grpc.errors import DrainingError, EngineError

from .conftest import VOCAB, answer, collect, request, running_engine, tiny_model, token_ids, until
from .test_engine import Faulty

# Passes the engine's checks, and fails when its row is made.
POISON = SamplingParams(temperature=0.0, logit_bias={3: "much"})  # type: ignore[dict-item]  # on purpose


async def test_a_row_that_cannot_be_made_ends_its_request_only(engine):
    good = [request(prompt=(1, 2, 3 + i), max_tokens=30) for i in range(3)]
    expected = [await answer(engine, one) for one in good]
    async with asyncio.timeout(60):
        results = await asyncio.gather(
            collect(engine, good[0]),
            collect(engine, request(sampling=POISON)),
            *(collect(engine, one) for one in good[1:]),
            return_exceptions=True,
        )
    assert isinstance(results.pop(1), EngineError)
    assert [token_ids(events) for events in results] == expected
    assert all(sum(isinstance(event, PrefillStarted) for event in events) == 1 for events in results)
    assert all(isinstance(events[0], PrefillStarted) for events in results)
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


async def test_a_row_that_cannot_be_removed_harms_nobody(engine, monkeypatch):
    """Removing a row computes: the device may fail there as well."""
    expected = await answer(engine, request(max_tokens=60))
    remove = Batch.remove

    def failing(self: Batch, uid: int) -> None:
        monkeypatch.setattr(Batch, "remove", remove)
        raise RuntimeError("device lost")

    running = asyncio.create_task(answer(engine, request(max_tokens=60)))
    leaver = engine.generate(request(prompt=(7,), max_tokens=10_000))
    async for event in leaver:
        if isinstance(event, TokensGenerated):
            break
    monkeypatch.setattr(Batch, "remove", failing)
    await leaver.aclose()
    async with asyncio.timeout(30):
        assert await running == expected
        assert await answer(engine, request(max_tokens=60)) == expected


async def test_leaving_a_model_that_was_unloaded_takes_no_row_of_its_successor(engine):
    old = engine.generate(request(max_tokens=100_000))
    async for event in old:
        if isinstance(event, TokensGenerated):
            break
    await engine.detach("tiny")
    await engine.attach("tiny", await engine.call(tiny_model), (), VOCAB)
    new = asyncio.create_task(answer(engine, request(max_tokens=2_000)))
    await until(lambda: engine.stats().running == 2)
    await old.aclose()
    async with asyncio.timeout(120):
        assert len(await new) == 2_000


async def test_an_unloaded_model_is_freed():
    async with running_engine() as engine:
        model = await engine.call(tiny_model)
        gone = weakref.ref(model)
        await engine.attach("other", model, (), VOCAB)
        del model
        await answer(engine, replace(request(), model_id="other"))
        await engine.detach("other")
        await engine.free()
        assert gone() is None


async def test_the_batch_of_a_failed_step_is_freed_at_once(monkeypatch):
    """Its KV caches may be what the device had no memory for."""
    monkeypatch.setattr(runner.logger, "disabled", True)  # pytest keeps records, with their tracebacks
    async with running_engine(
        wrap=lambda m: Faulty(m, lambda call, _: call == 20), prompt_cache_bytes=2**20
    ) as engine:
        first = await engine.call(lambda: weakref.ref(engine._worker.runner("tiny")._batch))
        gc.disable()
        try:
            assert len(await answer(engine, request(max_tokens=40))) == 40
            assert await engine.call(lambda: first() is None)
        finally:
            gc.enable()


async def test_a_call_after_the_end_is_refused(engine):
    await engine.stop()
    async with asyncio.timeout(60):
        with pytest.raises(DrainingError):
            await engine.call(lambda: None)


async def test_a_request_that_always_fails_is_tried_twice():
    models: list[Faulty] = []

    def wrap(model: Any) -> Faulty:
        models.append(Faulty(model, lambda *_: True))
        return models[0]

    async with running_engine(wrap=wrap) as engine:
        with pytest.raises(EngineError):
            await answer(engine, request())
    assert models[0]._calls == 2


async def test_cancelling_a_suspect_and_the_one_on_trial_lets_the_others_go_on(monkeypatch):
    """Both leave between the failing step and the next one."""
    on_trial, gone = threading.Event(), threading.Event()
    prefill = runner.Runner.prefill

    def held(self: runner.Runner) -> Any:
        deliveries = prefill(self)
        if self._on_trial is not None and self._suspects and not on_trial.is_set():
            on_trial.set()
            gone.wait(60)
        return deliveries

    monkeypatch.setattr(runner.Runner, "prefill", held)
    failing = {12}
    async with running_engine() as engine:
        expected = await answer(engine, request(prompt=(5,), max_tokens=60))
    async with running_engine(wrap=lambda m: Faulty(m, lambda call, _: call in failing)) as engine:
        leavers = [engine.generate(request(prompt=(1, i), max_tokens=10_000)) for i in range(3)]
        starts = [asyncio.create_task(anext(leaver)) for leaver in leavers]
        staying = asyncio.create_task(answer(engine, request(prompt=(5,), max_tokens=60)))
        await asyncio.gather(*starts)
        assert await asyncio.to_thread(on_trial.wait, 60)
        await asyncio.gather(*(leaver.aclose() for leaver in leavers))
        gone.set()
        assert await staying == expected
        engine_runner = await engine.call(lambda: engine._worker.runner("tiny"))
        assert await engine.call(lambda: len(engine_runner.scheduler)) == 0


async def test_log_probabilities_stay_with_their_rows(engine):
    """Beside rows that ask for none, and when rows leave."""
    asked = [
        request(prompt=(10 + i, i), max_tokens=5 + 7 * i, top_logprobs=None if i % 2 else 3) for i in range(5)
    ]
    for one, events in zip(
        asked, await asyncio.gather(*(collect(engine, one) for one in asked)), strict=True
    ):
        tokens = [t for event in events if isinstance(event, TokensGenerated) for t in event.tokens]
        assert len(tokens) == one.max_tokens
        for token in tokens:
            if one.top_logprobs is None:
                assert (token.logprob, token.top) == (None, ())
            else:
                assert (token.token_id, token.logprob) == (token.top[0].token_id, token.top[0].logprob)


async def test_a_dead_mlx_thread_ends_everything_that_waits_for_it(monkeypatch):
    """The batch cannot even be rebuilt, as after a device that is gone for good."""

    def gone(self: runner.Runner) -> Never:
        raise RuntimeError("device gone")

    async with running_engine() as engine:
        running = asyncio.create_task(answer(engine, request(max_tokens=100_000)))
        await until(lambda: engine.stats().running == 1)
        monkeypatch.setattr(runner.Runner, "prefill", gone)
        async with asyncio.timeout(60):
            with pytest.raises(EngineError):
                await running
            await engine.death()
            with pytest.raises(EngineError):
                await answer(engine, request())
            with pytest.raises(EngineError):
                await engine.call(lambda: None)
        assert engine.stats().running == 0
