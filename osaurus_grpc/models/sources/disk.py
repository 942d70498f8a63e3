"""Disk space, and what a full disk is called."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from osaurus_grpc.errors import DiskFullError

# A quota and a file system's limit on one file's size read the same to the user: there is no room.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_full(error: OSError) -> bool:
    """Whether an error means that there is no room."""
    return error.errno in _FULL


@contextmanager
def full_disk_named(model: str) -> Iterator[None]:
    """Turn an error that means a full disk, or was caused by one, into DiskFullError.

    Args:
        model: Named in the text.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and is_full(cause)):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise DiskFullError(
            f"The disk with the models directory is full; {model} was not installed."
        ) from error


def ensure_free(folder: Path, needed_bytes: int, model: str) -> None:
    """Check that there is room, where the system tells.

    Raises:
        DiskFullError: There is not.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    if free < needed_bytes:
        raise DiskFullError(
            f"{model} needs {_gigabytes(needed_bytes)} on the disk with the models directory; "
            f"{_gigabytes(free)} are free."
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
