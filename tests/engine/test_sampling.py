"""Sampling against a plain numpy implementation, row by row, over random logits and settings."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osaurus_grpc.engine import host_sampling
from osaurus_grpc.engine.host_sampling import race, race_of
from osaurus_grpc.engine.sampling import BatchSampler, RowSampler, gumbel
from osaurus_grpc.engine.types import SamplingParams
from osaurus_grpc.models.platform import mx

VOCAB = 40
STEPS = 6


def host_noise(key: int, params: SamplingParams) -> np.ndarray:
    truncates = 0 < params.top_k < VOCAB or params.top_p < 1 or params.min_p > 0
    return -np.log(race_of(key, np.arange(VOCAB)) if truncates else race(key, VOCAB))


def reference_scores(
    logits: np.ndarray, params: SamplingParams, noise: np.ndarray, prompt: list[int], generated: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """What the token that a step chooses has most of, and the log-probabilities it must report."""
    logits = logits.astype(np.float64).copy()
    if params.repetition_penalty != 1.0 and params.repetition_context != 0:
        seen = [*prompt, *generated]
        if params.repetition_context > 0:
            seen = seen[-params.repetition_context :]
        for token in set(seen):
            logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
    for token in set(generated):
        logits[token] -= params.frequency_penalty * generated.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    logprobs = logits - logits.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    if params.temperature == 0:
        return logits, logprobs
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(logprobs[order])
    before = np.cumsum(probabilities) - probabilities
    rank = np.arange(len(order))
    kept = rank < (params.top_k or len(order))
    kept &= before < params.top_p if params.top_p < 1 else True
    kept &= probabilities >= params.min_p * probabilities[0]
    kept[0] = True
    scores = (logits - logits.max()) / params.temperature + noise
    scores[order[~kept]] = -np.inf
    return scores, logprobs


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    def maybe(off: float, low: float, high: float) -> float:
        return draw(st.one_of(st.just(off), st.floats(low, high, width=32)))

    return SamplingParams(
        temperature=maybe(0.0, 0.125, 2.0),
        top_p=maybe(1.0, 0.125, 0.96875),
        top_k=draw(st.sampled_from([0, 0, 1, 3, 17, VOCAB, 1000])),
        min_p=maybe(0.0, 0.03125, 1.0),
        repetition_penalty=maybe(1.0, 0.5, 2.0),
        repetition_context=draw(st.sampled_from([-1, 0, 1, 4, 64])),
        presence_penalty=maybe(0.0, -2.0, 2.0),
        frequency_penalty=maybe(0.0, -2.0, 2.0),
        logit_bias=draw(
            st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=4)
        ),
    )


@settings(max_examples=60)
@given(rows=st.lists(params(), min_size=1, max_size=6), seed=st.integers(0, 2**32), on_host=st.booleans())
def test_every_row_is_sampled_as_by_itself(rows: list[SamplingParams], seed: int, on_host: bool) -> None:
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, VOCAB, generator.integers(1, 9)).tolist() for _ in rows]
    samplers = [
        RowSampler(p, prompt, (), top_logprobs=5, seed=seed + i, vocab_size=VOCAB)
        for i, (p, prompt) in enumerate(zip(rows, prompts, strict=True))
    ]
    draws = [random.Random(seed + i) for i in range(len(rows))]
    generated: list[list[int]] = [[] for _ in rows]
    batch = BatchSampler(on_host=on_host)
    for step in range(STEPS):
        if step == 3 and len(rows) > 1:  # a row leaves between steps
            for values in (rows, prompts, samplers, draws, generated):
                values.pop(0)
        logits = generator.standard_normal((len(rows), VOCAB)).astype(np.float32) * 3
        fed = [(out or prompt)[-1] for out, prompt in zip(generated, prompts, strict=True)]
        tokens, details = batch.sample(samplers, mx.array(fed), mx.array(logits))
        for i, row in enumerate(rows):
            noise = np.zeros(VOCAB)
            if row.temperature != 0 and row.top_k != 1:
                key = draws[i].getrandbits(64)
                noise = host_noise(key, row) if on_host else np.array(gumbel([key], VOCAB))[0]
            scores, logprobs = reference_scores(logits[i], row, noise, prompts[i], generated[i])
            chosen = int(tokens[i].item())
            detail = details[i]
            assert detail is not None
            # float32 against float64.
            assert scores[chosen] >= scores.max() - 1e-4
            told = detail.token(chosen)
            assert told.logprob == pytest.approx(logprobs[chosen], abs=2e-4)
            top = np.sort(logprobs)[::-1][:5]
            np.testing.assert_allclose([entry.logprob for entry in told.top], top, atol=2e-4)
            assert told.top[0].token_id == int(np.argmax(logprobs))
            generated[i].append(chosen)


def test_a_rebuilt_row_goes_on_where_it_was() -> None:
    """After a device error a sampler is made anew from the tokens so far."""
    row = SamplingParams(
        temperature=1.2, presence_penalty=0.7, repetition_penalty=1.3, repetition_context=5, seed=4
    )
    generator = np.random.default_rng(0)
    prompt = [3, 9, 9, 1]
    logits = generator.standard_normal((10, 1, VOCAB)).astype(np.float32)

    def run(rebuild_at: int | None) -> list[int]:
        out: list[int] = []
        sampler = RowSampler(row, prompt, (), top_logprobs=None, seed=4, vocab_size=VOCAB)
        batch = BatchSampler()
        for step in range(10):
            if step == rebuild_at:
                sampler = RowSampler(row, prompt, out, top_logprobs=None, seed=4, vocab_size=VOCAB)
            tokens, _ = batch.sample([sampler], mx.array([[*prompt, *out][-1]]), mx.array(logits[step]))
            out.append(int(tokens[0].item()))
        return out

    whole = run(None)
    assert len(set(whole)) > 3
    for at in range(10):
        assert run(at) == whole


@pytest.mark.parametrize("on_host", [True, False])
def test_a_draw_never_lands_on_an_impossible_token(on_host: bool) -> None:
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[0, 7] = 1.0
    for seed in range(50):
        sampler = RowSampler(
            SamplingParams(temperature=2.0, top_p=0.9 if seed % 2 else 1.0),
            [1],
            (),
            top_logprobs=None,
            seed=seed,
            vocab_size=VOCAB,
        )
        tokens, _ = BatchSampler(on_host=on_host).sample([sampler], mx.array([1]), mx.array(logits))
        assert tokens.item() == 7


@pytest.mark.parametrize("on_host", [True, False])
def test_sampling_follows_the_distribution(on_host: bool) -> None:
    """A thousand draws of a known distribution stay near it (the seed is fixed)."""
    probabilities = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    logits = np.log(probabilities).astype(np.float32)[None]
    for kind in ({}, {"top_k": 5}):  # the plain and the sorting path
        sampler = RowSampler(
            SamplingParams(temperature=1.0, **kind), [0], (), top_logprobs=None, seed=1, vocab_size=5
        )
        batch = BatchSampler(on_host=on_host)
        counts = np.zeros(5)
        for _ in range(1000):
            counts[batch.sample([sampler], mx.array([0]), mx.array(logits))[0].item()] += 1
        np.testing.assert_allclose(counts / 1000, probabilities, atol=0.04)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("kind", [{}, {"top_p": 0.99}], ids=["plain", "truncating"])
def test_the_last_bits_of_logits_do_not_change_what_is_drawn(kind: dict[str, float], on_host: bool) -> None:
    """A few probable tokens, among which the bits are noise, and many improbable ones."""
    vocab_size, rows = 20_000, 200
    generator = np.random.default_rng(0)
    logits = generator.standard_normal(vocab_size).astype(np.float32)
    logits[::5_000] += 10
    nearly = logits + generator.standard_normal(vocab_size).astype(np.float32) * np.float32(3e-6)

    def drawn(values: np.ndarray, seed: int) -> list[int]:
        samplers = [
            RowSampler(
                SamplingParams(temperature=1.0, **kind), [0], (), top_logprobs=None, seed=seed + i,
                vocab_size=vocab_size,
            )
            for i in range(rows)
        ]  # fmt: skip
        fed, batch = mx.array([0] * rows), BatchSampler(on_host=on_host)
        made: list[int] = batch.sample(samplers, fed, mx.array(np.tile(values, (rows, 1))))[0].tolist()
        return made

    for seed in range(0, 5 * rows, rows):
        tokens = drawn(logits, seed)
        assert len(set(tokens)) > rows // 8
        assert drawn(nearly, seed) == tokens


def test_a_cold_temperature_draws_the_most_probable_token() -> None:
    logits = np.array([[1e30, 3.0, -1e30, 2.0]], np.float32)
    for kind in ({}, {"top_p": 0.9}):
        for on_host in (True, False):
            sampler = RowSampler(
                SamplingParams(temperature=2e-6, **kind), [0], (), top_logprobs=None, seed=1, vocab_size=4
            )
            tokens, _ = BatchSampler(on_host=on_host).sample([sampler], mx.array([0]), mx.array(logits))
            assert tokens.item() == 0


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5]),
    top_k=st.sampled_from([0, 3, 600, 2000]),
    min_p=st.sampled_from([0.0, 0.001, 0.1]),
    masked=st.sampled_from([0.0, 0.9]),
    most_near=st.sampled_from([0, 4096]),
)
def test_what_is_kept_does_not_depend_on_how_it_is_found(
    seed: int, scale: float, top_p: float, top_k: int, min_p: float, masked: float, most_near: int
) -> None:
    """A wide vocabulary, flat and peaked distributions, many equal logits and impossible tokens."""
    generator = np.random.default_rng(seed)
    shifted = (generator.standard_normal(3000) * scale).round(1).astype(np.float32)
    shifted[generator.random(3000) < masked] = -np.inf
    shifted -= shifted.max()
    params = SamplingParams(temperature=1.0, top_p=top_p, top_k=top_k, min_p=min_p)
    with mock.patch.object(host_sampling, "_MOST_NEAR", most_near):
        kept = host_sampling._kept(shifted, params)
    order = np.argsort(-shifted, kind="stable")
    probabilities = np.exp(shifted[order].astype(np.float64))
    before = np.cumsum(probabilities) - probabilities
    allowed = np.arange(3000) < (top_k or 3000)
    if top_p < 1.0:
        allowed &= before < top_p * probabilities.sum()
    if min_p:
        allowed &= shifted[order] >= np.log(min_p)
    expected = order[allowed]
    # float32 sums may shift the border of top_p by a token.
    assert abs(len(kept) - len(expected)) <= (1 if top_p < 1.0 else 0)
    shared = min(len(kept), len(expected))
    descending = -np.sort(-shifted[kept])
    np.testing.assert_array_equal(descending[:shared], shifted[expected[:shared]])
    assert len(set(kept.tolist())) == len(kept)


@pytest.mark.parametrize("on_host", [True, False])
def test_penalties_go_with_their_rows(on_host: bool) -> None:
    """Rows join and leave, and other samplers take them over, without what they look back at being lost."""
    settings = [
        SamplingParams(temperature=0.0, repetition_penalty=1.8, repetition_context=4),
        SamplingParams(temperature=0.0, repetition_penalty=1.5, repetition_context=-1, logit_bias={7: 0.5}),
        SamplingParams(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.8),
        SamplingParams(temperature=0.0),
    ]
    prompts = [[3, 9, 9, 1, 4], [2], [5, 6], [8]]
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((12, len(settings), VOCAB)).astype(np.float32)

    def run(groups: list[list[int]]) -> list[list[int]]:
        rows = [
            RowSampler(row, prompt, (), top_logprobs=None, seed=0, vocab_size=VOCAB)
            for row, prompt in zip(settings, prompts, strict=True)
        ]
        fed = [prompt[-1] for prompt in prompts]
        said: list[list[int]] = [[] for _ in rows]
        for step, at_once in enumerate(logits):
            sampler = BatchSampler(on_host=on_host)
            rest = [i for i in range(len(rows)) if i not in groups[step % len(groups)]]
            for group in (groups[step % len(groups)], rest):
                if not group:
                    continue
                made, _ = sampler.sample(
                    [rows[i] for i in group], mx.array([fed[i] for i in group]), mx.array(at_once[group])
                )
                for i, token in zip(group, made.tolist(), strict=True):
                    fed[i] = token
                    said[i].append(token)
        return said

    together = run([[0, 1, 2, 3]])
    assert run([[0, 3], [2, 1, 0, 3], [1], [3, 2, 0]]) == together
    assert len({tuple(one) for one in together}) == len(settings)
