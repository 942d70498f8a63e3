"""Faster attention, SwiGLU and rotary embedding where MLX computes on a CPU.

MLX's matrix products go through the BLAS there, but its element-wise code takes one number at a time:
an exponential costs some 22 ns on x86, and a prompt of 1,400 tokens has 280 million of them in its
attention alone. So, from a certain size on, queries, keys and values are evaluated, and our own code
(native/attention.c) goes on from there, without ever making a matrix of all scores. Where that was not
compiled, numpy does the exponentials, which are vectorised too.

The price is that the layer's graph must be evaluated in its midst, which small passes do not earn
back; they take MLX's own way. Results differ from MLX's in the last bits, as those of two BLAS do.

MLX rotates queries and keys there by some fifteen operations, most of them to compute sines of the same
positions again in each layer. Here the sines of a pass are computed once, and five operations are left.
A decode step of a small model is made of thousands of operations, so that it tells.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import Device, blas, device, mx  # isort: skip  # first: it loads the BLAS

import math
import sys
import threading
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import numpy.typing as npt

from osaurus_grpc.models.native_kernels import NativeKernels

# Elements from which numpy's way is the faster one, its synchronisation included.
_ATTENTION_ELEMENTS = 2**15
_SWIGLU_ELEMENTS = 2**16
# The same for our own code.
_NATIVE_ATTENTION_ELEMENTS = 2**13
_NATIVE_SWIGLU_ELEMENTS = 2**14
# Rows of queries that are masked and normalised together: they stay in the processor's cache.
_ROWS = 64

_Scores = npt.NDArray[np.float32]

_kernels = blas.kernels
_mlx_attention = mx.fast.scaled_dot_product_attention
_mlx_rope = mx.fast.rope


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
    elements = rows * heads * queries * keys
    least = _ATTENTION_ELEMENTS if _kernels is None else _NATIVE_ATTENTION_ELEMENTS
    is_float32 = q.dtype == k.dtype == v.dtype == mx.float32
    if elements < least or sinks is not None or options or not is_float32:
        if sinks is not None:
            options["sinks"] = sinks
        return _mlx_attention(q, k, v, scale=scale, mask=mask, **options)
    if _kernels is not None:
        done = _native_attention(_kernels, q, k, v, scale, mask)
        if done is not None:
            return done
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


def _native_attention(
    kernels: NativeKernels, q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array | None:
    """attention() by our own code; None where that does not do it."""
    if scale <= 0:
        return None
    rows, _, queries, _ = q.shape
    keys = k.shape[2]
    seen = None
    if isinstance(mask, mx.array):
        is_shared = mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == 1)
        if mask.dtype != mx.bool_ or not is_shared:
            return None
        seen = mx.broadcast_to(mask, (rows, 1, queries, keys))[:, 0]
    elif mask not in (None, "causal"):
        return None
    q = mx.contiguous(q)
    mx.eval(q, k, v) if seen is None else mx.eval(q, k, v, seen)
    views = [np.array(array, copy=False) for array in (q, k, v)]
    view = None if seen is None else np.array(seen, copy=False)
    for each in (*views, view):
        if each is not None and each.shape[-1] > 1 and each.strides[-1] != each.itemsize:
            return None
    is_causal = isinstance(mask, str)
    out = kernels.attention(*views, scale=scale, mask=view, is_causal=is_causal)
    return None if out is None else mx.array(out)


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
    least = _SWIGLU_ELEMENTS if _kernels is None else _NATIVE_SWIGLU_ELEMENTS
    if gate.size < least or gate.dtype != mx.float32 or x.dtype != mx.float32:
        return gate * mx.sigmoid(gate) * x
    if _kernels is not None:
        gate, x = mx.contiguous(gate), mx.contiguous(x)
        mx.eval(gate, x)
        return mx.array(_kernels.swiglu(np.array(gate, copy=False), np.array(x, copy=False)))
    mx.eval(gate, x)
    values: _Scores = np.array(gate, copy=False)
    # A gate below -88 overflows to an infinity here, and then gives the zero that it should.
    with np.errstate(over="ignore"):
        product = np.exp(-values)
    product += 1.0
    np.divide(values, product, out=product)
    product *= np.array(x, copy=False)
    return mx.array(product)


class _Rotations(threading.local):
    """Cosines and sines of the passes that run; one a thread, since arrays belong to their thread's stream.

    Attributes:
        shared: Offsets that nobody writes to, of the passes that run.
        tables: By positions and frequencies, with the arrays whose identity is part of the key.
    """

    def __init__(self) -> None:
        self.shared: deque[mx.array] = deque(maxlen=4)
        self.tables: OrderedDict[tuple[Any, ...], tuple[mx.array, mx.array, object]] = OrderedDict()


_rotations = _Rotations()
_MAX_TABLES = 8


def share_offset(offset: mx.array) -> None:
    """Promise that an array of offsets is never written to: what follows from it is computed once."""
    _rotations.shared.append(offset)


def rope(
    a: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None = None,
    **options: Any,
) -> mx.array:
    """mx.fast.rope, of which this takes over the float32 cases that rotate halves.

    Args:
        a: Shape (rows, heads, count, dim).
        dims: To be rotated, from the first on.
        traditional: Whether neighbours are rotated; left to MLX.
        base: Of the frequencies; None where freqs has them.
        scale: Of the positions.
        offset: Of the first position; as an array one a row.
        freqs: Their inverses, shape (dims / 2,).
        options: Left to MLX.

    Returns:
        Shape of a.
    """
    is_array = isinstance(offset, mx.array)
    is_shared = not is_array or any(offset is one for one in _rotations.shared)
    if traditional or options or a.ndim != 4 or a.dtype != mx.float32 or dims % 2 or not is_shared:
        return _mlx_rope(
            a, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs, **options
        )
    count, dim = a.shape[2:]
    cosines, sines = _table(offset, count, dim, dims, base, scale, freqs)
    half = dims // 2
    parts = [a[..., half:dims], a[..., :half]]
    if dims < dim:
        parts.append(a[..., dims:])
    return a * cosines + mx.concatenate(parts, axis=-1) * sines


def _table(
    offset: int | mx.array,
    count: int,
    dim: int,
    dims: int,
    base: float | None,
    scale: float,
    freqs: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Cosines and signed sines, each of shape (rows or 1, 1, count, dim)."""
    where = offset if isinstance(offset, int) else ("array", id(offset))
    key = where, count, dim, dims, base, scale, None if freqs is None else id(freqs)
    tables = _rotations.tables
    if key not in tables:
        if len(tables) >= _MAX_TABLES:
            tables.popitem(last=False)
        tables[key] = *_computed_table(offset, count, dim, dims, base, scale, freqs), (offset, freqs)
    return tables[key][:2]


def _computed_table(
    offset: int | mx.array,
    count: int,
    dim: int,
    dims: int,
    base: float | None,
    scale: float,
    freqs: mx.array | None,
) -> tuple[mx.array, mx.array]:
    first = offset[:, None] if isinstance(offset, mx.array) else offset
    positions = (mx.arange(count) + first).astype(mx.float32).reshape(-1, 1, count, 1) * scale
    if freqs is None:
        assert base is not None
        frequencies = mx.exp(
            mx.arange(0, -(dims // 2), -1, dtype=mx.float32) * (math.log(base) / (dims // 2))
        )
    else:
        frequencies = 1.0 / freqs.astype(mx.float32)
    angles = positions * frequencies
    cosines, sines = mx.cos(angles), mx.sin(angles)
    rest = (*cosines.shape[:-1], dim - dims)
    return (
        mx.concatenate([cosines, cosines, mx.ones(rest)], axis=-1),
        mx.concatenate([-sines, sines, mx.zeros(rest)], axis=-1),
    )


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
    mx.fast.rope = rope
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models.") and getattr(module, "swiglu", None) is mlx_lm_swiglu:
            vars(module)["swiglu"] = swiglu
