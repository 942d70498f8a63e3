from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.chat.stop import StopMatcher
from osaurus_grpc.errors import InvalidRequestError

# Two letters make overlaps and near misses common.
TEXT = st.text(alphabet="ab", max_size=40)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=5)


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the stop that completes first, the longest of those that complete together."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def pieces(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(borders)]


@given(TEXT, STOPS, st.lists(st.integers(0, 100), max_size=10))
def test_any_cut_of_the_text_gives_the_first_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    results = [matcher.feed(piece) for piece in pieces(text, cuts)]
    matches = [result.matched for result in results if result.matched is not None]
    out = "".join(result.text for result in results) + matcher.flush()
    expected, matched = reference(text, stops)
    assert out == expected
    assert matches == ([] if matched is None else [matched])
    assert not any(stop in out for stop in stops)


@given(TEXT, STOPS)
def test_holds_back_no_more_than_may_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    result = matcher.feed(text)
    if result.matched is None:
        prefixes = {stop[:end] for stop in stops for end in range(len(stop))}
        longest = max((prefix for prefix in prefixes if text.endswith(prefix)), key=len)
        assert text == result.text + longest


def test_a_stop_across_pieces() -> None:
    matcher = StopMatcher(["apital"])
    assert matcher.feed("The c").text == "The c"
    assert matcher.feed("apit").text == ""
    result = matcher.feed("al of France")
    assert (result.text, result.matched) == ("", "apital")
    assert matcher.feed("more").text == ""
    assert matcher.flush() == ""


def test_a_false_start_is_let_go() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.feed("a\n").text == "a"
    assert matcher.feed("\n\nUse").text == "\n"
    assert matcher.feed("ful").text == "\n\nUseful"


@pytest.mark.parametrize("stop", ["]", "^", "-", "\\", "[^a]", "😀", "\n", "\0"])
def test_characters_that_mean_something_to_regular_expressions(stop: str) -> None:
    matcher = StopMatcher([stop])
    result = matcher.feed(f"xyz{stop}")
    assert (result.text, result.matched) == ("xyz", stop)


def test_no_stops_hold_nothing() -> None:
    matcher = StopMatcher([])
    assert matcher.feed("anything").text == "anything"


def test_an_empty_stop_is_refused_by_its_place() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        StopMatcher(["a", ""])
    assert caught.value.field == "sampling.stop[1]"
