"""What a tool's schema becomes before a call is held to it."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.calls import families
from osaurus_grpc.chat.calls.lark import call_grammar
from osaurus_grpc.chat.calls.rules import checked_tool
from osaurus_grpc.chat.grammar import Grammars
from osaurus_grpc.chat.types import ToolSpec
from osaurus_grpc.errors import InvalidRequestError
from tests.chat.calls.walks import Model

TEXT = {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "properties", "others"),
    [
        ({"properties": {"a": TEXT}}, {"a": TEXT}, False),
        ({"properties": {"a": TEXT}, "additionalProperties": TEXT}, {"a": TEXT}, TEXT),
        # A member that is required is one, whether or not it is declared.
        (
            {"properties": {"a": TEXT, "b": TEXT}, "required": ["c", "b"]},
            {"a": TEXT, "b": TEXT, "c": {}},
            False,
        ),
        ({"properties": {}, "required": ["c"], "additionalProperties": TEXT}, {}, TEXT),
    ],
)
def test_objects_are_closed_where_clients_do_not_say(
    schema: object, properties: object, others: object
) -> None:
    tool = checked_tool(ToolSpec("f", "", json.dumps(schema)), 0, is_strict=True)
    assert list(tool.schema["properties"].items()) == list(properties.items())
    assert tool.schema["additionalProperties"] == others


@pytest.mark.smollm
@pytest.mark.parametrize(
    ("schema", "is_satisfied"),
    [
        ({"properties": {}, "required": ["c"]}, True),
        ({"properties": {"a": TEXT}, "unevaluatedProperties": False}, True),
        ({"properties": {}, "required": ["c"], "additionalProperties": False}, False),
        ({"properties": {}, "required": ["c"], "unevaluatedProperties": False}, False),
    ],
)
async def test_calls_are_held_to_what_can_be_satisfied(
    tokenizer: PreTrainedTokenizerBase, schema: object, is_satisfied: bool
) -> None:
    assert isinstance(tokenizer.eos_token_id, int)
    model = Model(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    tool = checked_tool(ToolSpec("f", "", json.dumps(schema)), 0, is_strict=True)
    grammar = call_grammar(families.HERMES, tokenizer, [tool], is_forced=True, is_parallel=True)
    grammars = Grammars()
    try:
        if is_satisfied:
            await grammars.lark(model, grammar.text)
            return
        with pytest.raises(InvalidRequestError):
            await grammars.lark(model, grammar.text)
    finally:
        grammars.close()
