"""Rows of different lengths in one cache: exact whoever joins and leaves, and in place."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from osaurus_grpc.engine import layers
from osaurus_grpc.engine.batch import Batch, Decoded
from osaurus_grpc.engine.decoding import DecodeBatch
from osaurus_grpc.engine.memory import KVFootprint, spare_rows
from osaurus_grpc.engine.ragged_cache import STEP, RaggedKVCache, RowLengths, lengths_of
from osaurus_grpc.engine.sampling import RowSampler
from osaurus_grpc.engine.types import SamplingParams
from osaurus_grpc.models.platform import mx

from .conftest import GREEDY, VOCAB, tiny_model

KINDS = ("llama", "gemma3", "gpt_oss", "qwen3_next", "falcon_h1")
_MODELS: dict[str, Any] = {}


def model_of(kind: str) -> Any:
    if kind not in _MODELS:
        _MODELS[kind] = tiny_model(kind)
    return _MODELS[kind]


def plain_row(lengths: list[int], seed: int = 0) -> list[KVCache]:
    """Caches of one row, a layer for each length; 0 is a layer that was not used."""
    mx.random.seed(seed)
    caches = []
    for length in lengths:
        cache = KVCache()
        if length:
            cache.update_and_fetch(mx.random.normal((1, 2, length, 8)), mx.random.normal((1, 2, length, 4)))
        caches.append(cache)
    layers.evaluate(caches)
    return caches


def address(array: mx.array) -> int:
    return int(np.asarray(memoryview(array)).ctypes.data)  # type: ignore[arg-type]  # mx.array is a buffer


def addresses(caches: list[Any]) -> list[int]:
    layers.evaluate(caches)
    return [address(array) for cache in caches for array in (cache.keys, cache.values)]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_pass_over_ragged_rows_is_that_over_mlx_lms(data):
    """Masks, places and what is fetched, against each row alone in mlx-lm's cache."""
    lengths = data.draw(st.lists(st.integers(1, 2 * STEP), min_size=1, max_size=4))
    count, window = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([None, 1, 3, 100]))
    rows = [plain_row([length], seed) for seed, length in enumerate(lengths)]
    ragged = layers.merge(rows, data.draw(st.integers(0, 3)))[0]
    assert ragged.offset.tolist() == lengths
    mx.random.seed(9)
    new = mx.random.normal((len(rows), 2, count, 8)), mx.random.normal((len(rows), 2, count, 4))
    mask = ragged.make_mask(count, return_array=True, window_size=window)
    keys, values = ragged.update_and_fetch(*new)
    assert ragged.offset.tolist() == [length + count for length in lengths]
    for i, (cache,) in enumerate(rows):
        expected = cache.make_mask(count, return_array=True, window_size=window)
        if expected is None:
            expected = mx.ones((count, lengths[i] + 1), dtype=mx.bool_)
        alone = cache.update_and_fetch(new[0][i : i + 1], new[1][i : i + 1])
        end = lengths[i] + count
        assert mx.array_equal(keys[i, :, :end], alone[0][0])
        assert mx.array_equal(values[i, :, :end], alone[1][0])
        assert mx.array_equal(mask[i, 0, :, :end], expected)
        assert not mask[i, 0, :, end:].any()
    assert ragged.trim(count) == count
    assert ragged.lengths == lengths


def test_rows_of_one_length_need_no_mask():
    even, odd = (RaggedKVCache(RowLengths(rows)) for rows in ([5, 5], [5, 6]))
    assert even.make_mask(1) is None
    assert even.make_mask(3) == "causal"
    assert even.make_mask(1, window_size=6) is None
    assert even.make_mask(1, window_size=5).tolist()[0][0][0] == [False, True, True, True, True, True]
    assert even.make_mask(1, return_array=True).shape == (2, 1, 1, 6)
    assert odd.make_mask(1).shape == (2, 1, 1, 7)


@pytest.mark.parametrize("count", range(1, 6))
def test_the_last_rows_take_the_seats_that_are_free(count):
    for size in range(count + 1):
        for gone in itertools.combinations(range(count), size):
            order = layers.arrangement(count, gone)
            assert sorted(order) == [i for i in range(count) if i not in gone]
            # Rows that need not move do not.
            assert sum(i != seat for seat, i in enumerate(order)) == sum(i < count - size for i in gone)


def test_rows_join_and_leave_in_place():
    """No buffer is exchanged while there are seats, whichever row comes or goes."""
    batch = layers.merge([plain_row([300, 300], 1), plain_row([200, 200], 2), plain_row([120, 120], 3)], 1)
    layers.resize(batch, 5, batch[0].capacity)
    expected = [[np.array(array) for array in batch[0].row(i)] for i in range(3)]
    before = addresses(batch)
    joiner = plain_row([400, 400], 4)  # the longest, which would move all rows of an aligned batch
    layers.join(batch, layers.as_batch(joiner), 4)
    assert addresses(batch) == before
    assert lengths_of(batch) == [300, 200, 120, 400]
    layers.leave(batch, layers.arrangement(4, [0]))
    assert addresses(batch) == before
    assert lengths_of(batch) == [400, 200, 120]
    layers.leave(batch, layers.arrangement(3, [2]))
    assert addresses(batch) == before
    keys, values = batch[0].row(1)
    assert np.array_equal(keys, expected[1][0])
    assert np.array_equal(values, expected[1][1])
    assert np.array_equal(batch[1].row(0)[0], joiner[1].keys[:, :, :400])


def test_a_batch_of_a_model_decodes_in_the_same_buffers():
    model = model_of("llama")
    batch = Batch(model, (), 8)
    try:
        uids = [insert(batch, [1, 2, 3 + i], 200) for i in range(4)]
        for _ in range(6):
            batch.step(64)
        caches = batch._decoding.caches
        assert layers.places(caches) == (4, STEP)
        joined = insert(batch, list(range(1, 60)), 200)
        batch.step(64)
        assert layers.places(caches)[0] == 7  # two rows more than there are
        before = addresses(caches)
        batch.step(64)
        insert(batch, [7], 200)
        batch.step(64)
        batch.remove(uids[1])
        batch.step(64)
        batch.remove(joined)
        batch.step(64)
        assert batch.decoding == 4
        # A pass may find a buffer of the pass before still being read, and copies it then; these are
        # awaited one by one.
        assert addresses(caches) == before
    finally:
        batch.close()


def test_an_unused_layer_stays_one():
    batch = layers.merge([plain_row([3, 0]), plain_row([5, 0])], 1)
    layers.join(batch, layers.as_batch(plain_row([2, 0])), 3)
    layers.leave(batch, layers.arrangement(3, [0]))
    assert [cache.empty() for cache in batch] == [False, True]
    assert lengths_of(batch) == [2, 5]
    single = layers.as_single(batch, 1)
    assert single is not None
    assert [cache.offset for cache in single if cache.keys is not None] == [5]


def test_a_row_that_is_left_alone_owns_its_memory():
    batch = layers.merge([plain_row([3], 1), plain_row([300], 2)], 1)
    whole = batch[0]
    expected = [np.array(array) for array in whole.row(1)]
    (single,) = layers.as_single(batch, 1) or []
    assert type(single) is KVCache
    assert single.nbytes < whole.nbytes
    assert np.array_equal(single.keys[:, :, :300], expected[0])
    assert np.array_equal(single.values[:, :, :300], expected[1])
    start = address(whole.keys)
    assert not start <= address(single.keys) < start + whole.keys.nbytes


def insert(batch: Batch, prompt: list[int], tokens: int, params: SamplingParams = GREEDY) -> int:
    sampler = RowSampler(params, prompt, (), top_logprobs=None, seed=len(prompt), vocab_size=VOCAB)
    return batch.insert(prompt, tokens, sampler)[0]


_PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=90)
_PARAMS = st.sampled_from(
    [
        GREEDY,
        SamplingParams(temperature=0.0, repetition_penalty=1.3),
        SamplingParams(temperature=0.0, frequency_penalty=0.7, logit_bias={5: 2.0}),
        SamplingParams(temperature=0.9, top_p=0.9),
    ]
)
# Steps to wait, a prompt, tokens to say, settings, and whether an older row is dropped then.
_ARRIVALS = st.tuples(st.integers(0, 6), _PROMPTS, st.integers(1, 20), _PARAMS, st.integers(0, 5))


def alone(model: Any, prompt: list[int], tokens: int, params: SamplingParams) -> list[int]:
    batch = Batch(model, (), 1)
    insert(batch, prompt, tokens, params)
    said: list[int] = []
    while len(batch):
        said += [event.token.token_id for event in batch.step(256) if isinstance(event, Decoded)]
    batch.close()
    return said


@given(
    kind=st.sampled_from(KINDS),
    arrivals=st.lists(_ARRIVALS, min_size=2, max_size=6),
    spare=st.integers(0, 4),
)
@settings(max_examples=20, deadline=None)
def test_rows_say_what_they_say_alone_whoever_joins_and_leaves(kind, arrivals, spare):
    model = model_of(kind)
    batch = Batch(model, (), 6)
    asked: dict[int, Any] = {}
    said: dict[int, list[int]] = {}
    dropped: set[int] = set()

    def step() -> None:
        batch.spare_rows = spare
        for event in batch.step(48):
            if isinstance(event, Decoded) and event.token is not None:
                said[event.uid].append(event.token.token_id)
        within_bounds(batch, spare)

    try:
        for wait, prompt, tokens, params, drop in arrivals:
            while len(batch) >= 6:
                step()
            uid = insert(batch, prompt, tokens, params)
            asked[uid], said[uid] = (prompt, tokens, params), []
            for _ in range(wait):
                step()
            if drop < 2 and len(asked) > drop + 1:
                dropped.add(uid - drop - 1)
                batch.remove(uid - drop - 1)
        while len(batch):
            step()
    finally:
        batch.close()
    for uid, (prompt, tokens, params) in asked.items():
        expected = alone(model, prompt, tokens, params)
        assert said[uid] == (expected[: len(said[uid])] if uid in dropped else expected)


def within_bounds(batch: Batch, spare: int) -> None:
    """No more is held than memory counts."""
    decoding = batch._decoding
    seats, capacity = layers.places(decoding.caches)
    if seats:
        rows, longest = len(decoding.rows), max(lengths_of(decoding.caches))
        assert seats * capacity <= (rows + min(spare, spare_rows(rows))) * (longest + STEP)


def test_memory_that_others_need_is_given_back_at_the_next_step():
    batch = Batch(model_of("llama"), (), 16)
    footprint = KVFootprint(token_bytes=2 * 2 * 2 * 8 * 4)
    try:
        for i in range(7):
            insert(batch, [1, 2, 3 + i], 300)
            batch.step(64)
            batch.step(64)
        assert layers.places(batch._decoding.caches)[0] > 7
        batch.spare_rows = 0
        batch.step(64)
        assert layers.places(batch._decoding.caches)[0] == 7
        assert batch.nbytes <= footprint.batch_bytes(7, 20)
    finally:
        batch.close()


def test_the_cache_of_a_long_row_that_left_is_given_back():
    batch = Batch(model_of("llama"), (), 16)
    try:
        for i in range(3):
            insert(batch, [1, 2, 3 + i], 300)
        long = insert(batch, [5] * 600, 300)
        while batch.decoding < 4:
            batch.step(1024)
        assert layers.places(batch._decoding.caches)[1] > 600
        batch.remove(long)
        assert layers.places(batch._decoding.caches)[1] == STEP
    finally:
        batch.close()


def capacities(batch: Batch) -> list[int]:
    return [cache.capacity for cache in batch._decoding.caches if isinstance(cache, RaggedKVCache)]


@pytest.mark.parametrize("streams", [1, 2])
def test_room_for_a_long_prompt_is_made_layer_by_layer(streams):
    model = tiny_model("llama", layers=4)
    batch = Batch(model, (), 8)
    said: dict[int, list[int]] = {}
    long_prompt = [1 + i % (VOCAB - 1) for i in range(500)]

    def step() -> None:
        for event in batch.step(64):
            if isinstance(event, Decoded) and event.token is not None:
                said.setdefault(event.uid, []).append(event.token.token_id)

    try:
        short = {insert(batch, [1, 2, 3 + i], 40): [1, 2, 3 + i] for i in range(streams)}
        while batch.decoding < streams:
            step()
        step()
        long = insert(batch, long_prompt, 10)
        seen = []
        while batch.prefilling:
            step()
            if batch.prefilling:
                seen.append(sum(capacity > 500 for capacity in capacities(batch)))
        # Some in each step, until only the last pass is left.
        assert seen == sorted(seen)
        assert len(set(seen)) >= 3
        assert seen[-1] >= 3
        while len(batch):
            step()
    finally:
        batch.close()
    for uid, prompt in short.items():
        assert said[uid] == alone(model, prompt, 40, GREEDY)
    assert said[long] == alone(model, long_prompt, 10, GREEDY)


def test_the_room_of_a_prompt_that_does_not_come_is_given_back():
    batch = Batch(model_of("llama"), (), 16)
    batch.spare_rows = 0
    try:
        for i in range(3):
            insert(batch, [1, 2, 3 + i], 300)
        while batch.decoding < 3:
            batch.step(64)
        long = insert(batch, [5] * 600, 300)
        for _ in range(4):
            batch.step(128)
        assert max(capacities(batch)) > 600
        assert layers.places(batch._decoding.caches)[0] == 4
        batch.remove(long)
        for _ in range(2):
            batch.step(128)
        assert set(capacities(batch)) == {STEP}
        within_bounds(batch, 0)
    finally:
        batch.close()


def test_the_models_cache_is_like_mlx_lms():
    """What mlx-lm's models and this engine ask of BatchKVCache is there."""
    asked = {"keys", "values", "offset", "state", "nbytes", "update_and_fetch", "keys_and_values"}
    asked |= {"make_mask", "is_trimmable", "trim", "empty", "size"}
    assert all(hasattr(BatchKVCache([0]), name) for name in asked)
    assert all(hasattr(RaggedKVCache(RowLengths([0])), name) for name in asked)


def test_a_model_may_begin_with_an_empty_batch():
    model = model_of("llama")
    lengths = RowLengths([0, 0])
    caches = [RaggedKVCache(lengths) for _ in make_prompt_cache(model)]
    ids = mx.array([[1, 2, 3], [4, 5, 6]])
    together = model(ids, cache=caches)
    assert mx.allclose(together[1], model(ids[1:])[0], atol=1e-4)
    assert DecodeBatch(model, 2).rows == []
