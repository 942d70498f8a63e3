"""Reasoning before a constraint: what may open it, what ends it, and what holds behind it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from osaurus_grpc.chat.gate import Reasoning, ReasoningGate

VOCAB = 70
END, OPEN, CLOSE, WANTED, OTHER = 1, 2, 66, 5, 40
TEXTS = {OPEN: b"<think>", CLOSE: b"</think>", WANTED: b"{", OTHER: b"hm"}


class OneToken:
    """Lets one token through and is done."""

    def __init__(self) -> None:
        self.is_done = False

    def accept(self, token_id: int) -> None:
        assert token_id == WANTED
        self.is_done = True

    def mask(self) -> npt.NDArray[np.uint32] | None:
        mask = np.zeros(3, np.uint32)
        mask[WANTED // 32] = 1 << WANTED % 32
        return mask

    def fork(self) -> OneToken:
        return OneToken()


def gate(
    *, is_open: bool, limit: int | None = None, can_open: bool = True, bound: bool = True
) -> ReasoningGate:
    reasoning = Reasoning((OPEN,) if can_open else (), (CLOSE,), b"</think>", is_open, limit)
    return ReasoningGate(
        reasoning,
        OneToken() if bound else None,
        end_ids=[END],
        vocab_size=VOCAB,
        token_bytes=lambda token_id: TEXTS.get(token_id, b"x"),
    )


def allowed(made: ReasoningGate) -> set[int]:
    mask = made.mask()
    if mask is None:
        return set(range(VOCAB))
    assert mask.shape == (3,)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()) & set(
        range(VOCAB)
    )


@pytest.mark.parametrize("is_forked", [False, True])
def test_a_constraint_holds_behind_reasoning_that_the_prompt_opened(is_forked: bool) -> None:
    made = gate(is_open=True)
    if is_forked:
        made.accept(CLOSE)
        made.accept(WANTED)
        made = made.fork()
    assert allowed(made) == set(range(VOCAB)) - {END}
    made.accept(OTHER)
    made.accept(CLOSE)
    assert allowed(made) == {WANTED}
    made.accept(WANTED)
    assert made.is_done


def test_the_first_token_decides_whether_there_is_reasoning() -> None:
    made = gate(is_open=False)
    assert allowed(made) == {OPEN, WANTED}
    made.accept(OPEN)
    assert END not in allowed(made)
    assert OTHER in allowed(made)
    without = made.fork()
    without.accept(WANTED)
    assert without.is_done


def test_reasoning_that_is_too_long_is_closed() -> None:
    made = gate(is_open=True, limit=2)
    made.accept(OTHER)
    assert len(allowed(made)) > 1
    made.accept(OTHER)
    assert allowed(made) == {CLOSE}
    made.accept(CLOSE)
    assert allowed(made) == {WANTED}


def test_a_limit_alone_leaves_the_answer_free() -> None:
    made = gate(is_open=True, limit=1, bound=False)
    assert allowed(made) == set(range(VOCAB))
    made.accept(OTHER)
    assert allowed(made) == {CLOSE}
    made.accept(CLOSE)
    assert allowed(made) == set(range(VOCAB))
    assert not made.is_done
