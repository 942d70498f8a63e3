"""Log-probabilities of prompts: those of the model's own forward pass over the whole prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from osaurus_grpc.engine import logprobs
from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.logprobs import LogprobTable, PromptScores
from osaurus_grpc.engine.types import (
    EngineEvent,
    GenerationFinished,
    PrefillProgress,
    PrefillStarted,
    PromptScored,
    StopCause,
    Token,
    TokensGenerated,
)
from osaurus_grpc.models.platform import mx

from .conftest import VOCAB, answer, collect, request, running_engine, tiny_model, token_ids
from .test_engine import Faulty

PROMPT = tuple(np.random.default_rng(5).integers(0, VOCAB, 150).tolist())


def scored(events: Sequence[EngineEvent]) -> list[Token]:
    return [token for event in events if isinstance(event, PromptScored) for token in event.tokens]


def log_softmax(logits: Any) -> np.ndarray:
    values = np.asarray(logits, dtype=np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def require_scores(tokens: Sequence[Token], prompt: Sequence[int], expected: np.ndarray, count: int) -> None:
    """The figures of a whole prompt, given the log-softmax of every position's logits."""
    assert [token.token_id for token in tokens] == list(prompt)
    assert tokens[0] == Token(prompt[0])
    for place, token in enumerate(tokens[1:]):
        row = expected[place]
        assert token.logprob == pytest.approx(row[token.token_id], abs=2e-4)
        assert len(token.top) == count
        values = [entry.logprob for entry in token.top]
        np.testing.assert_allclose(values, np.sort(row)[::-1][:count], atol=2e-4)
        np.testing.assert_allclose([row[entry.token_id] for entry in token.top], values, atol=2e-4)
        same = [entry.logprob for entry in token.top if entry.token_id == token.token_id]
        assert same in ([], [token.logprob])


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba2", "qwen3_next"])
async def test_a_prompt_is_scored_as_by_one_pass_over_it(kind: str) -> None:
    async with running_engine(kind=kind, prompt_cache_bytes=2**24) as engine:
        # Its beginning is kept now, and an answer could go on from there.
        plain = await answer(engine, request(prompt=PROMPT))
        model = await engine.call(lambda: tiny_model(kind))
        expected = await engine.call(lambda: log_softmax(model(mx.array([PROMPT]))[0]))

        events = await collect(engine, request(prompt=PROMPT, prompt_logprobs=3))

        require_scores(scored(events), PROMPT, expected, 3)
        assert token_ids(events) == plain
        assert isinstance(events[0], PrefillStarted)
        assert events[0].cached_tokens == 0
        last = max(i for i, event in enumerate(events) if isinstance(event, PromptScored))
        assert last < min(i for i, event in enumerate(events) if isinstance(event, TokensGenerated))
        # Chunks of 64: the figures come as the prompt advances.
        assert sum(isinstance(event, PromptScored) for event in events) >= 3


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]])
@pytest.mark.parametrize("count", [None, 0, VOCAB + 5])
async def test_a_request_for_no_token_ends_with_its_prompt(
    engine: Engine, prompt: tuple[int, ...], count: int | None
) -> None:
    events = await collect(engine, request(prompt=prompt, max_tokens=0, prompt_logprobs=count))

    assert [token.token_id for token in scored(events)] == ([] if count is None else list(prompt))
    assert all(len(token.top) == min(count or 0, VOCAB) for token in scored(events)[1:])
    assert events[-2] == PrefillProgress(len(prompt), len(prompt))
    assert isinstance(events[-1], GenerationFinished)
    assert (events[-1].cause, events[-1].completion_tokens) == (StopCause.MAX_TOKENS, 0)
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


async def test_a_prompt_without_an_answer_is_kept_for_the_next() -> None:
    async with running_engine(prompt_cache_bytes=2**24) as engine:
        expected = await answer(engine, request(prompt=PROMPT))
    async with running_engine(prompt_cache_bytes=2**24) as engine:
        await collect(engine, request(prompt=PROMPT[:140], max_tokens=0))
        events = await collect(engine, request(prompt=PROMPT))
        assert isinstance(events[0], PrefillStarted)
        assert events[0].cached_tokens >= 128
        assert token_ids(events) == expected


async def test_scored_prompts_beside_each_other_and_beside_answers(engine: Engine) -> None:
    prompts = [PROMPT[i : i + 20 + 30 * i] for i in range(4)]
    alone = [await collect(engine, request(prompt=one, prompt_logprobs=2)) for one in prompts]
    running = [request(prompt=(7, i), max_tokens=60) for i in range(2)]
    expected = [await answer(engine, one) for one in running]

    together = await asyncio.gather(
        *(collect(engine, one) for one in running),
        *(collect(engine, request(prompt=one, prompt_logprobs=2)) for one in prompts),
    )

    assert [token_ids(events) for events in together[:2]] == expected
    for events, other in zip(together[2:], alone, strict=True):
        assert token_ids(events) == token_ids(other)
        assert [token.token_id for token in scored(events)] == [token.token_id for token in scored(other)]
        np.testing.assert_allclose(
            [token.logprob for token in scored(events)[1:]],
            [token.logprob for token in scored(other)[1:]],
            atol=1e-4,
        )


async def test_a_pass_has_no_more_logits_than_memory_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_PROMPT_LOGITS_BYTES", 4 * VOCAB * 70)
    widths: list[int] = []

    def watch(_: int, inputs: Any) -> bool:
        widths.append(inputs.shape[1])
        return False

    prompt = PROMPT * 2
    async with running_engine(prefill_chunk_tokens=256, wrap=lambda m: Faulty(m, watch)) as engine:
        events = await collect(engine, request(prompt=prompt, max_tokens=0, prompt_logprobs=0))
        assert [token.token_id for token in scored(events)] == list(prompt)
        assert max(widths) <= 70
        widths.clear()
        await collect(engine, request(prompt=prompt, max_tokens=0))
        assert max(widths) > 70


async def test_after_a_device_error_nothing_is_told_twice() -> None:
    async with running_engine() as engine:
        whole = await collect(engine, request(prompt=PROMPT, prompt_logprobs=1))
    async with running_engine(wrap=lambda m: Faulty(m, lambda call, _: call == 2)) as engine:
        events = await collect(engine, request(prompt=PROMPT, prompt_logprobs=1))
    assert [token.token_id for token in scored(events)] == list(PROMPT)
    np.testing.assert_allclose(
        [token.logprob for token in scored(events)[1:]],
        [token.logprob for token in scored(whole)[1:]],
        atol=1e-5,
    )
    assert token_ids(events) == token_ids(whole)


async def test_the_end_token_has_its_figures() -> None:
    async with running_engine() as engine:
        events = await collect(engine, request(max_tokens=6, top_logprobs=2))
    said = [token for event in events if isinstance(event, TokensGenerated) for token in event.tokens]
    end = said[4]
    async with running_engine(end_tokens=(end.token_id,)) as engine:
        events = await collect(engine, request(max_tokens=6, top_logprobs=2))
        bare = await collect(engine, request(max_tokens=6))
    place = [token.token_id for token in said].index(end.token_id)
    assert token_ids(events) == [token.token_id for token in said[:place]] == token_ids(bare)
    finished, other = events[-1], bare[-1]
    assert isinstance(finished, GenerationFinished)
    assert isinstance(other, GenerationFinished)
    assert finished.cause is StopCause.END_OF_SEQUENCE
    assert finished.completion_tokens == place
    assert finished.end_token is not None
    assert finished.end_token.logprob == pytest.approx(said[place].logprob, abs=1e-5)
    assert len(finished.end_token.top) == 2
    assert other.end_token == Token(end.token_id)


@pytest.mark.parametrize("vocab_size", [1, 7, 96, 1_000, 5_000])
@pytest.mark.parametrize("levels", [2, 10_000])
def test_host_and_device_make_the_same_table(vocab_size: int, levels: int) -> None:
    """With two levels nearly all logits are equal: any of them is among the most probable."""
    generator = np.random.default_rng(vocab_size)
    logits = generator.integers(0, levels, (5, vocab_size)).astype(np.float32) * (8.0 / levels)
    logits[1, : vocab_size // 2] = -np.inf
    tokens = generator.integers(vocab_size // 2, vocab_size, 5)
    expected = log_softmax(logits)
    for count in {0, 1, min(5, vocab_size), min(20, vocab_size), vocab_size}:
        host, device = (
            LogprobTable(mx.array(logits), mx.array(tokens), count, on_host=on_host)
            for on_host in (True, False)
        )
        for row, token_id in enumerate(tokens.tolist()):
            mine = host.token(row, token_id, count)
            other = device.token(row, token_id, count)
            assert mine.logprob == pytest.approx(expected[row, token_id], abs=1e-4)
            assert other.logprob == pytest.approx(mine.logprob, abs=1e-5)
            top = np.sort(expected[row])[::-1][:count]
            for told in (mine.top, other.top):
                np.testing.assert_allclose([entry.logprob for entry in told], top, atol=1e-4)
                assert len({entry.token_id for entry in told}) == count
                named = [expected[row, entry.token_id] for entry in told]
                np.testing.assert_allclose(named, top, atol=1e-4)


def test_figures_are_told_once_and_in_order() -> None:
    logits = mx.array(np.random.default_rng(1).standard_normal((200, VOCAB)).astype(np.float32))
    scores = PromptScores(PROMPT, 1, VOCAB)
    taken: list[Token] = []
    for first, last in ((0, 90), (90, 91), (91, 150)):
        scores.note(logits[first:last], first)
        taken += scores.take()
        assert len(taken) == min(last + 1, 150)
    again = PromptScores(PROMPT, 1, VOCAB, told=91)
    again.note(logits[:90], 0)
    assert again.take() == ()
    again.note(logits[90:150], 90)
    assert again.take() == tuple(taken[91:])
