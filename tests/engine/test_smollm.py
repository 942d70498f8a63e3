"""The engine on a real model: a batch of eight says what each request says alone."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import mlx_lm
import numpy as np
import psutil
import pytest
from mlx_lm.utils import dequantize_model

from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.types import GenerationRequest, SamplingParams
from osaurus_grpc.models import platform, short_weights
from osaurus_grpc.models.catalog import Catalog
from osaurus_grpc.models.platform import mx
from osaurus_grpc.models.residency import LoadedModel, Residency

from .conftest import answer, collect
from .test_prompt_scores import log_softmax, require_scores, scored

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea, the wind and a small boat far from home.",
    "2 + 2 =",
    "Who wrote Hamlet?",
    "Translate to German: good morning",
    "Explain in two sentences why the sky is blue, for a child of six who asks many questions.",
    "Say hello.",
)


def asked(model: LoadedModel, question: str, number: int) -> GenerationRequest:
    prompt = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    # Every other one greedy, the rest sampled with settings and a seed of their own.
    sampling = (
        SamplingParams(temperature=0.0)
        if number % 2 == 0
        else SamplingParams(temperature=0.9, top_p=0.9 if number % 4 == 1 else 1.0, seed=number)
    )
    return GenerationRequest(str(number), model.entry.id, tuple(prompt), 16, sampling)


@asynccontextmanager
async def smollm(smollm_dir: Path, **settings: int) -> AsyncIterator[tuple[Engine, LoadedModel]]:
    engine = Engine(
        **{"max_batch_size": 8, "max_waiting_requests": 8, "prefill_chunk_tokens": 512, **settings}
    )
    await engine.start()
    models = Residency(engine, max_loaded_models=1, keep_alive_seconds=-1, dtype="auto")
    try:
        async with models.lease(Catalog(smollm_dir).find("smollm2-135m-instruct")) as lease:
            yield engine, lease.model
    finally:
        await models.close()
        await engine.stop()


@pytest.mark.smollm
@pytest.mark.timeout(900)  # 150 steps of a real model, each through all of its weights
async def test_eight_together_say_what_each_says_alone(smollm_dir: Path) -> None:
    """Without kept caches, with caches that are kept meanwhile, and with those of the same prompts."""
    async with smollm(smollm_dir, prompt_cache_bytes=0) as (engine, model):
        requests = [asked(model, question, i) for i, question in enumerate(QUESTIONS)]
        alone = [await answer(engine, one) for one in requests]
        assert await asyncio.gather(*(answer(engine, one) for one in requests)) == alone
        assert "Paris" in model.tokenizer.decode(alone[0])
    async with smollm(smollm_dir, prompt_cache_bytes=2**28) as (engine, model):
        for _ in range(2):
            assert await asyncio.gather(*(answer(engine, one) for one in requests)) == alone
        assert await answer(engine, requests[0]) == alone[0]


@pytest.mark.smollm
@pytest.mark.skipif(platform.blas.kernels is None, reason="our kernels are not compiled here")
async def test_reading_quantized_weights_changes_no_token(
    smollm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = platform.blas.kernels
    assert kernels is not None
    answers = []
    for is_read in (True, False):
        if not is_read:
            monkeypatch.setattr(short_weights, "begin", lambda model, quantized: None)
        before = kernels.short_products
        async with smollm(smollm_dir) as (engine, model):
            requests = [asked(model, question, i) for i, question in enumerate(QUESTIONS[:4])]
            answers.append([await answer(engine, one) for one in requests[:2]])
            answers[-1] += await asyncio.gather(*(answer(engine, one) for one in requests))
        assert (kernels.short_products > before) == is_read
    assert answers[0] == answers[1]


@pytest.mark.smollm
@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read as Linux tells it")
async def test_an_unloaded_models_memory_goes_back_to_the_system(smollm_dir: Path) -> None:
    resident = psutil.Process().memory_info
    async with smollm(smollm_dir) as (engine, model):
        for _ in range(2):
            await answer(engine, asked(model, QUESTIONS[0], 0))
        loaded = resident().rss
    assert loaded - resident().rss > 0.8 * model.resident_bytes


@pytest.mark.smollm
async def test_a_prompt_is_scored_as_by_mlx_lm(smollm_dir: Path) -> None:
    """Against mlx-lm's model called on the whole prompt, and log-softmax in float64."""
    text = "The quick brown fox jumps over the lazy dog. The capital of France is Paris, not Lyon. " * 4
    async with smollm(smollm_dir, max_batch_size=2, prefill_chunk_tokens=64) as (engine, model):
        prompt = tuple(model.tokenizer.encode(text))
        asked = GenerationRequest("1", model.entry.id, prompt, 0, SamplingParams(), prompt_logprobs=5)
        tokens = scored(await collect(engine, asked))

        def forward() -> np.ndarray:
            reference, _ = mlx_lm.load(str(smollm_dir / "smollm2-135m-instruct"))
            reference.set_dtype(mx.float32)
            reference = dequantize_model(reference)
            return log_softmax(reference(mx.array([prompt]))[0])

        require_scores(tokens, prompt, await engine.call(forward), 5)
