"""Requests that arrive together and begin alike pay for their beginning once."""

from __future__ import annotations

import asyncio

import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from osaurus_grpc.engine.cache_layout import CacheLayout
from osaurus_grpc.engine.prompt_cache import PromptCache
from osaurus_grpc.engine.scheduler import Scheduler
from osaurus_grpc.engine.sequence import Sequence
from osaurus_grpc.engine.types import GenerationFinished, PrefillProgress, PrefillStarted

from .conftest import VOCAB, answer, collect, request, running_engine, token_ids

PLENTY = 64 * 2**20
SYSTEM = tuple((7 * i + 3) % VOCAB for i in range(700))


def sequence(prompt: tuple[int, ...], **more: int) -> Sequence:
    made = Sequence(request(prompt=prompt, **more), seed=0)
    made.chain.extend(prompt)
    return made


def scheduler(cache: object = None) -> Scheduler:
    store = PromptCache(CacheLayout([cache or KVCache()]), PLENTY)
    return Scheduler(max_batch_size=8, prefill_chunk_tokens=512, kept=store)


def admit(target: Scheduler) -> list[Sequence]:
    admitted = target.admit()
    for uid, one in enumerate(admitted, 100 + len(target.running)):
        target.started(one, uid)
    return admitted


def test_a_sequence_waits_for_what_another_is_computing():
    target = scheduler()
    first, second, other = sequence((*SYSTEM, 1)), sequence((*SYSTEM, 2)), sequence((5,) * 60)
    target.waiting.extend([first, second, other])
    assert admit(target) == [first, other]
    first.prefilled = first.kept_tokens = 640
    assert admit(target) == []
    first.prefilled = first.kept_tokens = 688  # the last block that both have is stored
    assert admit(target) == [second]


def test_nobody_waits_for_little():
    target = scheduler()
    short = [sequence((*SYSTEM[:48], i)) for i in range(4)]
    target.waiting.extend(short)
    assert admit(target) == short


def test_nobody_waits_for_one_that_is_gone():
    target = scheduler()
    first, second, third = (sequence((*SYSTEM, i)) for i in range(3))
    target.waiting.extend([first, second, third])
    assert admit(target) == [first]
    target.ended(first)
    assert admit(target) == [second]
    target.restart()
    assert admit(target) == [third]


def test_nobody_waits_in_vain_for_ever():
    """Others come and go before it, and nothing of theirs is kept."""
    target = scheduler()
    patient = sequence((*SYSTEM, 1))
    target.waiting.append(patient)
    for i in range(2, 5):
        target.running = {i: sequence((*SYSTEM[:200], i))}
        assert admit(target) == []
    target.running = {5: sequence((*SYSTEM[:200], 5))}
    assert admit(target) == [patient]


def test_nobody_waits_for_what_cannot_be_taken_up():
    """A model with windows leaves something only where its prefill pauses."""
    target = scheduler(RotatingKVCache(max_size=32))
    first, second = sequence((*SYSTEM[:240], 1)), sequence(SYSTEM[:240] + (2,) * 30)
    third = sequence(SYSTEM[:100] + (3,) * 10)
    target.waiting.extend([first, third, second])
    assert admit(target) == [first, third]
    third.is_decoding = True
    first.prefilled = first.kept_tokens = 240
    assert admit(target) == [second]
    target = scheduler(RotatingKVCache(max_size=32))
    first, second = (sequence(SYSTEM[:200] + (i,) * 50, stable_prefix_tokens=200) for i in range(2))
    target.waiting.extend([first, second])
    assert admit(target) == [first]
    first.prefilled = first.kept_tokens = 192
    assert admit(target) == [second]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3_next"])
async def test_a_shared_beginning_is_computed_once(kind) -> None:
    async with running_engine(kind=kind, prompt_cache_bytes=PLENTY) as engine:
        asked = [
            request(prompt=(*SYSTEM[:400], i, i + 1), max_tokens=3, stable_prefix_tokens=400)
            for i in range(12)
        ]
        events = await asyncio.gather(*(collect(engine, one) for one in asked))
        found = [started.cached_tokens for started, *_ in events if isinstance(started, PrefillStarted)]
        assert sorted(found) == [0] + [400] * 11
        async with running_engine(kind=kind) as plain:
            for one, got in list(zip(asked, events, strict=True))[::4]:
                assert token_ids(got) == await answer(plain, one)


async def test_the_others_go_on_when_the_one_they_wait_for_is_cancelled() -> None:
    """What it had computed is not lost."""
    async with running_engine(prompt_cache_bytes=PLENTY) as engine:
        first = engine.generate(request(prompt=(*SYSTEM, 1)))
        async for event in first:
            if isinstance(event, PrefillProgress):
                break
        others = [
            asyncio.create_task(collect(engine, request(prompt=(*SYSTEM, i), max_tokens=2))) for i in (2, 3)
        ]
        await asyncio.sleep(0)
        await first.aclose()
        second, third = await asyncio.gather(*others)
        assert isinstance(second[0], PrefillStarted)
        assert isinstance(third[0], PrefillStarted)
        assert second[0].cached_tokens > 0
        assert third[0].cached_tokens == 688
        assert isinstance(third[-1], GenerationFinished)
