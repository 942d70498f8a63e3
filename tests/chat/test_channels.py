"""Harmony's channels: bounded analyses, and calls that are looked for outside them only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from osaurus_grpc.chat.channels import ChannelGate

MARKS = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>"]


class Recorder:
    """Lets everything through and keeps what it was given."""

    is_done = False

    def __init__(self) -> None:
        self.taken: list[int] = []

    def accept(self, token_id: int) -> None:
        self.taken.append(token_id)

    def mask(self) -> npt.NDArray[np.uint32] | None:
        return None

    def fork(self) -> Recorder:
        return Recorder()


@pytest.fixture(scope="module")
def harmony(smollm_dir: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(smollm_dir / "smollm2-135m-instruct")
    loaded.add_special_tokens({"additional_special_tokens": MARKS}, replace_extra_special_tokens=False)
    return loaded


def fed(gate: ChannelGate, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        gate.accept(token_id)


def allowed(gate: ChannelGate, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    mask = gate.mask()
    if mask is None:
        return set(range(len(tokenizer)))
    ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return {int(token_id) for token_id in ids if token_id < len(tokenizer)}


def made(tokenizer: PreTrainedTokenizerBase, limit: int | None, *, waits: bool = True) -> ChannelGate:
    return ChannelGate(tokenizer, Recorder(), vocab_size=len(tokenizer), max_tokens=limit, waits=waits)


def test_an_analysis_is_ended_at_its_limit_and_not_begun_again(harmony: PreTrainedTokenizerBase) -> None:
    everything = set(range(len(harmony)))
    end = harmony.convert_tokens_to_ids("<|end|>")
    analysis = harmony.encode("analysis", add_special_tokens=False)[0]
    first = made(harmony, 2)
    for gate in (first, first.fork()):
        fed(gate, harmony, "<|channel|>analysis<|message|>")
        assert allowed(gate, harmony) == everything
        fed(gate, harmony, " a")
        fed(gate, harmony, " b")
        assert allowed(gate, harmony) == {end}
        fed(gate, harmony, "<|end|><|start|>assistant")
        assert allowed(gate, harmony) == everything
        fed(gate, harmony, "<|channel|>")
        assert allowed(gate, harmony) == everything - {analysis}
        fed(gate, harmony, "final<|message|> a b c")
        assert allowed(gate, harmony) == everything


def test_no_analysis_at_all(harmony: PreTrainedTokenizerBase) -> None:
    gate = made(harmony, 0)
    fed(gate, harmony, "<|channel|>")
    assert harmony.encode("analysis", add_special_tokens=False)[0] not in allowed(gate, harmony)


@pytest.mark.parametrize("waits", [True, False])
def test_what_waits_for_a_call_does_not_see_analyses(harmony: PreTrainedTokenizerBase, waits: bool) -> None:
    inner = Recorder()
    gate = ChannelGate(harmony, inner, vocab_size=len(harmony), max_tokens=None, waits=waits)
    fed(gate, harmony, "<|channel|>analysis<|message|> to=functions.f<|end|> after")
    assert (" to=functions.f" in harmony.decode(inner.taken)) is not waits
    assert harmony.decode(inner.taken).endswith(" after")
