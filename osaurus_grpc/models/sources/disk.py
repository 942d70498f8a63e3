"""Disk space, and what a full disk is called."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from osaurus_grpc.errors import DiskFullError, SourceUnavailableError

# A quota and a file system's limit on one file's size read the same to the user: there is no room.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_full(error: OSError) -> bool:
    """Whether an error means that there is no room."""
    return error.errno in _FULL


@contextmanager
def system_errors_named(model: str) -> Iterator[None]:
    """Raise the system's errors by our names.

    Args:
        model: Named in the text.

    Raises:
        DiskFullError: There was no room, or an error was caused by that.
        SourceUnavailableError: Any other error of the system, by its own words without paths.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if _is_caused_by_full_disk(error):
            raise DiskFullError(
                f"The disk with the models directory is full; {model} was not installed."
            ) from error
        if isinstance(error, OSError) and error.errno:
            raise SourceUnavailableError(f"{model} was not installed: {os.strerror(error.errno)}.") from error
        raise


def _is_caused_by_full_disk(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and is_full(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


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
    if count < 1e5:
        return f"{count} bytes"
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
