"""Our attention, SwiGLU and rotary embedding against MLX's own."""

from __future__ import annotations

import numpy as np
import pytest

from osaurus_grpc.models import cpu_kernels
from osaurus_grpc.models.platform import Device, device, mx

CAUSAL, NONE, BOOLEAN, ADDITIVE = "causal", "none", "boolean", "additive"
mlx_attention = cpu_kernels._mlx_attention
mlx_rope = cpu_kernels._mlx_rope


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


@pytest.fixture(params=["native", "numpy", "mlx"])
def _every_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native" and cpu_kernels._kernels is None:
        pytest.skip("not compiled")
    if request.param != "native":
        monkeypatch.setattr(cpu_kernels, "_kernels", None)
    elements = 2**40 if request.param == "mlx" else 1
    for name in ("ATTENTION", "SWIGLU", "NATIVE_ATTENTION", "NATIVE_SWIGLU"):
        monkeypatch.setattr(cpu_kernels, f"_{name}_ELEMENTS", elements)


def exact_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None
) -> np.ndarray:
    """By its definition, in float64."""
    queries, keys, values = (np.array(array).astype(np.float64) for array in (q, k, v))
    shared = queries.shape[1] // keys.shape[1]
    scores = queries @ np.repeat(keys, shared, axis=1).swapaxes(-1, -2) * scale
    if mask == "causal":
        scores += np.triu(np.full(scores.shape[-2:], -np.inf), scores.shape[-1] - scores.shape[-2] + 1)
    elif isinstance(mask, mx.array):
        given = np.array(mask)
        scores = np.where(given, scores, -np.inf) if given.dtype == bool else scores + given
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ np.repeat(values, shared, axis=1)


@pytest.mark.usefixtures("_every_way")
@pytest.mark.parametrize("kind", [CAUSAL, NONE, BOOLEAN, ADDITIVE])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "queries", "keys"),
    [
        (1, 9, 3, 1, 40),
        (1, 4, 4, 7, 7),
        (2, 6, 2, 130, 200),
        (3, 4, 1, 64, 64),
        (1, 2, 2, 65, 66),
        (5, 9, 3, 1, 300),  # several blocks of keys
        (1, 6, 1, 23, 1000),
        (2, 2, 1, 24, 128),
    ],
)
def test_attention_is_what_it_should_be(kind, rows, heads, kv_heads, queries, keys):
    q = states(rows, heads, queries, 16, seed=1)
    k = states(rows, kv_heads, keys, 16, seed=2)
    v = states(rows, kv_heads, keys, 24, seed=3)
    mask = mask_of(kind, rows, queries, keys)
    ours = cpu_kernels.attention(q, k, v, scale=0.25, mask=mask)
    exact = exact_attention(q, k, v, 0.25, mask)
    assert ours.shape == exact.shape
    assert np.array(ours) == pytest.approx(exact, rel=1e-5, abs=1e-5)


@pytest.mark.usefixtures("_every_way")
@pytest.mark.parametrize("dim", [8, 24, 33, 64, 80, 128])
@pytest.mark.parametrize("value_dim", [7, 8, 40, 64, 80, 256, 264])
def test_attention_of_heads_of_any_size(dim, value_dim):
    q, k, v = states(2, 4, 9, dim, seed=1), states(2, 2, 50, dim, seed=2), states(2, 2, 50, value_dim, seed=3)
    ours = cpu_kernels.attention(q, k, v, scale=dim**-0.5, mask="causal")
    assert np.array(ours) == pytest.approx(exact_attention(q, k, v, dim**-0.5, "causal"), rel=1e-5, abs=1e-5)


@pytest.mark.usefixtures("_every_way")
def test_attention_of_parts_of_larger_buffers():
    """A cache's keys are its buffer's first places; queries may be a view with its axes exchanged."""
    q = states(2, 5, 6, 16, seed=1).swapaxes(1, 2)
    k, v = (states(4, 3, 256, 16, seed=seed)[1:3, :, :100] for seed in (2, 3))
    for mask in (None, "causal", mx.arange(100) < mx.array([[60], [100]])[:, :, None, None]):
        ours = cpu_kernels.attention(q, k, v, scale=0.25, mask=mask)
        assert np.array(ours) == pytest.approx(exact_attention(q, k, v, 0.25, mask), rel=1e-5, abs=1e-5)


@pytest.mark.usefixtures("_every_way")
def test_masks_of_fewer_axes_and_rows_of_any_layout():
    q, k = states(2, 4, 5, 16, seed=1), states(2, 2, 8, 16, seed=2)
    seen = np.random.default_rng(0).random((5, 8)) < 0.6
    seen[:, 0] = True
    exchanged = mx.array(seen.T.copy()).T
    for mask in (mx.array(seen), mx.array(seen)[None, None], exchanged, mx.array(seen[:1])):
        ours = cpu_kernels.attention(q, k, k, scale=0.25, mask=mask)
        assert np.array(ours) == pytest.approx(exact_attention(q, k, k, 0.25, mask), rel=1e-5, abs=1e-5)


@pytest.mark.usefixtures("_every_way")
@pytest.mark.parametrize("size", [1e-30, 1.0, 300.0, 1e18])
def test_scores_of_any_size_give_numbers(size):
    """A softmax of large scores is a choice; none may overflow."""
    q, k = states(1, 2, 30, 16, seed=1) * size, states(1, 2, 150, 16, seed=2)
    ours = np.array(cpu_kernels.attention(q, k, k, scale=0.25, mask="causal"))
    assert np.isfinite(ours).all()
    if size == 1e18:
        # Of the keys that a query sees, the one with the highest score alone.
        scores = np.array(q).astype(np.float64) @ np.array(k).astype(np.float64).swapaxes(-1, -2)
        chosen = np.argmax(scores + np.triu(np.full((30, 150), -np.inf), 121), axis=-1)
        picked = np.take_along_axis(np.array(k), chosen[..., None], axis=2)
        assert ours == pytest.approx(picked, rel=1e-5)


@pytest.mark.usefixtures("_every_way")
@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("queries", [3, 30])
def test_what_is_no_number_stays_none_and_does_not_spread(broken, queries):
    q, k = np.array(states(1, 2, queries, 16, seed=1)), np.array(states(1, 1, 70, 16, seed=2))
    q[0, 1, 2], k[0, 0, 69] = broken, abs(k[0, 0, 69])
    with np.errstate(invalid="ignore"):
        ours = np.array(cpu_kernels.attention(mx.array(q), mx.array(k), mx.array(k), scale=0.25))
    is_none = np.isnan(ours).any(axis=-1)
    assert is_none[0, 1, 2]
    assert is_none.sum() == 1


@pytest.mark.usefixtures("_every_way")
@pytest.mark.parametrize("scale", [-20.0, 0.0])
def test_scales_that_turn_scores_around(scale):
    q, k = states(1, 2, 20, 16, seed=1), states(1, 1, 70, 16, seed=2)
    ours = cpu_kernels.attention(q, k, k, scale=scale)
    assert np.array(ours) == pytest.approx(exact_attention(q, k, k, scale, None), rel=1e-3, abs=1e-3)


@pytest.mark.usefixtures("_every_way")
def test_what_is_not_seen_may_be_anything():
    q, k = states(1, 2, 3, 16, seed=1), np.array(states(1, 1, 5, 16, seed=2))
    expected = np.array(mlx_attention(q, mx.array(k[:, :, :4]), mx.array(k[:, :, :4]), scale=0.25))
    k[0, 0, 4] = 1e30
    seen = mx.array(np.arange(5) < 4)[None]
    ours = cpu_kernels.attention(q, mx.array(k), mx.array(k), scale=0.25, mask=seen)
    assert np.array(ours) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.skipif(cpu_kernels._kernels is None, reason="not compiled")
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_a_row_gives_the_same_alone_and_in_a_batch(queries, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_NATIVE_ATTENTION_ELEMENTS", 1)
    q, k, v = (states(3, heads, count, 64, seed=count) for heads, count in ((6, queries), (2, 400), (2, 400)))
    lengths = np.array([130, 400, 257])
    last = lengths[:, None] - queries + np.arange(queries)
    mask = mx.array(np.arange(400) <= last[:, None, :, None])
    together = np.array(cpu_kernels.attention(q, k, v, scale=0.125, mask=mask))
    for row, length in enumerate(lengths):
        own = [q[row : row + 1], *(array[row : row + 1, :, :length] for array in (k, v))]
        alone = np.array(cpu_kernels.attention(*own, scale=0.125, mask="causal"))
        assert np.array_equal(alone[0], together[row])


@pytest.mark.usefixtures("_every_way")
def test_a_row_that_sees_nothing_gives_numbers():
    """Queries in a batch's padding: what they give is thrown away, but must not spread."""
    mask = mx.array(np.zeros((1, 1, 3, 5), dtype=bool))
    q, k = states(1, 2, 3, 8, seed=1), states(1, 2, 5, 8, seed=2)
    ours = cpu_kernels.attention(q, k, k, scale=1.0, mask=mask)
    assert np.isfinite(np.array(ours)).all()


@pytest.mark.usefixtures("_every_way")
def test_sinks_and_other_dtypes_are_mlxs():
    q, k = states(1, 2, 3, 8, seed=1), states(1, 2, 5, 8, seed=2)
    sinks = mx.array([0.5, -0.5])
    ours = cpu_kernels.attention(q, k, k, scale=1.0, sinks=sinks)
    assert np.array_equal(np.array(ours), np.array(mlx_attention(q, k, k, scale=1.0, sinks=sinks)))
    half = cpu_kernels.attention(q.astype(mx.float16), k.astype(mx.float16), k.astype(mx.float16), scale=1.0)
    assert half.dtype == mx.float16


@pytest.mark.usefixtures("_every_way")
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
    monkeypatch.setattr(mx.fast, "rope", mx.fast.rope)
    monkeypatch.setattr(activations, "swiglu", activations.swiglu)
    monkeypatch.setattr(llama, "swiglu", activations.swiglu)
    cpu_kernels.install()
    cpu_kernels.install()
    assert mx.fast.scaled_dot_product_attention is cpu_kernels.attention
    assert mx.fast.rope is cpu_kernels.rope
    assert llama.swiglu is activations.swiglu is cpu_kernels.swiglu


@pytest.mark.parametrize("offset", [0, 7, 5000, "rows"])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {"dims": 16, "base": 10000.0, "scale": 1.0},
        {"dims": 8, "base": 500000.0, "scale": 0.25},  # the rest of a head is left as it is
        {"dims": 16, "base": None, "scale": 1.0, "freqs": mx.array([1.5**i for i in range(8)])},
    ],
)
def test_rope_is_mlxs(offset, count, settings):
    a = states(3, 2, count, 16, seed=count)
    at = mx.array([3, 900, 12]) if offset == "rows" else offset
    if offset == "rows":
        cpu_kernels.share_offset(at)
    for _ in range(2):  # computed, and found
        ours = cpu_kernels.rope(a, traditional=False, offset=at, **settings)
        theirs = mlx_rope(a, traditional=False, offset=at, **settings)
        assert np.array(ours) == pytest.approx(np.array(theirs), rel=1e-6, abs=1e-6)


def test_sines_are_computed_once_and_only_for_offsets_that_stay():
    a, common = states(2, 2, 1, 16, seed=1), {"traditional": False, "base": 10000.0, "scale": 1.0}
    tables = cpu_kernels._rotations.tables
    tables.clear()
    changing = mx.array([1, 2])
    first = cpu_kernels.rope(a, 16, offset=changing, **common)
    changing += 5
    second = cpu_kernels.rope(a, 16, offset=changing, **common)
    assert not mx.allclose(first, second)
    assert mx.array_equal(second, mlx_rope(a, 16, offset=mx.array([6, 7]), **common))
    assert not tables
    cpu_kernels.share_offset(changing)
    assert mx.array_equal(cpu_kernels.rope(a, 16, offset=changing, **common), second)
    cpu_kernels.rope(states(2, 1, 1, 16, seed=2), 16, offset=changing, **common)
    assert len(tables) == 1
    for offset in range(50):
        cpu_kernels.rope(a, 16, offset=offset, **common)
    assert len(tables) == cpu_kernels._MAX_TABLES


def test_neighbours_other_dtypes_and_shapes_are_mlxs():
    common = {"base": 10000.0, "scale": 1.0, "offset": 3}
    a = states(1, 2, 4, 16, seed=1)
    for traditional, array in ((True, a), (False, a.astype(mx.float16)), (False, a[0])):
        ours = cpu_kernels.rope(array, 16, traditional=traditional, **common)
        assert mx.array_equal(ours, mlx_rope(array, 16, traditional=traditional, **common))
