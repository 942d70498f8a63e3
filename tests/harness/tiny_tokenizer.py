"""A real tokenizer cut down to its most frequent tokens.

Reading a vocabulary of 49,152 tokens, and taking it in for grammars, costs more than all else that a
core does with a tiny model. Merges are in the order of their tokens, so that a beginning of them is a
whole tokenizer: every text has tokens still, and common words have one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 8_192


def shortened(folder: Path, size: int = VOCABULARY) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE tokenizer, with the tokens below an id only."""
    tokenizer: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    vocabulary = {piece: token_id for piece, token_id in model["vocab"].items() if token_id < size}
    assert all(token["id"] < size for token in tokenizer["added_tokens"])
    model["vocab"] = vocabulary
    model["merges"] = [merge for merge in model["merges"] if "".join(_parts(merge)) in vocabulary]
    assert all(part in vocabulary for merge in model["merges"] for part in _parts(merge))
    return tokenizer


def _parts(merge: list[str] | str) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge
