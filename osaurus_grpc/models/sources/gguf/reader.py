"""Reads a GGUF file: its metadata, the list of its tensors, and their bytes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
The constants (value types, tensor types, block sizes) are the `gguf` package's. Its `GGUFReader` is
not used, because it trusts the counts in the file: an array that claims 2**60 one-byte elements keeps
it in a loop past the file's end, and a vocabulary of 262,144 tokens costs it seconds and a NumPy view
per token. Here every count is checked against the bytes that are left before it is acted on, so time
and memory are bounded by the file's size.

A tensor's bytes are read with ordinary reads, not through a memory map: a file that shrinks meanwhile
is then a short read and not a SIGBUS.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self, TypeAlias

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)
from numpy.typing import NDArray

from osaurus_grpc.errors import SourceInvalidError

NumberArray: TypeAlias = NDArray[np.int64] | NDArray[np.float64]
MetadataValue: TypeAlias = str | int | float | bool | list[str] | NumberArray

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_KEYS: Final = 65_536
_MAX_TENSORS: Final = 262_144
_MAX_DIMENSIONS: Final = 4
_MAX_NAME_BYTES: Final = 1_024
_MAX_STRING_BYTES: Final = 16 * 1024 * 1024
_MAX_STRINGS: Final = 4_194_304  # in one array; the largest vocabularies have 262,144 tokens

_SCALARS: Final[Mapping[GGUFValueType, str]] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: GGUF name, for example "blk.0.attn_q.weight".
        kind: How its values are stored.
        shape: Outermost dimension first, as NumPy and MLX count them (GGUF lists them innermost first).
        offset: First byte, from the start of the file.
        size_bytes: Bytes it takes.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def row_count(self) -> int:
        """Number of rows, all dimensions but the innermost taken together."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; rows are whole blocks."""
        return self.size_bytes // self.row_count


def cut_off() -> SourceInvalidError:
    """The error for a file that ends before what its header announces."""
    return SourceInvalidError("The GGUF file is cut off: it ends before the data its header announces.")


def _corrupt(what: str) -> SourceInvalidError:
    return SourceInvalidError(f"The GGUF file is corrupt: {what}.")


class _Cursor:
    """Reads the header front to back, never past the end of the file."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self.position = 0

    @property
    def left(self) -> int:
        return self._size - self.position

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise cut_off()
        data = self._stream.read(count)
        if len(data) != count:
            raise cut_off()
        self.position += count
        return data

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def text(self, limit: int) -> str:
        length = self.u64()
        if length > self.left:
            raise cut_off()
        if length > limit:
            raise _corrupt(f"a text of {length} bytes is longer than the {limit} allowed")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise _corrupt("a text is not UTF-8") from None


def _value_type(number: int, key: str) -> GGUFValueType:
    try:
        return GGUFValueType(number)
    except ValueError:
        raise _corrupt(f"the metadata value {key!r} has the unknown type {number}") from None


def _scalar(cursor: _Cursor, kind: GGUFValueType) -> int | float | bool:
    dtype = np.dtype(_SCALARS[kind])
    value = np.frombuffer(cursor.take(dtype.itemsize), dtype)[0].item()
    assert isinstance(value, int | float)
    return bool(value) if kind is GGUFValueType.BOOL else value


def _array(cursor: _Cursor, key: str) -> list[str] | NumberArray:
    kind = _value_type(cursor.u32(), key)
    count = cursor.u64()
    if kind is GGUFValueType.ARRAY:
        raise _corrupt(f"the metadata value {key!r} is an array of arrays")
    if kind is GGUFValueType.STRING:
        if count * 8 > cursor.left:
            raise cut_off()
        if count > _MAX_STRINGS:
            raise _corrupt(
                f"the metadata value {key!r} has {count} texts, more than the {_MAX_STRINGS} allowed"
            )
        return [cursor.text(_MAX_STRING_BYTES) for _ in range(count)]
    dtype = np.dtype(_SCALARS[kind])
    if count * dtype.itemsize > cursor.left:
        raise cut_off()
    if count > _MAX_STRINGS:
        raise _corrupt(
            f"the metadata value {key!r} has {count} numbers, more than the {_MAX_STRINGS} allowed"
        )
    values = np.frombuffer(cursor.take(count * dtype.itemsize), dtype)
    if dtype.kind == "f":
        return values.astype(np.float64)
    return values.astype(np.int64)


def _value(cursor: _Cursor, key: str) -> MetadataValue:
    kind = _value_type(cursor.u32(), key)
    if kind is GGUFValueType.STRING:
        return cursor.text(_MAX_STRING_BYTES)
    if kind is GGUFValueType.ARRAY:
        return _array(cursor, key)
    return _scalar(cursor, kind)


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Checks magic and version; returns the counts of tensors and of metadata keys."""
    magic = cursor.take(4) if cursor.left >= 4 else b""
    if magic != _MAGIC:
        raise SourceInvalidError("The file is not a GGUF file: it does not begin with the letters GGUF.")
    version = cursor.u32()
    if version and version & 0xFFFF == 0:
        raise SourceInvalidError("The GGUF file is big-endian, which is not supported.")
    if version not in _VERSIONS:
        raise SourceInvalidError(f"The GGUF file is of version {version}; versions 2 and 3 are supported.")
    tensors, keys = cursor.u64(), cursor.u64()
    if keys > _MAX_KEYS or tensors > _MAX_TENSORS:
        raise _corrupt(f"it claims {tensors} tensors and {keys} metadata values")
    return tensors, keys


def _metadata(cursor: _Cursor, count: int) -> dict[str, MetadataValue]:
    values: dict[str, MetadataValue] = {}
    for _ in range(count):
        key = cursor.text(_MAX_NAME_BYTES)
        if key in values:
            raise _corrupt(f"the metadata value {key!r} appears twice")
        values[key] = _value(cursor, key)
    return values


def _tensor(cursor: _Cursor) -> TensorInfo:
    """One entry of the tensor list; its offset still counts from the start of the data."""
    name = cursor.text(_MAX_NAME_BYTES)
    rank = cursor.u32()
    if not 1 <= rank <= _MAX_DIMENSIONS:
        raise _corrupt(f"tensor {name} has {rank} dimensions")
    shape = tuple(reversed(struct.unpack(f"<{rank}Q", cursor.take(8 * rank))))
    number, offset = cursor.u32(), cursor.u64()
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise SourceInvalidError(
            f"Tensor {name} is stored as the unknown type {number}, which cannot be converted."
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise _corrupt(f"tensor {name} has the shape {list(shape)}, which {kind.name} cannot hold")
    return TensorInfo(name, kind, shape, offset, math.prod(shape) // block * block_bytes)


def _alignment(metadata: Mapping[str, MetadataValue]) -> int:
    value = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or value < 1 or value & (value - 1) or value > 1 << 20:
        raise _corrupt("its alignment is not a power of two")
    return value


def _placed(entries: list[TensorInfo], start: int, alignment: int, size: int) -> dict[str, TensorInfo]:
    """Gives every entry its place in the file; refuses what lies outside it or upon another."""
    placed: dict[str, TensorInfo] = {}
    end = start
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.name in placed:
            raise _corrupt(f"tensor {entry.name} appears twice")
        offset = start + entry.offset
        if entry.offset % alignment or offset < end:
            raise _corrupt(f"tensor {entry.name} is misplaced")
        end = offset + entry.size_bytes
        if end > size:
            raise cut_off()
        placed[entry.name] = TensorInfo(entry.name, entry.kind, entry.shape, offset, entry.size_bytes)
    return placed


class GGUFFile:
    """An open GGUF file. Close it, or use it as a context manager.

    Args:
        path: The file.

    Attributes:
        metadata: Key to value; arrays of texts are lists, arrays of numbers NumPy arrays of int64 or
            float64.
        tensors: Name to place, in the order of their offsets.

    Raises:
        SourceInvalidError: It cannot be opened, is no GGUF file, is cut off or contradicts itself.
    """

    metadata: dict[str, MetadataValue]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: Path) -> None:
        try:
            self._stream = path.open("rb", buffering=1 << 20)
        except OSError:
            raise SourceInvalidError("The GGUF file cannot be opened.") from None
        try:
            self._read_header()
        except OSError:
            self._stream.close()
            raise SourceInvalidError("The GGUF file cannot be read.") from None
        except BaseException:
            self._stream.close()
            raise

    def _read_header(self) -> None:
        size = self._stream.seek(0, os.SEEK_END)
        self._stream.seek(0)
        cursor = _Cursor(self._stream, size)
        tensor_count, key_count = _counts(cursor)
        self.metadata = _metadata(cursor, key_count)
        entries = [_tensor(cursor) for _ in range(tensor_count)]
        alignment = _alignment(self.metadata)
        start = -(-cursor.position // alignment) * alignment
        self.tensors = _placed(entries, start, alignment, size)

    def read_rows(self, tensor: TensorInfo, start: int, count: int) -> NDArray[np.uint8]:
        """Reads rows as they are stored.

        Returns:
            uint8, shape (count, tensor.row_bytes).

        Raises:
            SourceInvalidError: The file ends early or cannot be read.
        """
        wanted = count * tensor.row_bytes
        try:
            self._stream.seek(tensor.offset + start * tensor.row_bytes)
            data = self._stream.read(wanted)
        except OSError:
            raise SourceInvalidError("The GGUF file cannot be read.") from None
        if len(data) != wanted:
            raise cut_off()
        return np.frombuffer(data, np.uint8).reshape(count, tensor.row_bytes)

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
