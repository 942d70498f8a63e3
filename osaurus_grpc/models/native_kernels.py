"""Our own kernels for a CPU: matrix products of few rows, attention, SwiGLU.

The library is compiled when the package is installed, on x86-64 Linux with a C compiler (native/gemm.c,
numbers.c and attention.c say what it does and why). Its cblas_sgemm takes the BLAS's place by being found
first: the dynamic linker looks libraries up in the order in which they became global.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["NativeKernels", "NumberKind", "ShortNumbers", "can_group", "load"]

_LIBRARY = Path(__file__).parent / "native" / "libosaurus_native.so"
_INTERFACE = 4
_NEEDED = frozenset({"avx2", "fma", "f16c"})
_FLOAT_BYTES = 4
# Numbers that share a scale, at least.
_LEAST_GROUP = 32
# Multiplications from which others may run in the interpreter meanwhile. It takes up to 5 ms to be let back
# in, which every layer of a small pass would wait for.
_LARGE = 2**26

_Floats: TypeAlias = npt.NDArray[np.float32]
_Codes: TypeAlias = npt.NDArray[np.uint8]


class NumberKind(IntEnum):
    """How a matrix's numbers are held; enum kind of native/kernels.h."""

    BFLOAT16 = 1
    FLOAT16 = 2
    AFFINE4 = 3
    AFFINE8 = 4
    AFFINE8_ROUNDED = 5


class _Numbers(ctypes.Structure):
    """struct numbers of native/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "biases")),
        *((name, ctypes.c_int32) for name in ("kind", "group_shift")),
    )


@dataclass(frozen=True, slots=True)
class ShortNumbers:
    """The numbers of a matrix in fewer bits.

    Attributes:
        kind: How.
        codes: They.
        scales: Of each group, float32; None where there are no groups.
        biases: The same.
        group_shift: The logarithm to base 2 of a group's size.
    """

    kind: NumberKind
    codes: npt.NDArray[Any]
    scales: _Floats | None = None
    biases: _Floats | None = None
    group_shift: int = 0

    @classmethod
    def affine(
        cls, kind: NumberKind, codes: npt.NDArray[Any], scales: _Floats, biases: _Floats, group_size: int
    ) -> ShortNumbers:
        """Numbers as MLX's affine quantization packs them, in groups of a size that can_group() allows."""
        return cls(kind, codes, scales, biases, group_size.bit_length() - 1)

    @property
    def nbytes(self) -> int:
        """Bytes they take."""
        return self.codes.nbytes + sum(a.nbytes for a in (self.scales, self.biases) if a is not None)

    def structure(self) -> _Numbers:
        """As the library takes them; good while the arrays are."""
        pointers = [None if a is None else a.ctypes.data for a in (self.codes, self.scales, self.biases)]
        return _Numbers(*pointers, self.kind, self.group_shift)


def can_group(size: int) -> bool:
    """Whether so many numbers may share a scale."""
    return size >= _LEAST_GROUP and size.bit_count() == 1


class _Attention(ctypes.Structure):
    """struct attention of native/attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "values", "mask", "out")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "key_row", "key_head", "key_token", "value_row", "value_head", "value_token",
                "mask_row", "mask_query",
            )
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                "rows", "heads", "kv_heads", "query_count", "key_count", "dim", "value_dim", "is_causal",
            )
        ),
        ("scale", ctypes.c_float),
    )  # fmt: skip


class NativeKernels:
    """The loaded library.

    Args:
        library: It.
        path: Its file.
    """

    def __init__(self, library: ctypes.CDLL, path: Path) -> None:
        self._library = library
        # The same, called without letting others into the interpreter.
        self._brief = ctypes.PyDLL(str(path))
        library.osaurus_gemm_products.restype = ctypes.c_long
        library.osaurus_gemm_short_products.restype = ctypes.c_long
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        library.osaurus_shorten.argtypes = [pointer, size, number, pointer]
        library.osaurus_shorten.restype = None
        library.osaurus_encode.argtypes = [pointer, size, pointer, pointer, number, pointer]
        library.osaurus_encode.restype = None
        library.osaurus_is_same.argtypes = [pointer, pointer, size]
        library.osaurus_hold.argtypes = [pointer, number, number, pointer]
        library.osaurus_let_go.argtypes = [pointer]
        library.osaurus_let_go.restype = None
        for each in (self._library, self._brief):
            each.osaurus_attention.argtypes = [ctypes.c_void_p]
            each.osaurus_swiglu.argtypes = [ctypes.c_size_t, *[ctypes.c_void_p] * 3]
            each.osaurus_swiglu.restype = None

    @property
    def products(self) -> int:
        """Products it did itself since it was loaded."""
        return int(self._library.osaurus_gemm_products())

    @property
    def short_products(self) -> int:
        """Those of them for which it read shorter numbers."""
        return int(self._library.osaurus_gemm_short_products())

    @property
    def threads(self) -> int:
        """How many work on one product or attention, 64 at most."""
        return int(self._library.osaurus_threads())

    @threads.setter
    def threads(self, threads: int) -> None:
        self._library.osaurus_set_threads(ctypes.c_int(threads))

    def shortened(self, matrix: _Floats, kind: NumberKind) -> ShortNumbers:
        """A contiguous matrix's numbers in 16 bits each, rounded where they do not fit."""
        codes = np.empty(matrix.shape, np.uint16)
        self._library.osaurus_shorten(matrix.ctypes.data, matrix.size, kind, codes.ctypes.data)
        return ShortNumbers(kind, codes)

    def encoded(self, matrix: _Floats, scales: _Floats, biases: _Floats, group_size: int) -> _Codes:
        """The codes, of 8 bits, that a contiguous matrix in groups was made of, if it was."""
        codes = np.empty(matrix.shape, np.uint8)
        self._library.osaurus_encode(
            matrix.ctypes.data, matrix.size, scales.ctypes.data, biases.ctypes.data,
            group_size.bit_length() - 1, codes.ctypes.data,
        )  # fmt: skip
        return codes

    def is_same(self, numbers: ShortNumbers, matrix: _Floats) -> bool:
        """Whether numbers are those of a contiguous matrix, to the bit."""
        structure = numbers.structure()
        return bool(
            self._library.osaurus_is_same(ctypes.addressof(structure), matrix.ctypes.data, matrix.size)
        )

    def hold(self, matrix: _Floats, numbers: ShortNumbers) -> bool:
        """Read the numbers in place of the contiguous matrix from now on, where rows are few.

        Both stay where they are, and unchanged, until let_go(). Returns whether it will be done.
        """
        rows, columns = matrix.shape
        structure = numbers.structure()
        return bool(
            self._library.osaurus_hold(matrix.ctypes.data, rows, columns, ctypes.addressof(structure))
        )

    def let_go(self, matrix: _Floats) -> None:
        """Read the matrix itself again; nobody reads its numbers any more when this returns."""
        self._library.osaurus_let_go(matrix.ctypes.data)

    def attention(
        self,
        q: _Floats,
        k: _Floats,
        v: _Floats,
        *,
        scale: float,
        mask: npt.NDArray[np.bool_] | None = None,
        is_causal: bool = False,
    ) -> _Floats | None:
        """Scaled dot-product attention. A query that sees nothing gives zeros.

        Args:
            q: Shape (rows, heads, queries, dim), contiguous.
            k: Shape (rows, kv_heads, keys, dim), the last axis contiguous.
            v: Shape (rows, kv_heads, keys, value_dim), the last axis contiguous.
            scale: Of the scores, greater than 0.
            mask: What is seen, shape (rows, queries, keys), the last axis contiguous; None is everything.
            is_causal: Whether the last query sees all keys, the one before it all but the last, and so on.

        Returns:
            Shape (rows, heads, queries, value_dim); None where it does not do these sizes.
        """
        rows, heads, queries, dim = q.shape
        kv_heads, keys = k.shape[1:3]
        value_dim = v.shape[3]
        out = np.empty((rows, heads, queries, value_dim), np.float32)
        mask_strides = (0, 0) if mask is None else mask.strides[:2]
        asked = _Attention(
            q.ctypes.data, k.ctypes.data, v.ctypes.data, None if mask is None else mask.ctypes.data,
            out.ctypes.data,
            *(stride // _FLOAT_BYTES for stride in (*k.strides[:3], *v.strides[:3])),
            *mask_strides,
            rows, heads, kv_heads, queries, keys, dim, value_dim, is_causal,
            scale,
        )  # fmt: skip
        library = self._library if out.size * keys > _LARGE else self._brief
        return out if library.osaurus_attention(ctypes.addressof(asked)) else None

    def swiglu(self, gate: _Floats, x: _Floats) -> _Floats:
        """Compute gate * sigmoid(gate) * x of contiguous arrays of one shape."""
        out = np.empty(gate.shape, np.float32)
        self._brief.osaurus_swiglu(gate.size, gate.ctypes.data, x.ctypes.data, out.ctypes.data)
        return out


def load(
    blas: ctypes.CDLL, *, library: Path = _LIBRARY, cpu_info: Path = Path("/proc/cpuinfo")
) -> NativeKernels | None:
    """Put the library in front of a BLAS that is loaded and not global yet; before MLX is imported.

    Args:
        blas: What does the other products.
        library: The file.
        cpu_info: Where Linux tells the processor's abilities.

    Returns:
        None where it was not compiled, is of another version, or the processor lacks an instruction.
    """
    if not library.is_file() or not _has_instructions(cpu_info):
        return None
    try:
        # Not global yet: what is once global stays in front for good.
        found = ctypes.CDLL(str(library), mode=ctypes.RTLD_LOCAL)
        if found.osaurus_interface() != _INTERFACE:
            return None
        found.osaurus_gemm_set_blas(ctypes.cast(blas.cblas_sgemm, ctypes.c_void_p))
        return NativeKernels(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL), library)
    except (OSError, AttributeError):
        return None


def _has_instructions(cpu_info: Path) -> bool:
    try:
        text = cpu_info.read_text()
    except OSError:
        return False
    return any(
        name.strip() == "flags" and set(flags.split()) >= _NEEDED
        for name, _, flags in (line.partition(":") for line in text.splitlines())
    )
