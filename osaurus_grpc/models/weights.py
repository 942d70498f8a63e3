"""Headers of safetensors files: what tensors a file holds, read without its data.

The format: 8 bytes with the header's length N (little-endian), N bytes of JSON that map each tensor's
name to dtype, shape and data_offsets (relative to the end of the header), then the data, without
holes. A file shorter or longer than its header says is damaged, most often a download that broke off.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# The limit of the format's reference implementation.
MAX_HEADER_BYTES = 100_000_000

_DTYPE_NAMES = {"F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
_SCALE_SUFFIXES = (".scales", ".biases", "_scale", "_scale_inv", ".global_scale")


class DamagedWeightsError(ValueError):
    """A weights file is cut off or is no safetensors file. The text names the file, without its folder."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it.

    Attributes:
        dtype: The format's name, for example "BF16" or "U32".
        shape: Its dimensions; packed quantized weights count packed words.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class WeightsHeader:
    """A file's header.

    Attributes:
        tensors: By name.
        sha256: Of the header's bytes.
    """

    tensors: Mapping[str, TensorInfo]
    sha256: str


def read_header(path: Path) -> WeightsHeader:
    """Read and check a safetensors file's header.

    Raises:
        DamagedWeightsError: The file is not whole.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        file_size = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, file_size - 8):
            raise DamagedWeightsError(f"{path.name} is cut off or is no safetensors file")
        raw = file.read(length)
    try:
        tensors, data_size = _parsed(raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedWeightsError(f"{path.name} has a damaged header") from error
    if data_size != file_size - 8 - length:
        raise DamagedWeightsError(
            f"{path.name} is cut off: its tensors do not fill the file as its header says"
        )
    return WeightsHeader(tensors=tensors, sha256=hashlib.sha256(raw).hexdigest())


def _parsed(raw: bytes) -> tuple[dict[str, TensorInfo], int]:
    """Tensors of a header and the bytes of data they take; any of several errors where it is damaged."""
    tensors: dict[str, TensorInfo] = {}
    data_size = 0
    for name, entry in json.loads(raw).items():
        if name == "__metadata__":
            continue
        shape = tuple(int(dimension) for dimension in entry["shape"])
        tensors[name] = TensorInfo(dtype=str(entry["dtype"]), shape=shape)
        data_size = max(data_size, int(entry["data_offsets"][1]))
    return tensors, data_size


def parameter_count(tensors: Mapping[str, TensorInfo], group_sizes: Mapping[str, int]) -> int:
    """Count the weights that tensors stand for.

    MLX packs quantized weights into 32-bit words beside one scale for each group, so such a weight
    counts its scales times the group size; scales and biases of groups count nothing.

    Args:
        tensors: Of all files of a model.
        group_sizes: Module path to its quantization group size; "" is the default.
    """
    total = 0
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        scales = tensors.get(f"{module}.scales") if name.endswith(".weight") else None
        if scales is not None:
            total += scales.size * group_sizes.get(module, group_sizes.get("", 64))
        elif not _is_scale(name, tensors):
            total += tensor.size
    return total


def _is_scale(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor only describes the quantization of another."""
    for suffix in _SCALE_SUFFIXES:
        if name.endswith(suffix):
            owner = name.removesuffix(suffix)
            return owner in tensors or f"{owner}.weight" in tensors
    return False


def dominant_dtype(tensors: Iterable[TensorInfo]) -> str:
    """The dtype that most elements are stored in, in its short name, or "" without floating-point tensors."""
    elements: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in _DTYPE_NAMES:
            elements[_DTYPE_NAMES[tensor.dtype]] += tensor.size
    return max(elements, key=lambda name: elements[name]) if elements else ""
