"""Small model folders, whole in every respect but their weights' meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

CONFIG: dict[str, Any] = {"model_type": "llama", "hidden_size": 8, "max_position_embeddings": 64}
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def tensors(rows: int = 4) -> dict[str, NDArray[Any]]:
    values = np.arange(rows * 8, dtype=np.float32).reshape(rows, 8)
    return {"model.embed_tokens.weight": values, "model.norm.weight": np.ones(8, dtype=np.float32)}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def write_model(
    path: Path,
    *,
    config: Mapping[str, Any] = CONFIG,
    weights: Mapping[str, NDArray[Any]] | None = None,
    template: str | None = CHAT_TEMPLATE,
    shards: int = 1,
) -> Path:
    """Write a model folder; with several shards, one tensor goes into each, and an index beside them."""
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", dict(config))
    Tokenizer(WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]")).save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", {"chat_template": template} if template is not None else {})
    values = dict(weights if weights is not None else tensors())
    if shards == 1:
        save_file(values, path / "model.safetensors")
        return path
    weight_map = {}
    for number, (name, tensor) in enumerate(values.items(), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensor}, path / file)
        weight_map[name] = file
    write_json(path / "model.safetensors.index.json", {"weight_map": weight_map})
    return path


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
