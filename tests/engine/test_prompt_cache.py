"""Reuse of KV caches: it happens, it is bounded, and it changes no token of a greedy answer."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache

from osaurus_grpc.engine.prompt_cache import BLOCK_TOKENS, PromptCache
from osaurus_grpc.engine.types import PrefillProgress, PrefillStarted, TokensGenerated
from osaurus_grpc.models.platform import mx

from .conftest import VOCAB, answer, collect, request, running_engine, token_ids

LAYERS, HEADS, HEAD_DIM = 2, 1, 4
BLOCK_BYTES = 2 * LAYERS * HEADS * BLOCK_TOKENS * HEAD_DIM * 4
PLENTY = 64 * 2**20


def keep(store: PromptCache, tokens: list[int]) -> None:
    caches = caches_of(tokens)

    def extract(start: int, end: int) -> list[mx.array]:
        keys = [cache.keys[0, :, start:end] for cache in caches]
        return keys + [cache.values[0, :, start:end] for cache in caches]

    store.store(tokens, extract)


def caches_of(tokens: list[int]) -> list[KVCache]:
    """Caches whose values tell which token and place they belong to, in a buffer longer than filled."""
    caches = []
    for layer in range(LAYERS):
        rows = np.zeros((1, HEADS, len(tokens) + 5, HEAD_DIM), np.float32)
        for place, token in enumerate(tokens):
            rows[0, :, place] = token * 1000 + place + layer / 10
        cache = KVCache()
        cache.state = mx.array(rows), mx.array(-rows), len(tokens)
        caches.append(cache)
    return caches


@settings(max_examples=100, deadline=None)
@given(
    sequences=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=12),
    blocks=st.integers(1, 12),
)
def test_what_is_found_is_what_was_stored(sequences: list[list[int]], blocks: int) -> None:
    """Sequences over an alphabet of two blocks share beginnings and branch; the store holds a few."""
    store = PromptCache(blocks * BLOCK_BYTES)
    stored: list[list[int]] = []
    for pattern in sequences:
        tokens = [symbol * 7 + i % 3 for symbol in pattern for i in range(BLOCK_TOKENS)] + [1, 2, 3]
        expected_most = max((_common(tokens[:-1], other) for other in stored), default=0)
        length = store.match_length(tokens)
        prefix = store.lookup(tokens)
        assert length == (prefix.length if prefix else 0) <= expected_most
        if prefix is not None:
            assert length < len(tokens)
            for found, true in zip(prefix.caches, caches_of(tokens), strict=True):
                assert found.offset == length
                np.testing.assert_array_equal(found.keys[:, :, :length], true.keys[:, :, :length])
                np.testing.assert_array_equal(found.values[:, :, :length], true.values[:, :, :length])
                assert found.keys.shape[2] > len(tokens)
        keep(store, tokens)
        stored.append(tokens)
        assert store.nbytes <= blocks * BLOCK_BYTES
        if len(pattern) <= blocks:  # the newest is there whole
            assert store.match_length([*tokens, 5]) == len(pattern) * BLOCK_TOKENS
            assert not store.is_missing(tokens)


def _common(left: list[int], right: list[int]) -> int:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length // BLOCK_TOKENS * BLOCK_TOKENS


def test_a_beginning_that_is_used_outlives_others() -> None:
    store = PromptCache(4 * BLOCK_BYTES)
    system = [9] * BLOCK_TOKENS
    keep(store, system)
    for i in range(20):
        tokens = system + [i] * BLOCK_TOKENS
        assert store.match_length([*tokens, 0]) == BLOCK_TOKENS
        store.lookup(tokens)
        keep(store, tokens)


def test_the_last_token_is_always_computed() -> None:
    store = PromptCache(PLENTY)
    tokens = [1] * (2 * BLOCK_TOKENS)
    keep(store, tokens)
    assert store.match_length(tokens) == BLOCK_TOKENS
    assert store.match_length([*tokens, 1]) == 2 * BLOCK_TOKENS


def test_only_plain_caches_take_part() -> None:
    assert PromptCache.supports([KVCache(), KVCache()])
    assert not PromptCache.supports([KVCache(), RotatingKVCache(max_size=8)])
    assert not PromptCache.supports([])


def test_a_store_of_nothing_stores_nothing() -> None:
    store = PromptCache(0)
    tokens = [1] * 40
    assert not store.is_missing(tokens)
    assert store.lookup(tokens) is None


async def test_random_conversations_answer_as_without_reuse() -> None:
    """Turns, edits, branches and evictions; beside other requests, some of which leave early."""
    chance = random.Random(5)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(chance.randrange(VOCAB) for _ in range(length))

    async with running_engine() as plain, running_engine(prompt_cache_bytes=60_000) as reusing:
        reused = 0

        async def turn(prompt: tuple[int, ...]) -> list[int]:
            nonlocal reused
            expected = await answer(plain, request(prompt=prompt, max_tokens=12))
            events = await collect(reusing, request(prompt=prompt, max_tokens=12))
            assert token_ids(events) == expected
            assert isinstance(events[0], PrefillStarted)
            reused += events[0].cached_tokens
            assert events[0].cached_tokens < len(prompt)
            return expected

        async def conversation() -> None:
            prompt = system + tokens(chance.randrange(1, 30))
            for _ in range(5):
                said = await turn(prompt)
                match chance.randrange(4):
                    case 0:  # the last words are edited
                        prompt = (*prompt[: -chance.randrange(1, len(prompt))], *tokens(9))
                    case 1:  # the same again
                        pass
                    case _:
                        prompt = (*prompt, *said, *tokens(chance.randrange(1, 25)))

        async def leaver() -> None:
            for _ in range(6):
                generation = reusing.generate(request(prompt=system + tokens(200), max_tokens=500))
                wanted = chance.choice((PrefillProgress, TokensGenerated))
                async for event in generation:
                    if isinstance(event, wanted):
                        break
                await generation.aclose()

        system = tokens(45)
        async with asyncio.timeout(120):
            await asyncio.gather(*(conversation() for _ in range(4)), leaver())
        assert reused > 500


async def test_reuse_shows_in_the_events() -> None:
    async with running_engine(prompt_cache_bytes=PLENTY) as engine:
        prompt = tuple(range(90))
        first = await collect(engine, request(prompt=prompt, max_tokens=3))
        again = await collect(engine, request(prompt=prompt, max_tokens=3))
        assert first[0].cached_tokens == 0
        assert again[0].cached_tokens == 80
        assert token_ids(first) == token_ids(again)
        last_progress = [event for event in again if isinstance(event, PrefillProgress)][-1]
        assert last_progress == PrefillProgress(90, 90)


@pytest.mark.parametrize("kind", ["gemma3", "mamba2"])
async def test_models_with_other_caches_are_served_without_reuse(kind) -> None:
    async with running_engine(kind=kind, prompt_cache_bytes=PLENTY) as engine:
        for _ in range(2):
            events = await collect(engine, request(prompt=tuple(range(90)), max_tokens=3))
            assert events[0].cached_tokens == 0
