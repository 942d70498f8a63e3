"""One server a models directory, unless both agree to share it.

The lock is an flock on the directory itself: it needs no file in it, works where the directory is
read-only, and goes with the process however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# flock on some network file systems.
_LOCKS_UNSUPPORTED = frozenset({errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


class ModelsDirInUseError(Exception):
    """Another server holds the lock on the models directory."""


@contextlib.contextmanager
def models_dir_lock(models_dir: Path, *, is_shared: bool) -> Iterator[None]:
    """Hold the models directory while a server runs on it.

    A server that shares the directory takes a shared lock if it can get one, and starts in any
    case; one that does not share it takes an exclusive lock.

    Raises:
        ModelsDirInUseError: Another server is there and this one does not share.
        OSError: The directory cannot be opened.
    """
    descriptor = os.open(models_dir, os.O_RDONLY)
    try:
        kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not is_shared:
                raise ModelsDirInUseError from None
        except OSError as error:
            if error.errno not in _LOCKS_UNSUPPORTED:
                raise
        yield
    finally:
        os.close(descriptor)
