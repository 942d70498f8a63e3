"""Weights as they were published, beside the float32 ones that a CPU computes with.

Models are published in 16 bits a number, or quantized to fewer, and computed with in float32 on a CPU. A
decode step takes as long as its weights take to be read, so the shorter numbers stay beside the float32
matrices that were made of them, and products of a few rows read those: a half or a fifth of the memory's
traffic, for not a bit of difference in what comes out (native/numbers.c). Where that much memory is not to
spare there are none.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import blas, memory_bytes, mx  # isort: skip  # first: it loads the BLAS

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from osaurus_grpc.models.native_kernels import NativeKernels, NumberKind, ShortNumbers, can_group

# Of the memory that is left once the float32 weights are there.
_SHARE_OF_MEMORY = 0.25
# Smaller matrices stay in the processor's cache as they are.
_LEAST_ELEMENTS = 2**15
# What a number takes where it is not quantized, and what is looked at before all of a matrix is shortened.
_DENSE_BYTES = 2
_SAMPLE_ELEMENTS = 2**12
_BYTE_BITS = 8


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix as MLX's affine quantization packs it.

    Attributes:
        codes: Packed in words of 32 bits, shape (rows, columns * bits / 32).
        scales: Of each group, float32, shape (rows, columns / group_size).
        biases: The same.
        bits: Of a code.
        group_size: Numbers that share a scale.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes it takes, codes of an odd number of bits in a byte each."""
        codes = self.codes.nbytes if self.bits in (4, _BYTE_BITS) else self.scales.size * self.group_size
        return codes + self.scales.nbytes + self.biases.nbytes


# By a module's path.
QuantizedModules: TypeAlias = Mapping[str, Quantized]
NONE_QUANTIZED: QuantizedModules = MappingProxyType({})


def quantized_modules(model: nn.Module) -> QuantizedModules:
    """A model's matrices before they are expanded, those that can be multiplied by as they are."""
    return {
        path: Quantized(module.weight, module.scales, module.biases, module.bits, module.group_size)
        for path, module in _language_modules(model)
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
        and module.mode == "affine"
        and module.bits <= _BYTE_BITS
        and module.scales.dtype == mx.float32
    }


class ShortWeights:
    """What is held beside one model's weights, until close().

    Args:
        kernels: What multiplies by them.

    Attributes:
        nbytes: Bytes they take.
    """

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels
        # A matrix is known by its address, so it has to stay where it is.
        self._held: list[tuple[mx.array, npt.NDArray[np.float32], ShortNumbers]] = []
        self.nbytes = 0

    def add(self, weight: mx.array, quantized: Quantized | None = None) -> bool:
        """Hold what an evaluated float32 matrix was made of.

        Args:
            weight: The matrix.
            quantized: What it was expanded from; None where it was not.

        Returns:
            False where nothing shorter is the same to the bit.
        """
        matrix: npt.NDArray[np.float32] = np.array(weight, copy=False)
        if not matrix.flags.c_contiguous:
            return False
        numbers = self._shortened(matrix) if quantized is None else self._packed(matrix, quantized)
        if numbers is None or not self._kernels.hold(matrix, numbers):
            return False
        self._held.append((weight, matrix, numbers))
        self.nbytes += numbers.nbytes
        return True

    def _shortened(self, matrix: npt.NDArray[np.float32]) -> ShortNumbers | None:
        sample = matrix.reshape(-1)[:_SAMPLE_ELEMENTS]
        for kind in (NumberKind.BFLOAT16, NumberKind.FLOAT16):
            if self._kernels.is_same(self._kernels.shortened(sample, kind), sample):
                numbers = self._kernels.shortened(matrix, kind)
                return numbers if self._kernels.is_same(numbers, matrix) else None
        return None

    def _packed(self, matrix: npt.NDArray[np.float32], quantized: Quantized) -> ShortNumbers | None:
        mx.eval(quantized.codes, quantized.scales, quantized.biases)
        codes, scales, biases = (
            np.array(array, copy=False) for array in (quantized.codes, quantized.scales, quantized.biases)
        )
        size = quantized.group_size
        if not can_group(size) or not all(array.flags.c_contiguous for array in (codes, scales, biases)):
            return None
        if quantized.bits == 4:
            numbers = ShortNumbers.affine(NumberKind.AFFINE4, codes, scales, biases, size)
            if self._kernels.is_same(numbers, matrix):
                return numbers
        if quantized.bits != _BYTE_BITS:
            codes = self._kernels.encoded(matrix, scales, biases, size)
        for kind in (NumberKind.AFFINE8, NumberKind.AFFINE8_ROUNDED):
            numbers = ShortNumbers.affine(kind, codes, scales, biases, size)
            if self._kernels.is_same(numbers, matrix):
                return numbers
        return None

    def close(self) -> None:
        """Let all of them go. Harmless when repeated."""
        for _, matrix, _ in self._held:
            self._kernels.let_go(matrix)
        self._held.clear()
        self.nbytes = 0


def begin(model: nn.Module, quantized: QuantizedModules) -> ShortWeights | None:
    """Make a place for what a model's weights were made of, which ends with the model.

    Args:
        model: Its weights are evaluated.
        quantized: What they were before they were expanded.

    Returns:
        None where there is to be nothing: another device, no kernels, or too little memory.
    """
    kernels = blas.kernels
    if kernels is None:
        return None
    needed = sum(
        weight.size * _DENSE_BYTES if path not in quantized else quantized[path].nbytes
        for path, weight in matrices(model)
    )
    if needed > _SHARE_OF_MEMORY * memory_bytes():
        return None
    held = ShortWeights(kernels)
    weakref.finalize(model, held.close).atexit = False
    return held


def matrices(model: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """The float32 matrices that a decode step multiplies by, with their modules' paths."""
    modules: list[tuple[str, Any]] = [
        (path, module)
        for path, module in _language_modules(model)
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.dtype == mx.float32
    ]
    shapes = {module.weight.shape for _, module in modules if isinstance(module, nn.Linear)}
    for path, module in modules:
        # An embedding is a matrix to multiply by only where there is no head beside it.
        is_table = isinstance(module, nn.Embedding) and module.weight.shape in shapes
        if not is_table and module.weight.size >= _LEAST_ELEMENTS:
            yield path, module.weight


def _language_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Those that a decode step runs; images go through layers of their own, many rows at a time."""
    modules: list[tuple[str, nn.Module]] = getattr(model, "text_model", model).named_modules()
    return modules
