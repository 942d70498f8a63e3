"""Limits by the clock: the one thing a test cannot wait for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.errors import OverloadedError, RateLimitedError
from osaurus_grpc.server.admission import WINDOW_SECONDS, Admission


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fail_inside(admission: Admission) -> None:
    with admission.admit("m"):
        assert admission.active("m") == 1
        with pytest.raises(OverloadedError), admission.admit("m"):
            pass
        with admission.admit("another"):
            pass
        raise KeyError


def test_a_place_is_given_back_also_by_a_failure() -> None:
    admission = Admission(max_concurrent_requests=1, requests_per_minute=0)
    with pytest.raises(KeyError):
        fail_inside(admission)
    assert admission.active("m") == 0
    with admission.admit("m"):
        pass


def test_an_overloaded_model_says_about_when_a_place_falls_free() -> None:
    clock = Clock()
    admission = Admission(max_concurrent_requests=2, requests_per_minute=0, clock=clock)
    for _ in range(50):
        with admission.admit("m"):
            clock.now += 20.0
    with (
        admission.admit("m"),
        admission.admit("m"),
        pytest.raises(OverloadedError) as raised,
        admission.admit("m"),
    ):
        pass
    assert raised.value.retry_after_seconds == pytest.approx(10.0, rel=0.01)


def test_refused_requests_use_up_no_rate() -> None:
    clock = Clock()
    admission = Admission(max_concurrent_requests=1, requests_per_minute=2, clock=clock)
    with admission.admit("m"):
        for _ in range(10):
            with pytest.raises(OverloadedError), admission.admit("m"):
                pass
    with admission.admit("m"):
        pass
    with pytest.raises(RateLimitedError), admission.admit("m"):
        pass


@given(
    limit=st.integers(1, 8),
    gaps=st.lists(st.floats(0, 90, allow_nan=False, width=32), max_size=60),
)
def test_the_window_is_never_exceeded_and_retry_after_is_true(limit: int, gaps: list[float]) -> None:
    clock = Clock()
    admission = Admission(max_concurrent_requests=0, requests_per_minute=limit, clock=clock)
    admitted: list[float] = []
    for gap in gaps:
        clock.now += gap
        recent = [at for at in admitted if clock.now - at < WINDOW_SECONDS]
        if len(recent) == limit:
            with pytest.raises(RateLimitedError) as raised, admission.admit("m"):
                pass
            retry = raised.value.retry_after_seconds
            assert retry is not None
            assert 0 < retry <= WINDOW_SECONDS
            # A hair later than told, so that rounding does not decide.
            clock.now += retry + 1e-6
        with admission.admit("m"):
            admitted.append(clock.now)


def test_zero_is_no_limit() -> None:
    admission = Admission(max_concurrent_requests=0, requests_per_minute=0, clock=Clock())
    for _ in range(1000):
        with admission.admit("m"):
            pass
