"""Keys and values of some neighbouring tokens, taken out of a batch to be kept."""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# A layer's keys, or its values, for some tokens: shape (kv_heads, tokens, head_dim), with a number that
# says which they are.
Plane = tuple[int, mx.array]

# Values that share a scale when quantized; a head whose size neither divides is kept as it is.
_GROUP_SIZES = (64, 32)


@dataclass(frozen=True, slots=True)
class Piece:
    """Keys and values of neighbouring tokens in several layers, which own their memory.

    Attributes:
        stacks: Planes of one shape lie in one array (planes, kv_heads, tokens, head_dim); quantized, in
            three: packed values, scales and biases.
        planes: Which planes each stack holds.
        bits: Of quantized values; 0 where none is.
    """

    stacks: tuple[tuple[mx.array, ...], ...]
    planes: tuple[tuple[int, ...], ...]
    bits: int

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays."""
        return [array for stack in self.stacks for array in stack]

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(int(array.nbytes) for array in self.arrays)


def cut(planes: Sequence[Plane], count: int, bits: int) -> list[Piece]:
    """Cut keys and values into pieces of equally many tokens. Not evaluated yet.

    Args:
        planes: Of all layers, over the same tokens.
        count: Pieces to make.
        bits: Quantize to so many, 0 to keep them as they are.
    """
    shapes: dict[tuple[int, int, mx.Dtype], list[Plane]] = {}
    for number, array in planes:
        shapes.setdefault((array.shape[0], array.shape[2], array.dtype), []).append((number, array))
    numbers = tuple(tuple(number for number, _ in alike) for alike in shapes.values())
    columns = [
        # Copies: a slice would keep the whole tensor, and with it the batch it came from.
        [[mx.contiguous(part) for part in mx.split(whole, count, axis=2)] for whole in packed]
        for packed in (_pack(mx.stack([array for _, array in alike]), bits) for alike in shapes.values())
    ]
    return [
        Piece(tuple(tuple(parts[i] for parts in column) for column in columns), numbers, bits)
        for i in range(count)
    ]


def join(pieces: Sequence[Piece], *, skip: int = 0, room: int = 0) -> Iterator[Plane]:
    """Planes of pieces that follow each other, each of shape (1, kv_heads, tokens, head_dim).

    Args:
        pieces: At least one, of the same layers.
        skip: Tokens to leave out at the beginning, fewer than the first piece has.
        room: Places for further tokens to add at the end.
    """
    first = pieces[0]
    for i, numbers in enumerate(first.planes):
        same = [piece.stacks[i] for piece in pieces]
        if len(same[0]) > 1:
            parts = [mx.concatenate(list(part), axis=2) for part in zip(*same, strict=True)]
            same = [(_unpack(parts, first.bits),)]
        arrays = [array for (array,) in same]
        arrays[0] = arrays[0][:, :, skip:]
        if room:
            planes, heads, _, dim = arrays[0].shape
            arrays.append(mx.zeros((planes, heads, room, dim), dtype=arrays[0].dtype))
        # Joined at once, room and all: each further copy of a long beginning is felt.
        stack = mx.concatenate(arrays, axis=2)
        # One array a plane, so that each can be written to in place.
        for number, plane in zip(numbers, mx.split(stack, len(numbers)), strict=True):
            yield number, mx.contiguous(plane)


def _pack(stack: mx.array, bits: int) -> tuple[mx.array, ...]:
    group_size = next((size for size in _GROUP_SIZES if stack.shape[-1] and stack.shape[-1] % size == 0), 0)
    if not bits or not group_size:
        return (stack,)
    return tuple(mx.quantize(stack, group_size=group_size, bits=bits))


def _unpack(stack: Sequence[mx.array], bits: int) -> mx.array:
    values, scales, biases = stack
    group_size = values.shape[-1] * 32 // bits // scales.shape[-1]
    return mx.dequantize(values, scales, biases, group_size=group_size, bits=bits)
