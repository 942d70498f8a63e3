"""Looking into one model folder: is it whole, and what files does it hold.

A model folder is what mlx-lm loads: config.json, model*.safetensors (with all shards that an index
names) and a tokenizer, all directly inside. Symbolic links are followed, as the Hugging Face cache
is made of them.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from osaurus_grpc.models.weights import DamagedWeightsError, WeightsHeader, read_header

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
# Where sentence-transformers' layout says how an embedding model pools.
POOLING_FILE = "1_Pooling/config.json"
# Larger JSON than this is no configuration; tokenizers are not read here.
MAX_JSON_BYTES = 64 * 2**20

_WEIGHTS_FILE = re.compile(r"model[\w.+-]*\.safetensors")
_SHARD_FILE = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
_TOKENIZER_FILES = (
    frozenset({"tokenizer.json"}),
    frozenset({"tokenizer.model"}),
    frozenset({"vocab.json", "merges.txt"}),
    frozenset({"vocab.txt"}),
    frozenset({"spiece.model"}),
    frozenset({"sentencepiece.bpe.model"}),
    frozenset({"tiktoken.model"}),
    frozenset({"tekken.json"}),
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class IncompleteModelError(ValueError):
    """A folder is not a whole model. The text says what is missing, without paths."""


class FileStat(NamedTuple):
    """One file directly in a model folder; a link counts as what it points to.

    A tuple, since every listing makes and compares one for each file.

    Attributes:
        name: Its name.
        size: Bytes.
        mtime_ns: Modification time in nanoseconds.
        inode: Tells a replaced file from the one before.
    """

    name: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A whole model folder.

    Attributes:
        path: Where it is.
        files: All regular files directly inside, sorted by name.
        config: config.json.
        weights: Headers of the weights files by file name.
    """

    path: Path
    files: tuple[FileStat, ...]
    config: Mapping[str, object]
    weights: Mapping[str, WeightsHeader]


def is_weights(name: str) -> bool:
    """Whether mlx-lm loads a file of this name as weights."""
    return bool(_WEIGHTS_FILE.fullmatch(name))


def is_pickle(name: str) -> bool:
    """Whether a file of this name is, most likely, of a format that can run code when it is opened."""
    return name.endswith(_PICKLE_SUFFIXES)


def list_files(path: Path | str) -> tuple[FileStat, ...]:
    """The regular files directly in a folder, sorted by name; what vanishes meanwhile is left out.

    Raises:
        OSError: The folder itself cannot be read.
    """
    found = []
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                status = entry.stat()
            except OSError:
                continue  # a dangling link, or deleted just now
            if stat.S_ISREG(status.st_mode):
                found.append(FileStat(entry.name, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(sorted(found))


def inspect(path: Path, files: tuple[FileStat, ...] | None = None) -> ModelFolder:
    """Look into a folder.

    Args:
        path: The folder.
        files: What list_files() said, where the caller has it already.

    Raises:
        IncompleteModelError: It is not a whole model.
    """
    try:
        listed = list_files(path) if files is None else files
        names = {file.name for file in listed}
        if CONFIG_FILE not in names:
            raise IncompleteModelError("it has no config.json")
        config = read_json_object(path / CONFIG_FILE)
        if not architecture(config):
            raise IncompleteModelError("its config.json names no model_type")
        weights_files = _weights_files(path, names)
        if not any(group <= names for group in _TOKENIZER_FILES):
            raise IncompleteModelError(
                "it has no tokenizer (tokenizer.json, tokenizer.model or vocab.json with merges.txt)"
            )
        weights = {name: read_header(path / name) for name in weights_files}
    except OSError as error:
        raise IncompleteModelError("a file of it cannot be read") from error
    except DamagedWeightsError as error:
        raise IncompleteModelError(str(error)) from error
    return ModelFolder(path=path, files=listed, config=config, weights=weights)


def architecture(config: Mapping[str, object]) -> str:
    """The model type of a config.json, or ""."""
    model_type = config.get("model_type")
    return model_type if isinstance(model_type, str) else ""


def read_json_object(path: Path) -> dict[str, object]:
    """Read a JSON file that holds an object.

    Raises:
        IncompleteModelError: It does not.
        OSError: It cannot be read.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise IncompleteModelError(f"its {path.name} is too large")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IncompleteModelError(f"its {path.name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise IncompleteModelError(f"its {path.name} is not a JSON object")
    return value


def _weights_files(path: Path, names: set[str]) -> list[str]:
    """The weights files that mlx-lm will load, all shards there."""
    present = sorted(name for name in names if is_weights(name))
    if not present:
        raise IncompleteModelError(_without_weights(names))
    wanted = _indexed_shards(path) if INDEX_FILE in names else _numbered_shards(present)
    missing = sorted(wanted - names)
    if missing:
        raise IncompleteModelError(f"{len(missing)} of its {len(wanted)} weights files are missing")
    return present


def _without_weights(names: set[str]) -> str:
    """Why a folder without model*.safetensors is no use."""
    if any(name.endswith(".safetensors") for name in names):
        return "its weights files are not named model*.safetensors"
    if any(is_pickle(name) for name in names):
        return "its weights are pickles only, which can run code when they are opened; safetensors are needed"
    return "it has no weights (model*.safetensors)"


def _indexed_shards(path: Path) -> set[str]:
    weight_map = read_json_object(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise IncompleteModelError(f"its {INDEX_FILE} has no weight_map")
    return {str(shard) for shard in weight_map.values()}


def _numbered_shards(present: list[str]) -> set[str]:
    """The shards that file names such as model-00001-of-00003.safetensors promise."""
    wanted = set(present)
    for name in present:
        if numbered := _SHARD_FILE.fullmatch(name):
            digits, count = len(numbered["number"]), min(int(numbered["count"]), 10_000)
            wanted |= {
                f"{numbered['stem']}-{number:0{digits}d}-of-{numbered['count']}.safetensors"
                for number in range(1, count + 1)
            }
    return wanted
