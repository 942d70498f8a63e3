"""Faster attention and SwiGLU where MLX computes on a CPU.

MLX's matrix products go through the BLAS there, but its element-wise code takes one number at a time:
an exponential costs some 22 ns on x86, and a prompt of 1,400 tokens has 280 million of them in its
attention alone. numpy's exponential is vectorised and costs about 1 ns. So, from a certain size on, the
scores are evaluated, numpy turns them into probabilities where they lie, and MLX goes on from there.

The price is that the layer's graph must be evaluated in its midst, which small passes do not earn
back; they take MLX's own way. Results differ from MLX's in the last bits, as those of two BLAS do.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import Device, device, mx  # isort: skip  # first: it loads the BLAS

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

# Elements from which numpy's way is the faster one, its synchronisation included.
_ATTENTION_ELEMENTS = 2**15
_SWIGLU_ELEMENTS = 2**16
# Rows of queries that are masked and normalised together: they stay in the processor's cache.
_ROWS = 64

_Scores = npt.NDArray[np.float32]

_mlx_attention = mx.fast.scaled_dot_product_attention


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    **options: Any,
) -> mx.array:
    """mx.fast.scaled_dot_product_attention, of which this takes over the large float32 cases.

    Args:
        q: Shape (rows, heads, queries, dim).
        k: Shape (rows, kv_heads, keys, dim).
        v: Shape (rows, kv_heads, keys, value_dim).
        scale: Of the scores.
        mask: None, "causal" (the last query sees all keys), boolean or additive.
        sinks: Left to MLX.
        options: Left to MLX.

    Returns:
        Shape (rows, heads, queries, value_dim).
    """
    rows, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    is_large = rows * heads * queries * keys >= _ATTENTION_ELEMENTS
    if not is_large or sinks is not None or options or q.dtype != mx.float32 or k.dtype != mx.float32:
        if sinks is not None:
            options["sinks"] = sinks
        return _mlx_attention(q, k, v, scale=scale, mask=mask, **options)
    # Queries of the heads that share keys lie beside each other: one product for all of them.
    shared = heads // kv_heads * queries
    scores = (q * scale).reshape(rows, kv_heads, shared, dim) @ k.swapaxes(-1, -2)
    if isinstance(mask, mx.array):
        scores = scores.reshape(rows, heads, queries, keys)
        is_boolean = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, mx.finfo(mx.float32).min) if is_boolean else scores + mask
    mx.eval(scores)
    # A view: what numpy writes is what MLX reads. Nobody else holds these scores.
    view: _Scores = np.array(scores, copy=False).reshape(rows * heads, queries, keys)
    for head in view:
        if mask == "causal" and queries > 1:
            _softmax_causal(head)
        else:
            for first in range(0, queries, _ROWS):
                _softmax(head[first : first + _ROWS])
    return (scores.reshape(rows, kv_heads, shared, keys) @ v).reshape(rows, heads, queries, -1)


def _softmax(scores: _Scores) -> None:
    """Softmax of each row, in place."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)


def _softmax_causal(scores: _Scores) -> None:
    """Softmax in place, shape (queries, keys), of rows that see one key more each, the last one all."""
    queries, keys = scores.shape
    offset = keys - queries
    for first in range(0, queries, _ROWS):
        last = min(queries, first + _ROWS)
        seen = scores[first:last, : offset + last]
        corner = seen[:, offset + first :]
        corner[np.triu_indices(last - first, 1)] = -np.inf
        _softmax(seen)
        scores[first:last, offset + last :] = 0.0


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, as mlx_lm.models.activations has it."""
    if gate.size < _SWIGLU_ELEMENTS or gate.dtype != mx.float32 or x.dtype != mx.float32:
        return gate * mx.sigmoid(gate) * x
    mx.eval(gate, x)
    values: _Scores = np.array(gate, copy=False)
    # A gate below -88 overflows to an infinity here, and then gives the zero that it should.
    with np.errstate(over="ignore"):
        product = np.exp(-values)
    product += 1.0
    np.divide(values, product, out=product)
    product *= np.array(x, copy=False)
    return mx.array(product)


def install() -> None:
    """Put these in the place of MLX's and mlx-lm's, where the device is a CPU. Harmless when repeated.

    Modules of models that are imported later find the new ones; in those that are there already they
    are exchanged.
    """
    if device() is not Device.CPU:
        return
    from mlx_lm.models import activations

    mlx_lm_swiglu = activations.swiglu
    mx.fast.scaled_dot_product_attention = attention
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models.") and getattr(module, "swiglu", None) is mlx_lm_swiglu:
            vars(module)["swiglu"] = swiglu
