"""Requests with exactly one thing wrong, made from a JSON Schema: every field in turn, in every place.

Each is what is valid in the fewest words but for one value that is of another type or out of its range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator

Schema = Mapping[str, Any]
Wrap = Callable[[Any], Any]

# One of each of JSON's types.
_TYPES: Mapping[str, Any] = {
    "object": {"wrong": 1},
    "array": [[]],
    "number": 7.5,
    "boolean": True,
    "string": "x",
}
# A bound beyond this is not tried: the request would be larger than it is worth.
_LONGEST = 2_000


@dataclass(frozen=True, slots=True)
class WrongValue:
    """A request.

    Attributes:
        path: Of what is wrong, for example "messages[0].content".
        why: "type", or the schema's keyword that is violated.
        body: The whole request.
    """

    path: str
    why: str
    body: Any


class WrongValues:
    """The requests of one API description.

    Args:
        components: Its schemas by name.
    """

    def __init__(self, components: Mapping[str, Schema]) -> None:
        self._components = components

    def of(self, name: str, base: Mapping[str, Any]) -> Iterator[WrongValue]:
        """All that can be wrong with the schema of a name; base holds what makes its body valid."""
        for field, schema in self._components[name]["properties"].items():
            yield from self._walk(schema, field, lambda value, field=field: {**base, field: value})

    def _walk(self, schema: Schema, path: str, wrap: Wrap) -> Iterator[WrongValue]:
        taken = {kind for variant in self._variants(schema) for kind in _types(variant)}
        others = [value for kind, value in _TYPES.items() if kind not in taken]
        if others:
            yield WrongValue(path, "type", wrap(others[0]))
        for variant in self._variants(schema):
            for why, value in _out_of_range(variant):
                if not self._takes(schema, value):
                    yield WrongValue(path, why, wrap(value))
            yield from self._inside(variant, path, wrap)

    def _inside(self, schema: Schema, path: str, wrap: Wrap) -> Iterator[WrongValue]:
        if "properties" in schema:
            least = self._least(schema)
            for field, inner in schema["properties"].items():
                yield from self._walk(
                    inner, f"{path}.{field}", lambda value, field=field: wrap({**least, field: value})
                )
        elif isinstance(schema.get("additionalProperties"), dict):
            yield from self._walk(
                schema["additionalProperties"], f"{path}.1", lambda value: wrap({"1": value})
            )
        elif isinstance(schema.get("items"), dict):
            yield from self._walk(schema["items"], f"{path}[0]", lambda value: wrap([value]))

    def _variants(self, schema: Schema) -> Iterator[Schema]:
        if "$ref" in schema:
            yield from self._variants(self._components[schema["$ref"].rpartition("/")[2]])
        elif "anyOf" in schema:
            for variant in schema["anyOf"]:
                yield from self._variants(variant)
        elif schema.get("type") != "null":
            yield schema

    def _takes(self, schema: Schema, value: Any) -> bool:
        root = {**schema, "components": {"schemas": self._components}}
        return bool(Draft202012Validator(root).is_valid(value))

    def _least(self, schema: Schema) -> Any:
        """What is valid in the fewest words."""
        variant = next(self._variants(schema))
        if "const" in variant:
            return variant["const"]
        if "enum" in variant:
            return variant["enum"][0]
        match variant.get("type"):
            case "object":
                required = variant.get("required", ())
                # A discriminator is said even where it need not be.
                told = [name for name, inner in variant.get("properties", {}).items() if "const" in inner]
                return {name: self._least(variant["properties"][name]) for name in {*required, *told}}
            case "array":
                return [self._least(variant["items"])] * variant.get("minItems", 0)
            case "string":
                return "a"
            case "integer" | "number":
                return variant.get("minimum", 1)
            case "boolean":
                return False
            case _:
                return {}


def _types(schema: Schema) -> set[str]:
    if "enum" in schema or "const" in schema:
        return {"string"}
    kind = schema.get("type")
    return set(_TYPES) if kind is None else {"number" if kind == "integer" else kind}


def _out_of_range(schema: Schema) -> Iterator[tuple[str, Any]]:
    if "enum" in schema or "const" in schema:
        yield "enum", "no such value"
    for keyword, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0), ("exclusiveMaximum", 0)):
        if keyword in schema:
            yield keyword, schema[keyword] + step
    if schema.get("minLength"):
        yield "minLength", ""
    if schema.get("maxLength", _LONGEST) < _LONGEST:
        yield "maxLength", "a" * (schema["maxLength"] + 1)
    if "pattern" in schema:
        yield "pattern", "\n"
    if schema.get("minItems"):
        yield "minItems", []
    if schema.get("maxItems", _LONGEST) < _LONGEST and schema.get("items", {}).get("type") == "string":
        yield "maxItems", ["a"] * (schema["maxItems"] + 1)
