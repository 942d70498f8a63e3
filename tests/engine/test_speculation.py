"""Speculative decoding: whatever is guessed, by whom and how well, the answer is that of plain decoding."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osaurus_grpc.engine import sampling
from osaurus_grpc.engine.drafting import DraftModel, KeptBesideDraft
from osaurus_grpc.engine.sampling import RowSampler
from osaurus_grpc.engine.speculation import Lookup, Pace, Toll
from osaurus_grpc.engine.types import (
    GenerationRequest,
    SamplingParams,
    StopCause,
    TokensGenerated,
)
from osaurus_grpc.errors import EngineError, ModelUnusableError

from .conftest import GREEDY, VOCAB, answer, collect, request, running_engine, tiny_model, token_ids
from .test_engine import SETTINGS, Faulty

REPETITIVE = (3, 1, 4, 1, 5, 9, 2, 6) * 8
TWIN = tiny_model
STRANGER = partial(tiny_model, seed=5)
# By prompt lookup, by a model that guesses everything right, and by one that guesses little right.
WAYS: dict[str, dict[str, Any]] = {
    "lookup": {"prompt_lookup_tokens": 6},
    "twin": {"draft": TWIN},
    "stranger": {"draft": STRANGER, "draft_tokens": 3},
    "lookup and stranger": {"prompt_lookup_tokens": 4, "draft": STRANGER},
}


@pytest.fixture(autouse=True)
def _always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses as many as may be: whether it pays depends on the clock, and is tested by itself."""
    monkeypatch.setattr(Pace, "count", lambda self, plain_seconds: self._most)


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    """Random ones, of which some repeat themselves."""
    made = random.Random(seed)
    found = []
    for i in range(count):
        part = tuple(made.randrange(VOCAB) for _ in range(made.choice((1, 3, 8, 30))))
        found.append(part * made.choice((2, 5)) if i % 2 else part)
    return found


async def plain_answers(asked: list[GenerationRequest], **options: Any) -> list[list[int]]:
    async with running_engine(**options) as engine:
        return [await answer(engine, one) for one in asked]


# What is guessed.


def test_lookup_finds_what_followed_the_last_time():
    lookup = Lookup()
    assert lookup.propose([1, 2, 3, 4, 5, 1, 2], 3, 3) == [4, 5, 1]
    assert lookup.propose([1, 2, 3, 4, 5, 1, 2, 3, 9, 2], 3, 4) == [9, 2, 3, 9], "the later one"
    assert Lookup().propose([1, 2, 3, 4], 5, 3) == []
    assert Lookup().propose([], 5, 3) == []


def test_lookup_prefers_the_longer_match():
    tokens = [7, 1, 2, 50, 8, 1, 2, 60, 7, 1]
    assert Lookup().propose(tokens, 2, 1) == [50]


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 3), st.integers(1, 12))
def test_lookup_grown_step_by_step_is_lookup_of_the_whole(tokens, last, count):
    grown = Lookup()
    for i in range(len(tokens)):
        grown.propose(tokens[:i], tokens[i], 1)
    found = grown.propose(tokens, last, count)
    assert found == Lookup().propose(tokens, last, count)
    assert len(found) in (0, count)
    whole = [*tokens, last]
    if found:  # the guess continues the sequence as some earlier place of it went on
        assert any(whole[i - 2 : i] == whole[-2:] and whole[i] == found[0] for i in range(2, len(whole)))
    else:
        assert not any(whole[i - 2 : i] == whole[-2:] for i in range(2, len(whole)))


# Whether it pays.


def paying_count(pace: Pace, plain_seconds: float) -> int:
    return _COUNT(pace, plain_seconds)


_COUNT: Callable[[Pace, float], int] = Pace.count


def test_nothing_is_guessed_before_a_plain_step_was_timed():
    pace = Pace(4, Toll())
    assert paying_count(pace, 0.0) == 0
    assert not pace.is_paused
    assert paying_count(pace, 1.0) == 4


def test_good_guesses_are_long_and_poor_ones_are_given_up_and_tried_again_ever_later():
    toll = Toll()
    toll.observe(1.4, plain_seconds=1.0, guessed=4)
    assert toll.seconds == pytest.approx(0.1)
    pace = Pace(8, toll)
    for _ in range(20):
        pace.note(8, 8)
    assert paying_count(pace, 1.0) == 8
    pauses = []
    for _ in range(3):
        while paying_count(pace, 1.0):
            pace.note(8, 0)
        waited = 0
        while pace.is_paused:
            pace.rest()
            waited += 1
        pauses.append(waited)
    assert pauses == [16, 32, 64]
    assert paying_count(pace, 1.0) > 0


def test_dear_guesses_are_shorter_and_the_dearest_not_made():
    counts = []
    for cost in (0.01, 0.2, 0.5, 2.0):
        toll = Toll()
        toll.observe(1.0 + cost, plain_seconds=1.0, guessed=1)
        pace = Pace(8, toll)
        assert paying_count(pace, 1.0) == 4, "the first is made to learn"
        for _ in range(20):
            pace.note(8, 3)
        counts.append(paying_count(pace, 1.0))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > counts[3] == 0


def test_what_was_slow_for_once_does_not_end_guessing_for_good():
    """Here the very first guess, while the device compiles."""
    toll = Toll()
    toll.observe(50.0, plain_seconds=1.0, guessed=4)
    first = Pace(8, toll)
    first.note(4, 4)
    assert paying_count(first, 1.0) == 0
    second = Pace(8, toll)
    guessed = paying_count(second, 1.0)
    assert guessed > 0
    toll.observe(1.2, plain_seconds=1.0, guessed=guessed)
    second.note(guessed, guessed)
    assert paying_count(second, 1.0) > 0


def test_tokens_after_the_first_wrong_one_are_not_held_against_a_guess():
    toll = Toll()
    toll.observe(1.3, plain_seconds=1.0, guessed=1)
    pace = Pace(8, toll)
    pace.note(4, 3)
    before = paying_count(pace, 1.0)
    for _ in range(30):
        pace.note(8, 3)  # three in four that were judged
    assert paying_count(pace, 1.0) == before


# The answer.


@pytest.mark.parametrize("way", WAYS)
async def test_greedy_is_the_same_with_guesses(way):
    asked = [request(prompt=prompt, max_tokens=40) for prompt in [*prompts(4, 1), REPETITIVE]]
    expected = await plain_answers(asked)
    async with running_engine(**WAYS[way]) as engine:
        assert [await answer(engine, one) for one in asked] == expected
        stats = engine.stats()
    assert stats.drafted_tokens > 0
    if way == "twin":
        assert stats.accepted_tokens >= 0.9 * stats.drafted_tokens
    else:
        assert stats.accepted_tokens > 0
    if "stranger" in way:
        assert stats.accepted_tokens < stats.drafted_tokens


@pytest.mark.parametrize(
    ("way", "on_host"), [("lookup", True), ("twin", True), ("lookup and stranger", False)]
)
async def test_a_seeded_answer_is_the_same_with_guesses(monkeypatch, way, on_host):
    """Whatever its settings: the n-th token is drawn with the n-th number."""
    monkeypatch.setattr(sampling, "_IS_HOST", on_host)
    asked = [
        request(prompt=prompt, max_tokens=25, sampling=replace(params, seed=5 + i))
        for i, (params, prompt) in enumerate(zip(SETTINGS, prompts(len(SETTINGS), 3), strict=True))
    ]
    expected = await plain_answers(asked)
    async with running_engine(**WAYS[way]) as engine:
        assert [await answer(engine, one) for one in asked] == expected
        assert engine.stats().drafted_tokens > 0


@pytest.mark.parametrize("on_host", [True, False])
async def test_a_draft_model_draws_with_the_numbers_of_the_sequence(monkeypatch, on_host):
    """So that one which gives the same distribution is right at any temperature."""
    monkeypatch.setattr(sampling, "_IS_HOST", on_host)
    async with running_engine(draft=TWIN) as engine:
        for params in SETTINGS[:5]:
            await answer(engine, request(max_tokens=40, sampling=replace(params, seed=4)))
        stats = engine.stats()
    assert stats.accepted_tokens > 0.9 * stats.drafted_tokens > 100


@pytest.fixture(scope="module")
def loop_of_engines() -> Any:
    """A plain engine and one that guesses, in an event loop of their own that examples share."""
    loop = asyncio.new_event_loop()
    contexts = [running_engine(), running_engine(prompt_lookup_tokens=5, draft=STRANGER, draft_tokens=2)]
    engines = [loop.run_until_complete(context.__aenter__()) for context in contexts]
    yield loop, engines
    for context in contexts:
        loop.run_until_complete(context.__aexit__(None, None, None))
    loop.close()


@settings(max_examples=25)
@given(
    part=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    times=st.integers(1, 6),
    length=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
)
def test_guesses_change_no_answer(loop_of_engines, part, times, length, temperature):
    loop, engines = loop_of_engines
    asked = request(
        prompt=tuple(part * times),
        max_tokens=length,
        sampling=SamplingParams(temperature=temperature, seed=1),
    )
    plain, guessed = (loop.run_until_complete(answer(engine, asked)) for engine in engines)
    assert guessed == plain


async def test_log_probabilities_are_those_of_plain_decoding():
    asked = request(prompt=REPETITIVE, max_tokens=20, top_logprobs=3)
    async with running_engine() as engine:
        plain = await collect(engine, asked)
    async with running_engine(draft=TWIN) as engine:
        guessed = await collect(engine, asked)
        assert engine.stats().accepted_tokens > 0

    def tokens(events: list[Any]) -> list[Any]:
        return [t for event in events if isinstance(event, TokensGenerated) for t in event.tokens]

    for one, other in zip(tokens(plain), tokens(guessed), strict=True):
        assert one.token_id == other.token_id
        assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
        assert [t.token_id for t in other.top] == [t.token_id for t in one.top]


class Alternating:
    """Allows even and odd tokens in turn, and is done after some."""

    def __init__(self, length: int) -> None:
        self._length, self._said = length, 0

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == self._said % 2
        self._said += 1

    def mask(self) -> npt.NDArray[np.uint32]:
        return np.full(VOCAB // 32, (0x55555555, 0xAAAAAAAA)[self._said % 2], np.uint32)

    @property
    def is_done(self) -> bool:
        return self._said == self._length

    def fork(self) -> Alternating:
        return Alternating(self._length)


@pytest.mark.parametrize("way", ["twin", "lookup"])
async def test_a_constraint_sees_accepted_tokens_only(way):
    asked = request(prompt=REPETITIVE, max_tokens=60, constraint=Alternating(33))
    expected = await plain_answers([asked])
    assert len(expected[0]) == 33
    async with running_engine(**WAYS[way]) as engine:
        assert [await answer(engine, asked)] == expected
        assert engine.stats().drafted_tokens > 0


async def test_an_answer_ends_at_its_limit_within_a_guess():
    async with running_engine(draft=TWIN) as engine:
        for length in range(1, 9):
            asked = request(prompt=REPETITIVE, max_tokens=length)
            events = await collect(engine, asked)
            assert len(token_ids(events)) == length == events[-1].completion_tokens
            assert events[-1].cause is StopCause.MAX_TOKENS


async def test_an_answer_ends_at_its_end_token_within_a_guess():
    (full,) = await plain_answers([request(max_tokens=30)])
    for end in sorted(set(full[2:12])):
        expected = full[: full.index(end)]
        async with running_engine(draft=TWIN, end_tokens=(end,), draft_tokens=7) as engine:
            events = await collect(engine, request(max_tokens=30))
            assert token_ids(events) == expected
            assert events[-1].cause is StopCause.END_OF_SEQUENCE


async def test_tokens_of_one_pass_come_in_one_event():
    async with running_engine(draft=TWIN) as engine:
        events = await collect(engine, request(max_tokens=60))
    assert any(isinstance(event, TokensGenerated) and len(event.tokens) > 1 for event in events)


# Rows that come and go.


@pytest.mark.parametrize(
    ("way", "sampled"),
    [
        ("lookup", GREEDY),
        ("twin", GREEDY),
        ("lookup and stranger", GREEDY),
        ("twin", SamplingParams(temperature=1.0, seed=9)),
    ],
)
async def test_another_request_joining_and_leaving_changes_nothing(way, sampled):
    """The first one guesses, decodes beside the other one, and guesses again."""
    long = request(prompt=REPETITIVE, max_tokens=400, sampling=sampled)
    short = [request(prompt=prompt, max_tokens=10 + i) for i, prompt in enumerate(prompts(4, 7))]
    expected = await plain_answers([long, *short])
    async with running_engine(**WAYS[way], prefill_chunk_tokens=16) as engine:
        said: list[int] = []
        beside: list[asyncio.Task[list[int]]] = []
        drafted: list[int] = []
        async with asyncio.timeout(60):
            async for event in engine.generate(long):
                if not isinstance(event, TokensGenerated):
                    continue
                said.extend(t.token_id for t in event.tokens)
                # One event may bring many tokens where this task does not get to run.
                while len(beside) < len(short) and len(said) > 25 * (len(beside) + 1):
                    drafted.append(engine.stats().drafted_tokens)
                    beside.append(asyncio.create_task(answer(engine, short[len(beside)])))
            assert [said, *(await asyncio.gather(*beside))] == expected
        assert len(beside) == len(short)
        assert drafted[0] < engine.stats().drafted_tokens


async def test_a_row_left_alone_with_padding_guesses_again():
    """It was the shorter one of a batch, so its cache begins with padding."""
    asked = request(prompt=(1, 2), max_tokens=200)
    other = request(prompt=tuple(range(60)), max_tokens=20)
    expected = await plain_answers([asked])
    async with running_engine(draft=TWIN) as engine:
        first, _ = await asyncio.gather(answer(engine, asked), answer(engine, other))
        assert [first] == expected
        assert engine.stats().drafted_tokens > 100


async def test_a_model_with_windows_or_states_decodes_plainly():
    for kind in ("gemma3", "mamba2"):
        asked = [request(prompt=REPETITIVE, max_tokens=40)]
        expected = await plain_answers(asked, kind=kind)
        async with running_engine(kind=kind, prompt_lookup_tokens=4) as engine:
            assert [await answer(engine, asked[0])] == expected
            assert engine.stats().drafted_tokens == 0


@pytest.mark.parametrize("way", ["twin", "lookup and stranger"])
async def test_cancelling_within_a_guess_leaves_a_cache_that_the_next_request_can_use(way):
    """What was accepted, and nothing else, is kept."""
    asked = request(prompt=REPETITIVE, max_tokens=300)
    async with running_engine(**WAYS[way], prompt_cache_bytes=2**22) as engine:
        said: list[int] = []
        generation = engine.generate(asked)
        async for event in generation:
            if isinstance(event, TokensGenerated):
                said.extend(t.token_id for t in event.tokens)
                if len(said) > 40:
                    break
        await generation.aclose()
        onward = request(prompt=(*REPETITIVE, *said, 7, 8), max_tokens=30)
        events = await collect(engine, onward)
        assert events[0].cached_tokens >= len(REPETITIVE) + len(said) - 1
        assert token_ids(events) == (await plain_answers([onward]))[0]


@pytest.mark.parametrize("way", ["twin", "lookup and stranger"])
async def test_turns_of_a_chat_reuse_what_was_accepted(way):
    async with running_engine(**WAYS[way], prompt_cache_bytes=2**22) as engine:
        history = REPETITIVE
        for turn in range(4):
            asked = request(prompt=history, max_tokens=33 + turn)
            events = await collect(engine, asked)
            if turn:
                assert events[0].cached_tokens >= len(history) - 4
            assert token_ids(events) == (await plain_answers([asked]))[0]
            history = (*history, *token_ids(events), 50 + turn, 60)


# Trouble.


async def test_after_a_device_error_the_answer_goes_on_and_guesses_no_more():
    asked = request(prompt=REPETITIVE, max_tokens=80)
    expected = await plain_answers([asked])
    for failing in (6, 9, 14):
        wrap = partial(Faulty, plan=lambda call, _, failing=failing: call == failing)
        async with running_engine(wrap=wrap, prompt_lookup_tokens=5) as engine:
            assert [await answer(engine, asked)] == expected


async def test_an_error_inside_the_draft_model_costs_its_guesses_only():
    def faulty() -> Faulty:
        return Faulty(tiny_model(), lambda call, _: call > 12)

    asked = request(prompt=REPETITIVE, max_tokens=60)
    expected = await plain_answers([asked])
    async with running_engine(draft=faulty) as engine:
        for _ in range(2):
            assert [await answer(engine, asked)] == expected


async def test_a_request_that_always_fails_still_ends():
    async with running_engine(wrap=lambda m: Faulty(m, lambda *_: True), draft=TWIN) as engine:
        with pytest.raises(EngineError):
            await answer(engine, request())


def drafted(model: DraftModel, tokens: list[int], last: int, count: int = 3) -> list[int]:
    """Guesses until the prompt is read."""
    sampler = RowSampler(GREEDY, tokens, (), top_logprobs=None, seed=0, vocab_size=VOCAB)
    for _ in range(10):
        if found := model.propose(tokens, last, count, sampler).tokens:
            return found
    return []


def test_a_draft_model_follows_a_sequence_whatever_was_guessed():
    """Prompts longer than a chunk, tokens that were guessed and others, another sequence, and back."""
    made = random.Random(3)
    model = tiny_model()
    following = DraftModel(model, VOCAB)
    for _ in range(3):
        tokens = [made.randrange(VOCAB) for _ in range(made.choice((5, 700)))]
        last = made.randrange(VOCAB)
        for _ in range(6):
            found = drafted(following, tokens, last)
            assert len(found) == 3
            assert found == drafted(DraftModel(model, VOCAB), list(tokens), last)
            right = made.randrange(4)
            tokens += [last, *found[:right]]
            last = found[right] if right < 3 else made.randrange(VOCAB)


def test_a_draft_model_guesses_nothing_beyond_its_vocabulary():
    model = DraftModel(tiny_model(), 40)
    assert max(drafted(model, [1, 2, 3], 4, count=8)) < 40
    assert drafted(model, [1, 2, 3], 41) == []
    assert len(drafted(model, [1, 2, 3], 5)) == 3


class Kept:
    """Kept beginnings of some size."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def allow(self, nbytes: int) -> None:
        self.nbytes = min(self.nbytes, nbytes)


def test_a_draft_models_cache_is_the_first_to_make_way():
    model = DraftModel(tiny_model(), VOCAB)
    kept = Kept(1000)
    together = KeptBesideDraft(kept, model)
    assert together.nbytes == 1000
    tokens = [1, 2, 3]
    assert drafted(model, tokens, 4)
    held = together.nbytes
    assert held > 1000
    together.allow(held)
    assert together.nbytes == held
    together.allow(held - 1)
    assert together.nbytes == 1000
    together.allow(10)
    assert together.nbytes == 10
    assert drafted(model, tokens, 4) == [], "not again for this sequence: it would only be dropped again"
    assert drafted(model, [1, 2, 3], 4)


async def test_a_model_whose_cache_cannot_be_cut_back_cannot_draft():
    with pytest.raises(ModelUnusableError, match="cannot draft"):
        async with running_engine(draft=partial(tiny_model, "mamba2")):
            pass
