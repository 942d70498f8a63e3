"""Lists without repetition, where the values of their items are listed: each order of each choice of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import permutations
from typing import Final

from osaurus_grpc.chat.schema_keywords import UNENFORCED, Schema, asserting_keywords
from osaurus_grpc.chat.schema_overlap import canonical, is_of_type, listed_values

# All orders of five values are 326 lists; compiling takes a tenth of a millisecond for each.
MAX_LISTS: Final = 400
# Characters of all lists together, about: each has most of the values.
_MAX_CHARACTERS: Final = 200_000
_KEYWORDS: Final = frozenset({"type", "items", "minItems", "maxItems", "uniqueItems"})


def unique_lists(node: Schema, items: object) -> list[Sequence[object]] | None:
    """All lists that a schema with uniqueItems admits.

    Args:
        node: The schema, of lists and nothing else.
        items: What it says of items, references followed.

    Returns:
        The lists; None where they are too many, or cannot be told.
    """
    values = _distinct(items)
    least, most = node.get("minItems", 0), node.get("maxItems", math.inf)
    if values is None or not all(_is_count(bound) for bound in (least, most)):
        return None
    if node.get("type") not in ("array", ["array"]) or _says(node) - _KEYWORDS:
        return None
    lengths = [length for length in range(len(values) + 1) if least <= length <= most]
    count = sum(math.perm(len(values), length) for length in lengths)
    if count > MAX_LISTS or count * len(json.dumps(values)) > _MAX_CHARACTERS:
        return None
    return [chosen for length in lengths for chosen in permutations(values, length)] or None


def _says(node: Schema) -> set[str]:
    """The keywords that say something about values, also those that are not enforced."""
    return asserting_keywords(node) | UNENFORCED & node.keys()


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _distinct(items: object) -> list[object] | None:
    """The values that a schema of items lists, each once; None where it says anything else."""
    values = listed_values(items)
    if values is None or not isinstance(items, dict) or _says(items) - {"enum", "const"}:
        return None
    if not all(is_of_type(value, items) for value in values):
        return None
    return list({canonical(value): value for value in values}.values())
