"""Engines over tiny random models, made without any download."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from mlx.utils import tree_map

from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.prefix_disk import PrefixDisk
from osaurus_grpc.engine.types import (
    EngineEvent,
    GenerationFinished,
    GenerationRequest,
    SamplingParams,
    TokensGenerated,
)
from osaurus_grpc.models.platform import mx

VOCAB = 96
GREEDY = SamplingParams(temperature=0.0)


def tiny_model(kind: str = "llama", *, seed: int = 11, layers: int = 2) -> Any:
    """A random model of an architecture with float32 weights; so many layers are for llama only."""
    mx.random.seed(seed)
    match kind:
        case "llama":
            from mlx_lm.models import llama as family

            arguments = family.ModelArgs(
                model_type="llama", hidden_size=32, num_hidden_layers=layers, intermediate_size=64,
                num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=VOCAB,
            )  # fmt: skip
        case "gemma3":  # sliding windows: rotating caches beside plain ones
            from mlx_lm.models import gemma3_text as family

            arguments = family.ModelArgs(
                model_type="gemma3_text", hidden_size=32, num_hidden_layers=4, intermediate_size=64,
                num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=VOCAB,
                sliding_window=16, sliding_window_pattern=2, query_pre_attn_scalar=8,
            )  # fmt: skip
        case "mamba2":  # recurrent state only
            from mlx_lm.models import mamba2 as family

            arguments = family.ModelArgs(
                model_type="mamba2", num_heads=4, head_dim=16, vocab_size=VOCAB, hidden_size=32,
                intermediate_size=64, state_size=16, num_hidden_layers=2, layer_norm_epsilon=1e-5,
                conv_kernel=4, n_groups=1, use_bias=False, use_conv_bias=True,
                tie_word_embeddings=True, time_step_limit=(0.0, 100.0), time_step_rank="auto",
            )  # fmt: skip
        case "gpt_oss":  # a window narrower than the others', experts, and sinks
            from mlx_lm.models import gpt_oss as family

            arguments = family.ModelArgs(
                num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, vocab_size=VOCAB,
                hidden_size=32, intermediate_size=32, head_dim=8, num_attention_heads=4,
                num_key_value_heads=2, sliding_window=24,
            )  # fmt: skip
        case "qwen3_next":  # recurrent layers beside plain ones
            from mlx_lm.models import qwen3_next as family

            arguments = family.ModelArgs(
                model_type="qwen3_next", hidden_size=32, num_hidden_layers=2, intermediate_size=64,
                num_attention_heads=4, linear_num_value_heads=4, linear_num_key_heads=2,
                linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4,
                num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
                shared_expert_intermediate_size=32, mlp_only_layers=[], moe_intermediate_size=32,
                rms_norm_eps=1e-5, vocab_size=VOCAB, num_key_value_heads=2, rope_theta=10000.0,
                partial_rotary_factor=0.5, max_position_embeddings=4096, head_dim=8,
                full_attention_interval=2,
            )  # fmt: skip
        case "falcon_h1":  # a recurrent and a plain cache in every layer's list
            from mlx_lm.models import falcon_h1 as family

            arguments = family.ModelArgs(
                head_dim=8, hidden_size=32, intermediate_size=64, mamba_d_head=8, mamba_d_ssm=32,
                mamba_d_state=8, mamba_n_heads=4, num_attention_heads=4, num_hidden_layers=2,
                num_key_value_heads=2, vocab_size=VOCAB, rope_theta=10000.0,
            )  # fmt: skip
        case "deepseek_v32":  # two plain caches in every layer's list, keys and values of other shapes
            from mlx_lm.models import deepseek_v32 as family

            arguments = family.ModelArgs(
                vocab_size=VOCAB, hidden_size=32, index_head_dim=8, index_n_heads=2, index_topk=512,
                intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
            )  # fmt: skip
        case "lfm2":  # short convolutions beside plain ones
            from mlx_lm.models import lfm2 as family

            arguments = family.ModelArgs(
                model_type="lfm2", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, norm_eps=1e-5,
                conv_bias=False, conv_L_cache=3, block_dim=32, block_ff_dim=64, block_multiple_of=8,
                block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False, rope_theta=10000.0,
                full_attn_idxs=[1],
            )  # fmt: skip
        case _:
            raise ValueError(kind)
    model = family.Model(arguments)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def sharpened(model: Any) -> Any:
    """Larger weights, so that an answer depends on all that was said and not on the last token only."""
    model.update(tree_map(lambda w: w * 3 if w.ndim > 1 else w, model.parameters()))
    mx.eval(model.parameters())
    return model


@asynccontextmanager
async def running_engine(
    *,
    kind: str = "llama",
    wrap: Callable[[Any], Any] = lambda model: model,
    end_tokens: tuple[int, ...] = (),
    max_batch_size: int = 8,
    max_waiting_requests: int = 64,
    prefill_chunk_tokens: int = 64,
    prompt_cache_bytes: int = 0,
    prompt_cache_bits: int = 0,
    kv_cache_bytes: int = -1,
    prefix_disk: PrefixDisk | None = None,
    identity: str = "",
    prompt_lookup_tokens: int = 0,
    draft_tokens: int = 4,
    draft: Callable[[], Any] | None = None,
) -> AsyncIterator[Engine]:
    """A started engine that serves one tiny model as "tiny", with what draft makes drafting for it."""
    engine = Engine(
        max_batch_size=max_batch_size,
        max_waiting_requests=max_waiting_requests,
        prefill_chunk_tokens=prefill_chunk_tokens,
        prompt_cache_bytes=prompt_cache_bytes,
        prompt_cache_bits=prompt_cache_bits,
        kv_cache_bytes=kv_cache_bytes,
        prefix_disk=prefix_disk,
        prompt_lookup_tokens=prompt_lookup_tokens,
        draft_tokens=draft_tokens,
    )
    await engine.start()
    try:
        if draft is not None:
            await engine.attach("draft", await engine.call(draft), end_tokens, VOCAB)
        model = await engine.call(lambda: wrap(tiny_model(kind)))
        await engine.attach(
            "tiny", model, end_tokens, VOCAB, identity=identity, draft_id="draft" if draft else ""
        )
        yield engine
    finally:
        await engine.stop()


EngineFactory = Callable[..., AbstractAsyncContextManager[Engine]]


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as running:
        yield running


def request(
    prompt: tuple[int, ...] = (1, 2, 3),
    max_tokens: int = 12,
    sampling: SamplingParams = GREEDY,
    **more: Any,
) -> GenerationRequest:
    return GenerationRequest(
        request_id="r", model_id="tiny", prompt=prompt, max_tokens=max_tokens, sampling=sampling, **more
    )


async def collect(engine: Engine, asked: GenerationRequest) -> list[EngineEvent]:
    async with asyncio.timeout(240):
        return [event async for event in engine.generate(asked)]


def token_ids(events: list[EngineEvent]) -> list[int]:
    return [t.token_id for event in events if isinstance(event, TokensGenerated) for t in event.tokens]


async def answer(engine: Engine, asked: GenerationRequest) -> list[int]:
    events = await collect(engine, asked)
    assert isinstance(events[-1], GenerationFinished)
    return token_ids(events)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that the engine does by itself."""
    async with asyncio.timeout(240):
        while not condition():  # noqa: ASYNC110  (the engine has no event for a test to wait on)
            await asyncio.sleep(0)
