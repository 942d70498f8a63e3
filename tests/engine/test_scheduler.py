"""Admission and chunk sizes, without any tensor."""

from __future__ import annotations

import itertools

import numpy as np
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
        (4, 0.05, 0.001, 2, 96),  # four decode steps, one for the token: 0.05 + 96 * 0.001 <= 0.15
        (8, 0.05, 0.001, 2, 256),  # eight: 0.05 + 256 * 0.001 <= 0.35
        (4, 0.05, 0.001, 0, 384),  # nobody waits: half a second
        (4, 0.05, 1.0, 2, 8),  # never below the smallest
        (1, 0.05, 1e-7, 2, 8),
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
    assert StepClock().chunk_tokens(5, decoding=1) == 5


def test_nobody_waits_for_a_large_chunk_of_which_nothing_is_known():
    clock = StepClock()
    clock.observe(0.05, decoding=1, prefilled=0)
    assert clock.chunk_tokens(512, decoding=1) == 8
    assert clock.chunk_tokens(512, decoding=0) == 256


def test_chunks_that_seem_to_cost_nothing_grow() -> None:
    clock = StepClock(4)
    clock.observe(0.05, decoding=1, prefilled=0)
    chunks = []
    for _ in range(7):
        chunks.append(clock.chunk_tokens(512, decoding=1))
        clock.observe(0.1, decoding=1, prefilled=chunks[-1])
    assert chunks == [8, 16, 32, 64, 128, 256, 512]


def test_room_is_left_for_steps_that_come_late():
    """One step in four takes a half longer than the others."""
    steady, unsteady = StepClock(4), StepClock(4)
    for step in range(200):
        for clock, late in ((steady, 1.0), (unsteady, 1.5 if step % 4 == 0 else 1.0)):
            clock.observe(0.05, decoding=1, prefilled=0)
            chunk = clock.chunk_tokens(512, decoding=1)
            clock.observe((0.1 + chunk * 0.001) * late, decoding=1, prefilled=chunk)
    assert steady.lateness <= 0.04
    assert steady.chunk_tokens(512, decoding=1) == 96
    assert 16 < unsteady.chunk_tokens(512, decoding=1) < 96
    # While nobody waits, nothing is late.
    alone = unsteady.chunk_tokens(512, decoding=0)
    unsteady.lateness = 0.0
    assert unsteady.chunk_tokens(512, decoding=0) == alone


def test_all_but_one_step_in_twenty_keep_to_the_bound():
    """Steps take up to three tenths longer than they should, each as likely as the other."""
    random = np.random.default_rng(0)
    clock = StepClock(4)
    pauses = []
    for _ in range(4_000):
        clock.observe(0.05, decoding=1, prefilled=0)
        # Any number of tokens may be in a chunk here, so that it is the bound which is kept to.
        allowed = (4 / (1 + clock.lateness) - 1) * 0.05
        tokens = int((allowed - 0.05) / max(0.001, clock.seconds_per_prompt_token))
        seconds = (0.1 + tokens * 0.001) * random.uniform(1.0, 1.3)
        clock.observe(seconds, decoding=1, prefilled=tokens)
        pauses.append(seconds / 0.05)
    late = np.mean(np.array(pauses[500:]) > 4)
    assert 0.01 < late < 0.08


def test_a_moment_in_which_the_machine_is_busy_makes_no_tiny_chunks():
    clock = StepClock(4)
    clock.observe(0.05, decoding=1, prefilled=0)
    clock.observe(0.1 + 64 * 0.001, decoding=1, prefilled=64)
    clock.observe(100 * (0.1 + 64 * 0.001), decoding=1, prefilled=64)
    clock.seconds_per_prompt_token = 0.001
    assert clock.chunk_tokens(512, decoding=1) >= 32


def test_chunks_follow_what_they_take():
    """Attention makes each chunk of a long prompt dearer than the one before."""
    clock = StepClock(4)
    sizes = []
    for step in range(200):
        clock.observe(0.05, decoding=1, prefilled=0)
        chunk = clock.chunk_tokens(512, decoding=1)
        taken = 0.05 + chunk * (0.0004 + 0.00002 * step)
        sizes.append(chunk)
        clock.observe(0.05 + taken, decoding=1, prefilled=chunk)
        assert taken <= 3 * 0.05 * 1.1
    assert sizes[0] == 8
    assert max(sizes) == 192
    assert sizes[-1] <= 16
    assert set(sizes) <= {8, 12, 16, 24, 32, 48, 64, 96, 128, 192}


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


def test_short_prompts_go_through_in_one_pass_whatever_the_pause():
    target = scheduler(size=8)
    target.clock.observe(0.05, decoding=1, prefilled=0)
    target.clock.observe(1.05, decoding=0, prefilled=100)
    target.waiting.extend([sequence(10, "running"), sequence(40, "short"), sequence(60, "another")])
    for uid, admitted in enumerate(target.admit()):
        target.started(admitted, uid)
    target.running[0].is_decoding = True
    assert target.chunk_tokens() == 256
    target.waiting.append(sequence(5000, "long"))
    for admitted in target.admit():
        target.started(admitted, 9)
    assert target.chunk_tokens() == 128
    target.running[1].is_decoding = target.running[2].is_decoding = True
    assert target.chunk_tokens() == 8
