"""Writes small GGUF files with the `gguf` package, as llama.cpp's conversion scripts do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    get_tensor_name_map,
    quants,
)
from gguf.constants import GGML_QUANT_SIZES, TokenType
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

Kind = GGMLQuantizationType
Floats = NDArray[np.float32]

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD, LAYERS = 256, 512, 4, 2, 64, 2
EXPERTS, EXPERT_FEED_FORWARD = 4, 256
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "Ġ w", "o r", "he ll", "hell o")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokens() -> list[str]:
    merged = [merge.replace(" ", "") for merge in MERGES]
    return [*CONTROL, *sorted(ByteLevel.alphabet()), *merged, "<tool>"]


def byte_level_metadata() -> dict[str, Any]:
    tokens = byte_level_tokens()
    types = [TokenType.NORMAL] * len(tokens)
    types[:3] = [TokenType.CONTROL] * 3
    types[-1] = TokenType.USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


VOCABULARY = len(byte_level_tokens())


@dataclass
class TinyModel:
    """Weights in Hugging Face's form, and how a GGUF file says the same.

    Change any part before calling write(): `metadata` overrides (None leaves a key out), `kinds` stores
    a tensor as another format, `extra` adds tensors, `left_out` drops some.
    """

    architecture: str = "llama"
    tied: bool = False
    seed: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    extra: dict[str, NDArray[Any]] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()

    def weights(self) -> dict[str, Floats]:
        """Hugging Face name to float32 weights."""
        random = np.random.default_rng(self.seed)
        shapes = self._shapes()
        made = {}
        for name, shape in shapes.items():
            scale = 1 / np.sqrt(shape[-1])
            values = random.standard_normal(shape).astype(np.float32) * np.float32(scale)
            is_norm = "norm" in name
            made[name] = values + np.float32(0 if self.architecture == "gemma3" or not is_norm else 1)
        return made

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        d, f, q, k, h = HIDDEN, FEED_FORWARD, HEADS * HEAD, KV_HEADS * HEAD, HEAD
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (VOCABULARY, d),
            "model.norm.weight": (d,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (VOCABULARY, d)
        for layer in range(LAYERS):
            block: dict[str, tuple[int, ...]] = {
                "input_layernorm.weight": (d,),
                "self_attn.q_proj.weight": (q, d),
                "self_attn.k_proj.weight": (k, d),
                "self_attn.v_proj.weight": (k, d),
                "self_attn.o_proj.weight": (d, q),
                "post_attention_layernorm.weight": (d,),
                "mlp.gate_proj.weight": (f, d),
                "mlp.up_proj.weight": (f, d),
                "mlp.down_proj.weight": (d, f),
            }
            if self.architecture == "qwen2":
                block |= {
                    "self_attn.q_proj.bias": (q,),
                    "self_attn.k_proj.bias": (k,),
                    "self_attn.v_proj.bias": (k,),
                }
            if self.architecture == "qwen3moe":
                block = {name: shape for name, shape in block.items() if not name.startswith("mlp.")}
                e, x = EXPERTS, EXPERT_FEED_FORWARD
                block |= {
                    "mlp.gate.weight": (e, d),
                    "mlp.switch_mlp.gate_proj.weight": (e, x, d),
                    "mlp.switch_mlp.up_proj.weight": (e, x, d),
                    "mlp.switch_mlp.down_proj.weight": (e, d, x),
                }
            if self.architecture in ("qwen3", "qwen3moe", "gemma3"):
                block |= {"self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,)}
            if self.architecture == "gemma3":
                block |= {"pre_feedforward_layernorm.weight": (d,), "post_feedforward_layernorm.weight": (d,)}
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
        return shapes

    def gguf_name(self, name: str) -> str:
        """GGUF's name of a Hugging Face tensor, from the `gguf` package's own table."""
        arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == self.architecture)
        name = name.replace("switch_mlp", "experts")
        found = get_tensor_name_map(arch, LAYERS).get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return found

    def stored(self) -> dict[str, Floats]:
        """GGUF name to the values a GGUF file holds."""
        tensors = {}
        for name, values in self.weights().items():
            heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0)
            if self.architecture == "llama" and heads:
                values = permuted(values, heads)
            if self.architecture == "gemma3" and name.endswith("norm.weight"):
                values = values + np.float32(1)
            tensors[self.gguf_name(name)] = values
        return tensors

    def all_metadata(self) -> dict[str, Any]:
        a = self.architecture
        made: dict[str, Any] = {
            f"{a}.block_count": LAYERS,
            f"{a}.context_length": 512,
            f"{a}.embedding_length": HIDDEN,
            f"{a}.feed_forward_length": FEED_FORWARD,
            f"{a}.attention.head_count": HEADS,
            f"{a}.attention.head_count_kv": KV_HEADS,
            f"{a}.attention.key_length": HEAD,
            f"{a}.attention.value_length": HEAD,
            f"{a}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{a}.rope.freq_base": 10_000.0,
            **byte_level_metadata(),
        }
        if a == "gemma3":
            made["gemma3.attention.sliding_window"] = 8
            made["gemma3.attention.sliding_window_pattern"] = 2
        if a == "qwen3moe":
            made["qwen3moe.expert_count"] = EXPERTS
            made["qwen3moe.expert_used_count"] = 2
            made["qwen3moe.expert_feed_forward_length"] = EXPERT_FEED_FORWARD
        made |= self.metadata
        return {key: value for key, value in made.items() if value is not None}

    def write(self, path: Path) -> Path:
        writer = GGUFWriter(path, self.architecture)
        for key, value in self.all_metadata().items():
            add(writer, key, value)
        for name, values in {**self.stored(), **self.extra}.items():
            if name in self.left_out:
                continue
            kind = self.kinds.get(name, Kind.F32)
            if values.dtype != np.float32 or kind is Kind.F32:
                writer.add_tensor(name, values)
            else:
                writer.add_tensor(name, encoded(values, kind), raw_dtype=kind)
        finish(writer)
        return path


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """What llama.cpp's conversion script does to q and k (conversion/llama.py, `LlamaModel.permute`)."""
    shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(values.reshape(shape).swapaxes(1, 2).reshape(values.shape))


def random_blocks(kind: Kind, rows: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Rows of blocks of any bits, with scales between 0.001 and 0.01. uint8, shape (rows, row bytes)."""
    random = np.random.default_rng(seed)
    block, size = GGML_QUANT_SIZES[kind]
    data = random.integers(0, 256, (rows * width // block, size), dtype=np.uint8)
    for offset in SCALES.get(kind, (0,)):
        scales = random.uniform(0.001, 0.01, len(data)).astype(np.float16)
        data[:, offset : offset + 2] = scales[:, None].view(np.uint8)
    if kind is Kind.MXFP4:
        data[:, 0] = random.integers(110, 128, len(data))
    if kind is Kind.IQ1_M:  # its scale is spread over the high nibbles of the last 8 bytes
        half = np.frombuffer(np.float16(0.005).tobytes(), np.uint16)[0]
        for index in range(4):
            data[:, 49 + 2 * index] = (data[:, 49 + 2 * index] & 0x0F) | (int(half) >> 4 * index & 0xF) << 4
    return data.reshape(rows, -1)


# Offsets of the float16 scales in a block, where they are not at its beginning alone.
SCALES: Mapping[Kind, tuple[int, ...]] = {
    Kind.Q4_1: (0, 2),
    Kind.Q5_1: (0, 2),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q6_K: (208,),
    Kind.IQ1_M: (),
    Kind.MXFP4: (),
}


def encoded(values: Floats, kind: Kind) -> NDArray[Any]:
    """Values in a format: quantized where the `gguf` package can, else random blocks of the same shape."""
    if kind is Kind.F16:
        return values.astype(np.float16)
    try:
        return np.asarray(quants.quantize(values, kind))
    except NotImplementedError:
        rows = random_blocks(kind, values.size // values.shape[-1], values.shape[-1])
        return rows.reshape(*values.shape[:-1], -1)
