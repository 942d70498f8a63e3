"""The engine on a real model: a batch of eight says what each request says alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.types import GenerationRequest, SamplingParams
from osaurus_grpc.models.catalog import Catalog
from osaurus_grpc.models.residency import LoadedModel, Residency

from .conftest import answer

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


@pytest.mark.smollm
@pytest.mark.parametrize("prompt_cache_bytes", [0, 2**28])
async def test_eight_together_say_what_each_says_alone(smollm_dir: Path, prompt_cache_bytes: int) -> None:
    engine = Engine(
        max_batch_size=8,
        max_waiting_requests=8,
        prefill_chunk_tokens=512,
        prompt_cache_bytes=prompt_cache_bytes,
    )
    await engine.start()
    models = Residency(engine, max_loaded_models=1, keep_alive_seconds=-1, dtype="auto")
    try:
        async with models.lease(Catalog(smollm_dir).find("smollm2-135m-instruct")) as lease:
            requests = [asked(lease.model, question, i) for i, question in enumerate(QUESTIONS)]
            alone = [await answer(engine, one) for one in requests]
            together = await asyncio.gather(*(answer(engine, one) for one in requests))
            assert together == alone
            assert "Paris" in lease.model.tokenizer.decode(alone[0])
    finally:
        await models.close()
        await engine.stop()
