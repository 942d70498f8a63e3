"""Turns rows of GGUF blocks into what MLX's quantized layers hold.

MLX's affine quantization stores, for each group of 32 values of a row, `w = scale * code + bias`, with
unsigned codes packed into uint32 words as one little-endian bit stream. Several GGUF formats say the
same in other words, so they are repacked without a change of value (block layouts: ggml-common.h and
`gguf.quants`):

| GGUF | code bits | scale, bias | their dtype |
|---|---|---|---|
| Q4_0, Q5_0 | 4, 5 | d, -8d or -16d | float16 |
| Q4_1, Q5_1 | 4, 5 | d, m | float16 |
| Q8_0 | 8 (code + 128) | d, -128d | float16 |
| Q4_K, Q5_K | 4, 5 | d*sc, -dmin*m | float32 |
| MXFP4 | 4, mode "mxfp4" | the block's own exponent byte | uint8 |

The scales of K-quants are products of an 11-bit and a 6-bit significand, which float16 cannot hold, so
they are stored as float32; MLX's quantized kernels accept float32, float16 and bfloat16 scales and
compute in the widest type among them and the activations. Computed in float32, `scale * code + bias`
equals `gguf.quants.dequantize` bit for bit for every format above, because the product is exact and
only the sum is rounded. Whoever casts a model to float16 or bfloat16 rounds the scales as well.

Q2_K, Q3_K, Q6_K and the IQ formats have groups of 16 or code books, which MLX's affine form cannot
say. They are dequantized and quantized again to 8 bits in groups of 32 with float32 scales. That is
not lossless: a value moves by at most (max - min) / 510 of its group. On weights drawn from a normal
distribution the root mean square error this adds, relative to that of the weights themselves, is
about 0.5 % (0.005).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

Kind: TypeAlias = GGMLQuantizationType
Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float16] | NDArray[np.float32]

GROUP_SIZE: Final = 32


@dataclass(frozen=True, slots=True)
class Layout:
    """How a GGUF block format is kept in MLX.

    Attributes:
        bits: Bits of one code.
        mode: MLX's quantization mode.
        scale_dtype: The scales' and biases' dtype, in safetensors' words.
        is_exact: Whether the values stay what they were.
    """

    bits: int
    mode: Literal["affine", "mxfp4"]
    scale_dtype: Literal["F16", "F32", "U8"]
    is_exact: bool


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows in MLX's form.

    Attributes:
        weight: uint32, shape (rows, width * bits / 32).
        scales: Shape (rows, width / 32).
        biases: As scales; None in mode "mxfp4".
    """

    weight: NDArray[np.uint32]
    scales: Floats | Bytes
    biases: Floats | None


def _pack_codes(codes: Bytes, bits: int) -> NDArray[np.uint32]:
    """Packs codes, uint8 of shape (rows, width), into one little-endian bit stream a row."""
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4")
    if bits == 4:
        return np.ascontiguousarray(codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)).view("<u4")
    # Eight codes of any width are a whole number of bytes.
    eights = codes.reshape(len(codes), -1, 8).astype(np.uint64)
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    words = np.bitwise_or.reduce(eights << shifts, axis=-1)
    stream = words.astype("<u8")[..., None].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(stream).reshape(len(codes), -1).view("<u4")


def _split(rows: Bytes, *sizes: int) -> list[Bytes]:
    """Cuts blocks of sum(sizes) bytes into their fields, each of shape (blocks, size)."""
    blocks = rows.reshape(-1, sum(sizes))
    return [np.ascontiguousarray(part) for part in np.split(blocks, np.cumsum(sizes)[:-1], axis=1)]


def _half(field: Bytes) -> NDArray[np.float16]:
    return field.view("<f2")


def _nibbles(field: Bytes) -> Bytes:
    """Codes of a 32-value block: the low halves of its 16 bytes, then the high halves."""
    return np.concatenate([field & np.uint8(0x0F), field >> np.uint8(4)], axis=1)


def _fifth_bits(field: Bytes) -> Bytes:
    """The fifth bits of a 32-value block, from a 32-bit mask, moved to bit 4."""
    return np.unpackbits(field, axis=1, bitorder="little") << np.uint8(4)


def _affine(rows: Bytes, bits: int, codes: Bytes, scales: Floats, biases: Floats) -> Packed:
    count = len(rows)
    return Packed(
        _pack_codes(codes.reshape(count, -1), bits), scales.reshape(count, -1), biases.reshape(count, -1)
    )


def _q4_0(rows: Bytes) -> Packed:
    d, qs = _split(rows, 2, 16)
    return _affine(rows, 4, _nibbles(qs), _half(d), _half(d) * np.float16(-8))


def _q4_1(rows: Bytes) -> Packed:
    d, m, qs = _split(rows, 2, 2, 16)
    return _affine(rows, 4, _nibbles(qs), _half(d), _half(m))


def _q5_0(rows: Bytes) -> Packed:
    d, qh, qs = _split(rows, 2, 4, 16)
    return _affine(rows, 5, _nibbles(qs) | _fifth_bits(qh), _half(d), _half(d) * np.float16(-16))


def _q5_1(rows: Bytes) -> Packed:
    d, m, qh, qs = _split(rows, 2, 2, 4, 16)
    return _affine(rows, 5, _nibbles(qs) | _fifth_bits(qh), _half(d), _half(m))


def _q8_0(rows: Bytes) -> Packed:
    d, qs = _split(rows, 2, 32)
    return _affine(rows, 8, qs ^ np.uint8(0x80), _half(d), _half(d) * np.float16(-128))


def _k_scales(d: Bytes, dmin: Bytes, scales: Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and biases of a 256-value K-quant block, float32 of shape (blocks, 8)."""
    factors, minima = quants.Q4_K.get_scale_min(scales)
    scale = _half(d).astype(np.float32) * factors.astype(np.float32)
    bias = _half(dmin).astype(np.float32) * -minima.astype(np.float32)
    return scale, bias


def _k_nibbles(qs: Bytes) -> Bytes:
    """Codes of a 256-value block: each 32 bytes hold two groups, low halves and high halves."""
    quarters = qs.reshape(len(qs), 4, 1, 32)
    return np.concatenate([quarters & np.uint8(0x0F), quarters >> np.uint8(4)], axis=2).reshape(-1, 256)


def _q4_k(rows: Bytes) -> Packed:
    d, dmin, scales, qs = _split(rows, 2, 2, 12, 128)
    return _affine(rows, 4, _k_nibbles(qs), *_k_scales(d, dmin, scales))


def _q5_k(rows: Bytes) -> Packed:
    d, dmin, scales, qh, qs = _split(rows, 2, 2, 12, 32, 128)
    group = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    fifth = (qh.reshape(-1, 1, 32) >> group & np.uint8(1)) << np.uint8(4)
    return _affine(rows, 5, _k_nibbles(qs) | fifth.reshape(-1, 256), *_k_scales(d, dmin, scales))


def _mxfp4(rows: Bytes) -> Packed:
    exponents, qs = _split(rows, 1, 16)
    codes = _nibbles(qs).reshape(len(rows), -1)
    return Packed(_pack_codes(codes, 4), exponents.reshape(len(rows), -1), None)


def quantize_8bit(values: NDArray[np.float32]) -> Packed:
    """Quantizes rows to 8 bits in groups of 32, from each group's minimum to its maximum.

    Args:
        values: float32, shape (rows, width), width a multiple of 32.
    """
    groups = values.reshape(len(values), -1, GROUP_SIZE)
    low = groups.min(axis=-1, keepdims=True)
    scale = (groups.max(axis=-1, keepdims=True) - low) / np.float32(255)
    codes = np.rint((groups - low) / np.where(scale > 0, scale, np.float32(1))).clip(0, 255).astype(np.uint8)
    return _affine(values, 8, codes, scale, low)  # type: ignore[arg-type]  # only len(values) is used


def dequantize(rows: Bytes, kind: Kind) -> NDArray[np.float32]:
    """Values of stored rows, float32 of shape (rows, width); any format `gguf.quants` knows."""
    with np.errstate(all="ignore"):  # a corrupt scale may be infinite; the caller checks the result
        return np.asarray(quants.dequantize(rows, kind), np.float32)


_EXACT: Final[Mapping[Kind, tuple[Layout, Callable[[Bytes], Packed]]]] = {
    Kind.Q4_0: (Layout(4, "affine", "F16", True), _q4_0),
    Kind.Q4_1: (Layout(4, "affine", "F16", True), _q4_1),
    Kind.Q5_0: (Layout(5, "affine", "F16", True), _q5_0),
    Kind.Q5_1: (Layout(5, "affine", "F16", True), _q5_1),
    Kind.Q8_0: (Layout(8, "affine", "F16", True), _q8_0),
    Kind.Q4_K: (Layout(4, "affine", "F32", True), _q4_k),
    Kind.Q5_K: (Layout(5, "affine", "F32", True), _q5_k),
    Kind.MXFP4: (Layout(4, "mxfp4", "U8", True), _mxfp4),
}

_REQUANTIZED: Final = Layout(8, "affine", "F32", False)
_REQUANTIZED_KINDS: Final = frozenset(
    {
        Kind.Q2_K,
        Kind.Q3_K,
        Kind.Q6_K,
        Kind.IQ1_S,
        Kind.IQ1_M,
        Kind.IQ2_XXS,
        Kind.IQ2_XS,
        Kind.IQ2_S,
        Kind.IQ3_XXS,
        Kind.IQ3_S,
        Kind.IQ4_NL,
        Kind.IQ4_XS,
    }
)


def layout(kind: Kind) -> Layout | None:
    """How a block format is kept in MLX, or None where it is not a format that can be."""
    if kind in _REQUANTIZED_KINDS:
        return _REQUANTIZED
    return _EXACT[kind][0] if kind in _EXACT else None


def pack(rows: Bytes, kind: Kind) -> Packed:
    """Rows of blocks in MLX's form.

    Args:
        rows: uint8, shape (rows, bytes of a row): whole blocks.
        kind: A format for which `layout` is not None.

    Returns:
        The packed rows; scales or biases are not finite where the blocks are corrupt.
    """
    if kind in _REQUANTIZED_KINDS:
        with np.errstate(all="ignore"):
            return quantize_8bit(dequantize(rows, kind))
    with np.errstate(all="ignore"):
        return _EXACT[kind][1](rows)
