"""Writes an MLX model folder from a GGUF file.

Weights go through in runs of rows, so their share of memory stays at some tens of megabytes (plus one q
or k projection as it is stored, whose rows are reordered) whatever the model's size; what remains is the
vocabulary, of which 262,144 tokens take about 300 MB while their merges are sorted. Everything is NumPy:
no MLX, so any thread may convert. Nothing in the file is executed; a chat template is copied as text.
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from osaurus_grpc.errors import DiskFullError, SourceInvalidError
from osaurus_grpc.models.sources.gguf import blocks
from osaurus_grpc.models.sources.gguf.config import (
    Settings,
    architecture_of,
    dimensions,
    model_config,
)
from osaurus_grpc.models.sources.gguf.reader import GGUFFile
from osaurus_grpc.models.sources.gguf.shards import ShardWriter, StoredTensor
from osaurus_grpc.models.sources.gguf.tensors import TensorPlan, plan_tensors
from osaurus_grpc.models.sources.gguf.tokenizer import build_tokenizer, tokenizer_config
from osaurus_grpc.models.sources.gguf.vocabulary import Vocabulary, read_vocabulary

_RUN_VALUES: Final = 1 << 21  # values of a tensor in memory at once; unpacked they take 4 bytes each
_DENSE: Final[Mapping[GGMLQuantizationType, str]] = {
    GGMLQuantizationType.F32: "F32",
    GGMLQuantizationType.F16: "F16",
    GGMLQuantizationType.BF16: "BF16",
}


@dataclass(frozen=True, slots=True)
class ConvertProgress:
    """How far a conversion is; completed_bytes and total_bytes count the GGUF file's tensors."""

    status: str
    file: str = ""
    completed_bytes: int = 0
    total_bytes: int = 0


def _refused(plan: TensorPlan) -> SourceInvalidError:
    return SourceInvalidError(
        f"Tensor {plan.source.name} is stored as {plan.source.kind.name}, which cannot be converted."
    )


def _stored(plan: TensorPlan) -> list[StoredTensor]:
    """The safetensors entries one GGUF tensor becomes."""
    source, name = plan.source, f"{plan.path}.{plan.parameter}"
    if source.kind in _DENSE:
        dtype = "F32" if plan.shift else _DENSE[source.kind]
        return [StoredTensor(name, dtype, source.shape)]
    layout = blocks.layout(source.kind)
    if layout is None or not plan.may_be_quantized:
        raise _refused(plan)
    *rows, width = source.shape
    scales = (*rows, width // blocks.GROUP_SIZE)
    entries = [
        StoredTensor(name, "U32", (*rows, width * layout.bits // 32)),
        StoredTensor(f"{plan.path}.scales", layout.scale_dtype, scales),
    ]
    if layout.mode == "affine":
        entries.append(StoredTensor(f"{plan.path}.biases", layout.scale_dtype, scales))
    return entries


def _runs(file: GGUFFile, plan: TensorPlan) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """A tensor's stored rows in their final order: index of the first, uint8 (rows, bytes of a row)."""
    source = plan.source
    if len(source.shape) == 1:
        rows = file.read_rows(source, 0, 1)
        if plan.permuted_heads:
            width = source.size_bytes // source.shape[0]
            rows = rows.reshape(-1, width)[plan.row_order()].reshape(1, -1)
        yield 0, rows
        return
    step = max(1, _RUN_VALUES // source.shape[-1])
    whole = file.read_rows(source, 0, source.row_count)[plan.row_order()] if plan.permuted_heads else None
    for start in range(0, source.row_count, step):
        count = min(step, source.row_count - start)
        yield start, file.read_rows(source, start, count) if whole is None else whole[start : start + count]


def _dense(rows: NDArray[np.uint8], plan: TensorPlan) -> NDArray[Any]:
    if not plan.shift:
        return rows
    return blocks.dequantize(rows, plan.source.kind) + np.float32(plan.shift)


def _check_finite(values: NDArray[Any], plan: TensorPlan) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise SourceInvalidError(
            f"The GGUF file is corrupt: tensor {plan.source.name} has a scale that is not a number."
        )


def _write_tensor(file: GGUFFile, writer: ShardWriter, plan: TensorPlan) -> None:
    name = f"{plan.path}.{plan.parameter}"
    for start, rows in _runs(file, plan):
        if plan.source.kind in _DENSE:
            data = _dense(rows, plan)
            writer.write(name, start * data.nbytes // len(rows), data)
            continue
        packed = blocks.pack(rows, plan.source.kind)
        for suffix, part in (("scales", packed.scales), ("biases", packed.biases)):
            if part is not None:
                _check_finite(part, plan)
                writer.write(f"{plan.path}.{suffix}", start * part.nbytes // len(part), part)
        writer.write(name, start * packed.weight.nbytes // len(rows), packed.weight)


def _quantization(plans: list[TensorPlan]) -> dict[str, Any] | None:
    """config.json's "quantization" as mlx_lm.utils.load_model reads it: a default, and each module's own."""
    modules: dict[str, dict[str, Any]] = {}
    for plan in plans:
        layout = blocks.layout(plan.source.kind)
        if layout is not None:
            modules[plan.path] = {"group_size": blocks.GROUP_SIZE, "bits": layout.bits, "mode": layout.mode}
    if not modules:
        return None
    common, _ = Counter(tuple(module.values()) for module in modules.values()).most_common(1)[0]
    return {**dict(zip(("group_size", "bits", "mode"), common, strict=True)), **modules}


def _file_type(file: GGUFFile) -> str:
    """The name behind "general.file_type", or "" where there is none."""
    number = file.metadata.get("general.file_type")
    known = {kind.value: kind.name for kind in LlamaFileType if kind is not LlamaFileType.GUESSED}
    name = known.get(number, "") if isinstance(number, int) else ""
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _dtype(plans: list[TensorPlan]) -> str:
    """The dtype to compute in where memory matters, as Hugging Face's "dtype".

    A file of F32 or F16 weights says it itself. Behind quantized weights and F32 norms there was, for
    the architectures here, a model trained in bfloat16, whose range float16 does not have.
    """
    kinds = {plan.source.kind for plan in plans if plan.may_be_quantized}
    if kinds == {GGMLQuantizationType.F32}:
        return "float32"
    return "float16" if kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16} else "bfloat16"


def _origin(file: GGUFFile, plans: list[TensorPlan], name: str) -> dict[str, Any]:
    """config.json's "osaurus": what the file was, for the catalog.

    "quantization" is the file's own name for its mixture of formats, such as "Q4_K_M", or where it has
    none the format that holds most of the values.
    """
    values: Counter[str] = Counter()
    for plan in plans:
        values[plan.source.kind.name] += int(np.prod(plan.source.shape, dtype=object))
    origin = {
        "format": "gguf",
        "quantization": _file_type(file) or values.most_common(1)[0][0],
        "parameter_count": values.total(),
        "is_exact": all(
            layout.is_exact for plan in plans if (layout := blocks.layout(plan.source.kind)) is not None
        ),
    }
    return {**origin, "name": name} if name else origin


def _token_ids(vocabulary: Vocabulary) -> dict[str, Any]:
    ids: dict[str, Any] = {"bos_token_id": vocabulary.bos, "pad_token_id": vocabulary.pad}
    ids["eos_token_id"] = vocabulary.ends or None
    return {key: value for key, value in ids.items() if value is not None}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _convert(file: GGUFFile, target: Path, report: Callable[[ConvertProgress], None], name: str) -> None:
    gguf_name, architecture = architecture_of(file)
    settings = Settings(file.metadata, gguf_name)
    dims = dimensions(file, settings, is_mixture=architecture.is_mixture)
    plans = plan_tensors(file.tensors, architecture, dims)
    groups = [_stored(plan) for plan in plans]
    config = model_config(file, settings, architecture, dims)
    vocabulary = read_vocabulary(file.metadata)
    if len(vocabulary.tokens) > dims.vocabulary:
        raise SourceInvalidError("The GGUF file is corrupt: it has more tokens than embeddings.")
    build_tokenizer(vocabulary).save(str(target / "tokenizer.json"))
    _write_json(
        target / "tokenizer_config.json", tokenizer_config(vocabulary, config["max_position_embeddings"])
    )
    total = sum(plan.source.size_bytes for plan in plans)
    done = 0
    with ShardWriter(target, groups) as writer:
        for plan in plans:
            report(ConvertProgress("converting", plan.source.name, done, total))
            _write_tensor(file, writer, plan)
            done += plan.source.size_bytes
    config.update(_token_ids(vocabulary))
    config["quantization"] = _quantization(plans)
    config["dtype"] = _dtype(plans)
    config["osaurus"] = _origin(file, plans, name)
    _write_json(target / "config.json", {key: value for key, value in config.items() if value is not None})
    _write_json(target / "generation_config.json", _token_ids(vocabulary))
    report(ConvertProgress("converted", "", total, total))


def convert(
    source: Path,
    target: Path,
    *,
    report: Callable[[ConvertProgress], None] | None = None,
    name: str = "",
) -> None:
    """Reads one GGUF file and writes an MLX model folder that mlx_lm loads.

    Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and the weights:
    model.safetensors, or shards with model.safetensors.index.json. config.json is written last but
    one, so a folder without it is an unfinished one.

    Args:
        source: The GGUF file.
        target: An existing empty folder.
        report: Called before every tensor and at the end, in the calling thread; what it raises ends
            the conversion.
        name: Kept in config.json as osaurus.name, where given.

    Raises:
        SourceInvalidError: The file is no GGUF file, is cut off or corrupt, or holds an architecture, a
            tokenizer or a block format that cannot be converted; the text names it.
        DiskFullError: There is no room for the result.
    """
    try:
        with GGUFFile(source) as file:
            _convert(file, target, report or (lambda _: None), name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError("The disk is full: there is no room for the converted model.") from None
        raise
