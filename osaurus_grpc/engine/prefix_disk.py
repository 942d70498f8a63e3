"""The one thread that reads and writes prefix files, and what waits for it.

Restores go before saves: somebody waits for them. A restore takes one file at a time, so that several
take turns; a save waits with its arrays, which it pins beyond the KV budget, and is dropped where too
many bytes wait: the next request that goes on from there has it written.
Dropping old files to make room is part of a save.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from osaurus_grpc.engine.prefix_files import Bytes, Content, FileKey, PrefixFiles

logger = logging.getLogger(__name__)

# Arrays that may wait to be written.
_WAITING_SAVE_BYTES = 512 * 2**20
# Restores that may wait; further prompts are computed.
_WAITING_RESTORES = 256
# What stop() gives saves that wait.
_STOP_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Restore:
    """Runs to read, one after the other.

    Attributes:
        wanted: Their names and tokens, in order.
        layout: What their arrays must be.
        deliver: Called on the I/O thread with each file that was read, in order, and with None at the end;
            must return at once and not raise.
        is_cancelled: Set to have no more of them.
    """

    wanted: Sequence[tuple[FileKey, tuple[int, ...]]]
    layout: str
    deliver: Callable[[Restore, int, dict[str, Bytes] | None], None]
    is_cancelled: bool = False
    position: int = field(default=0, init=False)


class PrefixDisk:
    """Reads and writes files in the background.

    Args:
        files: The directory; nobody else may use it from now on.
    """

    def __init__(self, files: PrefixFiles) -> None:
        self._files = files
        self._restores: queue.SimpleQueue[Restore] = queue.SimpleQueue()
        self._saves: queue.SimpleQueue[Content | list[FileKey]] = queue.SimpleQueue()
        self._waiting = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._pending: set[FileKey] = set()
        self._pending_bytes = 0
        self._stop_at: float | None = None
        # A daemon: a disk that never answers must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="prefix-disk", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, for some seconds at most, and end the thread."""
        if self._thread.ident is None:
            return
        self._stop_at = time.monotonic() + _STOP_SECONDS
        self._waiting.release()
        self._thread.join(_STOP_SECONDS + 1.0)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self._files.nbytes

    @property
    def is_failing(self) -> bool:
        """Whether files cannot be written at present."""
        return self._files.is_failing

    def has(self, key: FileKey) -> bool:
        """Whether there is such a file, as far as is known without reading it."""
        return self._files.has(key)

    def size(self, key: FileKey) -> int:
        """Bytes of a file; 0 where there is none."""
        return self._files.size(key)

    def tails(self, model: str, name: bytes) -> frozenset[bytes]:
        """The tails of all ends behind a block."""
        return self._files.tails(model, name)

    def wants(self, key: FileKey) -> bool:
        """Whether save() would take such a file."""
        return (
            self._files.is_writable
            and self._pending_bytes < _WAITING_SAVE_BYTES
            and key not in self._pending
            and not self._files.has(key)
        )

    def save(self, contents: Sequence[Content], chain: Sequence[FileKey]) -> None:
        """Write files some time later.

        Args:
            contents: In order; their arrays must not change any more.
            chain: All files of the beginning they belong to, those first that others are of no use without.
        """
        for content in contents:
            with self._lock:
                if content.key in self._pending or self._pending_bytes + content.nbytes > _WAITING_SAVE_BYTES:
                    break  # those behind it would be of no use
                self._pending.add(content.key)
                self._pending_bytes += content.nbytes
            self._put(content)
        self._put(_by_use(chain))

    def _put(self, job: Content | list[FileKey]) -> None:
        self._saves.put(job)
        self._waiting.release()

    def restore(self, restore: Restore) -> bool:
        """Read runs as soon as may be; False where too many wait."""
        if self._restores.qsize() >= _WAITING_RESTORES:
            return False
        self._restores.put(restore)
        self._waiting.release()
        return True

    # What follows runs on the thread.

    def _run(self) -> None:
        while True:
            self._waiting.acquire()
            if self._stop_at is not None and (self._is_idle() or time.monotonic() > self._stop_at):
                return
            try:
                self._work()
            except Exception:  # whatever a file system does, the next job must be tried
                logger.exception("event=prefix_disk_failed")

    def _is_idle(self) -> bool:
        return self._restores.empty() and self._saves.empty()

    def _work(self) -> None:
        """One job, the most urgent."""
        try:
            self._read(self._restores.get_nowait())
            return
        except queue.Empty:
            pass
        try:
            job = self._saves.get_nowait()
        except queue.Empty:
            return
        if isinstance(job, Content):
            self._write(job)
        else:
            self._files.touch(job)

    def _read(self, restore: Restore) -> None:
        """Read a restore's next file; what is left goes behind the other restores."""
        position = restore.position
        if restore.is_cancelled:
            return
        arrays = None
        try:
            if position < len(restore.wanted) and self._stop_at is None:
                key, tokens = restore.wanted[position]
                arrays = self._files.read(key, tokens, restore.layout)
        finally:
            restore.position += 1
            restore.deliver(restore, position, arrays)
        if arrays is None:
            self._files.touch(_by_use([key for key, _ in restore.wanted]))
            return
        self._restores.put(restore)
        self._waiting.release()

    def _write(self, content: Content) -> None:
        try:
            self._files.write(content)
        finally:
            with self._lock:
                self._pending.discard(content.key)
                self._pending_bytes -= content.nbytes


def _by_use(chain: Sequence[FileKey]) -> list[FileKey]:
    """Successors before predecessors: a file is of no use without those before it."""
    return list(reversed(chain))
