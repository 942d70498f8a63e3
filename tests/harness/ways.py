"""The same answers asked for in several ways: streamed and whole, in batches of eight and alone.

OSAURUS_TEST_SEEDS says how many answers each schema gets. Without it, in the everyday run, each schema is
asked for once, as an answer or as a call; every other one is streamed, and a few are asked for again, alone
and the other way. With more than 1 each one is asked for both ways, the second time among other neighbours,
and one of each schema alone as well; 5 makes two hundred.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_ASKED_FOR: Final = int(os.environ.get("OSAURUS_TEST_SEEDS", "0"))
IS_EVERYDAY: Final = not _ASKED_FOR
SEEDS: Final = _ASKED_FOR or 1
AT_ONCE: Final = 8
# Their values have no bound but the model's taste.
UNBOUNDED: Final = frozenset({"tree", "list by itself"})
# What makes SmolLM2 come to an end with them: its tokens null, ], } and those of them with a space before.
ENDING_BIAS: Final = {str(token): 6.0 for token in (18220, 10034, 77, 6329, 4389, 109, 4029)}


@dataclass(frozen=True, slots=True)
class Asking:
    """One answer to ask for."""

    name: str
    seed: int
    is_streamed: bool

    @property
    def otherwise(self) -> Asking:
        """The same, streamed if this is not."""
        return Asking(self.name, self.seed, not self.is_streamed)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came; for a call, its arguments. Token ids where they are known."""

    text: str
    is_cut: bool
    token_ids: tuple[int, ...] = ()


Ask = Callable[[Asking], Awaitable[Answer]]


async def require_agreement(
    ask: Ask,
    check: Callable[[str, str], None],
    names: Sequence[str],
    alone: Iterable[str],
    first_seed: int,
    *,
    may_be_cut: Container[str] = (),
) -> None:
    """Ask in all ways; each answer must be valid, and the same whichever way it came.

    Args:
        ask: Asks for one answer.
        check: Fails for a text that the schema of a name does not admit.
        names: The schemas.
        alone: Those asked for alone in the everyday run.
        first_seed: The round: every other schema gets this seed, the others the next.
        may_be_cut: Schemas whose answers may be cut by their limit, and say so.
    """
    # Two by two, so that of each seed there are streams and whole answers.
    first = [Asking(name, first_seed + i % 2, (i // 2 + first_seed) % 2 == 0) for i, name in enumerate(names)]
    again = [asking.otherwise for asking in reversed(first)] if SEEDS > 1 else []
    chosen = set(names[first_seed::SEEDS] if SEEDS > 1 else alone)
    single = [asking.otherwise for asking in first if asking.name in chosen]

    answers = await _together(ask, first)
    seen = {asking.name: answer for asking, answer in zip(first, answers, strict=True)}
    for asking, answer in zip(first, answers, strict=True):
        if answer.is_cut:
            assert asking.name in may_be_cut, asking
        else:
            check(asking.name, answer.text)
    for asking, answer in zip(again, await _together(ask, again), strict=True):
        assert answer == seen[asking.name], asking
    for asking in single:
        assert await ask(asking) == seen[asking.name], asking
    # For the record of a long run; pytest shows it with -rP.
    streamed = sum(asking.is_streamed for asking in [*first, *again, *single])
    cut = sorted(asking.name for asking, answer in zip(first, answers, strict=True) if answer.is_cut)
    print(
        f"{len(first) - len(cut)} of {len(first)} valid, {len(cut)} without an end {cut}; "
        f"{len(first)} and {len(again)} in batches, {len(single)} alone; {streamed} streamed; all agree"
    )


async def _together(ask: Ask, wanted: Sequence[Asking]) -> list[Answer]:
    """Eight at a time; the next begins when one of them ends."""
    places = asyncio.Semaphore(AT_ONCE)

    async def wait_and_ask(asking: Asking) -> Answer:
        async with places:
            return await ask(asking)

    return await asyncio.gather(*map(wait_and_ask, wanted))
