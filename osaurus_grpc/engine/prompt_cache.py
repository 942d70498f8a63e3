"""KV caches of prompts and answers, kept for requests that begin with the same tokens.

A store of records under the names of token_chain:

* a Piece for each whole block and each lane of layers that hold the same tokens. Blocks of layers with
  a window are kept too, so that a sequence can be taken up wherever its last window is there;
* an End for a sequence's last tokens: what of it fills no block, and the recurrent states, which
  exist at exactly this place. Models with recurrent layers can be taken up at an End only.

Beside the records there are slots: caches of finished sequences as they are, each for the one prompt
that goes on from it.

Records own their arrays, which are evaluated; nothing refers to a batch's tensors. Equal beginnings
share their records, whatever requests they came from.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from osaurus_grpc.engine.cache_layout import CacheLayout, FoundCache, Lane, Row
from osaurus_grpc.engine.kv_piece import Piece, cut, join
from osaurus_grpc.engine.slots import Slot, Slots
from osaurus_grpc.engine.token_chain import BLOCK_TOKENS, Chain

logger = logging.getLogger(__name__)

# Tokens between two recurrent states that are kept of one prompt.
CHECKPOINT_TOKENS = 1024
# Plain caches grow by so many tokens.
_ROOM_TOKENS = FoundCache.step
# Of the store's bytes, what slots may hold: what is in a slot is in records too.
_SLOT_SHARE = 0.5
# Of the store's bytes, what stable beginnings may keep others from.
_STABLE_SHARE = 0.5


@dataclass(slots=True)
class PromptCacheCounters:
    """What all stores of a process did.

    Attributes:
        lookups: Prompts looked up.
        hits: Those of which a beginning was found.
        tokens_reused: Tokens of those beginnings.
        evictions: Records dropped to make room.
    """

    lookups: int = 0
    hits: int = 0
    tokens_reused: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class Prefix:
    """A reused beginning of a prompt.

    Attributes:
        length: Its tokens.
        caches: One a layer, for a batch to take over.
    """

    length: int
    caches: list[Any]


@dataclass(frozen=True, slots=True)
class End:
    """What is kept at the very end of a sequence.

    Attributes:
        block: Name of the last whole block before it.
        tail: Tokens after that block, fewer than a block has.
        fronts: By lane, the tokens between the window's beginning and the next block's; lanes without
            any are left out.
        tails: By lane, the tokens of the tail that the lane holds.
        states: By leaf, the arrays of its recurrent state.
    """

    block: bytes
    tail: tuple[int, ...]
    fronts: dict[int, Piece]
    tails: dict[int, Piece]
    states: dict[int, list[mx.array]]

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays."""
        pieces = [*self.fronts.values(), *self.tails.values()]
        return [array for piece in pieces for array in piece.arrays] + [
            array for state in self.states.values() for array in state
        ]

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(int(array.nbytes) for array in self.arrays)


# (lane, block's name) of a Piece; (block's name, tail) of an End.
BlockKey = tuple[int, bytes]
EndKey = tuple[bytes, tuple[int, ...]]
Key = BlockKey | EndKey


@dataclass(slots=True)
class _Held:
    record: Piece | End
    nbytes: int
    is_stable: bool


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a sequence can be taken up: after so many tokens, and what that needs."""

    length: int
    blocks: int
    end: EndKey | None
    starts: tuple[int, ...] = field(default=())  # by lane, the first block


class PromptCache:
    """A bounded store of one model's records, least recently used first out.

    Records of stable beginnings (system prompts and tools) go last, whatever their age, as long as they
    take up no more than half of the store.

    Lives on the MLX thread.

    Args:
        layout: The kinds of the model's caches.
        max_bytes: Of records; 0 keeps nothing.
        bits: Quantize keys and values to 8 or 4 bits while they are kept; 0 keeps them as they are.
        counters: Where to count.
    """

    def __init__(
        self,
        layout: CacheLayout,
        max_bytes: int,
        *,
        bits: int = 0,
        counters: PromptCacheCounters | None = None,
    ) -> None:
        self._layout = layout
        self._max_bytes = max_bytes
        self._bits = bits
        self._counters = counters or PromptCacheCounters()
        self._records: dict[Key, _Held] = {}
        # Oldest first. A block is always touched after its successors and after what only matters with
        # it, so the oldest record is one that no other needs.
        self._ordinary: OrderedDict[Key, None] = OrderedDict()
        self._stable: OrderedDict[Key, None] = OrderedDict()
        self._ends: dict[bytes, dict[tuple[int, ...], None]] = {}
        self._bytes = 0
        self._stable_bytes = 0
        self._allowed_bytes = 2**62
        # Called after store() with what it was given.
        self.on_store: Callable[[Chain, Sequence[int]], None] | None = None
        # Slots hold caches as they are, which whoever asks for quantized ones has no room for.
        self.slots = Slots(int(_SLOT_SHARE * max_bytes) if layout.is_plain and not bits else 0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._bytes + self.slots.nbytes

    @property
    def layout(self) -> CacheLayout:
        """The kinds of the model's caches."""
        return self._layout

    @property
    def bits(self) -> int:
        """Of keys and values while they are kept; 0 where they are kept as they are."""
        return self._bits

    @property
    def max_bytes(self) -> int:
        """Bytes held at most."""
        return self._max_bytes

    @property
    def is_plain(self) -> bool:
        """Whether records of a sequence can be made at any time after it was computed."""
        return self._layout.is_plain

    def pauses(self, start: int, length: int, stable_tokens: int) -> list[int]:
        """Where a prefill must stop for store() to see a state that can be kept, in ascending order.

        Args:
            start: Tokens of the prompt that were found.
            length: Tokens of the prompt.
            stable_tokens: Of its stable beginning.
        """
        if self._layout.is_plain or not self._max_bytes:
            return []
        wanted = {stable_tokens, length - 1, *range(0, length, CHECKPOINT_TOKENS)}
        places = {place // BLOCK_TOKENS * BLOCK_TOKENS for place in wanted if place < length}
        return sorted(place for place in places if place > start)

    def last_place(self, length: int, stable_tokens: int, limit: int) -> int:
        """Where a prompt that is being processed can be taken up by others; 0 is nowhere.

        Args:
            length: Tokens of the prompt.
            stable_tokens: Of its stable beginning.
            limit: Tokens that the others have in common with it.
        """
        if not self._max_bytes:
            return 0
        if self._layout.is_plain:
            return limit // BLOCK_TOKENS * BLOCK_TOKENS
        return max((place for place in self.pauses(0, length, stable_tokens) if place <= limit), default=0)

    def match_length(self, chain: Chain, tokens: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that need not be computed."""
        _, shared = self.slots.find(tokens)
        place = self._place(chain, tokens)
        return max(shared, place.length if place else 0)

    def find_slot(self, chain: Chain, tokens: Sequence[int]) -> Slot | None:
        """The slot to take for a prompt: one that has no less of it than lookup() would find."""
        slot, shared = self.slots.find(tokens)
        if slot is None:
            return None
        place = self._place(chain, tokens)
        return slot if place is None or place.length <= shared else None

    def take(self, slot: Slot, tokens: Sequence[int]) -> Prefix:
        """A slot's caches, cut to what a prompt shares with it; the slot is gone."""
        length = slot.shared(tokens)
        self._counters.lookups += 1
        self._counters.hits += 1
        self._counters.tokens_reused += length
        return Prefix(length, self.slots.take(slot, length))

    def leave(self, tokens: list[int], caches: list[Any]) -> Slot | None:
        """Keep the caches of a finished sequence as they are; None where they cannot be."""
        if not self._layout.is_plain:
            return None
        slot = self.slots.put(tokens, caches)
        self._make_way()
        return slot

    def make_room(self, slot: Slot) -> None:
        """Let a slot's next turn be written in place, as long as that takes nobody's room."""
        if slot in self.slots:
            slot.make_room()
            self._make_way()

    def _make_way(self) -> None:
        """Keep records and slots within the store's bytes, and within what running sequences leave."""
        if self.nbytes > self._allowed_bytes:
            self.slots.shrink(max(0, self._allowed_bytes - self._bytes))
            self._evict(self._allowed_bytes - self.slots.nbytes)
        self._evict(self._max_bytes - self.slots.nbytes)

    def lookup(self, chain: Chain, tokens: Sequence[int]) -> Prefix | None:
        """The longest recorded beginning of a prompt, its last token left out: that one is always computed.

        The caches have room for the rest of the prompt and the first tokens of an answer.

        Args:
            chain: The prompt's names.
            tokens: The prompt.
        """
        self._counters.lookups += 1
        place = self._place(chain, tokens)
        if place is None:
            return None
        self._counters.hits += 1
        self._counters.tokens_reused += place.length
        if place.end is not None:
            self._touch(place.end)
        for block in range(place.blocks - 1, -1, -1):
            self._touch_block(chain.names[block], block, place.starts)
        return Prefix(place.length, self._restore(chain, place, room=len(tokens) + 1))

    def store(self, chain: Chain, row: Row, *, stable_tokens: int = 0, is_end: bool = False) -> None:
        """Keep what is new of a row.

        Args:
            chain: Names of the row's tokens; it is brought up to date.
            row: What a batch holds of a sequence.
            stable_tokens: Of its stable beginning, 0 where it has none.
            is_end: Keep an End as well, so that the sequence can be taken up just here.
        """
        if not self._max_bytes:
            return
        chain.extend(row.tokens)
        blocks = len(row.tokens) // BLOCK_TOKENS
        added: dict[Key, Piece | End] = {}
        for number, lane in enumerate(self._layout.lanes):
            added |= self._new_blocks(chain, row, number, lane)
        end_key: EndKey | None = None
        if is_end and blocks:
            end_key = chain.names[blocks - 1], tuple(row.tokens[blocks * BLOCK_TOKENS :])
            if end_key not in self._records and (end := self._new_end(row, end_key)):
                added[end_key] = end
        if added:
            mx.eval([record.arrays for record in added.values()])
        for key, record in added.items():
            self._add(key, record)
        if end_key in self._records:
            assert end_key is not None
            self._touch(end_key, is_stable=len(row.tokens) <= stable_tokens)
        stable_blocks = stable_tokens // BLOCK_TOKENS
        starts = [lane.start(len(row.tokens)) // BLOCK_TOKENS for lane in self._layout.lanes]
        for block in range(blocks - 1, -1, -1):
            self._touch_block(chain.names[block], block, starts, is_stable=block < stable_blocks)
        if self.on_store is not None:
            self.on_store(chain, row.tokens)
        self._make_way()

    def pieces(self, name: bytes) -> dict[int, Piece]:
        """What there is of a block, by lane."""
        held = {lane: self._records.get((lane, name)) for lane in range(len(self._layout.lanes))}
        return {lane: one.record for lane, one in held.items() if one and isinstance(one.record, Piece)}

    def adopt(self, name: bytes, pieces: Mapping[int, Piece]) -> None:
        """Take in a block that was computed elsewhere; its arrays are evaluated and nobody else's.

        Args:
            name: The block's.
            pieces: By lane.
        """
        for lane, piece in pieces.items():
            if (lane, name) not in self._records:
                self._add((lane, name), piece)
        self._make_way()

    def allow(self, nbytes: int) -> None:
        """Hold no more than so many bytes from now on: slots go first, then the least useful records."""
        self._allowed_bytes = nbytes
        self._make_way()

    def clear(self) -> None:
        """Drop everything."""
        self.slots.clear()
        for key in list(self._records):
            self._drop(key)

    # Finding.

    def _place(self, chain: Chain, tokens: Sequence[int]) -> _Place | None:
        """The last place at which every layer can be restored."""
        if not self._records:
            return None
        best = None
        limit = len(tokens) - 1
        lanes = list(enumerate(self._layout.lanes))
        firsts = [0] * len(lanes)  # by lane, the first of the blocks that are there up to here
        for blocks, name in enumerate(chain.names[: limit // BLOCK_TOKENS], 1):
            for number, lane in lanes:
                if (number, name) not in self._records:
                    if lane.window is None:
                        return best
                    firsts[number] = blocks
            length = blocks * BLOCK_TOKENS
            if not self._layout.states and all(
                firsts[number] * BLOCK_TOKENS <= lane.start(length) for number, lane in lanes
            ):
                starts = tuple(lane.start(length) // BLOCK_TOKENS for _, lane in lanes)
                best = _Place(length, blocks, None, starts)
            for tail in self._ends.get(name, ()):
                place = self._end_place(blocks, (name, tail), tokens, firsts)
                if place and length + len(tail) <= limit and (best is None or place.length > best.length):
                    best = place
        return best

    def _end_place(
        self, blocks: int, key: EndKey, tokens: Sequence[int], firsts: Sequence[int]
    ) -> _Place | None:
        """The place of an End, where the tokens are its own and the blocks it needs are there."""
        _, tail = key
        start = blocks * BLOCK_TOKENS
        length = start + len(tail)
        if tuple(tokens[start:length]) != tail:
            return None
        starts = tuple(-(-lane.start(length) // BLOCK_TOKENS) for lane in self._layout.lanes)
        if any(first > needed for first, needed in zip(firsts, starts, strict=True) if needed < blocks):
            return None
        return _Place(length, blocks, key, starts)

    def _restore(self, chain: Chain, place: _Place, room: int) -> list[Any]:
        """Caches at a place, with plain ones that have room for so many tokens in all."""
        end = self._records[place.end].record if place.end is not None else None
        assert end is None or isinstance(end, End)
        planes: dict[int, mx.array] = {}
        for number, (lane, start) in enumerate(zip(self._layout.lanes, place.starts, strict=True)):
            pieces = [
                record
                for name in chain.names[start : place.blocks]
                if isinstance(record := self._records[number, name].record, Piece)
            ]
            skip = 0
            if end is None:
                skip = lane.start(place.length) - start * BLOCK_TOKENS
            else:
                around = end.fronts.get(number), end.tails.get(number)
                pieces = [piece for piece in (around[0], *pieces, around[1]) if piece is not None]
            free = 0
            if lane.window is None:
                free = -(-room // _ROOM_TOKENS) * _ROOM_TOKENS - place.length
            planes.update(join(pieces, skip=skip, room=free))
        return self._layout.build(place.length, planes, end.states if end else {})

    # Keeping.

    def _new_blocks(self, chain: Chain, row: Row, number: int, lane: Lane) -> dict[Key, Piece | End]:
        """Pieces of a row's whole blocks that are not there yet."""
        length = len(row.tokens)
        first, end = -(-lane.start(length) // BLOCK_TOKENS), length // BLOCK_TOKENS
        if lane.window is None:  # a block's predecessors are there
            start = end
            while start > first and (number, chain.names[start - 1]) not in self._records:
                start -= 1
        else:
            blocks = range(first, end)
            start = next((i for i in blocks if (number, chain.names[i]) not in self._records), end)
        if start >= end:
            return {}
        planes = row.planes(lane, start * BLOCK_TOKENS, end * BLOCK_TOKENS)
        pieces = cut(planes, end - start, self._bits)
        keys = [(number, name) for name in chain.names[start:end]]
        return {key: piece for key, piece in zip(keys, pieces, strict=True) if key not in self._records}

    def _new_end(self, row: Row, key: EndKey) -> End | None:
        """What to keep at a row's end; None where a state is not there, or blocks say everything."""
        length = len(row.tokens)
        last_block = length // BLOCK_TOKENS * BLOCK_TOKENS
        states = row.states(self._layout.states)
        if states is None:
            return None
        fronts, tails = {}, {}
        for number, lane in enumerate(self._layout.lanes):
            start = lane.start(length)
            first_block = min(-(-start // BLOCK_TOKENS) * BLOCK_TOKENS, last_block)
            if start < first_block:
                (fronts[number],) = cut(row.planes(lane, start, first_block), 1, self._bits)
            if max(start, last_block) < length:
                (tails[number],) = cut(row.planes(lane, max(start, last_block), length), 1, self._bits)
        block, tail = key
        return End(block, tail, fronts, tails, states) if fronts or tails or states else None

    def _add(self, key: Key, record: Piece | End) -> None:
        held = _Held(record, record.nbytes, is_stable=False)
        self._records[key] = held
        self._ordinary[key] = None
        self._bytes += held.nbytes
        if isinstance(record, End):
            self._ends.setdefault(record.block, {})[record.tail] = None

    def _touch(self, key: Key, *, is_stable: bool = False) -> None:
        """Make a record the newest."""
        held = self._records[key]
        if is_stable and not held.is_stable:
            held.is_stable = True
            self._stable_bytes += held.nbytes
            del self._ordinary[key]
            self._stable[key] = None
        (self._stable if held.is_stable else self._ordinary).move_to_end(key)

    def _touch_block(
        self, name: bytes, block: int, starts: Sequence[int], *, is_stable: bool = False
    ) -> None:
        """Make the pieces of a block the newest, in lanes that begin with it or before."""
        # Those with windows first: they are of no use without the others.
        for number in reversed(range(len(starts))):
            if block >= starts[number] and (number, name) in self._records:
                self._touch((number, name), is_stable=is_stable)

    def _evict(self, max_bytes: int) -> None:
        while self._stable_bytes > self._max_bytes * _STABLE_SHARE:
            key, _ = self._stable.popitem(last=False)
            held = self._records[key]
            held.is_stable = False
            self._stable_bytes -= held.nbytes
            self._ordinary[key] = None
        while self._records and self._bytes > max_bytes:
            self._counters.evictions += 1
            self._drop(next(iter(self._ordinary or self._stable)))

    def _drop(self, key: Key) -> None:
        held = self._records.pop(key)
        del (self._stable if held.is_stable else self._ordinary)[key]
        self._bytes -= held.nbytes
        self._stable_bytes -= held.nbytes if held.is_stable else 0
        if isinstance(held.record, End):
            tails = self._ends[held.record.block]
            del tails[held.record.tail]
            if not tails:
                del self._ends[held.record.block]


def prompt_cache_of(
    model: object, max_bytes: int, *, bits: int = 0, counters: PromptCacheCounters | None = None
) -> PromptCache:
    """A store for a model; one that keeps nothing where the model's caches cannot be reused."""
    try:
        layout = CacheLayout(make_prompt_cache(model))
    except ValueError as error:
        logger.info('event=prompt_cache_off reason="%s"', error)
        layout, max_bytes = CacheLayout([]), 0
    return PromptCache(layout, max_bytes, bits=bits, counters=counters)
