"""KV caches of prompt beginnings in files, that they outlive the process. Knows no MLX.

A file holds a run: the caches of 256 neighbouring tokens, 16 blocks of token_chain, in all layers. It is
named by the name of its last block, which stands for all tokens before it too. A file a block would be
sixteen times as many; a longer run would lose more of a prompt that ends inside it. Beginnings are
therefore found in steps of 256 tokens.

Or it holds the end of a sequence of a model that cannot be taken up anywhere: what its windows and
recurrent states hold just there, and what lies behind the last whole run. Its name has a hash over the
tokens behind the last whole block as well.

The files are safetensors, in a folder for each model and way of computing it:

    DIR/<model key>/<name of the last block>.safetensors
    DIR/<model key>/<name of the last block>-<hash of the tail>.safetensors

A file's metadata hold the tokens, which are compared, the layout of the arrays, and a checksum (XXH3, of
128 bits) over all of it: against damage, not against whoever may write here. What does not agree in any
of these is deleted and counts as missing. Files are written under another name and renamed; they are not
synchronised to the medium, since all that a power cut can cost is that they are computed again, and the
checksum finds torn ones.

Files that were not used for longest go first; the time of use is kept as the file's modification time,
so that it outlives the process too. Those of models that are gone are never used again and go that way.
They hold conversations: folders and files are their owner's alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import xxhash

from osaurus_grpc.engine.token_chain import BLOCK_TOKENS

logger = logging.getLogger(__name__)

RUN_BLOCKS = 16
RUN_TOKENS = RUN_BLOCKS * BLOCK_TOKENS

_FORMAT = "osaurus-prefix-2"
_SUFFIX = ".safetensors"
_TEMPORARY = ".part"
_TAIL_HASH_BYTES = 8
_MOST_BYTES = 30 * 2**30
_SHARE_OF_FREE_SPACE = 0.25
# A temporary file this old belongs to no process that still writes it.
_ABANDONED_SECONDS = 600.0
# How long after a write that failed the next one is tried.
_RETRY_SECONDS = 30.0

Bytes = npt.NDArray[np.uint8]


class PrefixDirectoryError(Exception):
    """The directory cannot be used; the text says why, for the person who named it."""


@dataclass(frozen=True, slots=True)
class FileKey:
    """What a file is called.

    Attributes:
        model: A model's key, of hexadecimal digits.
        name: Of the last block in it.
        tail: Of a sequence's end, tail_hash() of what follows that block; b"" is a run.
    """

    model: str
    name: bytes
    tail: bytes = b""


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds.

    Attributes:
        key: Its name.
        tokens: The RUN_TOKENS token ids of a run; all those of a sequence that ends here.
        layout: Says what the arrays are; a reader compares it with its own.
        arrays: Raw bytes of each array, under names that the layout gives a meaning.
    """

    key: FileKey
    tokens: tuple[int, ...]
    layout: str
    arrays: Mapping[str, Bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(part.nbytes for part in self.arrays.values())


def model_key(identity: str, layout: str) -> str:
    """A folder's name for a model.

    Args:
        identity: Changes with weights, dtype and whatever else changes the caches' values.
        layout: Changes with the caches' shapes and encoding.
    """
    text = "\n".join((_FORMAT, identity, layout))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def tail_hash(tokens: Sequence[int]) -> bytes:
    """What the end of a sequence is called by, beside its last whole block.

    Args:
        tokens: Those behind that block, which may be none.
    """
    return hashlib.blake2b(_raw(tokens), digest_size=_TAIL_HASH_BYTES).digest()


class PrefixFiles:
    """A directory of runs and ends, bounded in bytes.

    has(), size() and tails() may be called on any thread; all else belongs to one.

    Args:
        directory: Made where it is missing.
        max_bytes: Of all files; negative is 30 GiB, or a quarter of the room there is if that is less.

    Raises:
        PrefixDirectoryError: It cannot be made, read or written, or others may write to it.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._is_sized_by_room = max_bytes < 0
        # Least recently used first, with their sizes.
        self._sizes: OrderedDict[FileKey, int] = OrderedDict()
        # Of the sequences that end behind a block. Replaced and never changed: others read it.
        self._tails: dict[tuple[str, bytes], frozenset[bytes]] = {}
        self._bytes = 0
        self._last_use = 0
        self._failed_at: float | None = None
        try:
            self._prepare()
            self._scan()
            self._measure_room()
        except OSError as error:
            raise PrefixDirectoryError(error.strerror or "the system refuses") from error
        self._make_room(0)

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self._bytes

    @property
    def is_failing(self) -> bool:
        """Whether the last write failed, for want of room above all."""
        return self._failed_at is not None

    @property
    def is_writable(self) -> bool:
        """Whether a write is worth a try: the last one did not fail, or that is a while ago."""
        failed_at = self._failed_at
        return failed_at is None or time.monotonic() - failed_at >= _RETRY_SECONDS

    def has(self, key: FileKey) -> bool:
        """Whether there is such a file, as far as known without reading it."""
        return key in self._sizes

    def size(self, key: FileKey) -> int:
        """Bytes of a file; 0 where there is none."""
        return self._sizes.get(key, 0)

    def tails(self, model: str, name: bytes) -> frozenset[bytes]:
        """The tails of all ends behind a block."""
        return self._tails.get((model, name), frozenset())

    def read(self, key: FileKey, tokens: Sequence[int], layout: str) -> dict[str, Bytes] | None:
        """A file's arrays, or None where there is none or it is not what it should be; then it is dropped.

        Args:
            key: Its name.
            tokens: What it must be of.
            layout: What its arrays must be.
        """
        if key not in self._sizes:
            return None
        try:
            content = self._path(key).read_bytes()
        except OSError:  # another process dropped it
            self._forget(key)
            return None
        arrays = _decoded(content, tokens, layout)
        if arrays is None:
            logger.warning("event=prefix_file_dropped reason=damaged bytes=%d", len(content))
            self._drop(key)
        return arrays

    def write(self, content: Content) -> None:
        """Write a file, older ones making room; does nothing for a while once a write has failed."""
        if content.key in self._sizes or not self.is_writable:
            return
        encoded = _encoded(content)
        try:
            if self._is_sized_by_room and (self.is_failing or len(encoded) > self._max_bytes):
                self._measure_room()
                if len(encoded) > self._max_bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if len(encoded) > self._max_bytes:
                return
            self._make_room(len(encoded))
            self._replace(self._path(content.key), encoded)
        except OSError as error:
            self._note_failure(error)
            return
        if self.is_failing:
            self._failed_at = None
            logger.info("event=prefix_files_resumed files=%d", len(self))
        self._note(content.key, len(encoded))

    def _note_failure(self, error: OSError) -> None:
        """Write no more for a while; said once, however many tries fail."""
        if not self.is_failing:
            logger.warning("event=prefix_files_stopped errno=%s files=%d", error.errno, len(self))
        self._failed_at = time.monotonic()

    def _measure_room(self) -> None:
        """Set the bound where it hangs on how much room there is."""
        if self._is_sized_by_room:
            room = shutil.disk_usage(self._directory).free + self._bytes
            self._max_bytes = min(_MOST_BYTES, int(_SHARE_OF_FREE_SPACE * room))

    def touch(self, keys: Iterable[FileKey]) -> None:
        """Make files the newest, the last one of them most."""
        for key in keys:
            if key not in self._sizes:
                continue
            self._sizes.move_to_end(key)
            # Given, for the system's own times may be the same for some milliseconds.
            self._last_use = max(time.time_ns(), self._last_use + 1)
            with contextlib.suppress(OSError):
                os.utime(self._path(key), ns=(self._last_use, self._last_use))

    def _prepare(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self._directory.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o002:
            raise PrefixDirectoryError("other users may write to it")
        probe = self._temporary()
        self._create(probe, b"")
        probe.unlink()

    def _scan(self) -> None:
        """Learn what is there; leftovers of a process that was killed are removed."""
        found: list[tuple[int, FileKey, int]] = []
        now = time.time()
        for path in self._directory.glob("*/*" + _SUFFIX):
            name, _, tail = path.stem.partition("-")
            key = FileKey(path.parent.name, _name_of(name), _name_of(tail))
            status = _status(path)
            if status is not None and key.name and path == self._path(key):
                found.append((status.st_mtime_ns, key, status.st_size))
        for path in self._directory.glob("*" + _TEMPORARY):
            status = _status(path)
            if status is not None and now - status.st_mtime > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
        for _, key, size in sorted(found, key=lambda item: item[0]):
            self._note(key, size)

    def _note(self, key: FileKey, size: int) -> None:
        self._sizes[key] = size
        self._bytes += size
        if key.tail:
            place = key.model, key.name
            self._tails[place] = self._tails.get(place, frozenset()) | {key.tail}

    def _path(self, key: FileKey) -> Path:
        tail = f"-{key.tail.hex()}" if key.tail else ""
        return self._directory / key.model / f"{key.name.hex()}{tail}{_SUFFIX}"

    def _temporary(self) -> Path:
        # Not by a process's number, which is another one's after a restart, or in another container.
        return self._directory / f"{secrets.token_hex(16)}{_TEMPORARY}"

    @staticmethod
    def _create(path: Path, content: bytes) -> None:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(number, "wb") as file:
            file.write(content)

    def _replace(self, path: Path, content: bytes) -> None:
        temporary = self._temporary()
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            self._create(temporary, content)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> None:
        while self._sizes and self._bytes + size > self._max_bytes:
            self._drop(next(iter(self._sizes)))

    def _drop(self, key: FileKey) -> None:
        self._forget(key)
        path = self._path(key)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()  # fails while it holds others

    def _forget(self, key: FileKey) -> None:
        self._bytes -= self._sizes.pop(key)
        if key.tail:
            place = key.model, key.name
            self._tails[place] -= {key.tail}
            if not self._tails[place]:
                del self._tails[place]


def _status(path: Path) -> os.stat_result | None:
    """A file's status; None where another process has dropped or renamed it meanwhile."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _name_of(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def _raw(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def _packed(tokens: Sequence[int]) -> str:
    return _raw(tokens).hex()


def _checksum(tokens: str, layout: str, arrays: Mapping[str, Bytes]) -> str:
    # Somebody waits while a file is checked, and a cryptographic hash would take longest of all.
    digest = xxhash.xxh3_128()
    digest.update(json.dumps([tokens, layout, sorted(arrays)]).encode())
    for name in sorted(arrays):
        part = arrays[name]
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.data)
    return digest.hexdigest()


def _encoded(content: Content) -> bytes:
    arrays = {name: np.ascontiguousarray(part).reshape(-1) for name, part in content.arrays.items()}
    tokens = _packed(content.tokens)
    metadata = {
        "format": _FORMAT,
        "tokens": tokens,
        "layout": content.layout,
        "checksum": _checksum(tokens, content.layout, arrays),
    }
    return safetensors.numpy.save(arrays, metadata)


def _decoded(content: bytes, tokens: Sequence[int], layout: str) -> dict[str, Bytes] | None:
    """A file's arrays, or None where anything about it is not as it should be."""
    try:
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        tensors = safetensors.deserialize(content)  # type: ignore[no-untyped-call]  # it ships no types
        parts = {name: np.frombuffer(tensor["data"], np.uint8) for name, tensor in tensors}
        expected = _checksum(_packed(tokens), layout, parts)
        is_sound = metadata["format"] == _FORMAT and metadata["checksum"] == expected
        is_sound = is_sound and (metadata["tokens"], metadata["layout"]) == (_packed(tokens), layout)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError):  # a damaged file may hold anything
        return None
    return parts if is_sound else None
