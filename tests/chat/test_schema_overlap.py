"""What is told apart has no value in common, and oneOf by its letter."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osaurus_grpc.chat.grammar import Grammars, TokenizedModel
from osaurus_grpc.chat.schema import prepared
from osaurus_grpc.chat.schema_overlap import Looks, Overlap, TooMuchToCompareError, telling_property
from osaurus_grpc.errors import InvalidRequestError
from tests.chat.test_grammar import grammars, model, text_of, throw  # noqa: F401  (fixtures)

INTEGER = {"type": "integer"}
STRING = {"type": "string"}


def no_reference(reference: str) -> object:
    raise AssertionError(reference)


def are_apart(left: object, right: object) -> bool:
    return Overlap(no_reference, no_reference).are_apart(left, right)


def an_object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


APART = [
    (INTEGER, STRING),
    ({"type": ["integer", "null"]}, {"type": ["string", "array"]}),
    (False, True),
    ({"const": 1}, {"const": 2}),
    ({"const": 1}, {"const": True}),
    ({"enum": ["a", {"k": [1]}]}, {"enum": ["b", {"k": [2]}]}),
    ({"enum": [1, 2]}, {"type": "integer", "minimum": 3}),
    ({"enum": ["abc", None]}, {"type": "string", "maxLength": 2}),
    ({"const": {"a": 1}}, an_object("b")),
    ({"const": {"a": 1}}, an_object("a", a=STRING)),
    ({"const": [1, "x"]}, {"type": "array", "prefixItems": [STRING]}),
    ({"type": "number", "maximum": 3}, {"type": "integer", "exclusiveMinimum": 3}),
    ({"minimum": 5, "type": "number"}, {"maximum": 3}),
    ({"type": "string", "maxLength": 2}, {"type": "string", "minLength": 3}),
    ({"type": "array", "maxItems": 1}, {"type": "array", "minItems": 2}),
    ({"type": "array", "items": INTEGER, "minItems": 1}, {"type": "array", "items": STRING}),
    ({"type": "array", "prefixItems": [{}, INTEGER], "minItems": 2}, {"type": "array", "items": STRING}),
    ({"type": "array", "items": [STRING], "minItems": 1}, {"type": "array", "items": INTEGER}),
    (an_object("k", k={"const": "a"}), an_object(k={"const": "b"})),
    (an_object("a"), {"type": "object", "additionalProperties": False}),
    (an_object("a"), {"type": "object", "additionalProperties": STRING, "properties": {"a": INTEGER}}
     | {"properties": {"a": False}}),
    (an_object("a", "b"), {"type": "object", "maxProperties": 0, "minProperties": 0}
     | {"additionalProperties": False}),
    ({"anyOf": [INTEGER, {"type": "null"}]}, {"oneOf": [STRING, {"type": "boolean"}]}),
    ({"allOf": [{"minLength": 1}, STRING]}, {"allOf": [INTEGER]}),
]  # fmt: skip

TOGETHER = [
    (True, INTEGER),
    (INTEGER, {"type": "number"}),
    (INTEGER, {"minLength": 3}),
    ({"const": 1}, {"const": 1.0}),
    ({"enum": ["a", "b"]}, {"enum": ["b"]}),
    ({"type": "number", "maximum": 3}, {"type": "number", "minimum": 3}),
    ({"type": "array", "items": INTEGER}, {"type": "array", "items": STRING}),
    (an_object(k={"const": "a"}), an_object(k={"const": "b"})),
    (an_object("a"), an_object("b")),
    (an_object("ab", ab=INTEGER), {"type": "object", "patternProperties": {"^a": INTEGER},
                                   "additionalProperties": False}),
]  # fmt: skip


@pytest.mark.parametrize(("left", "right"), APART)
def test_apart(left: object, right: object) -> None:
    assert are_apart(left, right)
    assert are_apart(right, left)


@pytest.mark.parametrize(("left", "right"), TOGETHER)
def test_not_apart(left: object, right: object) -> None:
    assert not are_apart(left, right)
    assert not are_apart(right, left)


SCALARS = st.sampled_from([None, True, False, 0, 1, 1.0, 2, 2.5, -1, "", "a", "ab", "abc"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abk"), inner, max_size=3),
    max_leaves=6,
)
KINDS = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])


def keywords(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    small = st.integers(0, 3)
    several = st.lists(inner, min_size=1, max_size=2)
    return st.fixed_dictionaries(
        {},
        optional={
            "type": KINDS | st.lists(KINDS, min_size=1, max_size=2, unique=True),
            "const": VALUES,
            "enum": st.lists(VALUES, min_size=1, max_size=3),
            "minimum": st.sampled_from([0, 1, 1.5]),
            "maximum": st.sampled_from([0, 1, 1.5]),
            "exclusiveMinimum": small,
            "exclusiveMaximum": small,
            "minLength": small,
            "maxLength": small,
            "minItems": small,
            "maxItems": small,
            "minProperties": small,
            "maxProperties": small,
            "items": inner,
            "prefixItems": several,
            "properties": st.dictionaries(st.sampled_from("abk"), inner, max_size=2),
            "patternProperties": st.dictionaries(st.sampled_from(["^a", "k"]), inner, max_size=1),
            "additionalProperties": inner,
            "required": st.lists(st.sampled_from("abk"), max_size=2, unique=True),
            "anyOf": several,
            "allOf": several,
            "oneOf": several,
        },
    )


SCHEMAS = st.recursive(st.booleans() | keywords(st.booleans()), keywords, max_leaves=5)


@settings(max_examples=400)
@given(SCHEMAS, SCHEMAS, st.lists(VALUES, min_size=1, max_size=12))
def test_no_value_satisfies_what_is_told_apart(left: Any, right: Any, values: list[Any]) -> None:
    if are_apart(left, right):
        for value in values:
            assert not all(
                jsonschema.Draft202012Validator(schema).is_valid(value) for schema in (left, right)
            ), value


def test_what_takes_too_long_is_not_finished() -> None:
    union: dict[str, Any] = {"anyOf": [{"minLength": 1}, {"maxLength": 1}]}
    for _ in range(12):
        union = {"anyOf": [union, union]}
    with pytest.raises(TooMuchToCompareError):
        are_apart(union, union)


def test_the_property_that_tells_objects_apart() -> None:
    cat, dog = an_object(n=INTEGER, k={"const": "cat"}), an_object(k={"enum": ["dog", "wolf"]}, n=INTEGER)
    assert telling_property([cat, dog], Looks()) == "k"
    assert telling_property([cat, dog, an_object(k={"const": "wolf"})], Looks()) is None
    assert telling_property([cat, dog, an_object(n=INTEGER)], Looks()) is None
    assert (
        telling_property([cat, {"type": ["object", "null"], "properties": dog["properties"]}], Looks())
        is None
    )
    assert telling_property([True, cat], Looks()) is None


def union_of(*alternatives: Any, **more: Any) -> dict[str, Any]:
    return {"oneOf": list(alternatives), **more}


def kind(name: str, *required: str, **more: Any) -> dict[str, Any]:
    return an_object(*required, kind={"const": name, "default": name, "type": "string"}, **more)


SHAPES = {
    "circle": kind("circle", "size", size={"type": "integer", "minimum": 0, "maximum": 9}),
    "square": kind("square", "size", size={"type": "integer", "minimum": 0, "maximum": 9}),
    "none": kind("none"),
}
TREES = {
    "leaf": kind("leaf", n={"type": "integer", "minimum": 0, "maximum": 9}),
    "node": kind("node", "sub", sub=union_of({"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/node"})),
}

ONE_OF = {
    "a union of models by a constant that has a default, as pydantic writes it": union_of(
        *({"$ref": f"#/$defs/{name}"} for name in SHAPES),
        discriminator={"propertyName": "kind"},
        **{"$defs": SHAPES},
    ),
    "the same inline": union_of(*SHAPES.values()),
    "one that refers to itself": {"$ref": "#/$defs/node", "$defs": TREES},
    "references through references": union_of(
        {"$ref": "#/$defs/x", "description": "indeed"}, {"$ref": "#/$defs/square"},
        **{"$defs": {**SHAPES, "x": {"$ref": "#/$defs/circle"}}},
    ),
    "numbers by their bounds": union_of(
        {"type": "integer", "minimum": 0, "maximum": 9}, {"type": "integer", "minimum": 20, "maximum": 25}
    ),
    "strings by their lengths": union_of(
        {**STRING, "maxLength": 2}, {**STRING, "minLength": 4, "maxLength": 6}
    ),
    "lists by their items": union_of(
        {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 3},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    ),
    "exactly one of two properties": {
        **an_object(a={"type": "null"}, b={"type": "boolean"}), "additionalProperties": False,
        "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "what says nothing of the type around it": {"type": "boolean", "oneOf": [{"minimum": 3}]},
    "closed objects of which one has more": union_of(
        {**an_object("a", a={"type": "null"}), "additionalProperties": False},
        {**an_object("a", "b", a={"type": "null"}, b={"type": "null"}), "additionalProperties": False},
    ),
}  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")  # the fixtures' own
@pytest.mark.parametrize("name", ONE_OF)
async def test_one_of_is_enforced_by_its_letter(
    grammars: Grammars,  # noqa: F811
    model: TokenizedModel,  # noqa: F811
    name: str,
) -> None:
    schema = ONE_OF[name]
    validator = jsonschema.Draft202012Validator(schema)
    grammar = await grammars.json_schema(model, json.dumps(schema), strict=False, field="f")
    for seed in range(12):
        text = text_of(throw(grammar.constraint(), model, seed, haste=0.7), model)
        assert validator.is_valid(json.loads(text)), text


REFUSED = {
    "objects that others admit, too": union_of(an_object("a", a=INTEGER), an_object(b=INTEGER)),
    "one with more than another, both open": union_of(an_object("a"), an_object("a", "b")),
    "properties without a type": union_of(
        an_object("k", k={"minLength": 3}), an_object("k", k={"maximum": 5})
    ),
    "patterns": union_of({**STRING, "pattern": "^a"}, {**STRING, "pattern": "^b"}),
    "one property or both": {"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["a", "b"]}]},
    "constants in a draft that has none": union_of({"const": 1}, {"const": 2}),
    "a property of constants in that draft": union_of(kind("a", "kind"), kind("b", "kind")),
    "what an older draft ignores beside a reference": union_of(
        {"$ref": "#/$defs/n", "maximum": 3}, {"$ref": "#/$defs/n", "minimum": 5}
    ),
    "properties of which exactly one must be there, and very many": {
        "type": "object", "oneOf": [{"required": [f"p{n}"]} for n in range(101)],
    },
    "multiples": {**INTEGER, "oneOf": [{"multipleOf": 3}, {"multipleOf": 5}]},
    "very many": union_of(*({**STRING, "minLength": n, "maxLength": n} for n in range(400))),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_alternatives_that_are_not_told_apart_are_refused(name: str) -> None:
    schema = {"items": REFUSED[name], "$defs": {"n": INTEGER}}
    if "draft" in name:
        schema["$schema"] = "http://json-schema.org/draft-04/schema#"
    with pytest.raises(InvalidRequestError) as raised:
        prepared(json.dumps(schema), strict=False, field="f")
    assert raised.value.metadata == {"keyword": "oneOf", "path": "#/items/oneOf"}
    assert "cannot be enforced: " in raised.value.message
    # Where a schema is only asked to help, they are a union.
    assert "anyOf" in json.loads(prepared(json.dumps(schema), strict=False, lenient=True, field="f"))["items"]


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        (union_of({"$ref": 5}), "#/oneOf/0/$ref"),
        (union_of({"$ref": "#/nothing"}, {}), "#/oneOf/0/$ref"),
        (union_of({"$ref": "#/oneOf/1"}, {"$ref": "#/oneOf/0"}), "#/oneOf/0/$ref"),
        (
            union_of(
                {"$ref": "u:x#/$defs/a"},
                **{"$id": "u:x", "$defs": {"a": {"$ref": "u:x#/$defs/b"}, "b": {"$ref": "u:x#/%24defs/a"}}},
            ),
            "#/oneOf/0/$ref",
        ),
        ({"oneOf": []}, "#/oneOf"),
        (union_of({"type": [[]]}), "#/oneOf/0/type"),
        (union_of({"type": {}}), "#/oneOf/0/type"),
        (union_of(kind("a"), {"not": {}, "type": {}, "required": [[]]}), "#/oneOf"),
        ({"oneOf": [{"$ref": "#/$defs/a", "not": {"minimum": 1}}], "$defs": {"a": {}}}, "#/oneOf/0/not"),
        (union_of(an_object("k", k={"const": 1}) | {"required": "k"}, kind("a")), "#/oneOf/0/required"),
    ],
)
def test_what_is_wrong_in_an_alternative_is_named(schema: Any, path: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        prepared(json.dumps(schema), strict=False, field="f")
    assert raised.value.metadata["path"] == path


CHAIN = {**{f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(3_000)}, "a3000": {"type": "null"}}
SAME = {"type": "object", "properties": {f"p{i}": {"const": 1} for i in range(3_000)}}


@pytest.mark.timeout(20)  # each once took longer
@pytest.mark.parametrize(
    "schema",
    [
        union_of(*[{"$ref": "#/$defs/a0"}] * 2_500, **{"$defs": CHAIN}),
        union_of(*[{"$ref": "#/$defs/a"}] * 2_500, **{"$defs": {"a": SAME}}),
        union_of({"enum": list(range(1_000))}, {"anyOf": [{"const": list(range(500))}] * 80}),
        {"type": "object", "oneOf": [{"required": [f"p{i}"]} for i in range(6_000)]},
    ],
)
def test_what_would_take_too_long_to_compare_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        prepared(json.dumps(schema), strict=False, field="f")
    assert raised.value.metadata == {"keyword": "oneOf", "path": "#/oneOf"}
