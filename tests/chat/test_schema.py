"""What is made of clients' schemas before they become grammars."""

from __future__ import annotations

import json
from typing import Any

import pytest

from osaurus_grpc.chat.schema import MAX_SCHEMA_CHARACTERS, MAX_SCHEMAS, prepared
from osaurus_grpc.errors import InvalidRequestError

FIELD = "response_format.json_schema.schema_json"


def rewritten(schema: Any, **more: Any) -> Any:
    made = json.loads(prepared(json.dumps(schema), **{"strict": False, "field": FIELD, **more}))
    form = made.pop("x-guidance")
    assert form["whitespace_flexible"] is False
    return made


def refusal(schema: Any, **more: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as raised:
        rewritten(schema, **more)
    assert raised.value.field == FIELD
    return raised.value


UNENFORCED = [
    ({"not": {"minimum": 3}}, "not", "#/not"),
    ({"properties": {"a": {"if": {}, "then": {}}}}, "if", "#/properties/a/if"),
    ({"items": {"type": "array", "uniqueItems": True}}, "uniqueItems", "#/items/uniqueItems"),
    ({"anyOf": [{}, {"contains": {"const": 1}}]}, "contains", "#/anyOf/1/contains"),
    ({"$defs": {"x/y": {"dependentRequired": {"a": ["b"]}}}, "$ref": "#/$defs/x~1y"},
     "dependentRequired", "#/$defs/x~1y/dependentRequired"),
    ({"dependencies": {"a": ["b"]}}, "dependencies", "#/dependencies"),
    ({"allOf": [{"unevaluatedProperties": False, "$ref": "#/$defs/a"}], "$defs": {"a": {}}},
     "unevaluatedProperties", "#/allOf/0/unevaluatedProperties"),
    ({"prefixItems": [{}], "unevaluatedItems": False}, "unevaluatedItems", "#/unevaluatedItems"),
    ({"propertyNames": {"format": "date", "minLength": 3}}, "propertyNames", "#/propertyNames"),
    ({"propertyNames": {"maxLength": 3}, "properties": {}}, "propertyNames", "#/propertyNames"),
    ({"propertyNames": {"pattern": ["a"]}}, "propertyNames", "#/propertyNames"),
    ({"propertyNames": {"enum": 5}}, "propertyNames", "#/propertyNames"),
    ({"propertyNames": {"enum": [["a"]]}}, "propertyNames", "#/propertyNames"),
    ({"type": "object", "minProperties": 3}, "minProperties", "#/minProperties"),
    ({"oneOf": [{"minItems": 1}, {"type": "null"}]}, "oneOf", "#/oneOf"),
    ({"oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"pattern": "x"}}},
     "oneOf", "#/oneOf"),
    ({"multipleOf": 100_003}, "multipleOf", "#/multipleOf"),
    ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "multipleOf", "#/allOf/1/multipleOf"),
    ({"const": 123_456_789_012_345_678}, "const", "#/const"),
    ({"enum": [{"a": [2**60]}]}, "enum", "#/enum"),
]  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("schema", "keyword", "path"), UNENFORCED)
def test_what_cannot_be_enforced_is_refused_by_name(schema, keyword, path, strict):
    error = refusal(schema, strict=strict)
    assert (error.metadata["keyword"], error.metadata["path"]) == (keyword, path)
    assert f'"{keyword}" at {path}' in error.message


@pytest.mark.parametrize(("schema", "keyword", "path"), UNENFORCED)
def test_a_schema_that_only_helps_leaves_it_out(schema, keyword, path):
    assert f'"{keyword}": ' not in json.dumps(rewritten(schema, lenient=True)) or keyword == "multipleOf"


@pytest.mark.parametrize(
    ("schema", "keyword", "path"),
    [
        ({"type": "text"}, "type", "#/type"),
        ({"type": []}, "type", "#/type"),
        ({"properties": {"a": {"type": ["string", 3]}}}, "type", "#/properties/a/type"),
        ({"properties": []}, "properties", "#/properties"),
        ({"required": "a"}, "required", "#/required"),
        ({"enum": []}, "enum", "#/enum"),
        ({"enum": "a"}, "enum", "#/enum"),
        ({"anyOf": []}, "anyOf", "#/anyOf"),
        ({"minLength": -1}, "minLength", "#/minLength"),
        ({"maxItems": 1.5}, "maxItems", "#/maxItems"),
        ({"maxItems": 2**31}, "maxItems", "#/maxItems"),
        ({"minItems": True}, "minItems", "#/minItems"),
        ({"minimum": "3"}, "minimum", "#/minimum"),
        ({"maximum": 10**400}, "maximum", "#/maximum"),
        ({"multipleOf": 0}, "multipleOf", "#/multipleOf"),
        ({"pattern": 3}, "pattern", "#/pattern"),
        ({"format": 3}, "format", "#/format"),
        ({"$ref": 3}, "$ref", "#/$ref"),
        ({"$ref": "https://example.com/schema"}, "$ref", "#/$ref"),
        ({"$ref": "#name"}, "$ref", "#/$ref"),
        ({"$ref": "#/$defs/none"}, "$ref", "#/$ref"),
        ({"$ref": "#"}, "$ref", "#/$ref"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
         "$ref", "#/$ref"),
    ],
)  # fmt: skip
def test_what_is_no_schema_is_refused(schema, keyword, path):
    for lenient in (False, True):
        error = refusal(schema, lenient=lenient)
        assert (error.metadata["keyword"], error.metadata["path"]) == (keyword, path)


@pytest.mark.parametrize(
    "text", ["", "[]", "true", '"a"', "{", '{"a": NaN}', '{"const": "\\ud800"}', "[" * 100_000]
)
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(InvalidRequestError) as raised:
        prepared(text, strict=False, field=FIELD)
    assert raised.value.field == FIELD


def test_bounds_of_size():
    deep: Any = {"type": "integer"}
    for _ in range(60):
        deep = {"items": {"items": deep}}
    assert "nested too deeply" in refusal(deep).message
    many = {"anyOf": [{"anyOf": [{}] * 200}] * (MAX_SCHEMAS // 200 + 1)}
    assert str(MAX_SCHEMAS) in refusal(many).message
    assert str(MAX_SCHEMA_CHARACTERS) in refusal({"const": "x" * MAX_SCHEMA_CHARACTERS}).message


def test_strict_refuses_unknown_keywords_and_formats():
    assert '"maxlength" at #/items/maxlength' in refusal({"items": {"maxlength": 3}}, strict=True).message
    assert rewritten({"type": "string", "maxlength": 3}) == {"type": "string"}
    assert '"phone"' in refusal({"type": "string", "format": "phone"}, strict=True).message
    assert rewritten({"type": "string", "format": "phone"}) == {"type": "string"}
    # A format says nothing of numbers.
    bounded = {"type": "integer", "minimum": 0, "maximum": 5}
    assert rewritten({**bounded, "format": "int32"}, strict=True) == bounded


def test_annotations_are_left_out():
    said = {
        "title": "T", "description": "d", "default": 1, "examples": [1], "$comment": "c", "deprecated": True,
        "readOnly": True, "$schema": "http://json-schema.org/draft-07/schema#",
        "x-guidance": {"lenient": True},
        "discriminator": {"propertyName": "kind"},
    }  # fmt: skip
    assert rewritten({"type": "string", **said}, strict=True) == {"type": "string"}


def test_declared_properties_are_all_there_are_where_nothing_else_is_said():
    properties = {"b": {"type": "null"}, "a": {"type": "null"}}
    closed = rewritten({"properties": properties})
    assert closed == {"type": "object", "properties": properties, "additionalProperties": False}
    assert list(closed["properties"]) == ["b", "a"]
    for said in ({"additionalProperties": True}, {"required": ["c"]}, {"patternProperties": {"^x": {}}}):
        made = rewritten({"type": "object", "properties": properties, **said})
        assert made.get("additionalProperties", True) is True
    met = rewritten({"type": "object", "allOf": [{"properties": properties}, {"properties": {"c": {}}}]})
    assert all("additionalProperties" not in schema for schema in met["allOf"])
    either = rewritten({"type": "object", "anyOf": [{"properties": properties}, {"properties": {"c": {}}}]})
    assert all(schema["additionalProperties"] is False for schema in either["anyOf"])


def test_a_definition_is_narrowed_only_where_it_stands_alone():
    made = rewritten(
        {
            "$defs": {"a": {"type": "object", "properties": {"x": {"type": "null"}}}},
            "properties": {
                "alone": {"$ref": "#/$defs/a"},
                "met": {"$ref": "#/$defs/a", "properties": {"y": {}}},
            },
        }
    )
    by_use = {name: made["$defs"][use["$ref"].rpartition("/")[2]] for name, use in made["properties"].items()}
    assert by_use["alone"]["additionalProperties"] is False
    assert "additionalProperties" not in by_use["met"]


def test_alternatives_that_speak_of_one_type_only_are_of_that_type():
    minimum, maximum = {"minimum": 5}, {"type": "integer", "maximum": 3, "minimum": 0}
    made = rewritten({"oneOf": [minimum, maximum]})
    assert made == {"anyOf": [{"type": "number", **minimum}, maximum]}


def test_older_drafts_mean_what_they_said():
    assert rewritten({"type": "integer", "minimum": 3, "maximum": 5, "exclusiveMinimum": True}) == {
        "type": "integer", "exclusiveMinimum": 3, "maximum": 5
    }  # fmt: skip
    assert rewritten({"type": "number", "maximum": 3, "exclusiveMaximum": False}) == {
        "type": "number", "maximum": 3
    }  # fmt: skip
    made = rewritten({"items": [{"type": "null"}], "additionalItems": {"type": "boolean"}})
    assert made == {"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "boolean"}}


def test_numbers_that_no_float_holds_are_moved_inward():
    made = rewritten({"type": "integer", "minimum": 10**17 + 1, "maximum": 10**18 - 1})
    assert 10**17 + 1 <= made["minimum"] <= 10**17 + 17
    assert 10**18 - 129 <= made["maximum"] <= 10**18 - 1
    assert float(made["maximum"]) == made["maximum"]
    assert rewritten({"type": "integer"})["maximum"] == 2**63 - 1024


def test_values_nested_too_deeply_are_refused():
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    for schema in ({"const": deep}, {"default": deep}):
        assert "nested too deeply" in refusal(schema).message


def test_what_is_no_schema_is_named():
    error = refusal({"properties": {"a": {"items": 5}}})
    assert error.metadata == {"keyword": "items", "path": "#/properties/a/items"}
    error = refusal({"properties": {"a": []}})
    assert error.metadata == {"keyword": "properties", "path": "#/properties/a"}
    error = refusal({"anyOf": [{}, 3]})
    assert error.metadata == {"keyword": "anyOf", "path": "#/anyOf/1"}


def test_a_schema_that_only_helps_is_any_object_where_it_is_too_much_work():
    much = {"allOf": [{"type": "string", "pattern": f"x{i}"} for i in range(13)]}
    assert refusal(much).metadata["keyword"] == "allOf"
    assert rewritten(much, lenient=True) == {"type": "object"}
    assert refusal({"required": [f"p{i}" for i in range(5_000)]}).metadata["keyword"] == "required"
    multiples = {"anyOf": [{"type": "integer", "multipleOf": 9_000 + i} for i in range(200)]}
    assert refusal(multiples).metadata["keyword"] == "multipleOf"


def test_a_character_written_by_its_number_hides_no_name():
    schema: Any = {"type": "object", "properties": {"a": {"type": "null"}, "c": {"const": "\x01"}}}
    assert rewritten(schema)["properties"]["c"] == {"const": "\x01"}
    open_schema = {**schema, "additionalProperties": {"type": "string"}}
    error = refusal(open_schema)
    assert error.metadata == {"keyword": "const", "path": "#/properties/c/const"}
    assert rewritten(open_schema, lenient=True)["additionalProperties"] == {"type": "string"}


def test_excluded_bounds_are_moved_inward():
    made = rewritten({"type": "number", "exclusiveMinimum": 0.1, "minimum": 0, "exclusiveMaximum": 0.5})
    assert 0.1 < made["minimum"] < 0.100001
    assert 0.499999 < made["maximum"] < 0.5


def test_a_schema_made_ready_stays_so():
    schema = {
        "properties": {
            "a": {"format": "date"},
            "b": {"type": "integer"},
            "c": {"type": ["string", "null"], "format": "uuid"},
            "d": {"anyOf": [{"items": [{}]}, {"type": "null"}]},
            "f": {"type": "string", "pattern": '^[^"][^-a]$'},
            "e": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 5},
        }
    }
    once = prepared(json.dumps(schema), strict=True, field=FIELD)
    assert json.loads(prepared(once, strict=True, field=FIELD)) == json.loads(once)
