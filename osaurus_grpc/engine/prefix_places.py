"""Places at which a recorded sequence can be taken up: finding them, and the caches there.

Plain layers can be taken up after any recorded block. Layers with a window need the blocks of the last
window besides, wherever it begins; recurrent layers can be taken up at an End only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain as chained
from typing import Any

from osaurus_grpc.engine.cache_layout import CacheLayout, Lane
from osaurus_grpc.engine.kv_piece import Plane, join
from osaurus_grpc.engine.prefix_records import End, EndKey, PrefixRecords
from osaurus_grpc.engine.ragged_cache import STEP
from osaurus_grpc.engine.token_chain import BLOCK_TOKENS, Chain

# Plain caches grow by so many tokens.
_ROOM_TOKENS = STEP


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sequence can be taken up, and what that needs.

    Attributes:
        length: Tokens before it.
        blocks: Whole blocks before it.
        end: The End there; None where blocks say everything.
        starts: By lane, the first block that is needed.
    """

    length: int
    blocks: int
    end: EndKey | None
    starts: tuple[int, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Margins:
    """The tokens of a lane at the end of a sequence that fill no block.

    Attributes:
        front: From the window's beginning up to the first block inside; empty where they coincide.
        blocks: Numbers of the blocks between.
        tail: From the last block's end, or the window's beginning behind that, up to the sequence's.
    """

    front: range
    blocks: range
    tail: range


def margins(lane: Lane, length: int) -> Margins:
    """What a lane holds at the end of a sequence of so many tokens, at the edges of the blocks."""
    start, last_block = lane.start(length), length // BLOCK_TOKENS * BLOCK_TOKENS
    first_block = min(-(-start // BLOCK_TOKENS) * BLOCK_TOKENS, last_block)
    return Margins(
        front=range(start, max(start, first_block)),
        blocks=range(first_block // BLOCK_TOKENS, last_block // BLOCK_TOKENS),
        tail=range(max(start, last_block), length),
    )


def find(layout: CacheLayout, records: PrefixRecords, chain: Chain, tokens: Sequence[int]) -> Place | None:
    """The last place of a prompt, before its last token, at which every layer can be restored."""
    if not len(records):
        return None
    best = None
    limit = len(tokens) - 1
    lanes = list(enumerate(layout.lanes))
    firsts = [0] * len(lanes)  # by lane, the first of the blocks that are there up to here
    for blocks, name in enumerate(chain.names[: limit // BLOCK_TOKENS], 1):
        for number, lane in lanes:
            if (number, name) not in records:
                if lane.window is None:
                    return best
                firsts[number] = blocks
        length = blocks * BLOCK_TOKENS
        if not layout.states and all(
            firsts[number] * BLOCK_TOKENS <= lane.start(length) for number, lane in lanes
        ):
            starts = tuple(lane.start(length) // BLOCK_TOKENS for _, lane in lanes)
            best = Place(length, blocks, None, starts)
        for tail in records.tails(name):
            place = _at_end(layout, blocks, (name, tail), tokens, firsts)
            if place and length + len(tail) <= limit and (best is None or place.length > best.length):
                best = place
    return best


def _at_end(
    layout: CacheLayout, blocks: int, key: EndKey, tokens: Sequence[int], firsts: Sequence[int]
) -> Place | None:
    """The place of an End, where the tokens are its own and the blocks it needs are there."""
    _, tail = key
    start = blocks * BLOCK_TOKENS
    length = start + len(tail)
    if tuple(tokens[start:length]) != tail:
        return None
    starts = tuple(-(-lane.start(length) // BLOCK_TOKENS) for lane in layout.lanes)
    if any(first > needed for first, needed in zip(firsts, starts, strict=True) if needed < blocks):
        return None
    return Place(length, blocks, key, starts)


def restore(layout: CacheLayout, records: PrefixRecords, chain: Chain, place: Place, room: int) -> list[Any]:
    """Caches at a place, one a layer.

    Args:
        layout: Of the model.
        records: They hold what the place needs.
        chain: Names of the sequence.
        place: As find() gave it.
        room: Tokens that plain caches have room for at least, those before the place included.
    """
    end = records.end(place.end) if place.end is not None else None
    planes = dict(
        chained.from_iterable(
            _planes(lane, number, records, chain, place, end, room)
            for number, lane in enumerate(layout.lanes)
        )
    )
    return layout.build(place.length, planes, end.states if end else {})


def _planes(
    lane: Lane, number: int, records: PrefixRecords, chain: Chain, place: Place, end: End | None, room: int
) -> list[Plane]:
    """A lane's keys and values at a place."""
    start = place.starts[number]
    blocks = [records.piece((number, name)) for name in chain.names[start : place.blocks]]
    skip = 0
    if end is None:
        skip = lane.start(place.length) - start * BLOCK_TOKENS
    else:
        blocks = [end.fronts.get(number), *blocks, end.tails.get(number)]
    free = 0
    if lane.window is None:
        free = -(-room // _ROOM_TOKENS) * _ROOM_TOKENS - place.length
    return list(join([piece for piece in blocks if piece is not None], skip=skip, room=free))
