"""Schemas that nothing could stop once they are being compiled."""

from __future__ import annotations

import json
from typing import Any

import pytest

from osaurus_grpc.chat.schema import prepared
from osaurus_grpc.errors import InvalidRequestError
from tests.harness.schemas import SCHEMAS


def make(schema: Any) -> str:
    return prepared(json.dumps(schema), strict=False, field="f")


def patterns(count: int) -> list[Any]:
    return [{"type": "string", "pattern": f"x{i}"} for i in range(count)]


def nulls(count: int) -> dict[str, Any]:
    return {f"p{i}": {"type": "null"} for i in range(count)}


def alternatives(count: int) -> list[Any]:
    return [{"required": [f"p{i}"]} for i in range(count)]


REFUSED = [
    ({"allOf": patterns(13)}, "allOf", "#/allOf"),
    ({"properties": {"a": {"allOf": patterns(13)}}}, "allOf", "#/properties/a/allOf"),
    ({"allOf": [{"properties": {"a": one}} for one in patterns(13)]}, "allOf", "#/allOf"),
    ({"allOf": [{"anyOf": patterns(2)}] * 13}, "allOf", "#/allOf"),
    ({"$defs": {"a": {"allOf": patterns(7)}}, "allOf": [{"$ref": "#/$defs/a"}] * 2}, "allOf", "#/allOf"),
    ({"$defs": {"a": {"allOf": patterns(13)}}, "items": {"$ref": "#/$defs/a"}}, "allOf", "#/$defs/a/allOf"),
    ({"type": "object", "properties": nulls(100), "anyOf": alternatives(100)}, "anyOf", "#/anyOf"),
    ({"allOf": [{"anyOf": alternatives(100)}, {"properties": nulls(100)}]}, "allOf", "#/allOf"),
    ({"allOf": [{"anyOf": alternatives(12)}] * 6}, "allOf", "#/allOf"),
    ({"properties": nulls(2_001)}, "properties", "#/properties"),
    ({"prefixItems": [{"properties": nulls(1_200)}] * 3}, "properties", "#/prefixItems/2/properties"),
    ({"patternProperties": nulls(121)}, "patternProperties", "#/patternProperties"),
]


@pytest.mark.parametrize(("schema", "keyword", "path"), REFUSED)
def test_too_much_work_is_refused_by_name(schema: Any, keyword: str, path: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        make(schema)
    assert (raised.value.metadata["keyword"], raised.value.metadata["path"]) == (keyword, path)


@pytest.mark.parametrize(
    "schema",
    [
        *SCHEMAS.values(),
        {"allOf": patterns(12)},
        {"anyOf": patterns(500)},
        {"properties": {f"p{i}": one for i, one in enumerate(patterns(1_000))}},
        {"properties": nulls(2_000)},
        {"properties": nulls(4_000), "required": list(nulls(4_000))},
        {"anyOf": [{"type": "object", "properties": nulls(30)}] * 300},
        {"$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}, "c": {"pattern": "x"}}}},
         "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"c": {"minLength": 2}}}]},
    ],
)  # fmt: skip
def test_usual_schemas_are_not(schema: Any) -> None:
    make(schema)
