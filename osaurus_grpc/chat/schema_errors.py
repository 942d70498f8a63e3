"""Which keyword of a schema the grammar library refuses; its own messages do not say where it stands.

Found by trial: the innermost schema that is refused by itself, and in it the first keyword without
which it is not.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from osaurus_grpc.errors import InvalidRequestError

# Each takes about as long as compiling the part that is tried, so there is also a budget of CPU time.
_MAX_TRIALS: Final = 100
_MAX_CPU_SECONDS: Final = 0.3
_MAX_REASON_CHARACTERS: Final = 200
_SHARED: Final = ("$defs", "x-guidance")

Schema = dict[str, Any]


# What the library says, and what it means to somebody who has never heard of the library.
_MEANINGS: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(pattern, re.MULTILINE), meaning)
    for pattern, meaning in (
        (r"^error: (.+)$", r"the expression is not understood: \1"),
        (r"lookarounds not supported", "the expression has an anchor or a word boundary where none can be"),
        (r"Unable to determine if regex is empty", "its expressions are too much work together"),
        (r"Failed to generate regex for \w+ range", "the bounds are too large or too small numbers"),
        (r"circular references", "it refers to itself beside other keywords"),
        (r"Unsatisfiable schema: Regex is empty", "no text satisfies it"),
        (r"Unsatisfiable schema: range \[.*\] does not contain a (.*)", r"no value in the range is a \1"),
        (r"Unsatisfiable schema: (.*)", r"nothing satisfies it: \1"),
        (r"too (?:large|big)|panic|lexer precomputation failed|too complex|fuel", "it is too large"),
    )
)


def plain_reason(reason: str) -> str:
    """What a compiler's message means, in a sentence; it speaks of what the client sent."""
    for pattern, meaning in _MEANINGS:
        if found := pattern.search(reason):
            return _sentence(found.expand(meaning))
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return _sentence(lines[0] if lines else "the reason is unknown")


def _sentence(text: str) -> str:
    """Shortened, and ended by a full stop."""
    if len(text) > _MAX_REASON_CHARACTERS:
        return f"{text[:_MAX_REASON_CHARACTERS]}…"
    return f"{text.rstrip('.')}."


def raise_for(prepared: str, reason_of: Callable[[str], str], field: str) -> None:
    """Refuse a schema by the keyword that is at fault.

    Args:
        prepared: As schema.prepared() gives it.
        reason_of: Compiles a schema; returns why that fails, or "".
        field: Path of the request field that holds it.

    Raises:
        InvalidRequestError: The culprit was found. Returns where it was not.
    """
    found = _Search(json.loads(prepared), reason_of).culprit()
    if found is not None:
        keyword, path, reason = found
        raise InvalidRequestError(
            f'The schema\'s "{keyword}" at {path} cannot be enforced: {plain_reason(reason)}',
            field=field,
            metadata={"keyword": keyword, "path": path},
        )


class _Search:
    def __init__(self, root: Schema, reason_of: Callable[[str], str]) -> None:
        self._root = root
        self._reason_of = reason_of
        self._trials = 0
        self._last = time.thread_time() + _MAX_CPU_SECONDS

    def culprit(self) -> tuple[str, str, str] | None:
        """Its keyword, its path, and what the library says of it."""
        node, path, reason = self._root, "#", self._reason(self._root)
        if not reason:
            return None
        is_inner = True
        while is_inner:
            is_inner = False
            for child, child_path in _children(node, path):
                if child_reason := self._reason(child):
                    node, path, reason, is_inner = child, child_path, child_reason, True
                    break
        # Without its type nearly any schema is sound: that is the last to be suspected.
        keywords = sorted(
            (key for key in node if key not in _SHARED and key != "$comment"), key=lambda key: key == "type"
        )
        for keyword in keywords:
            rest = {key: value for key, value in node.items() if key != keyword}
            if not self._reason(rest) and not self._is_spent:
                return keyword, f"{path}/{keyword}", reason
        # More than one is at fault: the last of them in this order.
        rest = dict(node)
        for keyword in keywords:
            del rest[keyword]
            if not self._reason(rest) and not self._is_spent:
                return keyword, f"{path}/{keyword}", reason
        if not self._is_spent:
            return None
        # What takes so long is large, and most likely where most is said.
        longest = max((key for key in node if key not in _SHARED), key=lambda key: len(str(node[key])))
        return longest, f"{path}/{longest}", reason

    @property
    def _is_spent(self) -> bool:
        return self._trials > _MAX_TRIALS or time.thread_time() > self._last

    def _reason(self, part: Schema) -> str:
        self._trials += 1
        if self._trials > 1 and self._is_spent:
            return ""
        shared = {key: self._root[key] for key in _SHARED if key in self._root}
        return self._reason_of(json.dumps({**part, **shared}, ensure_ascii=False))


def _children(node: Schema, path: str) -> Iterator[tuple[Schema, str]]:
    """The schemas inside a schema, definitions by where they stood in the original."""
    # Definitions first: what refers to a bad one is refused as well.
    for keyword, value in sorted(node.items(), key=lambda item: item[0] != "$defs"):
        match keyword:
            case "properties" | "patternProperties" | "$defs":
                named = value.items()
            case "prefixItems" | "anyOf" | "oneOf" | "allOf":
                named = enumerate(value)
            case "items" | "additionalProperties":
                named = [("", value)]
            case _:
                continue
        for name, child in named:
            if isinstance(child, dict):
                inner = f"{path}/{keyword}/{name}".removesuffix("/")
                yield child, child.get("$comment", inner) if keyword == "$defs" else inner
