"""Every keyword of JSON schema is enforced, refused by name, or says nothing about values."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from jsonschema_specifications import REGISTRY

from osaurus_grpc.chat.grammar import Grammars, TokenizedModel
from osaurus_grpc.chat.schema import prepared
from osaurus_grpc.errors import InvalidRequestError
from tests.chat.test_grammar import grammars, model, text_of, throw  # noqa: F401  (fixtures)

_DIALECT = "https://json-schema.org/draft/2020-12/"
_VOCABULARIES = (
    "core",
    "applicator",
    "unevaluated",
    "validation",
    "meta-data",
    "format-annotation",
    "content",
)

DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
WORD = {"type": "string", "maxLength": 4}

# A schema that lives by the keyword: without it, the dice would soon throw something else.
ENFORCED: dict[str, Any] = {
    "$ref": {"$ref": "#/$defs/a", "$defs": {"a": DIGIT}},
    "type": {"type": ["null", "boolean"]},
    "enum": {"enum": ["a", 1, None, [2.5], {"k": False}]},
    "const": {"const": {"a": [1, None, "x"]}},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
    "anyOf": {"anyOf": [DIGIT, {"type": "null"}]},
    "oneOf": {"oneOf": [{"type": "object", "properties": {"k": {"const": kind}, "v": DIGIT},
                         "required": ["k"]} for kind in "ab"]},
    "properties": {"type": "object", "properties": {"a": DIGIT, "b": {"type": "null"}}},
    "patternProperties": {
        "type": "object", "patternProperties": {"^a": DIGIT, "^b": {"type": "null"}},
        "additionalProperties": False, "maxProperties": 3,
    },
    "additionalProperties": {"type": "object", "additionalProperties": DIGIT, "maxProperties": 3},
    "required": {"type": "object", "properties": {"a": DIGIT, "b": DIGIT}, "required": ["b"]},
    "propertyNames": {
        "type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": DIGIT,
    },
    "minProperties": {
        "type": "object", "additionalProperties": DIGIT, "minProperties": 1, "maxProperties": 2,
    },
    "maxProperties": {"type": "object", "additionalProperties": DIGIT, "maxProperties": 1},
    "items": {"type": "array", "items": DIGIT, "maxItems": 4},
    "prefixItems": {"type": "array", "prefixItems": [DIGIT, {"type": "null"}], "items": False},
    "minItems": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 3},
    "maxItems": {"type": "array", "items": DIGIT, "maxItems": 2},
    "minLength": {"type": "string", "minLength": 3, "maxLength": 5},
    "maxLength": {"type": "string", "maxLength": 2},
    "pattern": {"type": "string", "pattern": "^[a-f]{2}$"},
    "format": {"type": "string", "format": "date"},
    "minimum": {"type": "integer", "minimum": 95, "maximum": 102},
    "maximum": {"type": "number", "minimum": 0, "maximum": 0.5},
    "exclusiveMinimum": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    "exclusiveMaximum": {"type": "integer", "minimum": -3, "exclusiveMaximum": 0},
    "multipleOf": {"type": "integer", "minimum": 0, "maximum": 999, "multipleOf": 7},
    "unevaluatedProperties": {"type": "object", "properties": {"a": DIGIT}, "unevaluatedProperties": False},
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "$dynamicRef": "#a",
    "not": {"const": 1},
    "if": {"const": 1},
    "then": {"const": 1},
    "else": {"const": 1},
    "contains": DIGIT,
    "minContains": 2,
    "maxContains": 2,
    "uniqueItems": True,
    "dependentSchemas": {"a": {"required": ["b"]}},
    "dependentRequired": {"a": ["b"]},
    "dependencies": {"a": ["b"]},
    "unevaluatedItems": False,
    "unevaluatedProperties": {"type": "null"},
    "propertyNames": {"format": "date", "minLength": 3},
    "$recursiveRef": "#",
}
ANNOTATIONS = {
    "$anchor", "$comment", "$defs", "$dynamicAnchor", "$id", "$schema", "$vocabulary", "$recursiveAnchor",
    "contentEncoding", "contentMediaType", "contentSchema", "default", "definitions", "deprecated",
    "description", "examples", "readOnly", "title", "writeOnly",
}  # fmt: skip


def all_keywords() -> set[str]:
    found: set[str] = set()
    for uri in ("schema", *(f"meta/{name}" for name in _VOCABULARIES)):
        found |= REGISTRY.contents(_DIALECT + uri)["properties"].keys()
    return found


def test_no_keyword_is_left_out() -> None:
    assert all_keywords() == {*ENFORCED, *REFUSED, *ANNOTATIONS}


@pytest.mark.asyncio(loop_scope="module")  # the fixtures' own
@pytest.mark.parametrize("keyword", ENFORCED)
async def test_an_enforced_keyword_holds(
    grammars: Grammars,  # noqa: F811
    model: TokenizedModel,  # noqa: F811
    keyword: str,
) -> None:
    schema = ENFORCED[keyword]
    assert keyword in schema
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    grammar = await grammars.json_schema(model, json.dumps(schema), strict=True)
    for seed in range(4):
        text = text_of(throw(grammar.constraint(), model, seed, haste=0.7), model)
        validator.validate(json.loads(text))


@pytest.mark.parametrize("is_strict", [True, False])
@pytest.mark.parametrize("keyword", REFUSED)
def test_another_is_refused_wherever_it_stands(keyword: str, is_strict: bool) -> None:
    schema = {keyword: REFUSED[keyword]}
    for whole, path in (
        (schema, "#"),
        ({"type": "object", "properties": {"a": schema}}, "#/properties/a"),
        ({"type": "array", "items": {"anyOf": [{"type": "null"}, schema]}}, "#/items/anyOf/1"),
        ({"$defs": {"d": schema}, "allOf": [{"$ref": "#/$defs/d"}]}, "#/$defs/d"),
        ({"type": "object", "additionalProperties": schema}, "#/additionalProperties"),
        ({"type": "array", "prefixItems": [True, schema]}, "#/prefixItems/1"),
    ):
        with pytest.raises(InvalidRequestError) as raised:
            prepared(json.dumps(whole), strict=is_strict, field="f")
        assert raised.value.metadata == {"keyword": keyword, "path": f"{path}/{keyword}"}


def test_a_reference_below_another_base_is_refused() -> None:
    inner = {"$id": "https://example.com/inner", "$ref": "#/$defs/a"}
    schema = {"$defs": {"a": DIGIT}, "properties": {"x": inner}}
    with pytest.raises(InvalidRequestError) as raised:
        prepared(json.dumps(schema), strict=False, field="f")
    assert raised.value.metadata == {"keyword": "$id", "path": "#/properties/x/$id"}
    named = {"properties": {"x": {"$id": "#/properties/x", "type": "null"}}}
    assert "$id" not in prepared(json.dumps(named), strict=True, field="f")
