"""Rows under a constraint: what they may say, among rows that may say anything."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.types import GenerationFinished, SamplingParams, StopCause, TokensGenerated
from osaurus_grpc.errors import EngineError, InvalidRequestError

from .conftest import GREEDY, VOCAB, answer, collect, request, running_engine, token_ids
from .test_engine import Faulty

END = 5


class Ladder:
    """Lets through only tokens above the last one by at most a step, and ends with the highest."""

    def __init__(self, step: int, top: int = VOCAB - 1) -> None:
        self._step, self._top, self.last = step, top, 0

    def accept(self, token_id: int) -> None:
        if not self.last < token_id <= self.last + self._step:
            raise RuntimeError("a token that was masked")
        self.last = token_id

    def mask(self) -> npt.NDArray[np.uint32] | None:
        allowed = range(self.last + 1, min(self.last + self._step, self._top) + 1)
        return bits(allowed)

    @property
    def is_done(self) -> bool:
        return self.last >= self._top

    def fork(self) -> Ladder:
        return type(self)(self._step, self._top)


class Late(Ladder):
    """Free for three tokens, then a ladder from 0."""

    seen = 0

    def accept(self, token_id: int) -> None:
        self.seen += 1
        if self.seen > 3:
            super().accept(token_id)

    def mask(self) -> npt.NDArray[np.uint32] | None:
        return None if self.seen < 3 else super().mask()


class Failing(Ladder):
    """Fails with what it is given, where it is told to."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(7)
        self._where, self._error = where, error

    def _maybe(self, where: str) -> None:
        if where == self._where:
            raise self._error

    def accept(self, token_id: int) -> None:
        super().accept(token_id)
        self._maybe("accept")

    def mask(self) -> npt.NDArray[np.uint32] | None:
        self._maybe("mask")
        if self.last:
            self._maybe("second mask")
        return super().mask()

    def fork(self) -> Failing:
        self._maybe("fork")
        return Failing(self._where, self._error)


def bits(allowed: Any) -> npt.NDArray[np.uint32]:
    flags = np.zeros(VOCAB, bool)
    flags[list(allowed)] = True
    return np.packbits(flags, bitorder="little").view("<u4").astype(np.uint32)


def assert_is_ladder(ids: list[int], step: int, top: int = VOCAB - 1) -> None:
    assert ids[-1] == top
    assert all(0 < b - a <= step for a, b in zip([0, *ids], ids, strict=False))


SAMPLINGS = {
    "greedy": GREEDY,
    "hot": SamplingParams(temperature=1.5, seed=3),
    "truncating": SamplingParams(temperature=1.0, top_p=0.4, min_p=0.05, seed=4),
    "top_k": SamplingParams(temperature=1.0, top_k=3, seed=5),
    "penalised": SamplingParams(
        temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={1: 50.0, 90: -50.0}
    ),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
async def test_a_row_keeps_to_its_constraint_and_ends_with_it(
    engine: Engine, sampling: SamplingParams
) -> None:
    events = await collect(engine, request(max_tokens=96, sampling=sampling, constraint=Ladder(6)))
    assert_is_ladder(token_ids(events), 6)
    assert isinstance(events[-1], GenerationFinished)
    assert events[-1].cause is StopCause.END_OF_SEQUENCE
    assert events[-1].completion_tokens == len(token_ids(events))


async def test_all_of_them_beside_free_rows_say_what_they_say_alone(engine: Engine) -> None:
    constrained = [
        request((1, 2, i), 96, sampling, constraint=Ladder(3 + i))
        for i, sampling in enumerate(SAMPLINGS.values())
    ]
    free = [request((7, i), 40, sampling) for i, sampling in enumerate(list(SAMPLINGS.values())[:3])]
    late = request((9, 9), 60, GREEDY, constraint=Late(5))
    asked = [*constrained, *free, late]
    alone = [await answer(engine, one) for one in asked]
    assert await asyncio.gather(*(answer(engine, one) for one in asked)) == alone
    for i, ids in enumerate(alone[: len(constrained)]):
        assert_is_ladder(ids, 3 + i)
    assert alone[-1][:3] == await answer(engine, request((9, 9), 3))
    assert_is_ladder(alone[-1][3:], 5)


async def test_max_tokens_cuts_a_constrained_answer(engine: Engine) -> None:
    events = await collect(engine, request(max_tokens=4, constraint=Ladder(2)))
    assert len(token_ids(events)) == 4
    assert isinstance(events[-1], GenerationFinished)
    assert events[-1].cause is StopCause.MAX_TOKENS


async def test_an_answer_that_is_whole_with_its_last_token_was_not_cut(engine: Engine) -> None:
    events = await collect(engine, request(max_tokens=1, constraint=Ladder(1, 1)))
    assert token_ids(events) == [1]
    assert isinstance(events[-1], GenerationFinished)
    assert events[-1].cause is StopCause.END_OF_SEQUENCE


async def test_an_end_token_ends_where_the_constraint_lets_it() -> None:
    class Ending(Ladder):
        def mask(self) -> npt.NDArray[np.uint32] | None:
            return bits([END]) if self.last > 20 else super().mask()

        def accept(self, token_id: int) -> None:
            if token_id != END or self.last < 20:
                super().accept(token_id)

    async with running_engine(end_tokens=(END,)) as engine:
        # Ladder(20): the first rungs may be END itself, so it starts above.
        events = await collect(engine, request(max_tokens=96, constraint=Ending(20), sampling=BIASED))
        assert isinstance(events[-1], GenerationFinished)
        assert events[-1].cause is StopCause.END_OF_SEQUENCE
        assert END not in token_ids(events)
        assert token_ids(events)[-1] > 20


BIASED = SamplingParams(temperature=0.0, logit_bias={END: -100.0})


async def test_logprobs_are_those_before_the_mask(engine: Engine) -> None:
    free = await collect(engine, request(max_tokens=1, top_logprobs=VOCAB))
    held = await collect(engine, request(max_tokens=1, top_logprobs=VOCAB, constraint=Ladder(2)))
    (free_token,) = [t for e in free if isinstance(e, TokensGenerated) for t in e.tokens]
    (held_token,) = [t for e in held if isinstance(e, TokensGenerated) for t in e.tokens]
    assert held_token.top == free_token.top
    assert held_token.token_id in (1, 2)
    assert held_token.logprob == {t.token_id: t.logprob for t in free_token.top}[held_token.token_id]


@pytest.mark.parametrize("where", ["fork", "mask", "second mask", "accept"])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InvalidRequestError("too much", field="response_format"), InvalidRequestError),
        (KeyError("a bug"), EngineError),
    ],
    ids=["typed", "untyped"],
)
async def test_a_failing_constraint_ends_its_own_row(
    engine: Engine, where: str, error: Exception, told: type[Exception]
) -> None:
    free = request((7, 7), 30)
    expected = await answer(engine, free)
    ladder = request((4, 5), 96, constraint=Ladder(9))
    ladder_alone = await answer(engine, ladder)

    async def fail() -> None:
        with pytest.raises(told) as raised:
            await collect(engine, request((8, 8), 96, constraint=Failing(where, error)))
        assert raised.value is error or told is EngineError

    results = await asyncio.gather(answer(engine, free), fail(), answer(engine, ladder))
    assert results[0] == expected
    assert results[2] == ladder_alone
    assert engine.stats().running == 0


async def test_a_constraint_survives_a_device_error() -> None:
    asked = [
        request((1, 2, 3), 96, SAMPLINGS["hot"], constraint=Ladder(4)),
        request((3, 2, 1), 96, constraint=Late(9)),
        request((5, 5), 30),
    ]
    async with running_engine() as whole:
        expected = [await answer(whole, one) for one in asked]
    failed: list[int] = []

    def fails(call: int, inputs: Any) -> bool:
        if call in (9, 23):
            failed.append(len(inputs))
        return call in (9, 23)

    async with running_engine(wrap=lambda model: Faulty(model, fails)) as broken:
        assert await asyncio.gather(*(answer(broken, one) for one in asked)) == expected
    assert failed
    assert max(failed) > 1


async def test_the_next_pass_does_not_wait_for_a_constraint() -> None:
    """When a token is told to a constraint, the device has the pass that is fed it already."""
    passes: list[int] = []
    begun: list[int] = []

    class Watching(Ladder):
        def accept(self, token_id: int) -> None:
            begun.append(len(passes))
            super().accept(token_id)

    def note(call: int, inputs: Any) -> bool:
        passes.append(call)
        return False

    async with running_engine(wrap=lambda model: Faulty(model, note)) as watched:
        ids = await answer(watched, request((1, 2, 3), 96, constraint=Watching(16)))
    assert len(begun) == len(ids)
    prompt = begun[0]  # the first token is read as soon as it is there
    assert begun[1:-1] == [prompt + n for n in range(2, len(ids))]
