"""Models of the Hugging Face hub.

Endpoint, token, proxies and offline mode are the hub client's own settings (HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE, …). Only what is needed to run the model is fetched, and never a format that can run
code when it is opened.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, without __all__

from osaurus_grpc.errors import InvalidRequestError, SourceInvalidError, SourceUnavailableError
from osaurus_grpc.models.inspection import CONFIG_FILE, is_pickle, is_weights
from osaurus_grpc.models.sources.disk import ensure_free
from osaurus_grpc.models.sources.progress import FetchCancelledError, Progress
from osaurus_grpc.models.sources.selection import is_needed
from osaurus_grpc.models.sources.staging import Staging
from osaurus_grpc.models.sources.transfer import RemoteFile, download
from osaurus_grpc.models.sources.types import HubSource

_INFO_TIMEOUT_SECONDS = 30.0
_PARALLEL_FILES = 4


def bring(source: HubSource, staging: Staging, progress: Progress) -> None:
    """Download a repository's current revision into staging.model.

    Raises:
        SourceUnavailableError: The hub cannot be reached, does not know the repository or wants a login.
        SourceInvalidError: The repository holds no model that can be used.
        DiskFullError: There is not enough room.
    """
    progress.show(f"looking up {source.repo_id}")
    with _named_errors(source.repo_id):
        endpoint = _endpoint()
        info = HfApi(endpoint=endpoint, headers=_agent()).model_info(
            source.repo_id, files_metadata=True, timeout=_INFO_TIMEOUT_SECONDS
        )
        headers = build_hf_headers(headers=_agent())
    files = _wanted_files(source.repo_id, info, endpoint)
    have = sum(path.stat().st_size for path in staging.download.iterdir())
    ensure_free(staging.root, sum(file.size for file in files) - have, source.repo_id)
    _download_all(files, staging.download, headers, progress)
    for file in files:
        _link(staging.download / file.checksum, staging.model / file.name)


def _endpoint() -> str | None:
    """HF_ENDPOINT as it is now; None lets the hub client use its own."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _agent() -> dict[str, str]:
    """A user agent without the facts about this machine that the hub client would add."""
    return {"user-agent": f"osaurus/{version('osaurus')}"}


def _wanted_files(repo_id: str, info: ModelInfo, endpoint: str | None) -> list[RemoteFile]:
    """What to download, small files first; SourceInvalidError where that is no model."""
    siblings = info.siblings or []
    names = {sibling.rfilename for sibling in siblings}
    if not any(is_weights(name) for name in names):
        raise SourceInvalidError(_without_weights(repo_id, names))
    if CONFIG_FILE not in names:
        raise SourceInvalidError(f"{repo_id} has no config.json, so it is not a model this server can run.")
    files = [
        _remote_file(repo_id, sibling, info.sha or "main", endpoint)
        for sibling in siblings
        if is_needed(sibling.rfilename)
    ]
    return sorted(files, key=lambda file: (file.size, file.name))


def _without_weights(repo_id: str, names: set[str]) -> str:
    if any(name.endswith(".gguf") for name in names):
        return f"{repo_id} holds GGUF files; download the one you want and give its path."
    if any(is_pickle(name) for name in names):
        return (
            f"{repo_id} holds its weights as pickles only, which can run code when they are opened; "
            "look for a repository with safetensors."
        )
    return f"{repo_id} holds no weights (model*.safetensors)."


def _remote_file(repo_id: str, sibling: RepoSibling, revision: str, endpoint: str | None) -> RemoteFile:
    if sibling.lfs is not None:
        size, algorithm, checksum = sibling.lfs.size, "sha256", sibling.lfs.sha256
    else:
        size, algorithm, checksum = sibling.size or 0, "git-sha1", sibling.blob_id or ""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", checksum):
        raise SourceUnavailableError(f"The hub gives no checksum for {sibling.rfilename} of {repo_id}.")
    url = hf_hub_url(repo_id, sibling.rfilename, revision=revision, endpoint=endpoint)
    return RemoteFile(sibling.rfilename, url, size, algorithm, checksum)


def _download_all(files: list[RemoteFile], folder: Path, headers: dict[str, str], progress: Progress) -> None:
    """Download several files at a time; the first failure stops those that have not begun."""
    # Files are kept by checksum, so a resumed fetch of a newer revision reuses what did not change.
    distinct = {file.checksum: file for file in files}.values()
    failed = threading.Event()
    stoppable = progress.linked(failed)
    with ThreadPoolExecutor(_PARALLEL_FILES, thread_name_prefix="fetch") as pool:
        running = [
            pool.submit(download, file, folder / file.checksum, headers=headers, progress=stoppable)
            for file in distinct
        ]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            # Also on an interrupt from the keyboard: leaving the pool waits for its threads.
            failed.set()
            pool.shutdown(wait=True, cancel_futures=True)
    errors = [error for future in running if not future.cancelled() and (error := future.exception())]
    # The others only stopped because the first one failed.
    for error in sorted(errors, key=lambda each: isinstance(each, FetchCancelledError)):
        raise error


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _named_errors(repo_id: str) -> Iterator[None]:
    """Errors of the hub client by our names."""
    try:
        yield
    except GatedRepoError as error:
        raise SourceUnavailableError(
            f"{repo_id} is gated: accept its terms on its hub page, then log in (hf auth login, or HF_TOKEN)."
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceUnavailableError(
            f"The Hugging Face hub knows no model repository {repo_id}, or it is private: "
            "check the spelling, or log in (hf auth login, or HF_TOKEN)."
        ) from error
    except HFValidationError as error:
        raise InvalidRequestError(
            f"{repo_id} cannot be the name of a hub repository.", field="model"
        ) from error
    except HfHubHTTPError as error:
        raise SourceUnavailableError(
            f"The Hugging Face hub answered with HTTP status {error.response.status_code} for {repo_id}."
        ) from error
    except OfflineModeIsEnabled as error:
        raise SourceUnavailableError(f"{repo_id} was not fetched: HF_HUB_OFFLINE is set.") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise SourceUnavailableError(
            f"The Hugging Face hub could not be reached for {repo_id}; check the network, or HF_ENDPOINT."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise SourceUnavailableError(f"The hub's answer about {repo_id} could not be understood.") from error
