"""Answers in which no mark opens a call: held to form from their first token, free where they do not call."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.calls import families
from osaurus_grpc.chat.calls.lark import call_grammar
from osaurus_grpc.chat.calls.rules import checked_tool
from osaurus_grpc.chat.calls.syntax import CallSyntax
from osaurus_grpc.chat.grammar import Grammars
from osaurus_grpc.chat.types import ToolSpec
from tests.chat.calls.walks import Model, tokenizer_with_marks

SCHEMA = json.dumps({"properties": {"a": {"type": "integer"}}})
TOOLS = [checked_tool(ToolSpec(name, "", SCHEMA), index, is_strict=True) for index, name in enumerate("fg")]
LISTED, ADDRESSED = families.PYTHONIC, families.FUNCTIONARY_32


@pytest.mark.smollm
@pytest.mark.parametrize(
    ("syntax", "text", "end"),
    [
        (LISTED, "[f(a=1), g()]", "may"),
        (LISTED, "<|python_start|>[f(a=1)]<|python_end|>", "may"),
        (LISTED, "\n[f(a=1)", "may not"),
        (LISTED, "[1] says [f(x)].", "may"),
        (LISTED, "[f is free.", "may"),
        (LISTED, "", "may"),
        (LISTED, "[f(x", "refused"),
        (LISTED, "[f(a=1)] and", "refused"),
        (ADDRESSED, 'f\n{"a": 1}>>>g\n{}', "may"),
        (ADDRESSED, 'all\nSo:>>>f\n{"a": 1}', "may"),
        (ADDRESSED, "all\n>>> print(1)\n>>>h\nfree", "may"),
        (ADDRESSED, "all\nSo:>>>f\n", "may not"),
        (ADDRESSED, "all\nSo:>>>f\nfree", "refused"),
        (ADDRESSED, "f\nfree", "refused"),
    ],
)
async def test_what_looks_like_a_call_is_one(
    tokenizer: PreTrainedTokenizerBase, syntax: CallSyntax, text: str, end: str
) -> None:
    marked = tokenizer_with_marks(tokenizer, syntax, is_special=True)
    assert isinstance(marked.eos_token_id, int)
    model = Model(marked, frozenset({marked.eos_token_id}), len(marked))
    grammar = call_grammar(syntax, marked, TOOLS, is_forced=False, is_parallel=True)
    assert not grammar.trigger
    assert not grammar.trigger_ids
    grammars = Grammars()
    constraint = (await grammars.lark(model, grammar.text)).constraint()
    grammars.close()

    def admits(token_id: int) -> bool:
        mask = constraint.mask()
        assert mask is not None
        return bool(mask[token_id // 32] >> (token_id % 32) & 1)

    for token_id in marked.encode(text, add_special_tokens=False):
        if not admits(token_id):
            assert end == "refused"
            return
        constraint.accept(token_id)
    assert admits(marked.eos_token_id) == (end == "may")
    assert end != "refused"
