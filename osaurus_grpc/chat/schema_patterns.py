r"""Regular expressions of schemas in words that mean the same to the grammar library and to validators.

The library (llguidance 1.9) reads a class that has all control characters as one that has the quotation
mark and the backslash as well, since a JSON string escapes all of these: [^"] would admit what it excludes.
Such classes lose U+0000. And ECMA-262, by which JSON schema goes, Python and the library do not agree on
what \W, \D, \S and the dot are: of these remains what all three admit, in negated classes too.

The library has classes inside of classes, and operators between them ([a&&b], [a--b], [a~~b]), and takes all
hyphens at a class's beginning for themselves. For the others these are the characters that they look like.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_NUL: Final = r"[\x00]"
_SEVERAL: Final = (
    r"|\\P(?P<property>\{[^}]{1,64}\}|.)"
    r"|(?P<lowest>\\(?:x00|u0000))-"
    r"|\\(?P<letter>[WDSwd])"
    r"|\\."
)
_OUTSIDE: Final = re.compile(
    r"(?P<open>\[(?P<negated>\^)?(?:(?P<hyphen>-(?=-))|(?:-|\])?(?P<done>\[\\x00\])?))|(?P<dot>\.)"
    + _SEVERAL,
    re.DOTALL,
)
_INSIDE: Final = re.compile(
    r"(?P<done>\[\^\[\\x00\])|(?P<close>\])|(?P<literal>\[|(?P<operator>[&~-])(?P=operator))" + _SEVERAL,
    re.DOTALL,
)
_NARROWER: Final = {
    "W": rf"[^{_NUL}\p{{L}}\p{{M}}\p{{N}}\p{{Pc}}]",
    "D": rf"[^{_NUL}\p{{Nd}}]",
    "S": rf"[^{_NUL}\s\x1c-\x1f\x{{feff}}]",
    ".": rf"[^{_NUL}\n\r]",
}
# What any of the three admits: what a negated class has less of.
_WIDER: Final = {
    "W": rf"[^{_NUL}a-zA-Z0-9_]",
    "D": rf"[^{_NUL}0-9]",
    "S": rf"[^{_NUL} \t\n\r\x0b\x0c]",
    "w": r"\p{Alphabetic}\p{M}\p{N}\p{Pc}",
    "d": r"\p{Nd}",
}


def enforceable(pattern: str, *, narrow: bool) -> str:
    """The same regular expression, without what the library would read otherwise than it is meant.

    Args:
        pattern: The expression.
        narrow: Leave out what readers disagree about, too. Not for names of properties: to those that an
            expression does not match other keywords apply.
    """
    depth = 0
    letters: Mapping[str, str] = _NARROWER
    parts: list[str] = []
    end = 0
    while found := (_INSIDE if depth else _OUTSIDE).search(pattern, end):
        named = found.groupdict()
        if named.get("open"):
            letters = _WIDER if named["negated"] else _NARROWER
        parts += [pattern[end : found.start()], _written(named, found[0], letters if narrow else {})]
        end = found.end()
        depth += bool(named.get("open") or named.get("done")) - bool(named.get("close"))
        if not depth:
            letters = _NARROWER
    return "".join([*parts, pattern[end:]])


def _written(named: Mapping[str, str | None], text: str, letters: Mapping[str, str]) -> str:
    """One token for the library; the letters are those that are written otherwise."""
    if named.get("open"):
        if named["hyphen"]:
            # What follows the first may be a range from it.
            return f"[^{_NUL}\\-" if named["negated"] else "[\\-"
        return text if named["done"] or not named["negated"] else f"{text}{_NUL}"
    if named.get("literal"):
        return f"\\{text}" if text == "[" else f"{text[0]}\\{text[1]}"
    if named["property"]:
        return rf"[^{_NUL}\p{named['property']}]"
    if named["lowest"]:
        return r"\x01-" if "dot" not in named else text
    return letters.get(named["letter"] or named.get("dot") or "", text)
