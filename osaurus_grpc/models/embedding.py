"""Embedding vectors: hidden states of an encoder or a decoder, pooled to one vector a text.

How a model pools is what its sentence-transformers configuration says (1_Pooling/config.json); models
without one take the mean over their tokens.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from osaurus_grpc.models.encoder import Encoder
from osaurus_grpc.models.inspection import POOLING_FILE, IncompleteModelError, read_json_object


class Pooling(Enum):
    """Which hidden states make the vector. Values are sentence-transformers' names of the choices."""

    MEAN = "pooling_mode_mean_tokens"
    FIRST = "pooling_mode_cls_token"
    LAST = "pooling_mode_lasttoken"


def configured_pooling(path: Path) -> Pooling | None:
    """What a model folder says; None where it says nothing, or names a way that is not known here."""
    try:
        config = read_json_object(path / POOLING_FILE)
    except (OSError, IncompleteModelError):
        return None
    return next((pooling for pooling in Pooling if config.get(pooling.value) is True), None)


class Embedder:
    """Makes vectors with one loaded model. On the MLX thread.

    Args:
        model: An Encoder, or a decoder of mlx-lm.
        pooling: How hidden states become one vector.

    Raises:
        ValueError: A decoder whose hidden states cannot be had.
    """

    def __init__(self, model: Any, pooling: Pooling) -> None:
        self._hidden_states = _hidden_states(model)
        self._pooling = pooling

    def __call__(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """Vectors of some inputs.

        Args:
            inputs: Token ids, at least one each. They are padded to the longest.

        Returns:
            One vector an input, not normalised.
        """
        longest = max(len(tokens) for tokens in inputs)
        tokens = mx.array([[*each, *[0] * (longest - len(each))] for each in inputs], dtype=mx.int32)
        lengths = mx.array([len(each) for each in inputs], dtype=mx.int32)
        hidden = self._hidden_states(tokens, lengths).astype(mx.float32)
        vectors = self._pooled(hidden, lengths)
        mx.eval(vectors)
        values: list[list[float]] = vectors.tolist()  # type: ignore[assignment]  # two dimensions
        return values

    def _pooled(self, hidden: mx.array, lengths: mx.array) -> mx.array:
        """Shape (rows, hidden_size), of hidden states of shape (rows, length, hidden_size)."""
        match self._pooling:
            case Pooling.FIRST:
                return hidden[:, 0]
            case Pooling.LAST:
                return mx.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
            case Pooling.MEAN:
                # where() and not a product: padding's states may be no numbers at all.
                inside = (mx.arange(hidden.shape[1])[None] < lengths[:, None])[..., None]
                return mx.where(inside, hidden, 0.0).sum(axis=1) / lengths[:, None]


def _hidden_states(model: Any) -> Callable[[mx.array, mx.array], mx.array]:
    """A function from tokens and lengths to the last layer's states."""
    if isinstance(model, Encoder):
        return model
    # mlx-lm's models are a language head on an inner model; vision models hold one of those.
    outer = getattr(model, "language_model", model)
    inner = getattr(outer, "model", None)
    if not callable(inner):
        raise ValueError("this architecture gives no hidden states")

    def causal(tokens: mx.array, lengths: mx.array) -> mx.array:
        # Causal attention and recurrence look back only: padding on the right changes nothing.
        states: mx.array = inner(tokens)
        return states

    return causal
