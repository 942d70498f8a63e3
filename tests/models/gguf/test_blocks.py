from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from osaurus_grpc.models.platform import mx
from osaurus_grpc.models.sources.gguf import blocks
from tests.models.gguf.files import random_blocks

Kind = GGMLQuantizationType

EXACT = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K, Kind.MXFP4)
REQUANTIZED = (
    Kind.Q2_K, Kind.Q3_K, Kind.Q6_K, Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S,
    Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL, Kind.IQ4_XS,
)  # fmt: skip


def in_mlx(packed: blocks.Packed, layout: blocks.Layout) -> np.ndarray:
    """What MLX makes of packed rows, computed in float32."""
    scales = mx.array(packed.scales)
    biases = None if packed.biases is None else mx.array(packed.biases).astype(mx.float32)
    if layout.mode == "affine":
        scales = scales.astype(mx.float32)
    values = mx.dequantize(
        mx.array(packed.weight),
        scales,
        biases,
        group_size=blocks.GROUP_SIZE,
        bits=layout.bits,
        mode=layout.mode,
        dtype=mx.float32,
    )
    return np.array(values)


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_an_exact_format_keeps_every_value_bit_for_bit(kind):
    rows = random_blocks(kind, 48, 512)
    layout = blocks.layout(kind)
    assert layout.is_exact
    packed = blocks.pack(rows, kind)
    assert packed.weight.shape == (48, 512 * layout.bits // 32)
    assert packed.scales.shape == (48, 16)
    expected = quants.dequantize(rows, kind)
    assert len(np.unique(expected)) > 30
    np.testing.assert_array_equal(in_mlx(packed, layout), expected)


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_stored_scales_have_the_announced_dtype(kind):
    packed = blocks.pack(random_blocks(kind, 2, 256), kind)
    dtype = {"F16": np.float16, "F32": np.float32, "U8": np.uint8}[blocks.layout(kind).scale_dtype]
    assert packed.scales.dtype == dtype
    assert packed.biases is None if dtype is np.uint8 else packed.biases.dtype == dtype


@pytest.mark.parametrize("kind", REQUANTIZED, ids=lambda kind: kind.name)
def test_a_requantized_format_moves_a_value_by_half_a_step_at_most(kind):
    rows = random_blocks(kind, 16, 512)
    layout = blocks.layout(kind)
    assert (layout.bits, layout.is_exact) == (8, False)
    expected = quants.dequantize(rows, kind)
    assert len(np.unique(expected)) > 30
    groups = expected.reshape(16, -1, 32)
    half_step = (groups.max(-1) - groups.min(-1)) / 510
    error = np.abs(in_mlx(blocks.pack(rows, kind), layout).reshape(groups.shape) - groups)
    assert (error <= half_step[..., None] * 1.001 + 1e-9).all()


def test_requantizing_normal_weights_adds_half_a_percent_of_error():
    values = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    layout = blocks.layout(Kind.Q6_K)
    error = in_mlx(blocks.quantize_8bit(values), layout) - values
    relative = np.sqrt((error**2).mean() / (values**2).mean())
    assert 0.003 < relative < 0.006


def test_a_group_of_equal_values_is_requantized_exactly():
    values = np.full((2, 64), 0.3, np.float32)
    layout = blocks.layout(Kind.Q6_K)
    np.testing.assert_array_equal(in_mlx(blocks.quantize_8bit(values), layout), values)


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q8_0, Kind.Q5_0], ids=lambda kind: kind.name)
def test_mlx_multiplies_by_repacked_weights(kind, dtype):
    rows = random_blocks(kind, 16, 256)
    layout = blocks.layout(kind)
    packed = blocks.pack(rows, kind)
    x = mx.array(np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)).astype(dtype)
    product = mx.quantized_matmul(
        x,
        mx.array(packed.weight),
        mx.array(packed.scales),
        mx.array(packed.biases),
        transpose=True,
        group_size=32,
        bits=layout.bits,
    )
    expected = np.array(x.astype(mx.float32)) @ quants.dequantize(rows, kind).T
    np.testing.assert_allclose(np.array(product.astype(mx.float32)), expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("kind", [Kind.TQ1_0, Kind.TQ2_0, Kind.NVFP4, Kind.I8, Kind.F64, Kind.Q8_K])
def test_other_formats_have_no_layout(kind):
    assert blocks.layout(kind) is None
