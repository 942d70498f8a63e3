"""KV caches of prompt beginnings in files, that they outlive the process. Knows no MLX.

A file holds a run: the caches of 256 neighbouring tokens, 16 blocks of token_chain, in all layers. It is
named by the name of its last block, which stands for all tokens before it too. A file a block would be
sixteen times as many; a longer run would lose more of a prompt that ends inside it. Beginnings are
therefore found in steps of 256 tokens.

The files are safetensors, in a folder for each model and way of computing it:

    DIR/<model key>/<name of the last block>.safetensors

A file's metadata hold the tokens, which are compared, the layout of the arrays, and a checksum (BLAKE2b)
over all of it. What does not agree in any of these is deleted and counts as missing. Files are written
under another name and renamed; they are not synchronised to the medium, since all that a power cut can
cost is that they are computed again, and the checksum finds torn ones.

Files that were not used for longest go first; the time of use is kept as the file's modification time,
so that it outlives the process too. Those of models that are gone are never used again and go that way.
They hold conversations: folders and files are their owner's alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
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

from osaurus_grpc.engine.token_chain import BLOCK_TOKENS

logger = logging.getLogger(__name__)

RUN_BLOCKS = 16
RUN_TOKENS = RUN_BLOCKS * BLOCK_TOKENS

_FORMAT = "osaurus-prefix-1"
_SUFFIX = ".safetensors"
_TEMPORARY = ".part"
_CHECKSUM_BYTES = 16
_MOST_BYTES = 30 * 2**30
_SHARE_OF_FREE_SPACE = 0.25
# A temporary file this old belongs to no process that still writes it.
_ABANDONED_SECONDS = 600.0

Bytes = npt.NDArray[np.uint8]


class PrefixDirectoryError(Exception):
    """The directory cannot be used; the text says why, for the person who named it."""


@dataclass(frozen=True, slots=True)
class RunKey:
    """What a run is called.

    Attributes:
        model: A model's key, of hexadecimal digits.
        name: Of the run's last block.
    """

    model: str
    name: bytes


@dataclass(frozen=True, slots=True)
class Run:
    """A run's caches.

    Attributes:
        key: Its name.
        tokens: Its RUN_TOKENS token ids.
        layout: Says what the arrays are; a reader compares it with its own.
        arrays: Raw bytes of each array, under names that the layout gives a meaning.
    """

    key: RunKey
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


class PrefixFiles:
    """A directory of runs, bounded in bytes.

    has() may be called on any thread; all else belongs to one.

    Args:
        directory: Made where it is missing.
        max_bytes: Of all files; negative is 30 GiB, or a quarter of the room there is if that is less.

    Raises:
        PrefixDirectoryError: It cannot be made, read or written, or others may write to it.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        # Least recently used first, with their sizes.
        self._sizes: OrderedDict[RunKey, int] = OrderedDict()
        self._bytes = 0
        self._temporaries = 0
        self._last_use = 0
        self.is_writable = True
        try:
            self._prepare()
            self._scan()
            if max_bytes < 0:
                room = shutil.disk_usage(directory).free + self._bytes
                self._max_bytes = min(_MOST_BYTES, int(_SHARE_OF_FREE_SPACE * room))
        except OSError as error:
            raise PrefixDirectoryError(error.strerror or "the system refuses") from error
        self._make_room(0)

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self._bytes

    def has(self, key: RunKey) -> bool:
        """Whether there is such a run, as far as known without reading it."""
        return key in self._sizes

    def read(self, key: RunKey, tokens: Sequence[int], layout: str) -> dict[str, Bytes] | None:
        """A run's arrays, or None where there is none or it is not what it should be; then it is dropped.

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

    def write(self, run: Run) -> None:
        """Write a run, older ones making room; does nothing once a write has failed."""
        if run.key in self._sizes or not self.is_writable:
            return
        content = _encoded(run)
        if len(content) > self._max_bytes:
            return
        self._make_room(len(content))
        try:
            self._replace(self._path(run.key), content)
        except OSError as error:
            self.is_writable = False
            logger.warning("event=prefix_files_stopped errno=%s runs=%d", error.errno, len(self))
            return
        self._sizes[run.key] = len(content)
        self._bytes += len(content)

    def touch(self, keys: Iterable[RunKey]) -> None:
        """Make runs the newest, the last one of them most."""
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
        found: list[tuple[int, RunKey, int]] = []
        now = time.time()
        for path in self._directory.glob("*/*" + _SUFFIX):
            key = RunKey(path.parent.name, _name_of(path.stem))
            status = path.lstat()
            if key.name and path == self._path(key):
                found.append((status.st_mtime_ns, key, status.st_size))
        for path in self._directory.glob("*" + _TEMPORARY):
            if now - path.lstat().st_mtime > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
        for _, key, size in sorted(found, key=lambda item: item[0]):
            self._sizes[key] = size
            self._bytes += size

    def _path(self, key: RunKey) -> Path:
        return self._directory / key.model / (key.name.hex() + _SUFFIX)

    def _temporary(self) -> Path:
        self._temporaries += 1
        return self._directory / f"{os.getpid()}-{self._temporaries}{_TEMPORARY}"

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

    def _drop(self, key: RunKey) -> None:
        self._forget(key)
        path = self._path(key)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()  # fails while it holds others

    def _forget(self, key: RunKey) -> None:
        self._bytes -= self._sizes.pop(key)


def _name_of(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def _packed(tokens: Sequence[int]) -> str:
    return array("i", tokens).tobytes().hex()


def _checksum(tokens: str, layout: str, arrays: Mapping[str, Bytes]) -> str:
    digest = hashlib.blake2b(digest_size=_CHECKSUM_BYTES)
    digest.update(json.dumps([tokens, layout, sorted(arrays)]).encode())
    for name in sorted(arrays):
        part = arrays[name]
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.data)
    return digest.hexdigest()


def _encoded(run: Run) -> bytes:
    arrays = {name: np.ascontiguousarray(part).reshape(-1) for name, part in run.arrays.items()}
    tokens = _packed(run.tokens)
    metadata = {
        "format": _FORMAT,
        "tokens": tokens,
        "layout": run.layout,
        "checksum": _checksum(tokens, run.layout, arrays),
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
