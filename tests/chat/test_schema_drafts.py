"""Rarer keywords in the usual words, and the same meaning."""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
import pytest

from osaurus_grpc.chat.grammar import Grammars, TokenizedModel
from osaurus_grpc.chat.schema import prepared
from osaurus_grpc.errors import InvalidRequestError
from tests.chat.test_grammar import grammars, model, text_of, throw  # noqa: F401  (fixtures)
from tests.chat.test_json_schema_suite import admits

NULL = {"type": "null"}


def an_object(**more: Any) -> dict[str, Any]:
    properties = dict.fromkeys("abc", NULL)
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


# A schema, and values that are admitted or not.
MEANINGS: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    (
        an_object(**{"not": {"required": ["a", "b"]}}),
        [{}, {"a": None}, {"b": None}],
        [{"a": None, "b": None}],
    ),
    ({"type": "array", "items": {"not": {}}}, [[]], [[None]]),
    ({"type": "array", "items": {"not": True}, "not": False}, [[]], [[None]]),
    ({"not": {"type": "null"}}, [1, "a", {}, [], True], [None]),
    ({"type": ["integer", "null"], "not": {"type": ["null", "string"]}}, [1], [None]),
    ({"type": "integer", "not": {"type": "string"}}, [1], ["a"]),
    ({"type": ["integer", "null"], "not": {"type": "number"}}, [None], [1]),
    ({"enum": ["a", 1, None], "not": {"const": 1.0}}, ["a", None], [1]),
    ({"enum": ["a", 1, None], "not": {"enum": ["a", None]}}, [1], ["a", None]),
    (
        an_object(dependentRequired={"a": ["b"]}),
        [{}, {"b": None}, {"a": None, "b": None}, {"c": None}],
        [{"a": None}, {"a": None, "c": None}],
    ),
    (
        an_object(dependencies={"a": ["b"], "b": {"required": ["c"]}}),
        [{}, {"c": None}, {"a": None, "b": None, "c": None}],
        [{"a": None}, {"b": None}, {"a": None, "b": None}],
    ),
    (
        {**an_object(), "properties": {"a": NULL, "b": {"type": ["null", "boolean"]}},
         "dependentSchemas": {"a": {"properties": {"b": NULL}}, "c": False}},
        [{"a": None}, {"a": None, "b": None}, {"b": True}],
        [{"a": None, "b": True}, {"c": None}],
    ),
    (
        {"type": "object", "propertyNames": {"minLength": 2, "maxLength": 3}},
        [{}, {"ab": 1}],
        [{"a": 1}, {"abcd": 1}],
    ),
    ({"type": "object", "propertyNames": {"const": "k"}}, [{}, {"k": 1}], [{"a": 1}]),
    ({"type": "object", "propertyNames": False}, [{}], [{"a": 1}]),
    (
        {"type": "object", "propertyNames": {"$ref": "#/$defs/k"}, "$defs": {"k": {"enum": ["k", "l"]}}},
        [{}, {"k": 1, "l": 2}],
        [{"a": 1}],
    ),
    ({"type": "object", "propertyNames": {"format": "date"}}, [{}, {"2024-02-29": 1}], [{"2023-02-29": 1}]),
    ({"type": "object", "propertyNames": {"format": "path"}}, [{}, {"a": 1}], []),
]  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")  # the fixtures' own
@pytest.mark.parametrize(("schema", "valid", "invalid"), MEANINGS)
async def test_meanings(
    grammars: Grammars,  # noqa: F811
    model: TokenizedModel,  # noqa: F811
    schema: dict[str, Any],
    valid: list[Any],
    invalid: list[Any],
) -> None:
    # Of "dependencies" newer drafts say nothing.
    draft = jsonschema.Draft7Validator if "dependencies" in schema else jsonschema.Draft202012Validator
    validator = functools.partial(draft, format_checker=draft.FORMAT_CHECKER)
    grammar = await grammars.json_schema(model, json.dumps(schema), field="f")
    for value in valid + invalid:
        assert validator(schema).is_valid(value) is (value in valid)
        assert admits(grammar, model, json.dumps(value)) is (value in valid), value
    for seed in range(3):
        text = text_of(throw(grammar.constraint(), model, seed, haste=0.7), model)
        assert validator(schema).is_valid(json.loads(text)), text


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"not": {}}, "#/not"),
        ({"enum": [1], "not": {"const": 1}}, "#/not"),
        ({"type": "null", "not": {"type": "null"}}, "#/not"),
        ({"type": "number", "not": {"type": "integer"}}, "#/not"),
        ({"type": "string", "not": {"const": "a"}}, "#/not"),
        ({"not": {"required": ["a"]}}, "#/not"),
        ({"type": "object", "not": {"required": "a"}}, "#/not"),
        ({"items": {"not": {"minimum": 3}}}, "#/items/not"),
        ({"dependentRequired": {"a": ["b"]}}, "#/dependentRequired"),
        ({"type": "object", "dependentRequired": {"a": 5}}, "#/dependentRequired"),
        ({"not": {"type": "text"}}, "#/not"),
        ({"type": "object", "propertyNames": {"type": "number"}}, "#/propertyNames"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "enum": [1], "not": {"const": 2}}, "#/not"),
        ({"not": {"type": [[]]}}, "#/not"),
        ({"enum": [1], "not": {"enum": 5}}, "#/not"),
        ({"type": "object", "propertyNames": {"maxLength": "3"}}, "#/propertyNames"),
        ({"type": "object", "propertyNames": {"minLength": True}}, "#/propertyNames"),
        ({"type": "object", "propertyNames": {"minLength": -1}}, "#/propertyNames"),
        (
            {
                "type": "object",
                "propertyNames": {"enum": [f"n{i}" for i in range(500)]},
                "additionalProperties": {"enum": list(range(500))},
            },
            "#/propertyNames",
        ),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}], "items": {}},
            "#/prefixItems",
        ),
    ],
)
def test_what_cannot_be_said_otherwise_is_refused(schema: Any, path: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        prepared(json.dumps(schema), strict=False, field="f")
    assert raised.value.metadata["path"] == path
