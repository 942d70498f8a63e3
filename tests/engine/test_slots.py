"""A finished sequence's cache, continued in place: it happens, it is bounded, and it changes no token."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import pytest
from mlx_lm.models.cache import KVCache

from osaurus_grpc.engine.batch import Batch, Decoded
from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.prompt_cache import prompt_cache_of
from osaurus_grpc.engine.sampling import RowSampler
from osaurus_grpc.engine.slots import Slots, common_length
from osaurus_grpc.engine.token_chain import Chain
from osaurus_grpc.engine.types import SamplingParams
from osaurus_grpc.models.platform import mx

from .conftest import GREEDY, VOCAB, answer, collect, request, running_engine, tiny_model, token_ids, until

PLENTY = 64 * 2**20


class Counted:
    """A model that notes the shape of what it is called on."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, inputs: Any, cache: Any = None) -> Any:
        self.shapes.append(inputs.shape)
        return self._model(inputs, cache=cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def counted() -> tuple[list[Counted], Any]:
    models: list[Counted] = []

    def wrap(model: Any) -> Counted:
        models.append(Counted(model))
        return models[-1]

    return models, wrap


async def settle(engine: Engine) -> Any:
    """Wait until the batch has kept all it can; returns it."""
    async with asyncio.timeout(30):
        while True:
            batch = await engine.call(lambda: engine._worker.runner("tiny")._batch)
            if batch.is_tidy:
                return batch


async def known_length(engine: Engine, prompt: tuple[int, ...]) -> int:
    return await engine.call(lambda: engine._worker.runner("tiny")._batch.match_length(Chain(prompt), prompt))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba2"])
async def test_the_last_pass_of_a_prompt_gives_the_first_token(kind):
    models, wrap = counted()
    async with running_engine(kind=kind, wrap=wrap) as engine:
        del models[0].shapes[:]  # the engine measures the model's caches
        assert len(await answer(engine, request(prompt=tuple(range(50)), max_tokens=1))) == 1
        assert models[0].shapes == [(1, 50)]
        await answer(engine, request(prompt=tuple(range(50)), max_tokens=3))
        assert models[0].shapes[1:] == [(1, 50), (1, 1), (1, 1)]


async def test_short_prompts_go_through_one_pass():
    models, wrap = counted()
    async with running_engine(wrap=wrap, prefill_chunk_tokens=512) as engine:
        asked = [request(prompt=tuple(range(i, i + 20 + i)), max_tokens=4) for i in range(4)]
        expected = [await answer(engine, one) for one in asked]
        del models[0].shapes[:]
        # Submitted while the thread is busy, so that all of them wait for the same step.
        gate = threading.Event()
        busy = asyncio.create_task(engine.call(lambda: gate.wait(30)))
        answers = [asyncio.create_task(answer(engine, one)) for one in asked]
        await until(lambda: engine.stats().waiting == 4)
        gate.set()
        assert await asyncio.gather(*answers) == expected
        assert await busy
        assert models[0].shapes[0] == (4, 23)


async def test_the_same_prompt_again_computes_one_token():
    models, wrap = counted()
    prompt = tuple(range(90))
    async with running_engine(wrap=wrap, prompt_cache_bytes=PLENTY, prefill_chunk_tokens=512) as engine:
        first = await answer(engine, request(prompt=prompt, max_tokens=5))
        del models[0].shapes[:]
        assert await answer(engine, request(prompt=prompt, max_tokens=5)) == first
        assert models[0].shapes == [(1, 1)] * 5


async def test_one_more_turn_computes_what_is_new():
    models, wrap = counted()
    prompt = tuple(range(90))
    async with running_engine(wrap=wrap, prompt_cache_bytes=PLENTY, prefill_chunk_tokens=512) as engine:
        said = await answer(engine, request(prompt=prompt, max_tokens=5))
        del models[0].shapes[:]
        # The answer's last token was never fed.
        await answer(engine, request(prompt=(*prompt, *said, 7, 8, 9), max_tokens=1))
        assert models[0].shapes == [(1, 4)]


async def test_chats_in_turn_answer_as_without_reuse():
    """One request at a time, so that each leaves a slot: turns, edits, branches, cancelled ones."""
    chance = random.Random(8)
    hits = 0

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(chance.randrange(VOCAB) for _ in range(length))

    async with running_engine() as plain, running_engine(prompt_cache_bytes=400_000) as reusing:
        system = tokens(37)
        chats = [system + tokens(5 + 9 * i) for i in range(3)]
        for turn in range(40):
            which = chance.randrange(3)
            prompt = chats[which]
            sampling = SamplingParams(temperature=0.0, repetition_penalty=1.1 if turn % 3 else 1.0)
            asked = request(prompt=prompt, max_tokens=chance.randrange(1, 12), sampling=sampling)
            if turn % 7 == 3:
                leaving = reusing.generate(asked)
                for _ in range(chance.randrange(1, 4)):
                    await anext(leaving)
                await leaving.aclose()
            expected = await answer(plain, asked)
            events = await collect(reusing, asked)
            assert token_ids(events) == expected
            hits += events[0].cached_tokens % 16 != 0
            match chance.randrange(5):
                case 0:
                    chats[which] = (*prompt[: chance.randrange(1, len(prompt))], *tokens(6))
                case 1:
                    chats[which] = system + tokens(20)
                case _:
                    chats[which] = (*prompt, *expected, *tokens(chance.randrange(1, 12)))
        assert hits > 10


async def test_others_find_the_blocks_of_what_is_in_a_slot():
    async with running_engine(prompt_cache_bytes=PLENTY) as engine:
        prompt = tuple(range(90))
        said = await answer(engine, request(prompt=prompt, max_tokens=30))
        batch = await settle(engine)
        known = (*prompt, *said)
        # The answer's last token was never fed.
        assert await known_length(engine, (*known, 1)) == len(known) - 1
        await engine.call(batch._prompt_cache.slots.clear)
        assert await known_length(engine, (*known, 1)) == len(known) - 1
        assert await known_length(engine, (*known[:100], 1)) == 96


async def test_a_running_row_shares_its_prompt():
    """Its blocks are put away after its first token, not when it ends."""
    async with running_engine(prompt_cache_bytes=PLENTY) as engine:
        prompt = tuple(range(90))
        running = engine.generate(request(prompt=prompt, max_tokens=100_000))
        async with asyncio.timeout(30):
            while await known_length(engine, prompt) < 80:
                await anext(running)
        await running.aclose()


async def test_slots_go_with_an_unloaded_model_and_a_failed_step():
    async with running_engine(prompt_cache_bytes=PLENTY) as engine:
        await answer(engine, request(prompt=tuple(range(90)), max_tokens=5))
        batch = await settle(engine)
        assert batch._prompt_cache.slots.nbytes > 0
        await engine.detach("tiny")
        assert batch._prompt_cache.slots.nbytes == 0


def test_a_slot_that_its_records_push_out_is_not_taken():
    model = tiny_model()

    def answered(batch: Batch, prompt: list[int], length: int) -> tuple[int, list[int]]:
        sampler = RowSampler(GREEDY, prompt, (), top_logprobs=None, seed=0, vocab_size=VOCAB)
        _, found = batch.insert(prompt, length, sampler)
        events = []
        while len(batch):
            events += batch.step(512)
        return found, [e.token.token_id for e in events if isinstance(e, Decoded) and e.token is not None]

    store = prompt_cache_of(model, PLENTY)
    batch, plain = Batch(model, (), 4, store), Batch(model, (), 4)
    _, said = answered(batch, list(range(90)), 1)
    following = [*range(90), *said, 7, 8]
    assert not batch.is_tidy
    # Room for the slot, and none for its records beside it.
    store.allow(store.nbytes)
    found, said = answered(batch, following, 5)
    assert 0 < found < len(following)
    assert said == answered(plain, following, 5)[1]


def slot_caches(tokens: int) -> list[KVCache]:
    cache = KVCache()
    cache.state = mx.zeros((1, 1, tokens, 8)), mx.zeros((1, 1, tokens, 8)), tokens
    return [cache]


def test_slots_are_bounded():
    slots = Slots(64 * 1000, max_slots=3)
    for i in range(6):
        assert slots.put([i] * 100, slot_caches(100)) is not None
    assert [slots.find([i] * 101)[1] for i in range(6)] == [0, 0, 0, 100, 100, 100]
    assert slots.put([7] * 900, slot_caches(900)) is not None
    assert slots.nbytes <= 64 * 1000
    assert slots.find([5] * 101)[1] == 100
    assert slots.find([4] * 101)[1] == 0
    assert slots.put([8] * 1001, slot_caches(1001)) is None
    assert slots.find([5] * 101)[1] == 100


def test_a_slot_is_left_to_its_conversation_by_prompts_that_share_little():
    slots = Slots(PLENTY)
    slots.put([1] * 100, slot_caches(100))
    assert slots.find([1] * 49 + [2] * 80) == (None, 0)
    slot, shared = slots.find([1] * 50 + [2] * 80)
    assert slot is not None
    assert shared == 50
    (cache,) = slots.take(slot, shared)
    assert cache.offset == 50
    assert slots.find([1] * 101) == (None, 0)


def test_a_longer_slot_takes_the_place_of_its_beginning():
    slots = Slots(PLENTY)
    slots.put([1] * 10, slot_caches(10))
    slots.put([1] * 10 + [2] * 5, slot_caches(15))
    slots.put([1] * 10 + [2] * 5, slot_caches(15))
    assert slots.nbytes == 15 * 64


def test_common_length_leaves_out_what_it_is_told_to():
    assert common_length([1, 2, 3], [1, 2, 3, 4], 99) == 3
    assert common_length([1, 2, 3], [1, 2, 3], 2) == 2
    assert common_length([1, 2, 3], [1, 5], 99) == 1
    assert common_length([], [1], 9) == 0
