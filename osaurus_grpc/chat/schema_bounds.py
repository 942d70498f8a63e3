"""Bounds of what a schema may ask of the grammar library, where the library has none itself.

It intersects the string constraints that meet in one value, and the work of that doubles with each; it
multiplies the alternatives that meet others, or properties; it compares all properties of an object that
need not be there, and all that are required and not declared. Nothing ends that work once it is begun, so
it is estimated before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Never

from osaurus_grpc.errors import InvalidRequestError

# Twelve take a hundredth of a second, twenty take four seconds.
MAX_MEETINGS: Final = 12
# Each of these takes about a half of a second.
MAX_PRODUCT: Final = 8_000
MAX_OPTIONAL_SQUARED: Final = 2_000**2
MAX_PATTERNS_SQUARED: Final = 120**2
MAX_UNDECLARED_SQUARED: Final = 4_000**2

_OF_STRINGS: Final = ("pattern", "minLength", "maxLength")
_DEFINITIONS: Final = "#/$defs/"

Schema = dict[str, Any]


class _Weight(NamedTuple):
    """What a schema brings to a meeting: at most so much in one value."""

    strings: int = 0
    alternatives: int = 1
    properties: int = 0


def require_bounded(root: Schema, field: str) -> None:
    """Refuse a schema whose compiling would be too much work.

    Args:
        root: As rewritten for the library: references lead to its definitions, and nowhere else.
        field: Path of the request field that holds it, for errors.

    Raises:
        InvalidRequestError: Names the keyword that asks for too much.
    """
    definitions: Schema = root.get("$defs", {})
    weighing = _Weighing(field)
    for name in _inner_first(root, definitions):
        definition = definitions[name]
        path = str(definition.get("$comment", "")) if isinstance(definition, dict) else ""
        weighing.known[name] = weighing.weight(definition, path or f"{_DEFINITIONS}{name}")
    weighing.weight({key: value for key, value in root.items() if key != "$defs"}, "#")


class _Weighing:
    """Weighs schemas one after the other.

    Attributes:
        known: The weights of definitions. In a circle, what comes round again weighs nothing: it is the
            library's to refuse.
    """

    def __init__(self, field: str) -> None:
        self.known: dict[str, _Weight] = {}
        self._field = field
        self._optional_squared = 0
        self._patterns_squared = 0
        self._undeclared_squared = 0

    def weight(self, node: object, path: str) -> _Weight:
        """The weight of a schema; raises InvalidRequestError where it is too large."""
        if not isinstance(node, dict):
            return _Weight()
        self._count_squares(node, path)
        inside = [self.weight(child, f"{path}/{where}") for child, where in _inner(node)]
        # Which of two objects' properties meet is not looked at: any two may.
        own = sum(key in node for key in _OF_STRINGS)
        strings = max(own, max((weight.strings for weight in inside), default=0))
        meeting = [_Weight(strings, 1, len(node.get("properties", ())))]
        for key in ("anyOf", "oneOf"):
            if key in node:
                weights = [self.weight(child, f"{path}/{key}/{i}") for i, child in enumerate(node[key])]
                meeting.append(
                    _Weight(
                        max(weight.strings for weight in weights),
                        sum(weight.alternatives for weight in weights),
                        max(weight.properties for weight in weights),
                    )
                )
        meeting += [self.weight(child, f"{path}/allOf/{i}") for i, child in enumerate(node.get("allOf", ()))]
        if isinstance(reference := node.get("$ref"), str):
            meeting.append(self.known.get(reference.removeprefix(_DEFINITIONS), _Weight()))
        return self._met(meeting, node, path)

    def _met(self, meeting: list[_Weight], node: Schema, path: str) -> _Weight:
        strings = sum(weight.strings for weight in meeting)
        properties = sum(weight.properties for weight in meeting)
        alternatives = 1
        for weight in meeting:
            # Beyond the bound it does not matter how far.
            alternatives = min(alternatives * weight.alternatives, MAX_PRODUCT + 1)
        keyword = next((key for key in ("allOf", "anyOf", "oneOf", "$ref") if key in node), "pattern")
        if strings > MAX_MEETINGS:
            why = f"more than {MAX_MEETINGS} patterns, formats and lengths could meet in one value."
            self._refuse(keyword, path, why)
        several = sum(weight != _Weight() for weight in meeting) > 1
        if several and alternatives > 1 and alternatives * max(properties, 1) > MAX_PRODUCT:
            self._refuse(keyword, path, "too many alternatives meet too many others, or properties.")
        return _Weight(strings, alternatives, properties)

    def _count_squares(self, node: Schema, path: str) -> None:
        required = node.get("required", ())
        optional = len(node.get("properties", {}).keys() - set(required))
        self._optional_squared += optional**2
        if self._optional_squared > MAX_OPTIONAL_SQUARED:
            self._refuse("properties", path, "too many properties are not required.")
        self._undeclared_squared += len(set(required) - node.get("properties", {}).keys()) ** 2
        if self._undeclared_squared > MAX_UNDECLARED_SQUARED:
            self._refuse("required", path, "too many properties are required and not declared.")
        self._patterns_squared += len(node.get("patternProperties", ())) ** 2
        if self._patterns_squared > MAX_PATTERNS_SQUARED:
            self._refuse("patternProperties", path, "there are too many patterns.")

    def _refuse(self, keyword: str, path: str, why: str) -> Never:
        raise InvalidRequestError(
            f'The schema\'s "{keyword}" at {path}/{keyword} cannot be enforced: {why}',
            field=self._field,
            metadata={"keyword": keyword, "path": f"{path}/{keyword}"},
        )


def _inner(node: Schema) -> Iterator[tuple[object, str]]:
    """The schemas of values inside a schema's value."""
    for key in ("properties", "patternProperties"):
        for name, child in node.get(key, {}).items():
            yield child, f"{key}/{name}"
    for i, child in enumerate(node.get("prefixItems", ())):
        yield child, f"prefixItems/{i}"
    for key in ("items", "additionalProperties"):
        if key in node:
            yield node[key], key


def _inner_first(root: Schema, definitions: Schema) -> list[str]:
    """Names of the definitions, each behind those that it refers to."""
    ordered: dict[str, None] = {}
    begun: set[str] = set()
    # Not by calls: a chain of references may be thousands long.
    waiting = [(name, False) for name in definitions]
    while waiting:
        name, is_left = waiting.pop()
        if is_left:
            ordered[name] = None
        elif name not in begun:
            begun.add(name)
            waiting.append((name, True))
            found = _references(definitions[name])
            waiting += [(other, False) for other in found if other in definitions and other not in begun]
    return list(ordered)


def _references(node: object) -> Iterator[str]:
    """Names that a schema refers to, itself or inside; what a constant of it holds is taken for one, too."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref" and isinstance(value, str):
                yield value.removeprefix(_DEFINITIONS)
            else:
                yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)
