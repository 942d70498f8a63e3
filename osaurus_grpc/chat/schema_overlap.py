"""Whether two JSON schemas have a value in common, as far as that can be told from what they say.

A oneOf is a union only where no value satisfies two of its alternatives. The grammar library (llguidance
1.9) tells that by types and constants alone, follows no reference, and looks at the schemas that it is
given, which admit less than the client's (schema.py). So it is told here, by the client's own words, and
what is apart is handed on as an anyOf.

Keywords that are not looked at admit only less: what is told apart is apart, whatever else is said.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from osaurus_grpc.chat.schema_keywords import LATEST, Schema, are_names, as_meant

Resolve = Callable[[str], object]

_KINDS: Final = ("null", "boolean", "number", "string", "array", "object")
# Schemas and values looked at for all of a request; each takes some microseconds.
_MAX_LOOKS: Final = 100_000
_MAX_DEPTH: Final = 32
# So many items of two lists are looked at one by one.
_MAX_ITEMS: Final = 16


class TooMuchToCompareError(Exception):
    """What was asked takes more looks than are granted."""


class Looks:
    """Counts the schemas and values that were looked at."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, count: int = 1) -> None:
        """Count some more; raises TooMuchToCompareError where they are too many."""
        self._count += count
        if self._count > _MAX_LOOKS:
            raise TooMuchToCompareError


class Overlap:
    """Compares schemas of two documents, with one bound for all comparisons.

    Args:
        left: Finds what a reference in a schema on the left leads to.
        right: The same on the right.
        draft: The draft of JSON schema that the schemas on the right go by.
    """

    def __init__(self, left: Resolve, right: Resolve, draft: int = LATEST) -> None:
        self._resolve = (left, right)
        self._looks = Looks()
        self._draft = draft

    def are_apart(self, left: object, right: object) -> bool:
        """Whether no value satisfies both; False also where that is not seen.

        Raises:
            TooMuchToCompareError: All that was asked so far takes too long.
        """
        return self._apart(left, right, 0)

    def _apart(self, left: object, right: object, depth: int) -> bool:
        self._looks()
        if left is False or right is False:
            return True
        left, right = ({} if node is True else node for node in (left, right))
        right = as_meant(right, self._draft)
        if depth > _MAX_DEPTH or not isinstance(left, dict) or not isinstance(right, dict):
            return False
        depth += 1
        return (
            self._listed_apart(left, right, depth)
            or all(self._apart_as(kind, left, right, depth) for kind in _kinds(left) & _kinds(right))
            or any(self._apart(part, right, depth) for part in self._parts(left, 0))
            or any(self._apart(left, part, depth) for part in self._parts(right, 1))
            or any(all(self._apart(each, right, depth) for each in union) for union in _unions(left))
            or any(all(self._apart(left, each, depth) for each in union) for union in _unions(right))
        )

    def _listed_apart(self, left: Schema, right: Schema, depth: int) -> bool:
        """Whether one of them lists its values, and the other admits none of these."""
        ours, theirs = listed_values(left), listed_values(right)
        if ours is not None and theirs is not None:
            self._looks(_size(ours) + _size(theirs))
            return not {canonical(value) for value in ours} & {canonical(value) for value in theirs}
        if ours is not None:
            return all(self._fails(value, right, 1, depth) for value in ours)
        return theirs is not None and all(self._fails(value, left, 0, depth) for value in theirs)

    def _fails(self, value: object, node: object, side: int, depth: int) -> bool:
        """Whether a value does not satisfy a schema; False also where that is not seen."""
        self._looks()
        if node is False:
            return True
        node = as_meant(node, self._draft) if side else node
        if depth > _MAX_DEPTH or not isinstance(node, dict):
            return False
        depth += 1
        listed = listed_values(node)
        if listed is not None:
            self._looks(_size(value) + _size(listed))
            if canonical(value) not in map(canonical, listed):
                return True
        return (
            not is_of_type(value, node)
            or self._fails_inside(value, node, side, depth)
            or any(self._fails(value, part, side, depth) for part in self._parts(node, side))
            or any(all(self._fails(value, each, side, depth) for each in union) for union in _unions(node))
        )

    def _fails_inside(self, value: object, node: Schema, side: int, depth: int) -> bool:
        match value:
            case bool():
                return False
            case int() | float():
                exact = {"minimum": value, "maximum": value}
                return _numbers_apart(exact, node)
            case str():
                return _is_outside(len(value), node, "Length")
            case list():
                return _is_outside(len(value), node, "Items") or any(
                    self._fails(item, _item(node, index), side, depth) for index, item in enumerate(value)
                )
            case dict():
                return (
                    _is_outside(len(value), node, "Properties")
                    or any(name not in value for name in _required(node))
                    or any(
                        self._fails(item, _property(node, name), side, depth) for name, item in value.items()
                    )
                )
            case _:
                return False

    def _apart_as(self, kind: str, left: Schema, right: Schema, depth: int) -> bool:
        """Whether no value of one type satisfies both."""
        match kind:
            case "number":
                return _numbers_apart(left, right)
            case "string":
                return _counts_apart(left, right, "Length")
            case "array":
                least = max(_count(left, "minItems", 0), _count(right, "minItems", 0))
                return _counts_apart(left, right, "Items") or any(
                    self._apart(_item(left, index), _item(right, index), depth)
                    for index in range(int(min(least, _MAX_ITEMS)))
                )
            case "object":
                return _counts_apart(left, right, "Properties") or any(
                    self._apart(_property(left, name), _property(right, name), depth)
                    for name in dict.fromkeys((*_required(left), *_required(right)))
                )
            case _:
                return False

    def _parts(self, node: Schema, side: int) -> Iterator[object]:
        """Other schemas that each value of this one satisfies as well."""
        if isinstance(reference := node.get("$ref"), str):
            yield self._resolve[side](reference)
        if isinstance(parts := node.get("allOf"), list):
            yield from parts


def telling_property(nodes: Sequence[object], looks: Looks, draft: int = LATEST) -> str | None:
    """The property whose listed values tell objects apart, each object's from all others'.

    Args:
        nodes: Schemas of objects.
        looks: Counts what is looked at.
        draft: The draft of JSON schema that they go by.

    Returns:
        Its name, the first of several; None where there is none.

    Raises:
        TooMuchToCompareError: All that was asked so far takes too long.
    """
    meant = [as_meant(node, draft) for node in nodes]
    objects = [node for node in meant if isinstance(node, dict) and _kinds(node) == {"object"}]
    if len(objects) < len(nodes) or not nodes:
        return None
    named = [node["properties"] if isinstance(node.get("properties"), dict) else {} for node in objects]
    names: list[str] = list(named[0])
    for name in names:
        looks(len(named))
        listed = [listed_values(as_meant(properties.get(name), draft)) for properties in named]
        if all(listed) and _are_distinct(listed, looks):
            return name
    return None


def _are_distinct(listed: Sequence[list[object] | None], looks: Looks) -> bool:
    """Whether no value stands in two of several lists."""
    seen: set[object] = set()
    for values in listed:
        looks(_size(values))
        keys = {canonical(value) for value in values or ()}
        if seen & keys:
            return False
        seen |= keys
    return True


def _kinds(node: Schema) -> set[str]:
    """The types that a schema admits, whole numbers being numbers; all where it names none that is one."""
    said = node.get("type")
    names = said if isinstance(said, list) else [said]
    if not are_names(names):
        return set(_KINDS)
    return {"number" if kind == "integer" else kind for kind in names}


def is_of_type(value: object, node: Schema) -> bool:
    """Whether a value is of one of the types that a schema names."""
    said = node.get("type")
    if said is None:
        return True
    said = said if isinstance(said, list) else [said]
    match value:
        case None:
            return "null" in said
        case bool():
            return "boolean" in said
        case int() | float():
            return "number" in said or ("integer" in said and value == int(value))
        case str():
            return "string" in said
        case list():
            return "array" in said
        case _:
            return "object" in said


def listed_values(node: object) -> list[object] | None:
    """The values that a schema lists; None where it lists none."""
    if not isinstance(node, dict):
        return None
    if "const" in node:
        return [node["const"]]
    return node["enum"] if isinstance(node.get("enum"), list) else None


def _size(value: object) -> int:
    """How many values a value is made of."""
    match value:
        case list():
            return 1 + sum(map(_size, value))
        case dict():
            return 1 + sum(map(_size, value.values()))
        case _:
            return 1


def canonical(value: object) -> object:
    """The same for equal values of JSON, and for these only: 1 is 1.0, and not true."""
    match value:
        case bool():
            return ("boolean", value)
        case list():
            return ("array", *map(canonical, value))
        case dict():
            return ("object", *sorted((name, canonical(item)) for name, item in value.items()))
        case _:
            return value


def _unions(node: Schema) -> Iterator[Sequence[object]]:
    """Lists of schemas of which each value satisfies one at least."""
    for key in ("anyOf", "oneOf"):
        if isinstance(union := node.get(key), list) and union:
            yield union


def _numbers_apart(left: Schema, right: Schema) -> bool:
    (low, low_is_out), (high, high_is_out) = _bound(left, "minimum"), _bound(right, "maximum")
    if low > high or (low == high and (low_is_out or high_is_out)):
        return True
    (low, low_is_out), (high, high_is_out) = _bound(right, "minimum"), _bound(left, "maximum")
    return low > high or (low == high and (low_is_out or high_is_out))


def _bound(node: Schema, key: str) -> tuple[float, bool]:
    """A bound of a schema's numbers, and whether it is excluded."""
    sign = 1 if key == "minimum" else -1
    bounds = [(-sign * math.inf, False)]
    for name, is_out in ((key, False), (f"exclusive{key.capitalize()}", True)):
        value = node.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            bounds.append((value, is_out))
    return max(bounds, key=lambda bound: (sign * bound[0], bound[1]))


def _count(node: Schema, key: str, default: float) -> float:
    value = node.get(key, default)
    return value if isinstance(value, int | float) else default


def _counts_apart(left: Schema, right: Schema, what: str) -> bool:
    """Whether one admits only less of something than the other."""
    return any(
        _count(more, f"min{what}", 0) > _count(less, f"max{what}", math.inf)
        for more, less in itertools.permutations((left, right))
    )


def _is_outside(count: int, node: Schema, what: str) -> bool:
    return not _count(node, f"min{what}", 0) <= count <= _count(node, f"max{what}", math.inf)


def _required(node: Schema) -> Sequence[str]:
    required = node.get("required")
    return required if are_names(required) else ()


def _property(node: Schema, name: str) -> object:
    """What a schema says of a property, patterns apart."""
    properties = node.get("properties")
    if isinstance(properties, dict) and name in properties:
        return properties[name]
    # A pattern may speak of it, so that the rest does not.
    return True if node.get("patternProperties") else node.get("additionalProperties", True)


def _item(node: Schema, index: int) -> object:
    """What a schema says of an item."""
    items = node.get("items", True)
    first, rest = node.get("prefixItems", ()), items
    if isinstance(items, list):  # as older drafts have it
        first, rest = items, node.get("additionalItems", True)
    return first[index] if isinstance(first, list) and index < len(first) else rest
