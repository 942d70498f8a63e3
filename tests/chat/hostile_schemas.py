"""Schemas by which a client would keep a compiler or a matcher busy, or end it."""

from __future__ import annotations

from typing import Any


def _tower(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def _fan(width: int, depth: int) -> Any:
    """As many values as width to the power of depth, in a few lines."""
    definitions: Any = {
        f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * width, "minItems": width}
        for i in range(depth)
    }
    return {"$defs": {**definitions, f"d{depth}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def _chain(length: int) -> Any:
    """Definitions that each are the next one."""
    definitions: Any = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    return {"$defs": {**definitions, f"a{length}": {"type": "null"}}, "$ref": "#/$defs/a0"}


HOSTILE: dict[str, Any] = {
    "a chain": _chain(4_900),
    "a chain of objects": {
        "$defs": {
            f"a{i}": {"properties": {"a": {"$ref": f"#/$defs/a{i + 1}"}}, "required": ["a"]}
            for i in range(2_500)
        }
        | {"a2500": {"type": "null"}},
        "$ref": "#/$defs/a0",
    },
    "a long constant": {"const": "x y " * 50_000},
    "long constants": {"anyOf": [{"const": "x" * 100_000}, {"const": "y" * 100_000}]},
    "a huge array": {"type": "array", "items": {"type": "integer"}, "minItems": 2**31 - 1},
    "a huge string": {"type": "string", "minLength": 2**31 - 1},
    "many values": {"enum": [f"value {i * 7919}" for i in range(9_000)]},
    "many properties": {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(3_000)}},
    "many meetings": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"a{i}": {"type": "integer"}}} for i in range(12)]}
        ]
        * 6
    },
    "an exponential pattern": {"type": "string", "pattern": "(a|b)*a(a|b){200}$"},
    "patterns that meet": {
        "allOf": [{"type": "string", "pattern": f"^.*{c}.{{{20 + i}}}$"} for i, c in enumerate("abcdefgh")]
    },
    "nested repetition": {"type": "string", "pattern": "^((x{1,1000}){1,1000}){1,1000}$"},
    "wide classes": {"type": "string", "pattern": r"^(\p{L}{1,100}\w{1,100}){1,50}$"},
    "a tower": _tower(40),
    "a fan": _fan(10, 30),
    "a loop of all": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
    "no finite value": {"properties": {"x": {"$ref": "#"}}, "required": ["x"]},
    "a large multiple": {"type": "integer", "multipleOf": 9_973},
    "multiples that meet": {"allOf": [{"type": "integer", "multipleOf": 97}, {"multipleOf": 89}]},
    "many patterns that meet": {"allOf": [{"type": "string", "pattern": f"x{i}"} for i in range(40)]},
    "patterns that meet in a property": {
        "allOf": [{"properties": {"a": {"type": "string", "pattern": f"x{i}"}}} for i in range(40)]
    },
    "patterns that meet by reference": {
        "$defs": {
            f"a{i}": {"allOf": [{"pattern": f"x{i}"}, {"$ref": f"#/$defs/a{i + 1}"}]} for i in range(40)
        }
        | {"a40": {"type": "string"}},
        "$ref": "#/$defs/a0",
    },
    "alternatives beside properties": {
        "type": "object",
        "properties": {f"p{i}": {"type": "null"} for i in range(200)},
        "anyOf": [{"required": [f"p{i}"]} for i in range(200)],
    },
    "patterns of names": {"patternProperties": {f"^a{i}b+$": {"type": "null"} for i in range(900)}},
    "many alternatives": {"anyOf": [{"type": "string", "pattern": f"^[a-z]*{i}$"} for i in range(500)]},
}
