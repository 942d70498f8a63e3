"""The records of a prompt cache, and the order in which they are dropped.

Records own their arrays, which are evaluated; nothing refers to a batch's tensors.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from osaurus_grpc.engine.kv_piece import Piece

# Of the store's bytes, what stable beginnings may keep others from.
_STABLE_SHARE = 0.5


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


class PrefixRecords:
    """Records under their names, least recently used first out.

    Those of stable beginnings (system prompts and tools) go last, whatever their age, as long as they
    take up no more than half of the store.

    Args:
        max_bytes: Of the store; evict() says when it is kept to.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: dict[Key, _Held] = {}
        # Oldest first. A block is always touched after its successors and after what only matters with
        # it, so the oldest record is one that no other needs.
        self._ordinary: OrderedDict[Key, None] = OrderedDict()
        self._stable: OrderedDict[Key, None] = OrderedDict()
        self._tails: dict[bytes, dict[tuple[int, ...], None]] = {}
        self._bytes = 0
        self._stable_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def piece(self, key: BlockKey) -> Piece | None:
        """What a lane holds of a block."""
        held = self._held.get(key)
        return held.record if held is not None and isinstance(held.record, Piece) else None

    def end(self, key: EndKey) -> End | None:
        """What is kept at a sequence's end."""
        held = self._held.get(key)
        return held.record if held is not None and isinstance(held.record, End) else None

    def tails(self, block: bytes) -> Iterable[tuple[int, ...]]:
        """The tails of all Ends behind a block."""
        return self._tails.get(block, ())

    def add(self, key: Key, record: Piece | End) -> None:
        """Take in a record that is not there, as the newest."""
        held = _Held(record, record.nbytes, is_stable=False)
        self._held[key] = held
        self._ordinary[key] = None
        self._bytes += held.nbytes
        if isinstance(record, End):
            self._tails.setdefault(record.block, {})[record.tail] = None

    def touch(self, key: Key, *, is_stable: bool = False) -> None:
        """Make a record the newest, and stable where is_stable says so."""
        held = self._held[key]
        if is_stable and not held.is_stable:
            held.is_stable = True
            self._stable_bytes += held.nbytes
            del self._ordinary[key]
            self._stable[key] = None
        (self._stable if held.is_stable else self._ordinary).move_to_end(key)

    def touch_block(self, name: bytes, block: int, starts: Sequence[int], *, is_stable: bool = False) -> None:
        """Make the pieces of a block the newest, in lanes that begin with it or before.

        Args:
            name: The block's.
            block: Its number in its sequence.
            starts: By lane, the first block that the lane holds.
            is_stable: Make them stable.
        """
        # Those with windows first: they are of no use without the others.
        for number in reversed(range(len(starts))):
            if block >= starts[number] and (number, name) in self._held:
                self.touch((number, name), is_stable=is_stable)

    def evict(self, max_bytes: int) -> int:
        """Drop records until no more than so many bytes are held; returns how many were dropped."""
        while self._stable_bytes > self._max_bytes * _STABLE_SHARE:
            key, _ = self._stable.popitem(last=False)
            held = self._held[key]
            held.is_stable = False
            self._stable_bytes -= held.nbytes
            self._ordinary[key] = None
        dropped = 0
        while self._held and self._bytes > max_bytes:
            self._drop(next(iter(self._ordinary or self._stable)))
            dropped += 1
        return dropped

    def clear(self) -> None:
        """Drop everything."""
        for key in list(self._held):
            self._drop(key)

    def _drop(self, key: Key) -> None:
        held = self._held.pop(key)
        del (self._stable if held.is_stable else self._ordinary)[key]
        self._bytes -= held.nbytes
        self._stable_bytes -= held.nbytes if held.is_stable else 0
        if isinstance(held.record, End):
            tails = self._tails[held.record.block]
            del tails[held.record.tail]
            if not tails:
                del self._tails[held.record.block]
