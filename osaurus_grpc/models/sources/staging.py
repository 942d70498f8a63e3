"""Where a model is put together before it is installed: MODELS_DIR/.staging.

    .staging/.locks/KEY      held by the one process that works on the model KEY
    .staging/KEY/download/   what a later fetch can go on with
    .staging/KEY/work/       scratch, never reused
    .staging/KEY/model/      the model as it will be; renamed into place when whole
    .staging/.trash-…/       removed models on their way out

The models directory itself only ever sees that one rename, so a crash at any point leaves nothing that
is listed. The locks are the operating system's and end with their process. Whoever fetches next
clears away what dead processes left, but keeps a started download for its model's next fetch for
RESUMABLE_SECONDS.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from osaurus_grpc.errors import (
    DiskFullError,
    InvalidRequestError,
    ModelBusyError,
    ModelExistsError,
    SourceInvalidError,
)
from osaurus_grpc.models.naming import check_repo_id
from osaurus_grpc.models.sources.disk import is_full
from osaurus_grpc.models.sources.progress import Progress

logger = logging.getLogger(__name__)

STAGING_DIR = ".staging"
RESUMABLE_SECONDS = 7 * 24 * 3600.0
_POLL_SECONDS = 0.2
_REMOVE_WAIT_SECONDS = 10.0
_TRASH_PREFIX = ".trash-"
# Model names cannot begin with a dot, so neither can their staging folders.
_LOCKS_DIR = ".locks"


@dataclass(frozen=True, slots=True)
class Staging:
    """The staging area of one model, held by this fetch.

    Attributes:
        name: The model's place below the models directory: "org/name" or "name".
        target: Where it will be.
        root: Its staging folder.
    """

    name: str
    target: Path
    root: Path

    @property
    def download(self) -> Path:
        """Folder of what a later fetch can go on with."""
        return self.root / "download"

    @property
    def work(self) -> Path:
        """Folder for scratch files."""
        return self.root / "work"

    @property
    def model(self) -> Path:
        """Folder of the model to install; empty at first."""
        return self.root / "model"

    def install(self) -> Path:
        """Move the model into place, durably and at once.

        Returns:
            The installed folder.

        Raises:
            ModelExistsError: Something is there already.
        """
        for file in self.model.iterdir():
            _sync(file)
        _sync(self.model)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _move(self.model, self.target)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise exists_error(self.name) from error
            raise
        _sync(self.target.parent)
        return self.target


def exists_error(name: str) -> ModelExistsError:
    """The error that says that something which is no whole model is in the way."""
    return ModelExistsError(
        f"The models directory already holds something named {name} that is not a complete model; "
        "move it away or delete it first.",
        model=name,
    )


def target_path(models_dir: Path, name: str) -> Path:
    """Where a model's folder is; InvalidRequestError where the name is not safe."""
    return models_dir.joinpath(*check_repo_id(name).split("/"))


@contextmanager
def claimed(models_dir: Path, name: str, progress: Progress, *, wait_seconds: float) -> Iterator[Staging]:
    """Hold a model's staging area, alone among threads and processes.

    What can be resumed stays behind if the body fails for a reason that a retry may cure; a full disk,
    unusable content and success leave nothing.

    Args:
        models_dir: The models directory; made where missing.
        name: "org/name" or "name".
        progress: Told about waiting.
        wait_seconds: How long to wait for another fetch of the same model.

    Raises:
        ModelBusyError: The other fetch took longer.
        InvalidRequestError: The name is not safe, or the models directory cannot be written.
    """
    target = target_path(models_dir, name)
    area = models_dir / STAGING_DIR
    lock = _lock(area, _key(name))
    try:
        (area / _LOCKS_DIR).mkdir(parents=True, exist_ok=True)
        _acquire(lock, name, progress, wait_seconds)
    except OSError as error:
        if is_full(error):
            raise
        raise InvalidRequestError(
            f"The models directory cannot be written: {os.strerror(error.errno or 0)}.", field="models_dir"
        ) from error
    staging = Staging(name=name, target=target, root=area / _key(name))
    is_resumable = False
    try:
        _clear_stale(area)
        _reset(staging)
        yield staging
    except (DiskFullError, SourceInvalidError):
        raise
    except BaseException:
        is_resumable = True
        raise
    finally:
        _close(staging, is_resumable=is_resumable)
        lock.release()


@contextmanager
def discarding(models_dir: Path, name: str, folder: Path) -> Iterator[Path]:
    """Move an installed model out of sight at once; the body deletes what is yielded.

    Raises:
        ModelBusyError: A fetch of the model is running.
    """
    area = models_dir / STAGING_DIR
    (area / _LOCKS_DIR).mkdir(parents=True, exist_ok=True)
    trash = area / f"{_TRASH_PREFIX}{uuid.uuid4().hex}"
    try:
        with _lock(area, _key(name)).acquire(timeout=_REMOVE_WAIT_SECONDS):
            _move(folder, trash)
    except Timeout:
        raise ModelBusyError(f"{name} is being fetched; try again later.", model=name) from None
    yield trash


def _key(name: str) -> str:
    """One folder name for a model; file systems that ignore case see one model as well."""
    return name.replace("/", "--").casefold()


def _lock(area: Path, key: str) -> FileLock:
    return FileLock(area / _LOCKS_DIR / key, thread_local=False)


def _acquire(lock: FileLock, name: str, progress: Progress, wait_seconds: float) -> None:
    """Take the lock, waiting and reporting while another fetch holds it."""
    give_up = time.monotonic() + wait_seconds
    while True:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if time.monotonic() >= give_up:
                raise ModelBusyError(
                    f"{name} is being fetched by another process; try again later.", model=name
                ) from None
            progress.show(f"waiting for another fetch of {name}")
            progress.wait(min(_POLL_SECONDS, max(0.0, give_up - time.monotonic())))
        else:
            return


def _reset(staging: Staging) -> None:
    """Keep what can be resumed, start the rest empty."""
    for folder in (staging.work, staging.model):
        _delete(folder)
        folder.mkdir(parents=True)
    staging.download.mkdir(exist_ok=True)
    os.utime(staging.root)


def _close(staging: Staging, *, is_resumable: bool) -> None:
    if is_resumable and _has_download(staging.root):
        _delete(staging.work)
        _delete(staging.model)
    else:
        _delete(staging.root)


def _clear_stale(area: Path) -> None:
    """Delete what processes left that died: their trash, and staging that cannot or will not be resumed."""
    for folder in area.iterdir():
        if folder.name.startswith(_TRASH_PREFIX):
            _delete(folder)
        elif not folder.name.startswith(".") and folder.is_dir() and not _is_recent_download(folder):
            lock = _lock(area, folder.name)
            try:
                lock.acquire(blocking=False)
            except (Timeout, OSError):
                continue  # in use
            try:
                _delete(folder)
            finally:
                lock.release()


def _has_download(root: Path) -> bool:
    try:
        return any((root / "download").iterdir())
    except OSError:
        return False


def _is_recent_download(root: Path) -> bool:
    try:
        return time.time() - root.stat().st_mtime < RESUMABLE_SECONDS and _has_download(root)
    except OSError:
        return False


def _delete(folder: Path) -> None:
    """Delete a folder; what cannot be deleted now is left for the next fetch."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("staging not deleted folder=%s errno=%s", folder.name, error.errno)


def _move(source: Path, target: Path) -> None:
    """Rename a folder; where the target is on another file system, copy beside it first."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
        try:
            shutil.copytree(source, beside)
            beside.rename(target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(source)


def _sync(path: Path) -> None:
    """Have the system write a file or folder out, so that a power cut leaves no listed half model."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync folders.
        if error.errno not in {errno.EINVAL, errno.EBADF, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)
