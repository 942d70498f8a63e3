"""Grammars on every family's own tokenizer: what they let through is what clients read.

Run as test_families.py is.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from osaurus_grpc.chat.detokenize import Detokenizer
from osaurus_grpc.chat.grammar import Grammars
from osaurus_grpc.chat.vocabulary import Vocabulary
from tests.chat.test_grammar import model_of, text_of, throw
from tests.families.families import FAMILIES
from tests.harness.schemas import SCHEMAS

TEXT = (
    '{"name": "Zoë  naïve 日本語 🦕\\n\\t x", "n": [1, -2.5e3, 12345678901], "ключ": {"a": null}}\n'
    '  def f(x):\n\treturn "é" # ─┐ \u200d👩‍👩‍👧 Ω≈ç√'
)
_SAMPLE = 400


@pytest.fixture(scope="module", params=sorted({family.tokenizer for family in FAMILIES if family.tokenizer}))
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "tokenizers" / request.param)
    return loaded


@pytest.fixture(scope="module")
def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    return Vocabulary(model_of(tokenizer))


def test_a_texts_tokens_are_its_bytes(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    data = b"".join(map(vocabulary.bytes_of, token_ids))
    # SentencePiece puts a space at a text's start.
    assert data.decode().removeprefix(" ") == TEXT
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.step, token_ids)) + detokenizer.finish() == TEXT


def test_a_tokens_bytes_are_what_it_adds_to_a_text(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> None:
    letter = tokenizer.encode("a", add_special_tokens=False)[-1]

    def decoded(*token_ids: int) -> str:
        return str(
            tokenizer.decode([letter, *token_ids, letter], clean_up_tokenization_spaces=False)
        ).removeprefix(" ")

    behind = decoded().removeprefix("a")
    tried = 0
    for token_id in random.Random(1).sample(range(len(tokenizer)), _SAMPLE):
        try:
            text = vocabulary.bytes_of(token_id).decode()
        except UnicodeDecodeError:
            continue
        if text:
            assert decoded(token_id) == f"a{text}{behind}"
            tried += 1
    assert tried > _SAMPLE / 2


async def test_answers_satisfy_their_schemas(tokenizer: PreTrainedTokenizerBase) -> None:
    model, grammars = model_of(tokenizer), Grammars()
    for name in ("nested", "unicode keys", "enum of kinds"):
        grammar = await grammars.json_schema(model, json.dumps(SCHEMAS[name]), strict=True)
        for seed in range(2):
            text = text_of(throw(grammar.constraint(), model, seed), model)
            jsonschema.validate(json.loads(text), SCHEMAS[name])
    grammars.close()
