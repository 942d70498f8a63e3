"""What the records of a model's prompt cache look like as bytes, and how they are made of bytes again.

The shapes of a model's records are known without computing anything, so a file needs to hold no more
than the bytes of each array under a name:

    LANE.BLOCK.I           a block's pieces
    front.LANE.I, tail.LANE.I, state.LEAF.I    what an End holds
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

import json
import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from osaurus_grpc.engine.cache_layout import CacheLayout, Row
from osaurus_grpc.engine.kv_piece import Piece, cut
from osaurus_grpc.engine.prefix_files import Bytes
from osaurus_grpc.engine.prefix_places import margins
from osaurus_grpc.engine.prefix_records import End
from osaurus_grpc.engine.token_chain import BLOCK_TOKENS

# Shape and dtype's name of an array.
_ArrayForm = tuple[tuple[int, ...], str]


@dataclass(frozen=True, slots=True)
class PieceForm:
    """What a lane's pieces look like, whichever tokens they are of.

    Attributes:
        planes: As Piece.planes.
        bits: As Piece.bits.
        stacks: The form of each array, as Piece.stacks; the third axis is the tokens'.
    """

    planes: tuple[tuple[int, ...], ...]
    bits: int
    stacks: tuple[tuple[_ArrayForm, ...], ...]

    @property
    def arrays(self) -> int:
        """How many arrays a piece has."""
        return sum(len(stack) for stack in self.stacks)

    @property
    def nbytes(self) -> int:
        """What a piece takes in memory."""
        return sum(_nbytes(form) for stack in self.stacks for form in stack)

    def of(self, tokens: int) -> PieceForm:
        """The form of a piece of so many tokens."""
        return replace(
            self,
            stacks=tuple(
                tuple(((*shape[:2], tokens, *shape[3:]), dtype) for shape, dtype in stack)
                for stack in self.stacks
            ),
        )

    def rebuild(self, parts: SequenceOf[Bytes | None]) -> Piece | None:
        """A piece of this form from its arrays' bytes; None where they are not there or of other sizes."""
        left: Iterator[Bytes | None] = iter(parts)
        stacks = []
        for stack in self.stacks:
            arrays = _rebuilt(stack, list(islice(left, len(stack))))
            if arrays is None:
                return None
            stacks.append(tuple(arrays))
        return Piece(tuple(stacks), self.planes, self.bits)


class Forms:
    """The forms of a model's records. Nothing is computed: shapes are known without.

    Args:
        model: The model.
        layout: The kinds of its caches.
        bits: Of keys and values while they are kept.

    Attributes:
        text: Says all of it; equal where records of one model can be read as another's.
        block_bytes: What a block takes in all lanes.
    """

    def __init__(self, model: Any, layout: CacheLayout, bits: int) -> None:
        caches = make_prompt_cache(model)
        model(mx.zeros((1, BLOCK_TOKENS), dtype=mx.int32), cache=caches)
        # A batch's caches have the places in use to the right; so have these, of one block.
        row = Row([cache.merge([cache]) for cache in caches], 0, [0] * BLOCK_TOKENS)
        self._layout = layout
        self._lanes = tuple(self._piece_form(row, number, bits) for number in range(len(layout.lanes)))
        states = row.states(layout.states) or {}
        self._states = {leaf: tuple(_form(array) for array in arrays) for leaf, arrays in states.items()}
        self.block_bytes = sum(form.nbytes for form in self._lanes)
        lanes = [
            [lane.window, form.planes, form.bits, form.stacks]
            for lane, form in zip(layout.lanes, self._lanes, strict=True)
        ]
        self.text = json.dumps([lanes, sorted(self._states.items())])

    def _piece_form(self, row: Row, number: int, bits: int) -> PieceForm:
        (piece,) = cut(row.planes(self._layout.lanes[number], 0, BLOCK_TOKENS), 1, bits)
        stacks = tuple(tuple(_form(array) for array in stack) for stack in piece.stacks)
        return PieceForm(piece.planes, bits, stacks)

    def block(self, arrays: Mapping[str, Bytes], block: int) -> dict[int, Piece]:
        """The pieces that there are of a block, by lane."""
        found = {
            lane: form.rebuild([arrays.get(f"{lane}.{block}.{i}") for i in range(form.arrays)])
            for lane, form in enumerate(self._lanes)
        }
        return {lane: piece for lane, piece in found.items() if piece is not None}

    def end(self, arrays: Mapping[str, Bytes], name: bytes, tokens: SequenceOf[int]) -> End | None:
        """The End of a sequence; None where anything of it is missing.

        Args:
            arrays: Named as end_arrays() has them.
            name: Of the sequence's last whole block.
            tokens: The sequence.
        """
        fronts: dict[int, Piece] = {}
        tails: dict[int, Piece] = {}
        for number, (lane, form) in enumerate(zip(self._layout.lanes, self._lanes, strict=True)):
            edges = margins(lane, len(tokens))
            for side, pieces, part in (("front", fronts, edges.front), ("tail", tails, edges.tail)):
                if not part:
                    continue
                parts = [arrays.get(f"{side}.{number}.{i}") for i in range(form.arrays)]
                piece = form.of(len(part)).rebuild(parts)
                if piece is None:
                    return None
                pieces[number] = piece
        states = {}
        for leaf, forms in self._states.items():
            state = _rebuilt(forms, [arrays.get(f"state.{leaf}.{i}") for i in range(len(forms))])
            if state is None:
                return None
            states[leaf] = state
        tail = tuple(tokens[len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS :])
        return End(name, tail, fronts, tails, states)


def block_arrays(pieces: Mapping[int, Piece], block: int) -> dict[str, mx.array]:
    """The arrays of a block's pieces, by lane, under their names."""
    return {
        f"{lane}.{block}.{i}": array for lane, piece in pieces.items() for i, array in enumerate(piece.arrays)
    }


def end_arrays(end: End) -> dict[str, mx.array]:
    """The arrays of an End under their names."""
    parts: dict[str, SequenceOf[mx.array]] = {
        **{f"front.{lane}": piece.arrays for lane, piece in end.fronts.items()},
        **{f"tail.{lane}": piece.arrays for lane, piece in end.tails.items()},
        **{f"state.{leaf}": state for leaf, state in end.states.items()},
    }
    return {f"{part}.{i}": array for part, arrays in parts.items() for i, array in enumerate(arrays)}


def raw(arrays: Mapping[str, mx.array]) -> dict[str, Bytes]:
    """The bytes of evaluated arrays that never change. Nothing is copied."""
    views = {name: array.reshape(-1).view(mx.uint8) for name, array in arrays.items()}
    mx.eval(list(views.values()))
    return {name: np.asarray(view) for name, view in views.items()}


def _form(array: mx.array) -> _ArrayForm:
    return tuple(array.shape), str(array.dtype).removeprefix("mlx.core.")


def _nbytes(form: _ArrayForm) -> int:
    shape, dtype = form
    return math.prod(shape) * int(getattr(mx, dtype).size)


def _rebuilt(forms: SequenceOf[_ArrayForm], parts: SequenceOf[Bytes | None]) -> list[mx.array] | None:
    """Arrays of these forms; None where bytes are missing or of other sizes."""
    arrays = []
    for form, part in zip(forms, parts, strict=True):
        if part is None or part.nbytes != _nbytes(form):
            return None
        shape, dtype = form
        arrays.append(mx.array(part).view(getattr(mx, dtype)).reshape(shape))
    return arrays
