"""Weights as they were published beside float32 ones: nothing of what is computed differs, to the bit."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from osaurus_grpc.models import platform, short_weights
from osaurus_grpc.models.native_kernels import NativeKernels, NumberKind, can_group
from osaurus_grpc.models.platform import mx
from osaurus_grpc.models.short_weights import Quantized, ShortWeights
from tests.conftest import SMOLLM

import mlx.nn as nn  # isort: skip  # after the BLAS

pytestmark = pytest.mark.skipif(
    platform.blas.kernels is None, reason="not compiled: no C compiler, another processor, or not installed"
)

MAX_ROWS = {NumberKind.BFLOAT16: 16, NumberKind.FLOAT16: 16, NumberKind.AFFINE4: 8, NumberKind.AFFINE8: 8}
KINDS = [*MAX_ROWS]
DTYPES = {NumberKind.BFLOAT16: mx.bfloat16, NumberKind.FLOAT16: mx.float16}
BITS = {NumberKind.AFFINE4: 4, NumberKind.AFFINE8: 8}


@pytest.fixture
def kernels() -> Iterator[NativeKernels]:
    found = platform.blas.kernels
    assert found is not None
    before = found.threads
    yield found
    found.threads = before


@pytest.fixture
def held(kernels: NativeKernels) -> Iterator[ShortWeights]:
    made = ShortWeights(kernels)
    yield made
    made.close()


def random(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def quantized(weight: mx.array, bits: int, group_size: int = 32) -> tuple[mx.array, Quantized]:
    """What a matrix is after it was quantized, expanded and packed."""
    codes, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
    # As files have them; what is made of few bits is the same however it is rounded on its way.
    scales, biases = (array.astype(mx.float16).astype(mx.float32) for array in (scales, biases))
    expanded = mx.dequantize(codes, scales, biases, group_size=group_size, bits=bits)
    mx.eval(expanded, codes, scales, biases)
    return expanded, Quantized(codes, scales, biases, bits, group_size)


def published(kind: NumberKind, seed: int, rows: int, columns: int) -> tuple[mx.array, Quantized | None]:
    weight = random(seed, rows, columns)
    if kind in BITS:
        return quantized(weight, BITS[kind])
    dense = weight.astype(DTYPES[kind]).astype(mx.float32)
    mx.eval(dense)
    return dense, None


def product(x: mx.array, weight: mx.array) -> np.ndarray:
    return np.array(x @ weight.T)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_the_same_to_the_bit(
    kind: NumberKind, kernels: NativeKernels, held: ShortWeights
) -> None:
    # Around the sizes of tiles and strips, and in parts; depths that end within a vector where there are no
    # groups.
    depths = (32, 64, 96, 576, 4128, 8192) if kind in BITS else (1, 7, 8, 9, 577, 4097, 10_001)
    for columns in (1, 2, 3, 8, 9, 49, 97):
        for depth in depths:
            weight, packed = published(kind, depth, columns, depth)
            inputs = [random(rows, rows, depth) for rows in range(1, 18)]
            expected = [product(x, weight) for x in inputs]
            assert held.add(weight, packed)
            for x, wide in zip(inputs, expected, strict=True):
                before = kernels.short_products
                assert np.array_equal(product(x, weight), wide), (columns, depth, x.shape)
                # A single column or row may be laid out so that either order of it is right.
                is_read = kernels.short_products > before
                assert is_read == (x.shape[0] <= MAX_ROWS[kind]) or 1 in (columns, depth, x.shape[0])
            held.close()


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_groups_change_nothing(
    kind: NumberKind, kernels: NativeKernels, held: ShortWeights
) -> None:
    x = random(0, 3, 1024)
    for group_size in (32, 64, 128):
        weight, packed = published(kind, 1, 1000, 1024)
        if kind in BITS:
            weight, packed = quantized(weight, BITS[kind], group_size)
        expected = product(x, weight)
        assert held.add(weight, packed)
        for threads in (1, 2, 5):
            kernels.threads = threads
            assert np.array_equal(product(x, weight), expected)


def test_what_something_would_be_lost_of_is_left_as_it_is(kernels: NativeKernels, held: ShortWeights) -> None:
    weight = random(0, 300, 256)
    assert not held.add(weight)
    # Its first numbers would do.
    nearly = np.array(random(1, 300, 256).astype(mx.bfloat16).astype(mx.float32))
    nearly[-1, -1] = np.float32(1 / 3)
    assert not held.add(mx.array(nearly))
    # Packed numbers of another matrix, and scales that are rounded on the way.
    other, packed = quantized(random(2, 300, 256), 4)
    assert not held.add(weight, packed)
    assert not held.add(other + 1e-3, packed)
    assert not held.add(random(3, 256, 300).T[:, :256])
    assert held.nbytes == 0
    before = kernels.short_products
    product(random(4, 2, 256), weight)
    assert kernels.short_products == before


@pytest.mark.parametrize("kind", [NumberKind.BFLOAT16, NumberKind.FLOAT16])
def test_odd_numbers(kind: NumberKind, kernels: NativeKernels) -> None:
    small = {NumberKind.BFLOAT16: 1e-40, NumberKind.FLOAT16: 6e-8}[kind]
    numbers = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.5, small, 65504.0]
    matrix = np.array(mx.array(numbers * 2, dtype=mx.float32).astype(DTYPES[kind]).astype(mx.float32))
    assert kernels.is_same(kernels.shortened(matrix, kind), matrix)
    for wrong in (np.float32(1 / 3), np.float32(1e6 + 1), np.float32(1e-12 / 3)):
        for place in (0, 9, 17):
            other = matrix.copy()
            other[place] = wrong
            assert not kernels.is_same(kernels.shortened(other, kind), other)


def test_a_part_of_a_matrix_is_another_one(kernels: NativeKernels, held: ShortWeights) -> None:
    """It begins at the same address."""
    weight, _ = published(NumberKind.BFLOAT16, 0, 64, 64)
    x = random(1, 2, 64)
    part = np.array(weight, copy=False)[:10]
    expected = product(x, weight)
    assert held.add(weight)
    assert not held.add(weight)
    before = kernels.short_products
    assert np.array_equal(product(x, weight), expected)
    assert kernels.short_products == before + 1
    assert np.array_equal(product(x, weight[:10]), expected[:, :10])
    assert np.allclose(np.array(x) @ part.T, expected[:, :10], atol=1e-4)
    assert kernels.short_products == before + 1


def test_groups_that_it_does_not_do(held: ShortWeights) -> None:
    for size in (0, 1, 16, 31, 48, 96):
        assert not can_group(size)
    assert all(map(can_group, (32, 64, 128, 256)))
    weight, packed = quantized(random(0, 64, 256), 8)
    assert not held.add(weight, dataclasses.replace(packed, scales=packed.scales[:, ::2]))
    assert not held.add(weight, dataclasses.replace(packed, group_size=48))


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_other_numbers_of_bits(kernels: NativeKernels, held: ShortWeights, bits: int) -> None:
    """A byte holds them."""
    x = random(0, 2, 256)
    weight, packed = quantized(random(bits, 300, 256), bits)
    expected = product(x, weight)
    assert held.add(weight, packed)
    assert held.nbytes == 300 * 256 + 2 * 4 * 300 * 256 // 32
    before = kernels.short_products
    assert np.array_equal(product(x, weight), expected)
    assert kernels.short_products == before + 1


def test_scales_of_many_digits_and_none(kernels: NativeKernels, held: ShortWeights) -> None:
    """Their products with codes are rounded before biases are added, as those of K-quants are."""
    x = random(0, 2, 256)
    for bits in (4, 8):
        codes, scales, biases = mx.quantize(random(bits, 300, 256), group_size=32, bits=bits)
        scales *= mx.ones(scales.shape) * 1.2345678
        scales[0] = 0.0
        weight = mx.dequantize(codes, scales, biases, group_size=32, bits=bits)
        mx.eval(weight, codes, scales, biases)
        expected = product(x, weight)
        assert held.add(weight, Quantized(codes, scales, biases, bits, 32))
        before = kernels.short_products
        assert np.array_equal(product(x, weight), expected)
        assert kernels.short_products == before + 1


class Small(nn.Module):
    """A table, a tied or an own head, layers of several sizes."""

    def __init__(self, *, has_head: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(512, 256)
        self.layers = [nn.Linear(256, 256, bias=False), nn.Linear(256, 128), nn.Linear(32, 32)]
        if has_head:
            self.head = nn.Linear(256, 512, bias=False)

    def prepared(self) -> Small:
        self.set_dtype(mx.bfloat16)
        self.set_dtype(mx.float32)
        mx.eval(self.parameters())
        return self


@pytest.mark.parametrize("has_head", [False, True])
def test_which_matrices_of_a_model(has_head: bool) -> None:
    model = Small(has_head=has_head).prepared()
    head = "head" if has_head else "table"
    assert sorted(path for path, _ in short_weights.matrices(model)) == sorted([head, "layers.0", "layers.1"])


def test_it_ends_with_the_model(kernels: NativeKernels) -> None:
    model = Small(has_head=False).prepared()
    held = short_weights.begin(model, short_weights.NONE_QUANTIZED)
    assert held is not None
    for _, weight in short_weights.matrices(model):
        assert held.add(weight)
    assert held.nbytes == 2 * (512 * 256 + 256 * 256 + 256 * 128)
    weight, x = model.layers[0].weight, random(0, 2, 256)
    before = kernels.short_products
    expected = product(x, weight)
    assert kernels.short_products == before + 1
    del model, _
    gc.collect()
    assert held.nbytes == 0
    assert np.array_equal(product(x, weight), expected)
    assert kernels.short_products == before + 1


def test_there_are_none_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small(has_head=False).prepared()
    for available, is_held in ((1_700_000, False), (2_000_000, True)):
        monkeypatch.setattr(short_weights, "memory_bytes", lambda available=available: available)
        assert (short_weights.begin(model, short_weights.NONE_QUANTIZED) is not None) == is_held


def test_a_quantized_models_matrices(smollm_dir: Path, kernels: NativeKernels, held: ShortWeights) -> None:
    """All of SmolLM2's, of 4 and of 8 bits."""
    from mlx_lm.utils import dequantize_model, load_model

    model, _ = load_model(smollm_dir / SMOLLM, lazy=True)
    model.set_dtype(mx.float32)
    packed = short_weights.quantized_modules(model)
    model = dequantize_model(model)
    mx.eval(model.parameters())
    added = [held.add(weight, packed[path]) for path, weight in short_weights.matrices(model)]
    assert len(added) == 211
    assert all(added)
    assert {each.bits for each in packed.values()} == {4, 8}
