"""Random walks through a grammar: what a model that knows nothing could write under it."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.calls.syntax import CallSyntax
from osaurus_grpc.chat.gate import TokenConstraint
from osaurus_grpc.chat.grammar import GrammarConstraint

_MARK = re.compile(r"\]<\]\w+\[>\[|<[^<>\s=]{2,}>|\[[A-Z_]+\]")
_CLOSING = frozenset('"]}<>)')
_MOST_TOKENS = 1200


@dataclass(frozen=True)
class Model:
    """What a grammar needs of a model."""

    tokenizer: Any
    eos_token_ids: frozenset[int]
    vocab_size: int


def tokenizer_with_marks(
    plain: PreTrainedTokenizerBase, syntax: CallSyntax, *, is_special: bool
) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer with the marks of a syntax as tokens of their own, as its family has them."""
    tokenizer = copy.deepcopy(plain)
    marks = sorted({mark for text in syntax.texts for mark in _MARK.findall(text)})
    if is_special:
        tokenizer.add_special_tokens({"additional_special_tokens": marks}, replace_extra_special_tokens=False)
    else:
        tokenizer.add_tokens(marks)
    return tokenizer


def walk(
    model: Model,
    constraint: TokenConstraint,
    seed: int,
    begun: Sequence[int] = (),
    closing: Sequence[Sequence[int]] = (),
) -> list[int]:
    """Tokens drawn at random from what the constraint lets through, up to an end it allows.

    Args:
        model: Whose tokens.
        constraint: At its beginning.
        seed: Of the draws.
        begun: Tokens that are there already, such as those of a trigger.
        closing: Tokens of marks that end a string, which chance alone would hardly write.
    """
    rng = random.Random(seed)
    (end,) = model.eos_token_ids
    token_ids: list[int] = []
    wanted = list(begun)
    while wanted or (not constraint.is_done and (not begun or _is_active(constraint))):
        assert len(token_ids) < _MOST_TOKENS, model.tokenizer.decode(token_ids)
        allowed = set(wanted) if begun and not _is_active(constraint) else _allowed(constraint)
        if wanted and wanted[0] in allowed:
            token_id = wanted.pop(0)
        else:
            # What seemed to end a string may turn out to be a part of another one, and not to fit there.
            wanted.clear()
            if end in allowed and (len(token_ids) > 60 or rng.random() < 0.3):
                break
            allowed.discard(end)
            has_haste = len(token_ids) > 20
            marks = [mark for mark in closing if mark[0] in allowed] if has_haste else []
            if marks and len(allowed) > 100 and rng.random() < 0.5:
                token_id, *wanted = rng.choice(marks)
            else:
                token_id = _drawn(model, sorted(allowed), rng, has_haste)
        constraint.accept(token_id)
        token_ids.append(token_id)
    return token_ids


def _is_active(constraint: TokenConstraint) -> bool:
    return isinstance(constraint, GrammarConstraint) and constraint.is_active


def _allowed(constraint: TokenConstraint) -> set[int]:
    mask = constraint.mask()
    assert mask is not None
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def _drawn(model: Model, allowed: list[int], rng: random.Random, has_haste: bool) -> int:
    """One of the tokens; in haste most often one that may close what is open."""
    if has_haste and rng.random() < 0.7:
        closing = sorted(_closing(model.tokenizer).intersection(allowed))
        if closing:
            return rng.choice(closing)
    return rng.choice(allowed)


@lru_cache(maxsize=1)
def _closing(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that begin with what closes something and hold little else."""
    return frozenset(
        index for name, index in tokenizer.get_vocab().items() if name[0] in _CLOSING and len(name) < 4
    )
