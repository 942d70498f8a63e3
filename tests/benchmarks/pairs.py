"""Pairs of a model and a draft model with one tokenizer, made of the default model.

No small family of real models is at hand wherever the benchmarks run, so cost and agreement are made
to measure. A deep model has layers in between that change nothing: their output projections are zero,
and it says word for word what the default model says, for a multiple of its cost. A shallow one lacks
some layers, and agrees the less with the default model the more it lacks.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.subjects import MODEL, default_models_dir

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_OUTPUTS = ("self_attn.o_proj.", "mlp.down_proj.")


def models_dir() -> Path:
    """A models directory with the default model, and the place for those made of it."""
    source = default_models_dir() / MODEL
    target = source.parents[1] / "benchmarks" / "pairs"
    if not (target / MODEL / "config.json").exists():
        shutil.copytree(source, target / MODEL, copy_function=os.link)
    return target


def deep(times: int) -> str:
    """A model that costs about so many times what the default model does; returns its name."""
    layers = _layers()
    # A layer and those that do nothing behind it, made of the same weights.
    order = [(layer, place > 0) for layer in range(layers) for place in range(times)]
    return _write(f"{MODEL}-deep-{times}", order)


def shallow(first: int, count: int) -> str:
    """The default model without some neighbouring layers; returns its name."""
    order = [(layer, False) for layer in range(_layers()) if not first <= layer < first + count]
    return _write(f"{MODEL}-without-{first}-{first + count - 1}", order)


def _layers() -> int:
    return int(json.loads((models_dir() / MODEL / "config.json").read_text())["num_hidden_layers"])


def _write(name: str, order: Sequence[tuple[int, bool]]) -> str:
    """A model of these layers of the default model, in order; idle ones change nothing."""
    source, target = models_dir() / MODEL, models_dir() / name
    if (target / "model.safetensors").exists():
        return name
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.name not in {"config.json", "model.safetensors"} and not (target / path.name).exists():
            os.link(path, target / path.name)
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = len(order)
    if "quantization" in config:
        config["quantization"] = _renumbered(config["quantization"], order)
    (target / "config.json").write_text(json.dumps(config))
    weights = mx.load(str(source / "model.safetensors"))
    made = _renumbered(weights, order)
    for number, (_, is_idle) in enumerate(order):
        for key in [key for key in made if is_idle and key.startswith(f"model.layers.{number}.")]:
            if any(part in key for part in _OUTPUTS) and not key.endswith(".weight"):
                made[key] = mx.zeros_like(made[key])  # scales and biases: all weights are zero
    mx.save_safetensors(str(target / "model.safetensors"), made, metadata={"format": "mlx"})
    return name


def _renumbered(table: dict[str, Any], order: Sequence[tuple[int, bool]]) -> dict[str, Any]:
    """What a table says of layers, under their new numbers."""
    kept = {key: value for key, value in table.items() if not _LAYER.match(key)}
    by_layer: dict[int, dict[str, Any]] = {}
    for key, value in table.items():
        if found := _LAYER.match(key):
            by_layer.setdefault(int(found[1]), {})[key[found.end() :]] = value
    for number, (layer, _) in enumerate(order):
        kept |= {f"model.layers.{number}.{key}": value for key, value in by_layer.get(layer, {}).items()}
    return kept
