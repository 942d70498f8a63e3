"""What the benchmarks run on: the default model, and prompts that no cache has seen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
_FLOAT32 = f"{MODEL}-float32"

_SUBJECTS = (
    "a dragon who is afraid of the dark", "two sailors on a frozen sea", "a robot that learns to paint",
    "the last library on Earth", "a baker who talks to bread", "a lighthouse without a keeper",
    "a train that never stops", "a garden under the ocean", "a king who lost his name",
    "a clock that runs backwards", "a fox in the big city", "the first winter on Mars",
    "an island that moves", "a violin made of glass", "a mountain that hums", "a letter from the moon",
)  # fmt: skip


def prompts(count: int, turn: int) -> list[str]:
    """So many prompts of about 40 tokens with the chat template; other ones each turn."""
    return [
        f"Draft {turn * count + i}: write a long story about {_SUBJECTS[i % len(_SUBJECTS)]}."
        for i in range(count)
    ]


def token_ids(model_path: Path, texts: list[str]) -> list[list[int]]:
    """The prompts as the chat template gives them to the model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]


def stock_environment() -> dict[str, str]:
    """This process's environment for mlx-lm by itself: with the same BLAS, without our own products."""
    return {**os.environ, "OSAURUS_NATIVE_KERNELS": "0"}


def default_models_dir() -> Path:
    """Where the tests keep the default model; fetched on first use."""
    from osaurus_grpc.models.sources import fetch

    models_dir = Path("~/.cache/osaurus-tests/models").expanduser()
    models_dir.mkdir(parents=True, exist_ok=True)
    fetch(MODEL, models_dir, report=lambda progress: None)
    return models_dir


def float32_copy(models_dir: Path) -> Path:
    """The default model's folder in float32, for servers that do not dequantize by themselves.

    On a CPU every server here holds float32 weights; MLX's quantized kernels are slow there.
    """
    target = models_dir.parent / "benchmarks" / _FLOAT32
    if (target / "model.safetensors").exists():
        return target
    import shutil

    from mlx.utils import tree_flatten

    from osaurus_grpc.models.platform import mx
    from tests.benchmarks.baseline import load

    source = models_dir / MODEL
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix in {".json", ".jinja"} and not path.name.endswith(".index.json"):
            shutil.copy2(path, target / path.name)
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    (target / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(target / "model.safetensors"),
        dict(tree_flatten(load(source).parameters())),
        metadata={"format": "mlx"},
    )
    return target
