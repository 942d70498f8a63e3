"""Writes safetensors shards part by part, so that no tensor needs to be in memory whole.

Format: https://huggingface.co/docs/safetensors (an 8-byte little-endian header length, a JSON header,
then the data). The `safetensors` package writes a file from tensors that are all in memory, and knows
no bfloat16 through NumPy; here the layout is known before the data, so each part goes to its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from numpy.typing import NDArray

SHARD_BYTES: Final = 5_000_000_000

_ITEM_BYTES: Final[Mapping[str, int]] = {"F32": 4, "U32": 4, "F16": 2, "BF16": 2, "U8": 1}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a safetensors header lists it; dtype is "F32", "U32", "F16", "BF16" or "U8"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def _partition(groups: Iterable[Sequence[StoredTensor]], limit: int) -> list[list[StoredTensor]]:
    """Fills shards in order; the tensors of one group stay together."""
    shards: list[list[StoredTensor]] = [[]]
    used = 0
    for group in groups:
        size = sum(tensor.size_bytes for tensor in group)
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].extend(group)
        used += size
    return shards


def _header(tensors: Sequence[StoredTensor]) -> tuple[bytes, dict[str, int]]:
    """A shard's header and the file offset of each of its tensors, wider items first."""
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    starts: dict[str, int] = {}
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: -_ITEM_BYTES[tensor.dtype]):
        starts[tensor.name] = end
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [end, end + tensor.size_bytes],
        }
        end += tensor.size_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


class ShardWriter:
    """The weight files of one model folder. Use it as a context manager.

    One shard is called model.safetensors; several are model-00001-of-0000N.safetensors, and
    model.safetensors.index.json says which tensor is where.

    Args:
        folder: An existing folder.
        groups: Every tensor that will be written; the members of a group go into the same shard.
        shard_bytes: Data of one shard, at most, unless one group alone is larger.
    """

    def __init__(
        self, folder: Path, groups: Iterable[Sequence[StoredTensor]], *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._folder = folder
        self._shards = _partition(groups, shard_bytes)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._stack = ExitStack()

    def _name(self, index: int) -> str:
        count = len(self._shards)
        return "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for index, tensors in enumerate(self._shards):
                stream = stack.enter_context((self._folder / self._name(index)).open("wb"))
                header, offsets = _header(tensors)
                stream.write(header)
                self._places.update({name: (stream, offset) for name, offset in offsets.items()})
            self._stack = stack.pop_all()
        if len(self._shards) > 1:
            self._write_index()
        return self

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_size": sum(t.size_bytes for shard in self._shards for t in shard)},
            "weight_map": {t.name: self._name(i) for i, shard in enumerate(self._shards) for t in shard},
        }
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")

    def write(self, name: str, offset_bytes: int, data: NDArray[Any]) -> None:
        """Writes part of a tensor.

        Args:
            name: The tensor.
            offset_bytes: Where the part begins within the tensor.
            data: The part's values, little-endian, in the tensor's dtype.
        """
        stream, start = self._places[name]
        stream.seek(start + offset_bytes)
        stream.write(data.tobytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
