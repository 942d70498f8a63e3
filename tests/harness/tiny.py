"""A tiny random-weight Llama with a real tokenizer: every code path of a real model, in milliseconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.harness.tiny_tokenizer import VOCABULARY, shortened

HIDDEN, LAYERS, HEADS, KV_HEADS, FEED_FORWARD = 64, 2, 4, 2, 128
CONTEXT_LENGTH = 2048


def build(
    target: Path,
    tokenizer_from: Path,
    *,
    context_length: int = CONTEXT_LENGTH,
    vocab_size: int | None = VOCABULARY,
) -> None:
    """Write an MLX model folder.

    Args:
        target: The folder to make.
        tokenizer_from: A model folder whose tokenizer and chat template are copied.
        context_length: Its max_position_embeddings.
        vocab_size: Keep so many of the tokenizer's first tokens; None keeps all.
    """
    original = json.loads((tokenizer_from / "config.json").read_text())
    target.mkdir(parents=True, exist_ok=True)
    for path in tokenizer_from.iterdir():
        if path.name.startswith("tokenizer") or path.name in {
            "generation_config.json",
            "chat_template.jinja",
            "special_tokens_map.json",
        }:
            shutil.copy2(path, target / path.name)
    if vocab_size is None:
        vocab_size = int(original["vocab_size"])
    else:
        tokenizer = shortened(tokenizer_from, vocab_size)
        (target / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": FEED_FORWARD,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": vocab_size,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": True,
        "eos_token_id": original.get("eos_token_id"),
        "bos_token_id": original.get("bos_token_id"),
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    save_file(_weights(vocab_size), target / "model.safetensors", metadata={"format": "mlx"})


def _weights(vocab_size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    head = HIDDEN // HEADS
    # Embeddings of unit scale: their product with the hidden state spreads the logits, so that
    # greedy answers do not hang on rounding.
    weights = {
        "model.embed_tokens.weight": random.standard_normal((vocab_size, HIDDEN)).astype(np.float32),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": np.ones(HIDDEN, np.float32),
            prefix + "post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            prefix + "self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN) * 3,
            prefix + "self_attn.k_proj.weight": matrix(KV_HEADS * head, HIDDEN) * 3,
            prefix + "self_attn.v_proj.weight": matrix(KV_HEADS * head, HIDDEN) * 3,
            prefix + "self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN) * 3,
            prefix + "mlp.gate_proj.weight": matrix(FEED_FORWARD, HIDDEN) * 3,
            prefix + "mlp.up_proj.weight": matrix(FEED_FORWARD, HIDDEN) * 3,
            prefix + "mlp.down_proj.weight": matrix(HIDDEN, FEED_FORWARD) * 3,
        }
    return weights
