"""The architectures whose images are understood, and whether what they need is installed.

Listed are those whose language part fits the shared batch: it attends to the past only, images
included, keeps plain KV caches, and takes embeddings in place of token ids. Of others mlx-lm may
still serve the text.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Final

INSTALL_HINT: Final = "pip install 'osaurus[vision]'"


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        processor: mlx-vlm's class that prepares its images, as module and name.
        has_grid_positions: Its image tokens have a row and a column for a position (M-RoPE,
            arXiv:2409.12191).
    """

    processor: tuple[str, str]
    has_grid_positions: bool = False

    def processor_class(self) -> Any:
        """The class; imports mlx-vlm."""
        module, name = self.processor
        return getattr(importlib.import_module(f"mlx_vlm.models.{module}"), name)


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "idefics3": Family(("idefics3.processing_idefics3", "Idefics3Processor")),
        "smolvlm": Family(("smolvlm.processing_smolvlm", "SmolVLMProcessor")),
        "llava": Family(("llava.processing_llava", "LlavaProcessor")),
        "qwen2_vl": Family(("qwen2_vl.processing_qwen2_vl", "Qwen2VLProcessor"), has_grid_positions=True),
        "qwen2_5_vl": Family(
            ("qwen2_5_vl.processing_qwen2_5_vl", "Qwen2_5_VLProcessor"), has_grid_positions=True
        ),
        "qwen3_vl": Family(("qwen3_vl.processing_qwen3_vl", "Qwen3VLProcessor"), has_grid_positions=True),
    }
)


def family_of(config: Mapping[str, object]) -> Family | None:
    """The family of a model that has eyes, by its config.json."""
    architecture = config.get("model_type")
    has_vision = isinstance(config.get("vision_config"), dict)
    return FAMILIES.get(architecture) if has_vision and isinstance(architecture, str) else None


def is_missing_for(architecture: str) -> bool:
    """Whether a model's images would be understood if only mlx-vlm were there."""
    return architecture in FAMILIES and not is_installed()


@cache
def is_installed() -> bool:
    """Whether mlx-vlm is there; it is not imported."""
    return importlib.util.find_spec("mlx_vlm") is not None
