"""Tiny random-weight models that take images, with real tokenizers, templates and image processors.

One of each family that is served. SmolVLM and Idefics3 have image tokens in rows of tiles, Qwen's
positions in three dimensions, and Qwen3-VL adds what it sees behind its first layers, too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.harness.tiny_tokenizer import shortened

SMOLVLM, IDEFICS3, LLAVA = "tiny-smolvlm", "tiny-idefics3", "tiny-llava"
QWEN2_VL, QWEN2_5_VL, QWEN3_VL = "tiny-qwen2-vl", "tiny-qwen2.5-vl", "tiny-qwen3-vl"
MODELS = (SMOLVLM, IDEFICS3, LLAVA, QWEN2_VL, QWEN2_5_VL, QWEN3_VL)
CONTEXT_LENGTH = 2048
_SMOLVLM_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# The template of HuggingFaceTB/SmolVLM-Instruct: content is always a list of parts.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# The template of llava-hf/llava-1.5-7b-hf.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{# Render all images first #}{% for content in message['content'] "
    "| selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in message['content'] "
    "| selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# The template of Qwen/Qwen2-VL-2B-Instruct, without its parts about videos and numbered pictures.
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(models_dir: Path, tokenizer_from: Path) -> None:
    """Write all of MODELS."""
    build_smolvlm(models_dir / SMOLVLM, tokenizer_from)
    build_smolvlm(models_dir / IDEFICS3, tokenizer_from, family="idefics3")
    build_llava(models_dir / LLAVA, tokenizer_from)
    build_qwen2_vl(models_dir / QWEN2_VL, tokenizer_from)
    build_qwen2_5_vl(models_dir / QWEN2_5_VL, tokenizer_from)
    build_qwen3_vl(models_dir / QWEN3_VL, tokenizer_from)


def placeholder(model: str) -> str:
    """What the template of one of MODELS writes for an image."""
    return "<|vision_start|><|image_pad|><|vision_end|>" if "qwen" in model else "<image>"


def build_smolvlm(target: Path, tokenizer_from: Path, *, family: str = "smolvlm") -> None:
    """Write a SmolVLM or Idefics3 whose image is one or more tiles of 32 × 32 pixels, four tokens each."""
    ids = _write_tokenizer(target, tokenizer_from, _SMOLVLM_TOKENS, SMOLVLM_TEMPLATE)
    vocab_size = max(ids.values()) + 1
    config: dict[str, Any] = {
        "model_type": family,
        "image_token_id": ids["<image>"],
        "scale_factor": 2,
        "vocab_size": vocab_size,
        "eos_token_id": [ids["<end_of_utterance>"]],
        "text_config": {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "vocab_size": vocab_size, "max_position_embeddings": CONTEXT_LENGTH,
        },
        "vision_config": {
            "model_type": f"{family}_vision", "hidden_size": 32, "intermediate_size": 64,
            "num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32,
        },
    }  # fmt: skip
    processor = {
        "image_processor_type": {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[family] + "ImageProcessor",
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
        "do_image_splitting": True,
    }
    _write_json(target / "preprocessor_config.json", processor)
    _write_json(target / "processor_config.json", {"image_seq_len": 4})
    _write_model(target, config)


def build_llava(target: Path, tokenizer_from: Path) -> None:
    """Write a LLaVA whose image is 16 tokens, one a patch of 8 × 8 pixels."""
    ids = _write_tokenizer(target, tokenizer_from, ("<image>",), LLAVA_TEMPLATE)
    vocab_size = max(ids.values()) + 1
    config: dict[str, Any] = {
        "model_type": "llava",
        "image_token_index": ids["<image>"],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": vocab_size,
        "eos_token_id": [ids["<|im_end|>"]],
        "text_config": {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "vocab_size": vocab_size, "max_position_embeddings": CONTEXT_LENGTH,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
            "num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": 8, "image_size": 32,
        },
    }  # fmt: skip
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
    }
    _write_json(target / "preprocessor_config.json", processor)
    # As old conversions do, it leaves the size of patches to config.json.
    _write_json(target / "processor_config.json", {"num_additional_image_tokens": 1})
    _write_model(target, config)


def build_qwen2_vl(target: Path, tokenizer_from: Path) -> None:
    """Write a Qwen2-VL with patches of 8 × 8 pixels, four of which are a token."""
    ids = _write_tokenizer(target, tokenizer_from, _QWEN_TOKENS, QWEN_TEMPLATE)
    vocab_size = max(ids.values()) + 1
    config: dict[str, Any] = {
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": vocab_size,
        "max_position_embeddings": CONTEXT_LENGTH, "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "eos_token_id": [ids["<|im_end|>"]],
        "vision_config": {
            "model_type": "qwen2_vl", "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2,
            "patch_size": 8, "spatial_patch_size": 8, "mlp_ratio": 2, "in_channels": 3,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    }  # fmt: skip
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 16 * 16,
        "max_pixels": 96 * 96,
    }
    _write_json(target / "preprocessor_config.json", processor)
    _write_model(target, config)


def build_qwen2_5_vl(target: Path, tokenizer_from: Path) -> None:
    """Write a Qwen2.5-VL with patches of 8 × 8 pixels, four of which are a token, in windows of 32."""
    build_qwen2_vl(target, tokenizer_from)
    config = json.loads((target / "config.json").read_text())
    config |= {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vision_config": {
            "model_type": "qwen2_5_vl", "depth": 2, "hidden_size": 32, "intermediate_size": 64,
            "out_hidden_size": 64, "num_heads": 2, "patch_size": 8, "spatial_patch_size": 8,
            "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32,
            "fullatt_block_indexes": [1],
        },
    }  # fmt: skip
    _write_model(target, config)


def build_qwen3_vl(target: Path, tokenizer_from: Path) -> None:
    """Write a Qwen3-VL with patches of 8 × 8 pixels, four of which are a token."""
    ids = _write_tokenizer(target, tokenizer_from, _QWEN_TOKENS, QWEN_TEMPLATE)
    vocab_size = max(ids.values()) + 1
    config: dict[str, Any] = {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vocab_size": vocab_size,
        "eos_token_id": [ids["<|im_end|>"]],
        "text_config": {
            "model_type": "qwen3_vl_text", "hidden_size": 64, "intermediate_size": 128,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": vocab_size,
            "max_position_embeddings": CONTEXT_LENGTH, "tie_word_embeddings": False,
            "rope_scaling": {"type": "default", "mrope_section": [4, 2, 2]},
        },
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 3, "hidden_size": 32, "intermediate_size": 64,
            "out_hidden_size": 64, "num_heads": 2, "patch_size": 8, "in_channels": 3,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    }  # fmt: skip
    processor = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 16 * 16, "longest_edge": 96 * 96},
    }
    _write_json(target / "preprocessor_config.json", processor)
    _write_model(target, config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2))


def _write_tokenizer(target: Path, source: Path, tokens: tuple[str, ...], template: str) -> Mapping[str, int]:
    """A tokenizer with further special tokens; returns the ids of all added ones."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("special_tokens_map.json",):
        if (source / name).exists():
            shutil.copy2(source / name, target / name)
    tokenizer = shortened(source)
    added = tokenizer["added_tokens"]
    first = 1 + max(*(token["id"] for token in added), *tokenizer["model"]["vocab"].values())
    for token_id, content in enumerate(tokens, start=first):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added.append({"id": token_id, "content": content, **flags, "special": True})
    _write_json(target / "tokenizer.json", tokenizer)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    settings.pop("chat_template", None)
    _write_json(target / "tokenizer_config.json", settings)
    (target / "chat_template.jinja").write_text(template)
    return {token["content"]: token["id"] for token in added}


def _write_model(target: Path, config: Mapping[str, Any]) -> None:
    """Random weights for whatever parameters mlx-vlm's model of a configuration has."""
    _write_json(target / "config.json", config)
    save_file(_weights(target), target / "model.safetensors", metadata={"format": "mlx"})


def _weights(folder: Path) -> dict[str, np.ndarray]:
    from mlx.utils import tree_flatten
    from mlx_vlm.utils import get_model_and_args, load_config, update_module_configs

    config = load_config(folder)
    classes, _ = get_model_and_args(config)
    config.setdefault("text_config", {})
    model_config = update_module_configs(
        classes.ModelConfig.from_dict(config), classes, config, ["text", "vision"]
    )
    random = np.random.default_rng(11)
    weights: dict[str, np.ndarray] = {}
    for name, array in tree_flatten(classes.Model(model_config).parameters()):
        shape = tuple(array.shape)
        if len(shape) == 1:
            value = np.zeros(shape) if name.endswith("bias") else np.ones(shape)
        elif "embed_tokens" in name:
            value = random.standard_normal(shape)
        else:
            # As in tiny.py: logits are spread, so that greedy answers do not hang on rounding.
            value = random.standard_normal(shape) * 3 / np.sqrt(np.prod(shape[1:]))
        weights[name] = value.astype(np.float32)
    return weights
