"""KV caches of prompts and answers, kept for requests that begin with the same tokens.

A store of records under the names of token_chain:

* a Piece for each whole block and each lane of layers that hold the same tokens. Blocks of layers with
  a window are kept too, so that a sequence can be taken up wherever its last window is there;
* an End for a sequence's last tokens: what of it fills no block, and the recurrent states, which
  exist at exactly this place. Models with recurrent layers can be taken up at an End only.

Beside the records there are slots: caches of finished sequences as they are, each for the one prompt
that goes on from it. Equal beginnings share their records, whatever requests they came from.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from osaurus_grpc.engine import prefix_places
from osaurus_grpc.engine.cache_layout import CacheLayout, Lane, Row
from osaurus_grpc.engine.kv_piece import Piece, cut
from osaurus_grpc.engine.prefix_records import End, EndKey, Key, PrefixRecords
from osaurus_grpc.engine.slots import Slot, Slots
from osaurus_grpc.engine.token_chain import BLOCK_TOKENS, Chain

logger = logging.getLogger(__name__)

# Tokens between two recurrent states that are kept of one prompt.
CHECKPOINT_TOKENS = 1024
# Of the store's bytes, what slots may hold: what is in a slot is in records too.
_SLOT_SHARE = 0.5


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
        self._records = PrefixRecords(max_bytes)
        self._allowed_bytes = 2**62
        # Called after store() with the names, the tokens, and whether they can be taken up just here.
        self.on_store: Callable[[Chain, Sequence[int], bool], None] | None = None
        # Slots hold caches as they are, which whoever asks for quantized ones has no room for.
        self.slots = Slots(int(_SLOT_SHARE * max_bytes) if layout.is_plain and not bits else 0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._records.nbytes + self.slots.nbytes

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
        place = prefix_places.find(self._layout, self._records, chain, tokens)
        return max(shared, place.length if place else 0)

    def find_slot(self, chain: Chain, tokens: Sequence[int]) -> Slot | None:
        """The slot to take for a prompt: one that has no less of it than lookup() would find."""
        slot, shared = self.slots.find(tokens)
        if slot is None:
            return None
        place = prefix_places.find(self._layout, self._records, chain, tokens)
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
            self.slots.shrink(max(0, self._allowed_bytes - self._records.nbytes))
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
        place = prefix_places.find(self._layout, self._records, chain, tokens)
        if place is None:
            return None
        self._counters.hits += 1
        self._counters.tokens_reused += place.length
        if place.end is not None:
            self._records.touch(place.end)
        for block in range(place.blocks - 1, -1, -1):
            self._records.touch_block(chain.names[block], block, place.starts)
        room = len(tokens) + 1
        return Prefix(place.length, prefix_places.restore(self._layout, self._records, chain, place, room))

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
            self._records.add(key, record)
        if end_key in self._records:
            assert end_key is not None
            self._records.touch(end_key, is_stable=len(row.tokens) <= stable_tokens)
        stable_blocks = stable_tokens // BLOCK_TOKENS
        starts = [lane.start(len(row.tokens)) // BLOCK_TOKENS for lane in self._layout.lanes]
        for block in range(blocks - 1, -1, -1):
            self._records.touch_block(chain.names[block], block, starts, is_stable=block < stable_blocks)
        if self.on_store is not None:
            self.on_store(chain, row.tokens, is_end)
        self._make_way()

    def pieces(self, name: bytes) -> dict[int, Piece]:
        """What there is of a block, by lane."""
        found = {lane: self._records.piece((lane, name)) for lane in range(len(self._layout.lanes))}
        return {lane: piece for lane, piece in found.items() if piece is not None}

    def end(self, key: EndKey) -> End | None:
        """What is kept at a sequence's end."""
        return self._records.end(key)

    def adopt(self, blocks: Mapping[bytes, Mapping[int, Piece]], end: End | None = None) -> None:
        """Take in what was computed elsewhere; its arrays are evaluated and nobody else's.

        Args:
            blocks: Pieces by the block's name and lane.
            end: An End behind the last of them, or behind one that is there.
        """
        records: dict[Key, Piece | End] = {(end.block, end.tail): end} if end is not None else {}
        # From the last one: successors are dropped first.
        for name, pieces in reversed(list(blocks.items())):
            records |= {(lane, name): piece for lane, piece in pieces.items()}
        for key, record in records.items():
            if key not in self._records:
                self._records.add(key, record)
        self._make_way()

    def allow(self, nbytes: int) -> None:
        """Hold no more than so many bytes from now on: slots go first, then the least useful records."""
        self._allowed_bytes = nbytes
        self._make_way()

    def clear(self) -> None:
        """Drop everything."""
        self.slots.clear()
        self._records.clear()

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
        states = row.states(self._layout.states)
        if states is None:
            return None
        fronts: dict[int, Piece] = {}
        tails: dict[int, Piece] = {}
        for number, lane in enumerate(self._layout.lanes):
            edges = prefix_places.margins(lane, len(row.tokens))
            for pieces, part in ((fronts, edges.front), (tails, edges.tail)):
                if part:
                    (pieces[number],) = cut(row.planes(lane, part.start, part.stop), 1, self._bits)
        block, tail = key
        return End(block, tail, fronts, tails, states) if fronts or tails or states else None

    def _evict(self, max_bytes: int) -> None:
        self._counters.evictions += self._records.evict(max_bytes)


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
