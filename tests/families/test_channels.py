"""Harmony's channels on gpt-oss's own tokenizer: forced calls whose reasoning is bounded."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.channels import ChannelGate
from osaurus_grpc.chat.grammar import Grammars, Trigger
from osaurus_grpc.chat.style import ChatStyle
from osaurus_grpc.chat.template import chat_style
from tests.chat.calls.answers import TOOLS, check, grammar_of
from tests.chat.calls.walks import Model, walk
from tests.conftest import SMOLLM
from tests.families.families import FAMILIES

pytestmark = pytest.mark.smollm
ANALYSIS = "<|channel|>analysis<|message|>"


@pytest.fixture(scope="module")
def tokenizer(folder: Path, smollm_dir: Path) -> PreTrainedTokenizerBase:
    (family,) = (family for family in FAMILIES if family.name == "gpt-oss")
    return family.load(folder, smollm_dir / SMOLLM)


@pytest.mark.parametrize("limit", [0, 7])
async def test_forced_calls_after_bounded_reasoning(tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    style = chat_style(tokenizer, with_tools=True)
    assert isinstance(tokenizer.eos_token_id, int)
    model = Model(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    grammars = Grammars()
    grammar = grammar_of(style.syntax, tokenizer, is_forced=True)
    compiled = await grammars.lark(model, grammar.text)
    grammars.close()
    reasoned = 0
    for seed in range(4):
        inner = compiled.constraint()
        gate = ChannelGate(tokenizer, inner, vocab_size=model.vocab_size, max_tokens=limit, waits=False)
        token_ids = walk(model, gate, seed)
        check(
            tokenizer,
            partial(_reader, style),
            style.shown,
            token_ids,
            is_single=True,
        )
        written = tokenizer.decode(token_ids)
        thought = written.partition(ANALYSIS)[2].partition("<|end|>")[0]
        assert (ANALYSIS in written) <= (limit > 0)
        assert len(tokenizer.encode(thought, add_special_tokens=False)) <= 2 * limit
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        if ANALYSIS in written:
            reasoned += 1
            assert token_ids.index(end) <= 3 + limit
    assert bool(reasoned) == bool(limit)


async def test_an_analysis_that_names_a_function_is_no_call(tokenizer: PreTrainedTokenizerBase) -> None:
    style = chat_style(tokenizer, with_tools=True)
    assert isinstance(tokenizer.eos_token_id, int)
    model = Model(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    grammars = Grammars()
    grammar = grammar_of(style.syntax, tokenizer, is_forced=False)
    compiled = await grammars.lark(model, grammar.text)
    grammars.close()
    inner = compiled.constraint(Trigger(text=grammar.trigger, is_required=False), repeats=grammar.repeats)
    gate = ChannelGate(tokenizer, inner, vocab_size=model.vocab_size, max_tokens=None, waits=True)

    thought = tokenizer.encode(f"{ANALYSIS}I write to=functions. and then", add_special_tokens=False)
    for token_id in thought:
        gate.accept(token_id)
    assert gate.mask() is None
    for token_id in tokenizer.encode(
        "<|end|><|start|>assistant<|channel|>commentary to=functions.", add_special_tokens=False
    ):
        gate.accept(token_id)
    mask = gate.mask()
    assert mask is not None
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    names = {tokenizer.decode([int(token_id)]) for token_id in allowed}
    assert all(any(tool.name.startswith(name) for tool in TOOLS) for name in names)


def _reader(style: ChatStyle, streams: bool) -> AnswerReader | None:
    return style.reader(is_reasoning=False, tools=TOOLS, streams_calls=streams)
