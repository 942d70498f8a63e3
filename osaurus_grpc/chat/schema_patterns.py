r"""Regular expressions of schemas in words that mean the same to the grammar library and to validators.

The library (llguidance 1.9) reads a class that has all control characters as one that has the quotation
mark and the backslash as well, since a JSON string escapes all of these: [^"] would admit what it excludes.
Such classes lose U+0000. And ECMA-262, by which JSON schema goes, Python and the library do not agree on
what \W, \D, \S and the dot are: of these remains what all three admit.
"""

from __future__ import annotations

import re
from typing import Final

_NUL: Final = r"[\x00]"
_TOKEN: Final = re.compile(
    r"(?P<open>\[(?P<negated>\^)?(?:-+|\])?(?P<done>\[\\x00\])?)"
    r"|(?P<close>\])"
    r"|\\P(?P<property>\{[^}]*\}|.)"
    r"|(?P<lowest>\\(?:x00|u0000))-"
    r"|\\(?P<letter>[WDS])"
    r"|(?P<dot>\.)"
    r"|\\.",
    re.DOTALL,
)
_NARROWER: Final = {
    "W": rf"[^{_NUL}\p{{L}}\p{{M}}\p{{N}}\p{{Pc}}]",
    "D": rf"[^{_NUL}\p{{Nd}}]",
    "S": rf"[^{_NUL}\s\x1c-\x1f\x{{feff}}]",
    ".": rf"[^{_NUL}\n\r]",
}


def enforceable(pattern: str, *, narrow: bool) -> str:
    """The same regular expression, without what the library would read otherwise than it is meant.

    Args:
        pattern: The expression.
        narrow: Leave out what readers disagree about, too. Not for names of properties: to those that an
            expression does not match other keywords apply.
    """
    depth = 0
    parts: list[str] = []
    end = 0
    for found in _TOKEN.finditer(pattern):
        parts += [pattern[end : found.start()], _written(found, narrow=narrow, is_inside=depth > 0)]
        end = found.end()
        depth += bool(found["open"]) - bool(found["close"] and depth)
    return "".join([*parts, pattern[end:]])


def _written(found: re.Match[str], *, narrow: bool, is_inside: bool) -> str:
    if found["open"]:
        return found[0] if found["done"] or not found["negated"] else f"{found[0]}{_NUL}"
    if found["property"]:
        return rf"[^{_NUL}\p{found['property']}]"
    if found["lowest"]:
        return r"\x01-" if is_inside else found[0]
    letter = found["letter"] or (found["dot"] if not is_inside else None)
    return _NARROWER[letter] if letter and narrow else found[0]
