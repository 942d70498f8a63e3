"""Lists without repetition."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from osaurus_grpc.chat.grammar import Grammars, TokenizedModel
from osaurus_grpc.chat.schema import prepared
from osaurus_grpc.chat.schema_unique import unique_lists
from osaurus_grpc.errors import InvalidRequestError
from tests.chat.test_grammar import grammars, model, text_of, throw  # noqa: F401  (fixtures)

COLORS = {"enum": ["red", "green", "blue"], "type": "string", "title": "Color"}


def unique(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "uniqueItems": True, **more}


def test_every_order_of_every_choice() -> None:
    assert unique_lists(unique(COLORS), {"enum": [1, "a"]}) == [(), (1,), ("a",), (1, "a"), ("a", 1)]
    assert unique_lists(unique(COLORS, minItems=2), {"enum": [1, 1.0, True]}) == [(1.0, True), (True, 1.0)]
    assert unique_lists(unique(COLORS, maxItems=1), {"const": None}) == [(), (None,)]
    assert len(unique_lists(unique({}), {"enum": list(range(5))}) or ()) == 326
    assert len(unique_lists(unique({}, maxItems=2), {"enum": list(range(12))}) or ()) == 145


@pytest.mark.parametrize(
    "schema",
    [
        unique(COLORS),
        unique({"$ref": "#/$defs/color"}, minItems=1, maxItems=2, **{"$defs": {"color": COLORS}}),
        {"type": "object", "properties": {"c": unique(COLORS, minItems=3)}, "required": ["c"]},
        unique({"type": "integer"}, minItems=1, maxItems=1),
    ],
)
@pytest.mark.asyncio(loop_scope="module")  # the fixtures' own
async def test_no_value_comes_twice(
    grammars: Grammars,  # noqa: F811
    model: TokenizedModel,  # noqa: F811
    schema: Any,
) -> None:
    grammar = await grammars.json_schema(model, json.dumps(schema), field="f")
    for seed in range(8):
        text = text_of(throw(grammar.constraint(), model, seed, haste=0.7), model)
        assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)), text


@pytest.mark.parametrize(
    "schema",
    [
        unique({"type": "string"}),
        unique({"enum": list(range(6))}),
        unique({"enum": ["a"]}, minItems=2),
        unique({"enum": ["a", 1], "type": "string"}),
        unique({"enum": ["a", "b"], "minLength": 1}),
        {"items": COLORS, "uniqueItems": True},
        {**unique(COLORS), "contains": {"const": "red"}},
        unique({**COLORS, "not": {"const": "red"}}),
        unique(COLORS, minItems=-1),
        unique({"enum": [letter * 200 for letter in "abcde"]}),
        {**unique(COLORS), "prefixItems": [{}]},
        {**unique(COLORS), "type": ["array", "null"]},
    ],
)
def test_other_lists_are_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        prepared(json.dumps(schema), strict=False, field="f")
    assert raised.value.metadata == {"keyword": "uniqueItems", "path": "#/uniqueItems"}
