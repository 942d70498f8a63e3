"""Admission and chunk sizes, without any tensor."""

from __future__ import annotations

import itertools

import pytest

from osaurus_grpc.engine.scheduler import Scheduler, StepClock
from osaurus_grpc.engine.sequence import Sequence
from osaurus_grpc.engine.types import GenerationRequest, SamplingParams

UIDS = itertools.count(1000)


def sequence(length: int, name: str = "") -> Sequence:
    return Sequence(GenerationRequest(name, "m", (1,) * length, 5, SamplingParams()), seed=0)


def scheduler(size: int = 8, chunk: int = 512) -> Scheduler:
    return Scheduler(max_batch_size=size, prefill_chunk_tokens=chunk)


def admit(target: Scheduler) -> list[Sequence]:
    admitted = target.admit()
    for one in admitted:
        target.started(one, uid=next(UIDS))
    return admitted


def test_short_prompts_join_together():
    target = scheduler()
    target.waiting.extend(sequence(30) for _ in range(6))
    assert len(admit(target)) == 6
    assert not target.waiting


def test_the_batch_is_bounded():
    target = scheduler(size=4)
    target.waiting.extend(sequence(3) for _ in range(6))
    assert len(admit(target)) == 4
    assert len(target.waiting) == 2
    assert admit(target) == []


def test_one_long_prompt_at_a_time_in_order_and_short_ones_pass():
    target = scheduler()
    first, second, short = sequence(5000, "a"), sequence(5000, "b"), sequence(10, "c")
    target.waiting.extend([first, second, short])
    assert admit(target) == [first, short]
    assert list(target.waiting) == [second]
    first.is_decoding = short.is_decoding = True
    assert admit(target) == [second]


def test_skipped_prompts_keep_their_order():
    target = scheduler()
    longs = [sequence(5000, str(i)) for i in range(4)]
    target.waiting.extend(longs)
    admit(target)
    assert list(target.waiting) == longs[1:]


def test_ended_sequences_leave_from_wherever_they_are():
    target = scheduler(size=1)
    running, waiting = sequence(3), sequence(3)
    target.waiting.extend([running, waiting])
    admit(target)
    target.ended(waiting)
    target.ended(running)
    assert len(target) == 0
    target.ended(running)  # again: nothing happens


@pytest.mark.parametrize(
    ("pause", "decode", "per_token", "decoding", "expected"),
    [
        (4, 0.05, 0.001, 2, 128),  # a pause of four decode steps: 0.05 + 128 * 0.001 <= 0.2
        (7, 0.05, 0.001, 2, 256),  # of seven: 0.05 + 256 * 0.001 <= 0.35
        (4, 0.05, 0.001, 0, 256),  # nobody waits: half a second
        (4, 0.05, 1.0, 2, 64),  # never below the smallest
        (4, 0.05, 1e-7, 2, 512),  # never above the largest
    ],
)
def test_chunks_fit_the_pause_they_may_make(pause, decode, per_token, decoding, expected):
    clock = StepClock(pause)
    clock.observe(decode, decoding=1, prefilled=0)
    for _ in range(100):
        clock.observe(decode + 100 * per_token, decoding=0, prefilled=100)
    assert clock.chunk_tokens(512, decoding=decoding) == expected


def test_a_chunk_is_never_larger_than_the_setting():
    assert StepClock().chunk_tokens(16, decoding=0) == 16


def test_a_long_prompt_gets_in_between_a_stream_of_short_answers():
    """Each of them is in prefill, for one token still, when the next one asks."""
    target = scheduler(size=4)
    long_one = sequence(5000, "long")
    before = sequence(100)
    target.waiting.append(before)
    (running,) = admit(target)
    target.waiting.append(long_one)
    for _ in range(20):
        running.prefilled = 99  # the last token is fed by the next step
        target.waiting.append(sequence(100))
        admitted = admit(target)
        if long_one in admitted:
            return
        target.ended(running)
        (running,) = admitted
    pytest.fail("the long prompt never got in")
