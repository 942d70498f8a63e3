"""Our attention and SwiGLU against MLX's own."""

from __future__ import annotations

import numpy as np
import pytest

from osaurus_grpc.models import cpu_kernels
from osaurus_grpc.models.platform import Device, device, mx

CAUSAL, NONE, BOOLEAN, ADDITIVE = "causal", "none", "boolean", "additive"
mlx_attention = cpu_kernels._mlx_attention


def states(*shape: int, seed: int) -> mx.array:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 2
    return mx.array(values)


def mask_of(kind: str, rows: int, queries: int, keys: int) -> mx.array | str | None:
    seen = np.random.default_rng(5).random((rows, 1, queries, keys)) < 0.7
    seen[..., 0] = True
    match kind:
        case "causal":
            return "causal"
        case "boolean":
            return mx.array(seen)
        case "additive":
            return mx.array(np.where(seen, 0.0, -1e9).astype(np.float32))
        case _:
            return None


@pytest.fixture(params=["large", "small"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    elements = 1 if request.param == "large" else 2**40
    monkeypatch.setattr(cpu_kernels, "_ATTENTION_ELEMENTS", elements)
    monkeypatch.setattr(cpu_kernels, "_SWIGLU_ELEMENTS", elements)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("kind", [CAUSAL, NONE, BOOLEAN, ADDITIVE])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "queries", "keys"),
    [(1, 9, 3, 1, 40), (1, 4, 4, 7, 7), (2, 6, 2, 130, 200), (3, 4, 1, 64, 64), (1, 2, 2, 65, 66)],
)
def test_attention_is_mlxs(kind, rows, heads, kv_heads, queries, keys):
    q = states(rows, heads, queries, 16, seed=1)
    k = states(rows, kv_heads, keys, 16, seed=2)
    v = states(rows, kv_heads, keys, 24, seed=3)
    mask = mask_of(kind, rows, queries, keys)
    ours = cpu_kernels.attention(q, k, v, scale=0.25, mask=mask)
    theirs = mlx_attention(q, k, v, scale=0.25, mask=mask)
    assert ours.shape == theirs.shape
    assert np.array(ours) == pytest.approx(np.array(theirs), rel=5e-6, abs=5e-6)


@pytest.mark.usefixtures("_both_ways")
def test_a_row_that_sees_nothing_gives_numbers():
    """Queries in a batch's padding: what they give is thrown away, but must not spread."""
    mask = mx.array(np.zeros((1, 1, 3, 5), dtype=bool))
    q, k = states(1, 2, 3, 8, seed=1), states(1, 2, 5, 8, seed=2)
    ours = cpu_kernels.attention(q, k, k, scale=1.0, mask=mask)
    assert np.isfinite(np.array(ours)).all()


@pytest.mark.usefixtures("_both_ways")
def test_sinks_and_other_dtypes_are_mlxs():
    q, k = states(1, 2, 3, 8, seed=1), states(1, 2, 5, 8, seed=2)
    sinks = mx.array([0.5, -0.5])
    ours = cpu_kernels.attention(q, k, k, scale=1.0, sinks=sinks)
    assert np.array_equal(np.array(ours), np.array(mlx_attention(q, k, k, scale=1.0, sinks=sinks)))
    half = cpu_kernels.attention(q.astype(mx.float16), k.astype(mx.float16), k.astype(mx.float16), scale=1.0)
    assert half.dtype == mx.float16


@pytest.mark.usefixtures("_both_ways")
def test_swiglu_is_mlxs():
    gate, x = states(1, 50, 64, seed=1) * 60, states(1, 50, 64, seed=2)
    expected = gate * mx.sigmoid(gate) * x
    before = np.array(gate)
    ours = cpu_kernels.swiglu(gate, x)
    assert np.array(ours) == pytest.approx(np.array(expected), rel=1e-5, abs=1e-30)
    assert np.array_equal(np.array(gate), before), "what was passed in stays as it is"


@pytest.mark.skipif(device() is not Device.CPU, reason="only a CPU gets these")
def test_models_that_are_loaded_use_them(monkeypatch):
    import mlx_lm.models.llama as llama
    from mlx_lm.models import activations

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", mx.fast.scaled_dot_product_attention)
    monkeypatch.setattr(activations, "swiglu", activations.swiglu)
    monkeypatch.setattr(llama, "swiglu", activations.swiglu)
    cpu_kernels.install()
    cpu_kernels.install()
    assert mx.fast.scaled_dot_product_attention is cpu_kernels.attention
    assert llama.swiglu is activations.swiglu is cpu_kernels.swiglu
