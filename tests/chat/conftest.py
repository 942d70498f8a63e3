from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer(smollm_dir: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's own: byte-level BPE. Tests leave it as it is."""
    folder = smollm_dir / "smollm2-135m-instruct"
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded
