"""Forty JSON schemas of all kinds that are enforced, each with short values only.

Nothing here is left open that a random or small model would fill for ever.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema

Schema = dict[str, Any]

WORD: Schema = {"type": "string", "maxLength": 8}
DIGIT: Schema = {"type": "integer", "minimum": 0, "maximum": 9}


def record(**properties: Schema) -> Schema:
    """An object of exactly these."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def text(format_name: str) -> Schema:
    return record(value={"type": "string", "format": format_name})


SCHEMAS: dict[str, Schema] = {
    "flat": record(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 150}, ok={"type": "boolean"}),
    "nested": record(outer=record(inner=record(core=DIGIT), tag=WORD)),
    "optional": {
        "type": "object", "properties": {"a": DIGIT, "b": WORD, "c": {"type": "null"}}, "required": ["b"],
    },
    "no properties": {"type": "object", "properties": {}},
    "enum of words": record(colour={"enum": ["red", "green", "blue"]}),
    "enum of kinds": record(value={"enum": ["one", 2, 3.5, True, None, [1, "x"], {"k": 1}]}),
    "constant": record(version={"const": 3}, kind={"const": "exact \"quoted\" text"}),
    "array with bounds": record(items={"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 4}),
    "array of records": {"type": "array", "items": record(x=DIGIT, y=DIGIT), "minItems": 1, "maxItems": 2},
    "matrix": {
        "type": "array", "minItems": 2, "maxItems": 2,
        "items": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 2},
    },
    "tuple": {
        "type": "array", "prefixItems": [WORD, DIGIT, {"type": "boolean"}], "items": False, "minItems": 3,
    },
    "older tuple": {"type": "array", "items": [DIGIT, WORD], "additionalItems": False, "minItems": 2},
    "any of types": record(value={"type": ["integer", "null", "boolean"], "minimum": -5, "maximum": 5}),
    "any of": record(value={"anyOf": [{"type": "null"}, DIGIT, record(deep=WORD)]}),
    "one of, told apart": record(
        shape={
            "oneOf": [
                record(kind={"const": "circle"}, radius=DIGIT),
                record(kind={"const": "square"}, side=DIGIT),
            ]
        }
    ),
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
            {"type": "object", "properties": {"b": WORD}, "required": ["b"]},
        ],
        "properties": {"a": True, "b": True}, "additionalProperties": False,
    },
    "union beside properties": {
        "type": "object", "properties": {"id": DIGIT, "x": WORD, "y": WORD}, "required": ["id"],
        "anyOf": [{"required": ["x"]}, {"required": ["y"]}], "additionalProperties": False,
    },
    "definition": {
        "$defs": {"point": record(x=DIGIT, y=DIGIT)},
        **record(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
    },
    "odd pointer": {
        "definitions": {"a/b~c d": WORD}, **record(value={"$ref": "#/definitions/a~1b~0c%20d"}),
    },
    "reference beside keywords": {
        "$defs": {"n": {"type": "integer", "minimum": 0}},
        **record(n={"$ref": "#/$defs/n", "maximum": 20, "description": "small"}),
    },
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": DIGIT, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["v"], "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "list by itself": {
        "type": "object", "properties": {"head": DIGIT, "tail": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        "required": ["head", "tail"], "additionalProperties": False,
    },
    "unicode keys": record(**{"naïve": DIGIT, "ключ": WORD, "鍵": {"type": "boolean"}, "🔑": DIGIT}),
    "awkward keys": record(**{"a b": DIGIT, 'q"': DIGIT, "back\\slash": DIGIT, "new\nline": DIGIT, "": WORD}),
    "eighteen digits": record(
        id={"type": "integer", "minimum": 100_000_000_000_000_000, "maximum": 999_999_999_999_999_999}
    ),
    "sixty-four bits": record(id={"type": "integer"}),
    "open below": record(n={"type": "integer", "exclusiveMaximum": -3}),
    "fraction": record(p={"type": "number", "minimum": 0, "maximum": 1}),
    "multiple": record(n={"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 25}),
    "cents": record(price={"type": "number", "minimum": 0, "maximum": 50, "multipleOf": 0.5}),
    "pattern": record(plate={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "pattern and length": record(
        code={"type": "string", "pattern": "^(ab|c)+$", "minLength": 3, "maxLength": 6}
    ),
    "date": text("date"),
    "date-time": text("date-time"),
    "uuid": text("uuid"),
    "email": text("email"),
    "ipv4 and ipv6": record(a={"type": "string", "format": "ipv4"}, b={"type": "string", "format": "ipv6"}),
    "map": {
        "type": "object", "patternProperties": {"^k[0-9]$": DIGIT}, "additionalProperties": False,
        "minProperties": 1, "maxProperties": 2,
    },
    "names": {
        "type": "object", "propertyNames": {"enum": ["left", "right"]}, "additionalProperties": DIGIT,
    },
    "bare": {"enum": ["yes", "no", "maybe"]},
}  # fmt: skip

# For runs that cannot ask a real model for every schema in every way. Tuples of older drafts, which
# tools' arguments are not tested with, are in the first.
ONE_HALF = [
    name for i, name in enumerate(SCHEMAS) if i % 2 == 0 or isinstance(SCHEMAS[name].get("items"), list)
]
OTHER_HALF = [name for name in SCHEMAS if name not in ONE_HALF]


def validate(text: str, schema: dict[str, Any]) -> None:
    """Fail for a text that a schema does not admit; tuples may be written as older drafts do."""
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(_current(schema), format_checker=checker).validate(json.loads(text))


def _current(schema: Any) -> Any:
    """A schema with its tuples written as the draft of 2020 has them."""
    if isinstance(schema, list):
        return [_current(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(schema.get("items"), list):
        rest = {key: value for key, value in schema.items() if key not in ("items", "additionalItems")}
        schema = {**rest, "prefixItems": schema["items"], "items": schema.get("additionalItems", True)}
    return {key: _current(value) for key, value in schema.items()}
