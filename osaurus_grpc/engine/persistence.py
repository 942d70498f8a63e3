"""Carries a model's kept beginnings between its prompt cache and the disk. Lives on the MLX thread.

What the prompt cache takes in is written in the background, in runs of 256 tokens (prefix_files). A
request whose beginning is on the disk and no longer in memory waits for it, for some seconds at most,
while others run; what has been read by then is used and the rest is computed.

Only what can be taken up at the end of a run is of use: keys and values of all layers. Models with
recurrent layers, which can be taken up at few places, are not persisted.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from osaurus_grpc.engine.cache_layout import CacheLayout, Row
from osaurus_grpc.engine.kv_piece import Piece, cut
from osaurus_grpc.engine.prefix_disk import PrefixDisk, Restore
from osaurus_grpc.engine.prefix_files import RUN_BLOCKS, RUN_TOKENS, Bytes, Run, RunKey, model_key
from osaurus_grpc.engine.prompt_cache import PromptCache
from osaurus_grpc.engine.sequence import Sequence
from osaurus_grpc.engine.token_chain import BLOCK_TOKENS, Chain

# A sequence waits for its restore no longer.
_RESTORE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Form:
    """What a lane's pieces look like, whichever block they are of.

    Attributes:
        planes: As Piece.planes.
        bits: As Piece.bits.
        stacks: Shape and dtype's name of each array, as Piece.stacks.
    """

    planes: tuple[tuple[int, ...], ...]
    bits: int
    stacks: tuple[tuple[tuple[tuple[int, ...], str], ...], ...]

    @property
    def arrays(self) -> int:
        """How many arrays a piece has."""
        return sum(len(stack) for stack in self.stacks)

    @property
    def nbytes(self) -> int:
        """What a piece takes in memory."""
        parts = [part for stack in self.stacks for part in stack]
        return sum(math.prod(shape) * int(getattr(mx, dtype).size) for shape, dtype in parts)

    def rebuild(self, parts: SequenceOf[Bytes | None]) -> Piece | None:
        """A piece of this form from its arrays' bytes; None where they are not there or of other sizes."""
        left: Iterator[Bytes | None] = iter(parts)
        stacks = []
        for stack in self.stacks:
            arrays = []
            for (shape, dtype), part in zip(stack, islice(left, len(stack)), strict=True):
                kind: mx.Dtype = getattr(mx, dtype)
                if part is None or part.nbytes != math.prod(shape) * kind.size:
                    return None
                arrays.append(mx.array(part).view(kind).reshape(shape))
            stacks.append(tuple(arrays))
        return Piece(tuple(stacks), self.planes, self.bits)


def _forms(model: Any, layout: CacheLayout, bits: int) -> tuple[_Form, ...]:
    """The forms of a model's pieces, by lane. Nothing is computed: shapes are known without."""
    caches = make_prompt_cache(model)
    model(mx.zeros((1, BLOCK_TOKENS), dtype=mx.int32), cache=caches)
    # A batch's caches have the places in use to the right; so have these, of one block.
    row = Row([cache.merge([cache]) for cache in caches], 0, [0] * BLOCK_TOKENS)
    forms = []
    for lane in layout.lanes:
        (piece,) = cut(row.planes(lane, 0, BLOCK_TOKENS), 1, bits)
        stacks = tuple(
            tuple((tuple(array.shape), str(array.dtype).removeprefix("mlx.core.")) for array in stack)
            for stack in piece.stacks
        )
        forms.append(_Form(piece.planes, bits, stacks))
    return tuple(forms)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A restore and who waits for it.

    Attributes:
        restore: What is read.
        blocks: Names of the blocks of each of its runs.
        sequences: Who asked first, and those whose prompts begin with the same run.
        timer: Ends it.
    """

    restore: Restore
    blocks: list[list[bytes]]
    sequences: list[Sequence]
    timer: threading.Timer = field(init=False)


class Persistence:
    """One model's.

    Args:
        disk: Shared by all models.
        store: The model's prompt cache; it reports what it takes in from now on.
        identity: Changes with whatever changes the values in the caches.
        model: The model.
        post: Runs a function on the MLX thread.
    """

    def __init__(
        self,
        disk: PrefixDisk,
        store: PromptCache,
        identity: str,
        model: Any,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._disk = disk
        self._store = store
        self._post = post
        self._forms = _forms(model, store.layout, store.bits)
        self._layout = json.dumps(
            [[store.layout.lanes[i].window, f.planes, f.bits, f.stacks] for i, f in enumerate(self._forms)]
        )
        self._model = model_key(identity, self._layout)
        self._run_bytes = max(1, RUN_BLOCKS * sum(form.nbytes for form in self._forms))
        self._waiting: list[_Waiting] = []
        self._resume: Callable[[Sequence], None] = lambda sequence: None
        store.on_store = self._save

    def on_resume(self, resume: Callable[[Sequence], None]) -> None:
        """Say what to call with each sequence that has waited; not with those that were forgotten."""
        self._resume = resume

    def close(self) -> list[Sequence]:
        """Read and write no more; returns the sequences that wait."""
        self._store.on_store = None
        live = [sequence for waiting in self._waiting for sequence in waiting.sequences]
        for waiting in self._waiting:
            waiting.restore.is_cancelled = True
            waiting.timer.cancel()
        self._waiting.clear()
        return live

    # Writing.

    def _save(self, chain: Chain, tokens: SequenceOf[int]) -> None:
        """Write the runs of a sequence that are whole and not on the disk."""
        keys = self._keys(chain)
        runs = []
        for i, key in enumerate(keys):
            if self._disk.wants(key) and (run := self._run(i, key, chain, tokens)):
                runs.append(run)
        if runs:
            self._disk.save(runs, keys)

    def _keys(self, chain: Chain) -> list[RunKey]:
        return [RunKey(self._model, name) for name in chain.names[RUN_BLOCKS - 1 :: RUN_BLOCKS]]

    def _run(self, number: int, key: RunKey, chain: Chain, tokens: SequenceOf[int]) -> Run | None:
        """A run of what is in memory; None where layers that keep all tokens lack some."""
        views: dict[str, mx.array] = {}
        for place, name in enumerate(chain.names[number * RUN_BLOCKS : (number + 1) * RUN_BLOCKS]):
            pieces = self._store.pieces(name)
            if not self._is_complete(pieces):
                return None
            for lane, piece in pieces.items():
                for i, array in enumerate(piece.arrays):
                    views[f"{lane}.{place}.{i}"] = array.view(mx.uint8)
        mx.eval(list(views.values()))
        return Run(
            key=key,
            tokens=tuple(tokens[number * RUN_TOKENS : (number + 1) * RUN_TOKENS]),
            layout=self._layout,
            # Without a copy: a record's arrays never change.
            arrays={name: np.asarray(view).reshape(-1) for name, view in views.items()},
        )

    def _is_complete(self, pieces: Mapping[int, Piece]) -> bool:
        lanes = self._store.layout.lanes
        return all(lane in pieces for lane in range(len(lanes)) if lanes[lane].window is None)

    # Reading.

    def restore(self, sequence: Sequence) -> bool:
        """Have a new sequence wait for its beginning where that is on the disk and not in memory.

        Returns False where there is nothing to wait for.
        """
        numbers = self._missing(sequence)
        if not numbers:
            return False
        first = self._keys(sequence.chain)[numbers[0]]
        for waiting in self._waiting:
            if any(first == key for key, _ in waiting.restore.wanted):
                waiting.sequences.append(sequence)  # the same beginning is being read
                return True
        return self._begin(sequence, numbers)

    def _begin(self, sequence: Sequence, numbers: range) -> bool:
        """Read these runs of a sequence."""
        names, tokens = sequence.chain.names, sequence.prefill_tokens
        keys = self._keys(sequence.chain)
        restore = Restore(
            [(keys[n], tuple(tokens[n * RUN_TOKENS : (n + 1) * RUN_TOKENS])) for n in numbers],
            self._layout,
            self._deliver,
        )
        if not self._disk.restore(restore):
            return False
        blocks = [names[n * RUN_BLOCKS : (n + 1) * RUN_BLOCKS] for n in numbers]
        waiting = _Waiting(restore, blocks, [sequence])
        waiting.timer = threading.Timer(_RESTORE_SECONDS, self._give_up, (restore,))
        waiting.timer.daemon = True
        waiting.timer.start()
        self._waiting.append(waiting)
        return True

    def forget(self, sequence: Sequence) -> None:
        """A sequence was cancelled; what is read for nobody is read no further."""
        for waiting in self._waiting:
            if sequence in waiting.sequences:
                waiting.sequences.remove(sequence)
                if not waiting.sequences:
                    self._end(waiting.restore)
                return

    def _missing(self, sequence: Sequence) -> range:
        """Numbers of a prompt's runs that are on the disk, from where memory ends."""
        tokens = sequence.prefill_tokens
        first = end = self._store.match_length(sequence.chain, tokens) // RUN_TOKENS
        # The last token is always computed; and what memory cannot hold need not be read.
        most = min((len(tokens) - 1) // RUN_TOKENS, first + self._store.max_bytes // self._run_bytes)
        for key in self._keys(sequence.chain)[first:most]:
            if not self._disk.has(key):
                break
            end += 1
        return range(first, end)

    def _deliver(self, restore: Restore, position: int, arrays: dict[str, Bytes] | None) -> None:
        """On the I/O thread."""
        self._post(lambda: self._arrived(restore, position, arrays))

    def _give_up(self, restore: Restore) -> None:
        """On the timer's thread."""
        self._post(lambda: self._end(restore))

    def _arrived(self, restore: Restore, position: int, arrays: dict[str, Bytes] | None) -> None:
        """A run was read, or there are no more."""
        for waiting in self._waiting:
            if waiting.restore is restore:
                if arrays is None or not self._adopt(waiting.blocks[position], arrays):
                    self._end(restore)
                return

    def _adopt(self, names: SequenceOf[bytes], arrays: Mapping[str, Bytes]) -> bool:
        """Give the prompt cache the blocks of a run; False where they are not all there."""
        found: list[dict[int, Piece]] = []
        for place in range(len(names)):
            pieces: dict[int, Piece] = {}
            for lane, form in enumerate(self._forms):
                parts = [arrays.get(f"{lane}.{place}.{i}") for i in range(form.arrays)]
                piece = form.rebuild(parts)
                if piece is not None:
                    pieces[lane] = piece
            if not self._is_complete(pieces):
                return False
            found.append(pieces)
        mx.eval([piece.arrays for pieces in found for piece in pieces.values()])
        for name, pieces in zip(names, found, strict=True):
            self._store.adopt(name, pieces)
        return True

    def _end(self, restore: Restore) -> None:
        """Let the sequences go on that waited for a restore."""
        restore.is_cancelled = True
        for waiting in [one for one in self._waiting if one.restore is restore]:
            self._waiting.remove(waiting)
            waiting.timer.cancel()
            for i, sequence in enumerate(waiting.sequences):
                # Those that joined may have more on the disk than was read for the first.
                numbers = self._missing(sequence) if i else range(0)
                if not (numbers and self._begin(sequence, numbers)):
                    self._resume(sequence)
