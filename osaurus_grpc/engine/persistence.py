"""Carries a model's kept beginnings between its prompt cache and the disk. Lives on the MLX thread.

What the prompt cache takes in is written in the background, in runs of 256 tokens (prefix_files). Models
with windows or recurrent states can be taken up only where these are known: wherever the prompt cache
keeps an end of theirs, it is written too, with what lies behind the last whole run.

A request whose beginning is on the disk and no longer in memory waits for it, for some seconds at most,
while others run; what has been read by then is used and the rest is computed.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

from osaurus_grpc.engine.kv_piece import Piece
from osaurus_grpc.engine.prefix_disk import PrefixDisk, Restore
from osaurus_grpc.engine.prefix_files import (
    RUN_BLOCKS,
    RUN_TOKENS,
    Bytes,
    Content,
    FileKey,
    model_key,
    tail_hash,
)
from osaurus_grpc.engine.prefix_forms import Forms, block_arrays, end_arrays, raw
from osaurus_grpc.engine.prefix_places import margins
from osaurus_grpc.engine.prompt_cache import PromptCache
from osaurus_grpc.engine.sequence import Sequence
from osaurus_grpc.engine.token_chain import BLOCK_TOKENS, Chain

# A sequence waits for its restore no longer.
_RESTORE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Part:
    """A file of a sequence's beginning.

    Attributes:
        key: Its name.
        tokens: Those it holds: of a run, or of the whole sequence that ends there.
        names: Of the blocks it may hold.
        first: Number of the first of these.
        is_end: Whether it is an end rather than a run.
    """

    key: FileKey
    tokens: tuple[int, ...]
    names: SequenceOf[bytes]
    first: int
    is_end: bool


@dataclass(slots=True, eq=False)
class _Waiting:
    """A restore and who waits for it.

    Attributes:
        restore: What is read.
        parts: Its files.
        sequences: Who asked first, and those whose prompts begin with the same file.
        timer: Ends it.
        was_damaged: Whether a file turned out to be of no use, so that another may do.
    """

    restore: Restore
    parts: list[_Part]
    sequences: list[Sequence]
    timer: threading.Timer = field(init=False)
    was_damaged: bool = False


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
        layout = store.layout
        self._forms = Forms(model, layout, store.bits)
        self._model = model_key(identity, self._forms.text)
        # Runs are of use where all tokens are kept, or where any block may be a place to go on from.
        self._full = [number for number, lane in enumerate(layout.lanes) if lane.window is None]
        self._has_runs = bool(self._full) or not layout.states
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

    def _save(self, chain: Chain, tokens: SequenceOf[int], is_end: bool) -> None:
        """Write what of a sequence is not on the disk: whole runs, and its end where that is a place."""
        parts = list(self._runs(chain, tokens))
        if is_end and not self._store.is_plain and len(tokens) >= BLOCK_TOKENS:
            parts.append(self._end_part(chain, tokens, len(tokens)))
        contents = []
        for part in parts:
            if self._disk.wants(part.key) and (content := self._content(part)):
                contents.append(content)
        if contents:
            self._disk.save(contents, [*self._kept_ends(chain), *(part.key for part in parts)])

    def _runs(self, chain: Chain, tokens: SequenceOf[int]) -> Iterator[_Part]:
        """The whole runs of a sequence."""
        if not self._has_runs:
            return
        for first in range(0, len(chain.names) - RUN_BLOCKS + 1, RUN_BLOCKS):
            names = chain.names[first : first + RUN_BLOCKS]
            said = tuple(tokens[first * BLOCK_TOKENS : (first + RUN_BLOCKS) * BLOCK_TOKENS])
            yield _Part(FileKey(self._model, names[-1]), said, names, first, is_end=False)

    def _end_part(self, chain: Chain, tokens: SequenceOf[int], length: int) -> _Part:
        """The end of a sequence's first tokens, at least a block of them."""
        blocks = length // BLOCK_TOKENS
        tail = tail_hash(tokens[blocks * BLOCK_TOKENS : length])
        key = FileKey(self._model, chain.names[blocks - 1], tail)
        return _Part(key, tuple(tokens[:length]), chain.names[:blocks], 0, is_end=True)

    def _kept_ends(self, chain: Chain) -> list[FileKey]:
        """The ends on the way of a sequence, as far as they are at a block's: as stable beginnings are."""
        if self._store.is_plain:
            return []
        tail = tail_hash(())
        return [
            FileKey(self._model, name, tail)
            for name in chain.names
            if tail in self._disk.tails(self._model, name)
        ]

    def _content(self, part: _Part) -> Content | None:
        """A file of what is in memory; None where that lacks what is needed."""
        arrays = {}
        if part.is_end and self._has_end(len(part.tokens)):
            key = part.names[-1], part.tokens[len(part.names) * BLOCK_TOKENS :]
            end = self._store.end(key)
            if end is None:
                return None
            arrays = end_arrays(end)
        for block, lanes in self._needed(part).items():
            pieces = self._store.pieces(part.names[block - part.first])
            if any(lane not in pieces for lane in lanes):
                return None
            if part.is_end:
                pieces = {lane: pieces[lane] for lane in lanes}
            arrays |= block_arrays(pieces, block)
        return Content(part.key, part.tokens, self._forms.text, raw(arrays))

    def _has_end(self, length: int) -> bool:
        """Whether an End belongs to the end of a sequence of so many tokens: blocks do not say everything."""
        edges = [margins(lane, length) for lane in self._store.layout.lanes]
        return bool(self._store.layout.states) or any(edge.front or edge.tail for edge in edges)

    def _needed(self, part: _Part) -> dict[int, list[int]]:
        """Of each block of a file, the lanes that must be there."""
        if not part.is_end:
            return dict.fromkeys(range(part.first, part.first + RUN_BLOCKS), self._full)
        length = len(part.tokens)
        needed: dict[int, list[int]] = {}
        for number, lane in enumerate(self._store.layout.lanes):
            blocks = margins(lane, length).blocks
            if lane.window is None:  # whole runs have files of their own
                blocks = range(length // RUN_TOKENS * RUN_BLOCKS, length // BLOCK_TOKENS)
            for block in blocks:
                needed.setdefault(block, []).append(number)
        return needed

    # Reading.

    def restore(self, sequence: Sequence) -> bool:
        """Have a new sequence wait for its beginning where that is on the disk and not in memory.

        Returns False where there is nothing to wait for.
        """
        parts = self._missing(sequence)
        if not parts:
            return False
        for waiting in self._waiting:
            if any(parts[0].key == part.key for part in waiting.parts):
                waiting.sequences.append(sequence)  # the same beginning is being read
                return True
        return self._begin(sequence, parts)

    def _begin(self, sequence: Sequence, parts: list[_Part]) -> bool:
        """Read these files of a sequence."""
        wanted = [(part.key, part.tokens) for part in parts]
        restore = Restore(wanted, self._forms.text, self._deliver)
        if not self._disk.restore(restore):
            return False
        waiting = _Waiting(restore, parts, [sequence])
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

    def _missing(self, sequence: Sequence) -> list[_Part]:
        """Files of a prompt's beginning that are on the disk, and not in memory."""
        chain, tokens = sequence.chain, sequence.prefill_tokens
        found = self._store.match_length(chain, tokens)
        # The last token is always computed.
        runs = [
            run for run in self._runs(chain, tokens) if (run.first + RUN_BLOCKS) * BLOCK_TOKENS < len(tokens)
        ]
        parts: list[_Part] = []
        if not self._store.layout.states:
            parts = self._known(runs[found // RUN_TOKENS :])
        for end in self._ends(chain, tokens, found):
            before = runs[: len(end.tokens) // RUN_TOKENS]
            absent = [run for run in before if not self._is_in_memory(run)]
            if all(self._disk.has(run.key) for run in absent):
                parts = [*{run.key: run for run in (*parts, *absent)}.values(), end]
                break
        return self._affordable(parts)

    def _known(self, runs: SequenceOf[_Part]) -> list[_Part]:
        """Runs up to the first that is not on the disk."""
        known = []
        for run in runs:
            if not self._disk.has(run.key):
                break
            known.append(run)
        return known

    def _ends(self, chain: Chain, tokens: SequenceOf[int], found: int) -> Iterator[_Part]:
        """Ends on the disk, behind what was found in memory and before the last token; the last first."""
        if self._store.is_plain:
            return
        limit = len(tokens) - 1
        for blocks in range(limit // BLOCK_TOKENS, max(1, found // BLOCK_TOKENS) - 1, -1):
            tails = self._disk.tails(self._model, chain.names[blocks - 1])
            if not tails:
                continue
            start = blocks * BLOCK_TOKENS
            for length in range(min(start + BLOCK_TOKENS - 1, limit), max(start - 1, found), -1):
                if tail_hash(tokens[start:length]) in tails:
                    yield self._end_part(chain, tokens, length)

    def _is_in_memory(self, run: _Part) -> bool:
        return all(lane in pieces for pieces in map(self._store.pieces, run.names) for lane in self._full)

    def _affordable(self, parts: list[_Part]) -> list[_Part]:
        """What the memory of the store can hold: an end with all before it, or else the first runs."""
        left = self._store.max_bytes
        if parts and parts[-1].is_end and sum(self._disk.size(part.key) for part in parts) > left:
            parts = [part for part in parts if not part.is_end and not self._store.layout.states]
        most = left // max(1, RUN_BLOCKS * self._forms.block_bytes)
        return [part for i, part in enumerate(parts) if part.is_end or i < most]

    def _deliver(self, restore: Restore, position: int, arrays: dict[str, Bytes] | None) -> None:
        """On the I/O thread."""
        self._post(lambda: self._arrived(restore, position, arrays))

    def _give_up(self, restore: Restore) -> None:
        """On the timer's thread."""
        self._post(lambda: self._end(restore))

    def _arrived(self, restore: Restore, position: int, arrays: dict[str, Bytes] | None) -> None:
        """A file was read, or there are no more."""
        for waiting in self._waiting:
            if waiting.restore is not restore:
                continue
            if arrays is None and position < len(waiting.parts):
                waiting.was_damaged = not self._disk.has(waiting.parts[position].key)
            if arrays is None or not self._adopt(waiting.parts[position], arrays):
                self._end(restore)
            return

    def _adopt(self, part: _Part, arrays: Mapping[str, Bytes]) -> bool:
        """Give the prompt cache what a file holds; False where something is missing."""
        needed = self._needed(part)
        blocks: dict[bytes, dict[int, Piece]] = {}
        for block, lanes in needed.items():
            pieces = self._forms.block(arrays, block)
            if any(lane not in pieces for lane in lanes):
                return False
            blocks[part.names[block - part.first]] = pieces
        end = None
        if part.is_end and self._has_end(len(part.tokens)):
            end = self._forms.end(arrays, part.names[-1], part.tokens)
            if end is None:
                return False
        evaluated = [piece.arrays for pieces in blocks.values() for piece in pieces.values()]
        mx.eval([*evaluated, end.arrays if end is not None else []])
        self._store.adopt(blocks, end)
        return True

    def _end(self, restore: Restore) -> None:
        """Let the sequences go on that waited for a restore."""
        restore.is_cancelled = True
        for waiting in [one for one in self._waiting if one.restore is restore]:
            self._waiting.remove(waiting)
            waiting.timer.cancel()
            for i, sequence in enumerate(waiting.sequences):
                # Those that joined may have more on the disk than was read for the first.
                parts = self._missing(sequence) if i or waiting.was_damaged else []
                if not (parts and self._begin(sequence, parts)):
                    self._resume(sequence)
