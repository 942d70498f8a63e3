"""Reuse of KV caches: it happens, it is bounded, and it changes no token of a greedy answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    BatchKVCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
)

from osaurus_grpc.engine.cache_layout import CacheLayout, Row
from osaurus_grpc.engine.prompt_cache import PromptCache
from osaurus_grpc.engine.token_chain import BLOCK_TOKENS, Chain
from osaurus_grpc.engine.types import PrefillProgress, PrefillStarted
from osaurus_grpc.models.platform import mx

from .conftest import VOCAB, answer, collect, request, running_engine, token_ids

LAYERS, HEADS, HEAD_DIM = 2, 1, 32
BLOCK_BYTES = 2 * LAYERS * HEADS * BLOCK_TOKENS * HEAD_DIM * 4
# Quantized, a group of 32 has a scale and a bias.
BLOCK_BYTES_OF = {0: BLOCK_BYTES, **{b: BLOCK_BYTES // 32 * b + BLOCK_BYTES // HEAD_DIM * 2 for b in (8, 4)}}
PLENTY = 64 * 2**20


def plain_store(max_bytes: int, **more: int) -> PromptCache:
    return PromptCache(CacheLayout([KVCache() for _ in range(LAYERS)]), max_bytes, **more)


def keep(store: PromptCache, tokens: list[int], **more: int) -> None:
    """Store a row of a batch cache whose values tell which token and place they belong to."""
    caches = []
    for layer in range(LAYERS):
        cache = BatchKVCache([3])  # padded to the left, in a buffer longer than filled
        rows = np.pad(rows_of(tokens, layer), ((0, 0), (0, 0), (3, 5), (0, 0)), constant_values=9)
        cache.state = mx.array(rows), mx.array(-rows), mx.array([len(tokens)]), mx.array([3]), len(tokens) + 3
        caches.append(cache)
    store.store(Chain(), Row(caches, 0, tokens), **more)


def rows_of(tokens: list[int], layer: int) -> np.ndarray:
    rows = np.zeros((1, HEADS, len(tokens), HEAD_DIM), np.float32)
    for place, token in enumerate(tokens):
        rows[0, :, place] = token * 1000 + place + layer / 10 + np.arange(HEAD_DIM) / 7
    return rows


def quantized(rows: np.ndarray, bits: int) -> np.ndarray:
    """The same as they come back from so many bits."""
    if not bits:
        return rows
    packed = mx.quantize(mx.array(rows), group_size=32, bits=bits)
    return np.asarray(mx.dequantize(*packed, group_size=32, bits=bits))


def match(store: PromptCache, tokens: list[int]) -> int:
    return store.match_length(Chain(tokens), tokens)


@settings(max_examples=100)
@given(
    sequences=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=12),
    blocks=st.integers(1, 12),
    ends=st.booleans(),
    bits=st.sampled_from((0, 0, 8, 4)),
)
def test_what_is_found_is_what_was_stored(
    sequences: list[list[int]], blocks: int, ends: bool, bits: int
) -> None:
    """Sequences over an alphabet of two blocks share beginnings and branch; the store holds a few.

    What was quantized is found as quantizing it once gives it, whatever became of it in between.
    """
    store = plain_store(blocks * BLOCK_BYTES_OF[bits], bits=bits)
    stored: list[list[int]] = []
    for pattern in sequences:
        tokens = [symbol * 7 + i % 3 for symbol in pattern for i in range(BLOCK_TOKENS)] + [1, 2, 3]
        prompt = [*tokens, 4]
        expected_most = max((_common(prompt[:-1], other) for other in stored), default=0)
        length = match(store, prompt)
        prefix = store.lookup(Chain(prompt), prompt)
        assert length == (prefix.length if prefix else 0) <= expected_most
        if prefix is not None:
            for layer, found in enumerate(prefix.caches):
                true = quantized(rows_of(prompt[:length], layer), bits)
                assert found.offset == length
                np.testing.assert_array_equal(found.keys[:, :, :length], true)
                values = quantized(-rows_of(prompt[:length], layer), bits)
                np.testing.assert_array_equal(found.values[:, :, :length], values)
                assert found.keys.shape[2] > len(prompt)
        keep(store, tokens, is_end=ends)
        stored.append(tokens)
        assert store.nbytes <= blocks * BLOCK_BYTES_OF[bits]
        if len(pattern) + ends <= blocks:  # the newest is there whole
            assert match(store, prompt) == (len(tokens) if ends else len(pattern) * BLOCK_TOKENS)


def _common(left: list[int], right: list[int]) -> int:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length


def test_a_beginning_that_is_used_outlives_others() -> None:
    store = plain_store(4 * BLOCK_BYTES)
    system = [9] * BLOCK_TOKENS
    keep(store, system)
    for i in range(20):
        tokens = system + [i] * BLOCK_TOKENS
        assert match(store, [*tokens, 0]) == BLOCK_TOKENS
        store.lookup(Chain(tokens), tokens)
        keep(store, tokens)


def test_a_stable_beginning_outlives_newer_ones_that_are_not() -> None:
    store = plain_store(4 * BLOCK_BYTES)
    system = [9] * BLOCK_TOKENS + [8] * BLOCK_TOKENS
    keep(store, [*system, *[7] * BLOCK_TOKENS], stable_tokens=len(system))
    for i in range(10, 30):
        keep(store, [i] * (5 * BLOCK_TOKENS))
    assert match(store, [*system, *[7] * BLOCK_TOKENS, 0]) == len(system)
    assert store.nbytes == 4 * BLOCK_BYTES


def test_stable_beginnings_leave_half_of_the_store_to_others() -> None:
    store = plain_store(4 * BLOCK_BYTES)
    for i in range(10):
        keep(store, [i] * BLOCK_TOKENS, stable_tokens=BLOCK_TOKENS)
    keep(store, [20] * (2 * BLOCK_TOKENS))
    for i in range(21, 24):
        keep(store, [i] * (2 * BLOCK_TOKENS))
        assert match(store, [i] * (2 * BLOCK_TOKENS + 1)) == 2 * BLOCK_TOKENS
    assert [i for i in range(10) if match(store, [i] * (BLOCK_TOKENS + 1))] == [8, 9]


def test_equal_beginnings_are_kept_once() -> None:
    store = plain_store(PLENTY)
    for i in range(5):
        keep(store, [9] * (10 * BLOCK_TOKENS) + [i] * BLOCK_TOKENS)
    assert store.nbytes == 15 * BLOCK_BYTES


def test_the_last_token_is_always_computed() -> None:
    store = plain_store(PLENTY)
    tokens = [1] * (2 * BLOCK_TOKENS)
    keep(store, tokens, is_end=True)
    assert match(store, tokens) == BLOCK_TOKENS
    assert match(store, [*tokens, 1]) == 2 * BLOCK_TOKENS


def test_a_sequence_is_taken_up_just_where_it_ended() -> None:
    store = plain_store(PLENTY)
    tokens = [1] * 40
    keep(store, tokens, is_end=True)
    assert match(store, [*tokens, 1]) == 40
    assert match(store, [*tokens[:-1], 5, 1]) == 32


@pytest.mark.parametrize("cache", [QuantizedKVCache(), ChunkedKVCache(8), ConcatenateKVCache()])
def test_models_with_other_caches_take_no_part(cache) -> None:
    with pytest.raises(ValueError, match="cannot be reused"):
        CacheLayout([KVCache(), cache])
    with pytest.raises(ValueError, match="cannot be reused"):
        CacheLayout([CacheList(KVCache(), cache)])


def test_a_subclass_of_a_known_cache_takes_no_part() -> None:
    """It may hold more than is known of its parent."""

    class Unknown(KVCache):
        pass

    with pytest.raises(ValueError, match="cannot be reused"):
        CacheLayout([Unknown()])


def test_clearing_drops_everything() -> None:
    store = plain_store(PLENTY)
    keep(store, [1] * 40, stable_tokens=16, is_end=True)
    assert store.nbytes > 0
    store.clear()
    assert store.nbytes == match(store, [1] * 41) == 0
    keep(store, [1] * 40)
    assert match(store, [1] * 41) == 32


async def test_reuse_shows_in_the_events() -> None:
    async with running_engine(prompt_cache_bytes=PLENTY) as engine:
        prompt = tuple(range(90))
        first = await collect(engine, request(prompt=prompt, max_tokens=3))
        again = await collect(engine, request(prompt=prompt, max_tokens=3))
        assert first[0].cached_tokens == 0
        assert again[0].cached_tokens == 89
        assert token_ids(first) == token_ids(again)
        last_progress = [event for event in again if isinstance(event, PrefillProgress)][-1]
        assert last_progress == PrefillProgress(90, 90)


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.03), (4, 0.5)])
def test_quantized_records_are_smaller_and_close_to_what_was_stored(bits: int, worst: float) -> None:
    tokens = list(range(40))
    values = np.random.default_rng(3).standard_normal((1, 2, len(tokens), 64)).astype(np.float32)
    caches = [KVCache(), KVCache()]
    for cache, dim in zip(caches, (64, 20), strict=True):  # 20 has no group size, and is kept as it is
        cache.state = mx.array(values[..., :dim]), mx.array(-values[..., :dim]), len(tokens)
    sizes = []
    for stored_bits in (0, bits):
        store = PromptCache(CacheLayout([KVCache(), KVCache()]), PLENTY, bits=stored_bits)
        store.store(Chain(), Row(caches, 0, tokens), is_end=True)
        sizes.append(store.nbytes)
    found = store.lookup(Chain([*tokens, 1]), [*tokens, 1])
    assert found is not None
    assert found.length == len(tokens)
    grouped, whole = (np.asarray(cache.keys[:, :, : len(tokens)]) for cache in found.caches)
    assert 0 < np.abs(grouped - values).max() < worst
    np.testing.assert_array_equal(whole, values[..., :20])
    float_bytes = 2 * 2 * len(tokens) * 4
    assert sizes[0] == float_bytes * (64 + 20)
    # A scale and a bias for each group of 64.
    assert sizes[1] == float_bytes * (64 * bits // 32 + 2 + 20)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3_next"])
async def test_quantized_caches_are_reused(kind) -> None:
    prompt = tuple((5 * i + 1) % VOCAB for i in range(100))
    async with running_engine(kind=kind, prompt_cache_bytes=PLENTY, prompt_cache_bits=8) as engine:
        first = await collect(engine, request(prompt=prompt, max_tokens=6))
        again = await collect(engine, request(prompt=(*prompt, *token_ids(first), 3), max_tokens=6))
        assert isinstance(again[0], PrefillStarted)
        assert again[0].cached_tokens >= 105


async def test_reuse_is_counted() -> None:
    async with running_engine(prompt_cache_bytes=30_000) as engine:
        prompt = tuple(range(90))
        await answer(engine, request(prompt=prompt, max_tokens=3))
        assert (engine.stats().cache_lookups, engine.stats().cache_hits) == (1, 0)
        events = await collect(engine, request(prompt=prompt, max_tokens=3))
        stats = engine.stats()
        assert isinstance(events[0], PrefillStarted)
        assert (stats.cache_lookups, stats.cache_hits) == (2, 1)
        assert stats.cache_tokens_reused == events[0].cached_tokens > 0
        assert 0 < stats.kv_kept_bytes <= 30_000
        for start in range(1, 6):
            await answer(engine, request(prompt=prompt[start:], max_tokens=3))
        assert engine.stats().cache_evictions > 0
