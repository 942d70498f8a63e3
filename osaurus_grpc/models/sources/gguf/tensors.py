"""Which tensors a model of each architecture has: GGUF's names, MLX's names and the shapes.

Names: GGUF's are those of llama.cpp (src/llama-arch.cpp, and `gguf.constants.TENSOR_NAMES`), MLX's are
the parameter paths of mlx_lm/models/{llama,qwen2,qwen3,qwen3_moe,gemma3_text}.py, which are Hugging Face's.

Two conventions differ and are undone here:

- llama.cpp's converter reorders the rows of q and k of the "llama" architecture, so that rotary
  embedding pairs neighbours (`LlamaModel.permute` in its conversion script); Hugging Face and MLX pair
  the two halves of a head. The rows are put back, so the config needs no `rope_traditional`.
- llama.cpp stores Gemma's norm weights with 1 added (`norm_shift` in its conversion script); MLX adds
  the 1 when it computes (`RMSNorm` in gemma3_text.py). The 1 is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from osaurus_grpc.errors import SourceInvalidError
from osaurus_grpc.models.sources.gguf.reader import TensorInfo


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes that decide a model's shapes; the experts' are 0 where there are none."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    experts: int = 0
    expert_feed_forward: int = 0

    def size(self, letter: str) -> int:
        """One dimension by its letter in the tables below."""
        match letter:
            case "d":
                return self.hidden
            case "f":
                return self.feed_forward
            case "q":
                return self.heads * self.head
            case "k":
                return self.kv_heads * self.head
            case "h":
                return self.head
            case "v":
                return self.vocabulary
            case "e":
                return self.experts
            case "x":
                return self.expert_feed_forward
            case _:
                raise AssertionError(letter)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What becomes of one tensor.

    Attributes:
        source: Where it lies in the file.
        path: The MLX module's path, for example "model.layers.0.self_attn.q_proj".
        parameter: "weight" or "bias".
        permuted_heads: Number of heads whose rows are put back in order; 0 where they are in order.
        shift: Added to every value.
        may_be_quantized: Whether the MLX module has a quantized form.
    """

    source: TensorInfo
    path: str
    parameter: str
    permuted_heads: int = 0
    shift: float = 0.0
    may_be_quantized: bool = False

    def row_order(self) -> NDArray[np.intp]:
        """The stored row that belongs at each place: the inverse of llama.cpp's permutation.

        Returns:
            Shape (rows,).
        """
        rows = np.arange(self.source.shape[0])
        return rows.reshape(self.permuted_heads, -1, 2).swapaxes(1, 2).reshape(-1)


_Table = Mapping[str, tuple[str, str]]  # GGUF name: (MLX name, letters of the shape)

_MODEL: Final[_Table] = {
    "token_embd.weight": ("model.embed_tokens.weight", "vd"),
    "output_norm.weight": ("model.norm.weight", "d"),
}
_HEAD: Final[_Table] = {"output.weight": ("lm_head.weight", "vd")}
_ATTENTION: Final[_Table] = {
    "attn_norm.weight": ("input_layernorm.weight", "d"),
    "attn_q.weight": ("self_attn.q_proj.weight", "qd"),
    "attn_k.weight": ("self_attn.k_proj.weight", "kd"),
    "attn_v.weight": ("self_attn.v_proj.weight", "kd"),
    "attn_output.weight": ("self_attn.o_proj.weight", "dq"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "d"),
}
_BLOCK: Final[_Table] = {
    **_ATTENTION,
    "ffn_gate.weight": ("mlp.gate_proj.weight", "fd"),
    "ffn_up.weight": ("mlp.up_proj.weight", "fd"),
    "ffn_down.weight": ("mlp.down_proj.weight", "df"),
}
_EXPERTS: Final[_Table] = {
    "ffn_gate_inp.weight": ("mlp.gate.weight", "ed"),
    "ffn_gate_exps.weight": ("mlp.switch_mlp.gate_proj.weight", "exd"),
    "ffn_up_exps.weight": ("mlp.switch_mlp.up_proj.weight", "exd"),
    "ffn_down_exps.weight": ("mlp.switch_mlp.down_proj.weight", "edx"),
}
_QKV_BIAS: Final[_Table] = {
    "attn_q.bias": ("self_attn.q_proj.bias", "q"),
    "attn_k.bias": ("self_attn.k_proj.bias", "k"),
    "attn_v.bias": ("self_attn.v_proj.bias", "k"),
}
_OUTPUT_BIAS: Final[_Table] = {"attn_output.bias": ("self_attn.o_proj.bias", "d")}
_QK_NORM: Final[_Table] = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "h"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "h"),
}
_GEMMA_NORMS: Final[_Table] = {
    "post_attention_norm.weight": ("post_attention_layernorm.weight", "d"),
    "ffn_norm.weight": ("pre_feedforward_layernorm.weight", "d"),
    "post_ffw_norm.weight": ("post_feedforward_layernorm.weight", "d"),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture that can be converted.

    Attributes:
        model_type: MLX's name for it, as config.json gives it.
        class_name: Hugging Face's name of the model class.
        block: The tensors of a block.
        optional_block: Tensors that all blocks have, or none.
        permutes: Whether q and k are stored reordered.
        norm_shift: Added to norm weights.
    """

    model_type: str
    class_name: str
    block: _Table
    optional_block: _Table = field(default_factory=lambda: MappingProxyType({}))
    permutes: bool = False
    norm_shift: float = 0.0

    @property
    def is_mixture(self) -> bool:
        """Whether the blocks have experts."""
        return any(letters.startswith("e") for _, letters in self.block.values())


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _BLOCK, optional_block={**_QKV_BIAS, **_OUTPUT_BIAS}, permutes=True
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", {**_BLOCK, **_QKV_BIAS}),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_BLOCK, **_QK_NORM}),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", {**_ATTENTION, **_QK_NORM, **_EXPERTS}),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", {**_BLOCK, **_QK_NORM, **_GEMMA_NORMS}, norm_shift=-1.0
    ),
}

ROPE_FACTORS: Final = "rope_freqs.weight"
EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"

_FLOATS: Final = frozenset({GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16})


def has_attention_bias(names: AbstractSet[str]) -> bool:
    """Whether the attention's projections have biases, by the first block."""
    return "blk.0.attn_q.bias" in names


def _expected(architecture: Architecture, layers: int, names: AbstractSet[str]) -> dict[str, tuple[str, str]]:
    """Every tensor the model must have: GGUF name to (MLX name, letters of the shape)."""
    block = dict(architecture.block)
    if any(f"blk.0.{name}" in names for name in architecture.optional_block):
        block.update(architecture.optional_block)
    expected = {**_MODEL, **(_HEAD if HEAD in names else {})}
    for layer in range(layers):
        for name, (path, letters) in block.items():
            expected[f"blk.{layer}.{name}"] = (f"model.layers.{layer}.{path}", letters)
    return expected


def _plan(
    source: TensorInfo, name: str, letters: str, architecture: Architecture, dims: Dimensions
) -> TensorPlan:
    shape = tuple(dims.size(letter) for letter in letters)
    if source.shape != shape:
        raise SourceInvalidError(
            f"The GGUF file is corrupt: tensor {source.name} has the shape {list(source.shape)}, "
            f"and the model's settings ask for {list(shape)}."
        )
    path, _, parameter = name.rpartition(".")
    is_vector = len(shape) == 1
    if is_vector and source.kind not in _FLOATS:
        raise SourceInvalidError(
            f"Tensor {source.name} is stored as {source.kind.name}, which cannot be converted for a vector."
        )
    heads = {"q": dims.heads, "k": dims.kv_heads}.get(letters[0], 0)
    is_rotated = architecture.permutes and (".attn_q." in source.name or ".attn_k." in source.name)
    return TensorPlan(
        source,
        path,
        parameter,
        permuted_heads=heads if is_rotated else 0,
        shift=architecture.norm_shift if source.name.endswith("norm.weight") else 0.0,
        may_be_quantized=not is_vector,
    )


def plan_tensors(
    tensors: Mapping[str, TensorInfo], architecture: Architecture, dims: Dimensions
) -> list[TensorPlan]:
    """Decides what becomes of every tensor in the file.

    Returns:
        One plan for each tensor of the MLX model, in the order of the file.

    Raises:
        SourceInvalidError: A tensor is missing, unknown, or of the wrong shape.
    """
    expected = _expected(architecture, dims.layers, tensors.keys())
    for name in expected:
        if name not in tensors:
            raise SourceInvalidError(f"The GGUF file is incomplete: tensor {name} is missing.")
    for name in tensors:
        if name not in expected and name != ROPE_FACTORS:
            raise SourceInvalidError(
                f"Tensor {name} is not part of the {architecture.model_type} models that can be converted."
            )
    return [
        _plan(source, *expected[name], architecture, dims)
        for name, source in tensors.items()
        if name in expected
    ]
