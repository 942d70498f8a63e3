"""BERT-family encoders, which mlx-lm does not have: BERT, RoBERTa, XLM-RoBERTa and their kin.

Architecture and weight names are those of transformers' BertModel and RobertaModel (BERT:
arXiv:1810.04805, RoBERTa: arXiv:1907.11692), absolute positions and post-layer normalisation. MiniLM,
BGE, E5, GTE, mxbai and Arctic embedding models are of this kind.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

BERT_TYPES = frozenset({"bert"})
# These number their positions from padding_idx + 1 on.
ROBERTA_TYPES = frozenset({"roberta", "xlm-roberta", "camembert"})
ENCODER_TYPES = BERT_TYPES | ROBERTA_TYPES

_PREFIXES = ("bert.", "roberta.", "model.")
_PARTS = ("embeddings.", "encoder.")
_ACTIVATIONS: Mapping[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "gelu_fast": nn.gelu_approx,
    "relu": nn.relu,
    "silu": nn.silu,
}


class UnsupportedEncoderError(ValueError):
    """An encoder of a kind that this module does not compute. The text says what, without paths."""


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """What config.json says of an encoder.

    Attributes:
        position_offset: The first position's row in the table of positions.
        The others are as in transformers' BertConfig.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    position_offset: int

    @classmethod
    def from_json(cls, config: Mapping[str, object]) -> EncoderConfig:
        """Read a config.json.

        Raises:
            UnsupportedEncoderError: A value is missing, or names what is not computed here.
        """

        def number(key: str, default: int | None = None) -> int:
            value = config.get(key, default)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UnsupportedEncoderError(f"its config.json has no {key}")
            return value

        if config.get("position_embedding_type", "absolute") != "absolute":
            raise UnsupportedEncoderError("its positions are not absolute")
        activation = config.get("hidden_act", "gelu")
        if activation not in _ACTIVATIONS:
            raise UnsupportedEncoderError("its activation function is not known")
        epsilon = config.get("layer_norm_eps", 1e-12)
        is_roberta = config.get("model_type") in ROBERTA_TYPES
        return cls(
            vocab_size=number("vocab_size"),
            hidden_size=number("hidden_size"),
            num_hidden_layers=number("num_hidden_layers"),
            num_attention_heads=number("num_attention_heads"),
            intermediate_size=number("intermediate_size"),
            max_position_embeddings=number("max_position_embeddings"),
            type_vocab_size=number("type_vocab_size", 2),
            layer_norm_eps=float(epsilon) if isinstance(epsilon, (int, float)) else 1e-12,
            hidden_act=str(activation),
            position_offset=number("pad_token_id", 1) + 1 if is_roberta else 0,
        )

    @property
    def context_length(self) -> int:
        """Tokens of an input at most."""
        return self.max_position_embeddings - self.position_offset


class _Embeddings(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self._offset = config.position_offset

    def __call__(self, tokens: mx.array) -> mx.array:
        positions = mx.arange(tokens.shape[1]) + self._offset
        # Inputs are single texts: every token is of type 0.
        types = self.token_type_embeddings(mx.zeros((1,), dtype=mx.int32))
        return self.LayerNorm(self.word_embeddings(tokens) + self.position_embeddings(positions) + types)


class _SelfAttention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.query, self.key, self.value = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)
        self._heads = config.num_attention_heads

    def __call__(self, hidden: mx.array, mask: mx.array) -> mx.array:
        rows, length, size = hidden.shape
        width = size // self._heads

        def split(states: mx.array) -> mx.array:
            return states.reshape(rows, length, self._heads, width).transpose(0, 2, 1, 3)

        states = mx.fast.scaled_dot_product_attention(
            split(self.query(hidden)),
            split(self.key(hidden)),
            split(self.value(hidden)),
            scale=width**-0.5,
            mask=mask,
        )
        return states.transpose(0, 2, 1, 3).reshape(rows, length, size)


class _Residual(nn.Module):
    """A projection, added to its input and normalised."""

    def __init__(self, inputs: int, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, states: mx.array, residual: mx.array) -> mx.array:
        return self.LayerNorm(self.dense(states) + residual)


class _Attention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self = _SelfAttention(config)
        self.output = _Residual(config.hidden_size, config)

    def __call__(self, hidden: mx.array, mask: mx.array) -> mx.array:
        return self.output(self.self(hidden, mask), hidden)


class _Intermediate(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class _Layer(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = _Intermediate(config)
        self.output = _Residual(config.intermediate_size, config)
        self._activation = _ACTIVATIONS[config.hidden_act]

    def __call__(self, hidden: mx.array, mask: mx.array) -> mx.array:
        hidden = self.attention(hidden, mask)
        return self.output(self._activation(self.intermediate.dense(hidden)), hidden)


class _Layers(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer = [_Layer(config) for _ in range(config.num_hidden_layers)]


class Encoder(nn.Module):
    """An encoder; its parameters have transformers' names."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Layers(config)

    def __call__(self, tokens: mx.array, lengths: mx.array) -> mx.array:
        """Hidden states of the last layer.

        Args:
            tokens: int32, shape (rows, length), padded on the right.
            lengths: int32, shape (rows,): tokens of each row.

        Returns:
            Of the weights' dtype, shape (rows, length, hidden_size); those of padding mean nothing.
        """
        hidden = self.embeddings(tokens)
        mask = (mx.arange(tokens.shape[1])[None] < lengths[:, None])[:, None, None, :]
        for layer in self.encoder.layer:
            hidden = layer(hidden, mask)
        return hidden


def load_encoder(path: Path, config: Mapping[str, object]) -> Encoder:
    """An encoder with its weights still lazy. On the MLX thread.

    Args:
        path: Its folder, with model*.safetensors.
        config: Its config.json.

    Raises:
        UnsupportedEncoderError: It is of a kind that is not computed here.
        ValueError: Weights are missing, superfluous or of the wrong shape.
    """
    model = Encoder(EncoderConfig.from_json(config))
    weights: dict[str, mx.array] = {}
    for file in sorted(path.glob("model*.safetensors")):
        for name, array in mx.load(str(file)).items():  # type: ignore[union-attr]  # a dict for this format
            bare = _bare(name)
            # Heads and poolers of other tasks, and buffers of old versions, are not needed.
            if bare.startswith(_PARTS) and not bare.endswith("position_ids"):
                weights[bare] = array
    model.load_weights(list(weights.items()), strict=True)
    return model


def _bare(name: str) -> str:
    """A weight's name without the model's own prefix, and by its newer spelling."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name.replace(".LayerNorm.gamma", ".LayerNorm.weight").replace(".LayerNorm.beta", ".LayerNorm.bias")
