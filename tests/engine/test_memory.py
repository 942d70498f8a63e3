"""Admission by memory: everything completes, nothing exceeds the budget, nobody starves."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osaurus_grpc.engine import layers
from osaurus_grpc.engine.batch import Batch
from osaurus_grpc.engine.footprint import measure
from osaurus_grpc.engine.memory import KVBudget, KVFootprint, KVMemory
from osaurus_grpc.engine.scheduler import Scheduler
from osaurus_grpc.engine.sequence import Sequence
from osaurus_grpc.engine.types import GenerationRequest, PrefillStarted, SamplingParams, TokensGenerated
from osaurus_grpc.errors import ContextLengthError, InvalidRequestError
from osaurus_grpc.models.platform import mx

from .conftest import VOCAB, answer, collect, request, running_engine, tiny_model, until

LLAMA = KVFootprint(token_bytes=2 * 2 * 2 * 8 * 4)  # keys and values, layers, heads, dimensions, float32


class Kept:
    """A prompt cache's size, without its tensors."""

    def __init__(self, nbytes: int = 0) -> None:
        self.nbytes = nbytes

    def allow(self, nbytes: int) -> None:
        self.nbytes = min(self.nbytes, nbytes)


def sequence(prompt: int, max_tokens: int = 10, name: str = "") -> Sequence:
    made = Sequence(GenerationRequest(name, "m", (1,) * prompt, max_tokens, SamplingParams()), seed=0)
    made.submitted_at = next(CLOCK)
    return made


CLOCK = itertools.count(1.0)
UIDS = itertools.count(1)


class Model:
    """A scheduler with a part of a budget, its rows moved by hand."""

    def __init__(self, budget: KVBudget, footprint: KVFootprint, kept: int = 0) -> None:
        self.kept = Kept(kept)
        self.memory = KVMemory(budget, footprint, self.kept, max_rows=64)
        self.scheduler = Scheduler(max_batch_size=64, prefill_chunk_tokens=2**20, memory=self.memory)
        # A chunk takes any prompt: what is tested here is memory alone.
        self.scheduler.clock.decode_seconds = 0.01
        self.scheduler.clock.seconds_per_prompt_token = 1e-12

    def wait(self, *sequences: Sequence) -> None:
        self.scheduler.waiting.extend(sequences)

    def admit(self) -> list[Sequence]:
        admitted = self.scheduler.admit()
        for one in admitted:
            self.scheduler.started(one, next(UIDS))
            one.is_decoding = True
        return admitted

    def grow(self, tokens: int) -> None:
        for one in self.scheduler.running.values():
            one.generated.extend([1] * tokens)


def tokens(rows: int, longest: int) -> int:
    """Bytes that this many rows of one byte a token are counted as."""
    return KVFootprint(1).batch_bytes(rows, longest)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba2"])
async def test_the_footprint_is_what_the_model_takes(engine, kind):
    def sizes() -> tuple[KVFootprint, list[int]]:
        from mlx_lm.models.cache import make_prompt_cache

        model, sizes = tiny_model(kind), []
        for length in (7, 500):
            caches = make_prompt_cache(model)
            mx.eval(model(mx.zeros((1, length), dtype=mx.int32), cache=caches))
            sizes.append(sum(cache.nbytes for cache in caches))
        return measure(model), sizes

    footprint, (short, long) = await engine.call(sizes)
    assert footprint.row_bytes(7) >= short
    assert footprint.row_bytes(500) >= long
    match kind:
        case "llama":
            assert footprint == LLAMA
        case "gemma3":
            # Half of the layers slide; each layer has keys and values of two heads of eight floats.
            assert footprint == KVFootprint(2 * 128, ((16, 2 * 128),))
        case "mamba2":
            assert footprint.token_bytes == 0
            assert footprint.state_bytes == short == long


@given(rows=st.integers(1, 70), longest=st.integers(0, 10_000), limit=st.integers(0, 10**7))
@settings(max_examples=200)
def test_the_longest_possible_request_is_exact(rows, longest, limit):
    footprint = KVFootprint(3, ((100, 5), (1000, 2)), 77)
    assert footprint.batch_bytes(rows, longest) == (rows + 1) * footprint.row_bytes(longest)
    most = footprint.tokens_within(limit)
    if most >= 0:
        assert footprint.batch_bytes(1, most) <= limit
    assert footprint.batch_bytes(1, most + 1) > limit


def test_what_does_not_fit_waits_until_somebody_leaves():
    model = Model(KVBudget(tokens(2, 1100)), KVFootprint(1))
    first, second, third = (sequence(1000) for _ in range(3))
    model.wait(first, second, third)
    assert model.admit() == [first, second]
    assert model.admit() == []
    model.scheduler.ended(first)
    assert model.admit() == [third]


def test_a_long_row_waits_for_few_enough_short_ones():
    """Eight rows as long as the long one would not fit, although the tokens themselves would."""
    model = Model(KVBudget(tokens(3, 2100)), KVFootprint(1))
    shorts, long = [sequence(20) for _ in range(7)], sequence(2000)
    model.wait(*shorts, long)
    assert model.admit() == shorts
    for short in shorts[:5]:
        assert model.admit() == []
        model.scheduler.ended(short)
    assert model.admit() == [long]


def test_short_ones_pass_a_long_one_some_times_only():
    model = Model(KVBudget(tokens(3, 2100)), KVFootprint(1))
    running, long = [sequence(20) for _ in range(3)], sequence(2000)
    model.wait(*running)
    model.admit()
    model.wait(long, *(sequence(20) for _ in range(30)))
    passing = model.admit()
    assert 0 < len(passing) <= 8
    while long not in model.scheduler.running.values():
        oldest = next(iter(model.scheduler.running.values()), None)
        assert oldest is not None, "nobody runs and the long one still waits"
        model.scheduler.ended(oldest)
        assert model.admit() in ([], [long])
    model.scheduler.ended(long)
    assert model.admit()


def test_an_impatient_one_that_is_cancelled_holds_nobody_up():
    model = Model(KVBudget(tokens(3, 2100)), KVFootprint(1))
    model.wait(*(sequence(20) for _ in range(3)))
    model.admit()
    long = sequence(2000)
    model.wait(long, *(sequence(20) for _ in range(12)))
    assert len(model.admit()) == 8
    assert model.admit() == []
    model.scheduler.ended(long)
    assert len(model.admit()) == 4


def test_the_youngest_gives_its_row_back_and_returns_with_more_room():
    model = Model(KVBudget(tokens(3, 1000)), KVFootprint(1))
    rows = [sequence(100, 5000) for _ in range(3)]
    model.wait(*rows)
    assert model.admit() == rows
    model.grow(899)
    assert model.scheduler.preempt() == []
    model.grow(2)
    uid = rows[2].uid
    assert model.scheduler.preempt() == [uid]
    assert list(model.scheduler.waiting) == [rows[2]]
    assert (rows[2].preemptions, rows[2].uid, len(rows[2].generated)) == (1, None, 901)
    assert model.admit() == []
    model.scheduler.ended(rows[0])
    assert model.admit() == []  # 2 rows of 1001 + 512 tokens are more than 3 of 1000
    model.scheduler.ended(rows[1])
    assert model.admit() == [rows[2]]


def test_the_last_row_stays_whatever_it_takes():
    model = Model(KVBudget(tokens(1, 500)), KVFootprint(1))
    only = sequence(100, 5000)
    model.wait(only)
    model.admit()
    model.grow(4000)
    assert model.scheduler.preempt() == []


def test_models_share_the_budget_and_the_oldest_sequence_goes_on():
    budget = KVBudget(tokens(1, 1000) + tokens(1, 1000))
    left, right = Model(budget, KVFootprint(1)), Model(budget, KVFootprint(1))
    first, second = (sequence(500, 3000) for _ in range(2))
    left.wait(first)
    right.wait(second)
    assert (left.admit(), right.admit()) == ([first], [second])
    left.grow(501)
    right.grow(501)
    assert left.scheduler.preempt() == []
    assert len(right.scheduler.preempt()) == 1
    assert right.admit() == []
    left.scheduler.ended(first)
    left.scheduler.preempt()
    assert right.admit() == [second]


def test_an_impatient_one_holds_other_models_too_until_its_model_leaves():
    budget = KVBudget(tokens(3, 2100))
    left, right = Model(budget, KVFootprint(1)), Model(budget, KVFootprint(1))
    left.wait(*(sequence(20) for _ in range(3)))
    left.admit()
    left.wait(sequence(2000), *(sequence(20) for _ in range(8)))
    assert len(left.admit()) == 8
    right.wait(sequence(20))
    assert right.admit() == []
    left.memory.close()
    assert len(right.admit()) == 1


def test_spare_rows_have_what_nobody_else_wants():
    row = KVFootprint(1).row_bytes(1000)
    budget = KVBudget(tokens(4, 1300) + 3 * row)
    first, second = Model(budget, KVFootprint(1), kept=row), Model(budget, KVFootprint(1))
    first.wait(*(sequence(1000) for _ in range(4)))
    first.admit()
    assert first.scheduler.preempt() == []
    needed = tokens(4, 1000)
    assert first.memory.needed_bytes == needed
    spare = (budget.limit_bytes - needed - row) // row
    assert first.scheduler.spare_rows == spare == 3
    assert first.memory.running_bytes == needed + spare * row
    assert first.kept.nbytes == row  # not pressed by what is spare
    # Another model's sequence is let in beside what is needed; the spare rows give way in the next round.
    second.wait(sequence(1000, 1))
    assert len(second.admit()) == 1
    assert first.scheduler.preempt() == []
    assert first.scheduler.spare_rows < spare
    assert budget.running_bytes + budget.kept_bytes <= budget.limit_bytes


@pytest.mark.parametrize(("rows", "spare"), [(0, 0), (1, 0), (2, 2), (3, 3), (40, 24), (64, 0)])
def test_spare_rows_are_no_more_than_there_may_be(rows, spare):
    model = Model(KVBudget(10**9), KVFootprint(1))
    model.wait(*(sequence(20) for _ in range(rows)))
    model.admit()
    model.scheduler.preempt()
    assert model.scheduler.spare_rows == spare


def test_kept_caches_make_way_those_of_idle_models_first():
    budget = KVBudget(tokens(1, 1000) + 500)
    idle, busy = Model(budget, KVFootprint(1), kept=800), Model(budget, KVFootprint(1), kept=400)
    assert busy.kept.nbytes + idle.kept.nbytes <= budget.limit_bytes
    busy.wait(sequence(1000, 1))
    assert len(busy.admit()) == 1
    assert (idle.kept.nbytes, busy.kept.nbytes) == (100, 400)


def test_a_budget_that_is_not_fixed_follows_the_memory():
    budget = KVBudget()
    model = Model(budget, KVFootprint(1), kept=1000)
    budget.adapt(3000)
    assert budget.limit_bytes == 3000
    model.memory.require_possible(100, 100)
    budget.adapt(0)
    with pytest.raises(ContextLengthError):
        model.memory.require_possible(1000, 100)
    fixed = KVBudget(77)
    fixed.adapt(10**9)
    assert fixed.limit_bytes == 77


async def test_a_request_that_can_never_fit_is_refused_before_any_work():
    async with running_engine(kv_cache_bytes=LLAMA.batch_bytes(1, 600)) as engine:
        with pytest.raises(InvalidRequestError) as refused:
            await answer(engine, request(prompt=(1,) * 500, max_tokens=101))
        assert refused.value.field == "sampling.max_tokens"
        assert all(figure in refused.value.message for figure in ("500", "101", "600", "at most 100"))
        for max_tokens, length in ((1, 600), (0, 601)):
            with pytest.raises(ContextLengthError) as too_long:
                await answer(engine, request(prompt=(1,) * length, max_tokens=max_tokens))
            assert too_long.value.field == "prompt"
            assert "memory" in too_long.value.message
            assert too_long.value.metadata == {"limit": "600", "prompt_tokens": str(length)}
        assert engine.stats().prompt_tokens == 0
        assert len(await answer(engine, request(prompt=(1,) * 500, max_tokens=100))) == 100


async def test_a_budget_set_while_memory_was_short_is_set_anew_before_anything_is_refused(engine):
    await engine.call(lambda: setattr(engine._budget, "limit_bytes", 1000))
    assert len(await answer(engine, request(max_tokens=5))) == 5
    assert engine.stats().kv_budget_bytes > 2**20


def watch_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Note the largest size that the caches of a batch, kept ones included, have after a step."""
    largest = 0
    prefill = Batch.prefill

    def watched(self: Batch, *arguments: Any) -> Any:
        nonlocal largest
        events = prefill(self, *arguments)
        kept = self._prompt_cache
        largest = max(largest, self.nbytes + (kept.nbytes if kept is not None else 0))
        return events

    monkeypatch.setattr(Batch, "prefill", watched)
    return lambda: largest


@pytest.mark.parametrize(("kind", "prompt_cache_bytes"), [("llama", 0), ("llama", 2**20), ("gemma3", 0)])
async def test_64_long_requests_complete_within_a_small_budget(kind, prompt_cache_bytes, monkeypatch):
    generator = random.Random(5)
    asked = [
        request(
            prompt=tuple(generator.randrange(VOCAB) for _ in range(generator.choice((20, 150, 250)))),
            max_tokens=generator.choice((4, 24)),
        )
        for _ in range(64)
    ]
    async with running_engine(kind=kind, max_batch_size=64) as engine:
        expected = await asyncio.gather(*(answer(engine, one) for one in asked))
        footprint = await engine.call(lambda: measure(tiny_model(kind)))
    budget = footprint.batch_bytes(7, 280)
    largest = watch_bytes(monkeypatch)
    async with running_engine(
        kind=kind,
        max_batch_size=64,
        kv_cache_bytes=budget,
        prompt_cache_bytes=prompt_cache_bytes,
        prefill_chunk_tokens=256,
    ) as engine:
        async with asyncio.timeout(120):
            assert await asyncio.gather(*(answer(engine, one) for one in asked)) == expected
        stats = engine.stats()
        assert stats.kv_budget_bytes == budget
        assert stats.kv_kept_bytes + stats.kv_running_bytes <= budget
    assert budget // 8 < largest() <= budget


async def test_answers_that_grow_into_the_budget_are_resumed_with_the_same_text(monkeypatch):
    sampled = SamplingParams(temperature=1.0, presence_penalty=0.5, seed=3)
    asked = [request(prompt=(1, 2, 3 + i), max_tokens=500) for i in range(3)]
    asked.append(request(prompt=(9, 2), max_tokens=500, sampling=sampled))
    async with running_engine() as engine:
        expected = await asyncio.gather(*(answer(engine, one) for one in asked))
    largest = watch_bytes(monkeypatch)
    budget = LLAMA.batch_bytes(2, 510)
    async with running_engine(kv_cache_bytes=budget) as engine:
        async with asyncio.timeout(120):
            events = await asyncio.gather(*(collect(engine, one) for one in asked))
        assert engine.stats().preemptions > 0
        assert engine.stats().kv_running_bytes == 0
    answers = [
        [t.token_id for e in each if isinstance(e, TokensGenerated) for t in e.tokens] for each in events
    ]
    assert answers == expected
    assert all(sum(isinstance(event, PrefillStarted) for event in each) == 1 for each in events)
    assert largest() <= budget


async def test_cancelling_who_waits_for_memory_frees_the_queue():
    async with running_engine(kv_cache_bytes=LLAMA.batch_bytes(1, 1000)) as engine:
        running = asyncio.create_task(answer(engine, request(max_tokens=950)))
        await until(lambda: engine.stats().running == 1)
        waiting = asyncio.create_task(answer(engine, request(prompt=(1,) * 600, max_tokens=10)))
        await until(lambda: engine.stats().waiting == 1)
        await engine.call(lambda: None)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with asyncio.timeout(60):
            assert len(await answer(engine, request(max_tokens=5))) == 5
            assert len(await running) == 950
        assert (engine.stats().running, engine.stats().waiting) == (0, 0)


async def test_two_models_share_a_small_budget():
    from dataclasses import replace

    async with running_engine(kv_cache_bytes=LLAMA.batch_bytes(2, 250)) as engine:
        await engine.attach("other", await engine.call(tiny_model), (), VOCAB)
        asked = [request(prompt=(1, 2, 3 + i), max_tokens=150) for i in range(4)]
        asked += [replace(one, model_id="other") for one in asked]
        async with asyncio.timeout(120):
            answers = await asyncio.gather(*(answer(engine, one) for one in asked))
        assert answers[:4] == answers[4:]
        await engine.detach("other")
        assert len(await answer(engine, asked[0])) == 150


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
async def test_large_caches_are_joined_and_cut_in_turn_with_the_same_text(kind, monkeypatch):
    asked = [request(prompt=(1, 2, 3) * i, max_tokens=4 + 3 * i) for i in range(1, 7)]
    async with running_engine(kind=kind) as engine:
        expected = [await answer(engine, one) for one in asked]
        turns = 0
        evaluate = layers.mx.eval

        def counted(*arrays: Any) -> None:
            nonlocal turns
            turns += 1
            evaluate(*arrays)

        monkeypatch.setattr(layers, "_TURN_BYTES", 1)
        monkeypatch.setattr(layers.mx, "eval", counted)
        assert await asyncio.gather(*(answer(engine, one) for one in asked)) == expected
        monkeypatch.undo()
    assert turns > len(asked)
