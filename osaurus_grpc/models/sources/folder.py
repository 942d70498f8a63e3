"""Models that are on this machine: a model folder or a GGUF file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from osaurus_grpc.errors import SourceInvalidError, SourceUnavailableError
from osaurus_grpc.models.inspection import POOLING_FILE, IncompleteModelError, inspect
from osaurus_grpc.models.sources.conversion import convert_gguf
from osaurus_grpc.models.sources.disk import ensure_free
from osaurus_grpc.models.sources.progress import Progress
from osaurus_grpc.models.sources.selection import is_needed
from osaurus_grpc.models.sources.staging import Staging
from osaurus_grpc.models.sources.types import LocalSource

_COPY_BYTES = 2**20


def bring(source: LocalSource, staging: Staging, progress: Progress) -> None:
    """Put a local model into staging.model; its files are linked where they can be, else copied.

    Raises:
        SourceUnavailableError: There is no such folder or file, or it cannot be read.
        SourceInvalidError: It is no model that can be used.
        DiskFullError: There is not enough room.
    """
    path = source.path
    if path.is_dir():
        _bring_folder(path, staging, progress)
    elif path.suffix.lower() == ".gguf" and os.access(path, os.R_OK):
        ensure_free(staging.root, path.stat().st_size, staging.name)
        convert_gguf(path, staging, progress)
    else:
        raise SourceUnavailableError(
            f"There is no readable model folder or .gguf file {path.name} at that path."
        )


def _bring_folder(path: Path, staging: Staging, progress: Progress) -> None:
    try:
        folder = inspect(path)
    except IncompleteModelError as error:
        raise SourceInvalidError(f"The folder {path.name} cannot be used: {error}.") from error
    names = [file.name for file in folder.files]
    if (path / POOLING_FILE).is_file():
        names.append(POOLING_FILE)
    for name in names:
        if is_needed(name):
            # Links of the Hugging Face cache are followed to the file they name.
            _place((path / name).resolve(), staging.model / name, progress)


def _place(source: Path, target: Path, progress: Progress) -> None:
    """Give a file a second name, or copy it where that is not possible."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise SourceUnavailableError(f"{target.name} vanished while it was copied.") from error
    else:
        return
    done, total = 0, source.stat().st_size
    ensure_free(target.parent, total, target.name)
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_COPY_BYTES):
            writer.write(chunk)
            done += len(chunk)
            progress.show("copying", target.name, done, total)
