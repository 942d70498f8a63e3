"""Makes config.json from a GGUF file's metadata.

Keys: "{architecture}.*" as in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's
src/llama-arch.cpp; config fields as mlx_lm/models/{llama,qwen2,qwen3,qwen3_moe,gemma3_text}.py read them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from osaurus_grpc.errors import SourceInvalidError
from osaurus_grpc.models.sources.gguf import tensors
from osaurus_grpc.models.sources.gguf.reader import GGUFFile, MetadataValue
from osaurus_grpc.models.sources.gguf.tensors import Architecture, Dimensions

_MAX_LAYERS: Final = 4_096
_MAX_DIMENSION: Final = 1 << 24

# Settings that change the computation and that the MLX models of these architectures do not have,
# with the value that says "off".
_INEXPRESSIBLE: Final[Mapping[str, float]] = {
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 0.0,
    "residual_scale": 0.0,
    "logit_scale": 0.0,
    "expert_weights_scale": 0.0,
    "expert_shared_count": 0.0,
}

# Llama 3's rotary scaling, of which GGUF keeps only the resulting factors: the wavelengths between
# which it blends, and the context it was trained on (llama_models' `apply_scaling`).
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Settings:
    """The "{architecture}.*" metadata, checked as it is read."""

    def __init__(self, metadata: Mapping[str, MetadataValue], architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def _get(self, key: str) -> MetadataValue | None:
        return self._metadata.get(f"{self._architecture}.{key}")

    def wrong(self, key: str, what: str = "is missing or out of range") -> SourceInvalidError:
        """The error for a value that cannot be used."""
        return SourceInvalidError(f"The GGUF file's setting {self._architecture}.{key} {what}.")

    def integer(self, key: str, default: int | None = None, *, limit: int = _MAX_DIMENSION) -> int:
        """A whole number from 1 to limit; an array of equal numbers counts as that number."""
        value = self._get(key)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, np.ndarray):
            raise self.wrong(key, "differs from block to block, which cannot be converted")
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise self.wrong(key)
        return value

    def period(self, key: str, default: int) -> int:
        """Every how many layers one is set apart: a number, or a flag a layer that is 0 for those."""
        value = self._get(key)
        if not isinstance(value, np.ndarray) or len(value) == 0:
            return self.integer(key, default)
        period = int(np.argmin(value != 0)) + 1
        if not np.array_equal(value != 0, np.arange(1, len(value) + 1) % period != 0):
            raise self.wrong(key, "is not periodic, which cannot be converted")
        return period

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key)
        return float(value)

    def text(self, key: str, default: str) -> str:
        """A text."""
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "is not a text")
        return value


def architecture_of(file: GGUFFile) -> tuple[str, Architecture]:
    """GGUF's name of the architecture and what is known of it.

    Raises:
        SourceInvalidError: The file is one part of a split model, holds no language model, or one of an
            architecture that cannot be converted.
    """
    parts = file.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise SourceInvalidError(
            f"The GGUF file is one of {parts} parts; merge them with llama-gguf-split first."
        )
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise SourceInvalidError("The GGUF file does not say which architecture it holds.")
    if name not in tensors.ARCHITECTURES:
        known = ", ".join(tensors.ARCHITECTURES)
        raise SourceInvalidError(
            f"GGUF files of the architecture {name[:64]!r} cannot be converted; these can: {known}."
        )
    return name, tensors.ARCHITECTURES[name]


def dimensions(file: GGUFFile, settings: Settings, *, is_mixture: bool) -> Dimensions:
    """The model's sizes.

    Args:
        file: The file.
        settings: Its settings.
        is_mixture: Whether the architecture has experts.

    Raises:
        SourceInvalidError: One is missing, absurd, or cannot be said in MLX.
    """
    embedding = file.tensors.get(tensors.EMBEDDING)
    if embedding is None:
        raise SourceInvalidError(f"The GGUF file is incomplete: tensor {tensors.EMBEDDING} is missing.")
    hidden = settings.integer("embedding_length")
    heads = settings.integer("attention.head_count")
    head = settings.integer("attention.key_length", max(1, hidden // heads))
    if settings.integer("attention.value_length", head) != head:
        raise settings.wrong("attention.value_length", "differs from key_length, which cannot be converted")
    if settings.integer("rope.dimension_count", head) != head:
        raise settings.wrong("rope.dimension_count", "is not the head's size, which cannot be converted")
    kv_heads = settings.integer("attention.head_count_kv", heads)
    if heads % kv_heads or head % 2:
        raise settings.wrong("attention.head_count", "does not fit the other attention settings")
    return Dimensions(
        layers=settings.integer("block_count", limit=_MAX_LAYERS),
        hidden=hidden,
        feed_forward=settings.integer("feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head=head,
        vocabulary=embedding.shape[0],
        experts=settings.integer("expert_count") if is_mixture else 0,
        expert_feed_forward=settings.integer("expert_feed_forward_length") if is_mixture else 0,
    )


def _llama3_factors(base: float, head: int, factor: float) -> NDArray[np.float64]:
    """Llama 3's divisors of the rotary frequencies, shape (head / 2,)."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    context = _LLAMA3["original_max_position_embeddings"]
    wavelengths = 2 * math.pi * base ** (np.arange(0, head, 2) / head)
    smooth = (context / wavelengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < context / high, 1.0, np.where(wavelengths > context / low, factor, blended))


def _factor_scaling(file: GGUFFile, base: float, head: int) -> dict[str, Any] | None:
    """Names the rotary scaling behind "rope_freqs.weight", float32 of shape (head / 2,)."""
    tensor = file.tensors[tensors.ROPE_FACTORS]
    if tensor.kind.name != "F32" or tensor.shape != (head // 2,):
        raise SourceInvalidError(f"The GGUF file is corrupt: tensor {tensor.name} has the wrong form.")
    factors = file.read_rows(tensor, 0, 1).view("<f4")[0]
    if (factors == 1).all():
        return None
    factor = float(factors.max())
    if math.isfinite(factor) and np.allclose(factors, _llama3_factors(base, head, factor), rtol=1e-4):
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise SourceInvalidError(
        f"The rotary factors in tensor {tensor.name} are not those of Llama 3, and cannot be converted."
    )


def _rope_scaling(file: GGUFFile, settings: Settings, base: float, head: int) -> dict[str, Any] | None:
    """The rotary scaling as mlx_lm/models/rope_utils.py reads it, or None."""
    kind = settings.text("rope.scaling.type", "linear")
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 1.0))
    if tensors.ROPE_FACTORS in file.tensors:
        scaling = _factor_scaling(file, base, head)
        if scaling is not None and kind != "none" and factor not in (0.0, 1.0, scaling["factor"]):
            raise settings.wrong("rope.scaling.factor", "contradicts the rotary factors")
        if scaling is not None:
            return scaling
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if factor < 0:
        raise settings.wrong("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(settings, factor)
    raise settings.wrong("rope.scaling.type", f"is {kind[:32]!r}, which cannot be converted")


def _yarn(settings: Settings, factor: float) -> dict[str, Any]:
    if settings.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise settings.wrong("rope.scaling.attn_factor", "cannot be converted")
    if settings.number("rope.scaling.yarn_log_multiplier", 0.0):
        raise settings.wrong("rope.scaling.yarn_log_multiplier", "cannot be converted")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": settings.integer("rope.scaling.original_context_length"),
        "beta_fast": settings.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": settings.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _gemma3(settings: Settings, dims: Dimensions) -> dict[str, Any]:
    """Gemma 3's own fields: five sliding-window layers to one full one (llama.cpp, src/models/gemma3.cpp)."""
    # The 27B model, told by its number of layers, scales by hidden / heads, all others by the head's size.
    scalar = dims.hidden // dims.heads if dims.layers == 62 else dims.head
    period = settings.period("attention.sliding_window_pattern", 6)
    if period > dims.layers:
        raise settings.wrong("attention.sliding_window_pattern", "is larger than the number of layers")
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": settings.integer("attention.sliding_window"),
        "sliding_window_pattern": period,
        "rope_local_base_freq": settings.number("rope.freq_base_swa", 10_000.0),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _qwen3_moe(settings: Settings, dims: Dimensions) -> dict[str, Any]:
    """The experts: every layer has them, and the chosen ones' shares are normed (llama.cpp, qwen3moe.cpp)."""
    return {
        "num_experts": dims.experts,
        "num_experts_per_tok": settings.integer("expert_used_count", limit=dims.experts),
        "moe_intermediate_size": dims.expert_feed_forward,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


def _check_expressible(settings: Settings, architecture: Architecture) -> None:
    if not architecture.is_mixture and settings.number("expert_count", 0.0):
        raise settings.wrong("expert_count", "is set, which cannot be converted")
    for key, off in _INEXPRESSIBLE.items():
        if settings.number(key, off) != off:
            raise settings.wrong(key, "is set, which cannot be converted")


def model_config(
    file: GGUFFile, settings: Settings, architecture: Architecture, dims: Dimensions
) -> dict[str, Any]:
    """config.json without its quantization and its token ids.

    Raises:
        SourceInvalidError: A setting is missing, absurd, or cannot be said in MLX.
    """
    _check_expressible(settings, architecture)
    if architecture.model_type == "qwen2" and dims.heads * dims.head != dims.hidden:
        raise settings.wrong("attention.key_length", "is not hidden / heads, which cannot be converted")
    base = settings.number(
        "rope.freq_base", 1_000_000.0 if architecture.model_type == "gemma3_text" else 10_000.0
    )
    if base <= 0:
        raise settings.wrong("rope.freq_base")
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "hidden_size": dims.hidden,
        "num_hidden_layers": dims.layers,
        "intermediate_size": dims.feed_forward,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head,
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": dims.vocabulary,
        "max_position_embeddings": settings.integer("context_length"),
        "rope_theta": base,
        "rope_scaling": _rope_scaling(file, settings, base, dims.head),
        "tie_word_embeddings": tensors.HEAD not in file.tensors,
    }
    if architecture.model_type == "llama":
        config["attention_bias"] = tensors.has_attention_bias(file.tensors.keys())
    if architecture.model_type == "gemma3_text":
        return config | _gemma3(settings, dims)
    if architecture.is_mixture:
        config.update(_qwen3_moe(settings, dims))
    return config | {"hidden_act": "silu"}
