"""Downloading one file over HTTP: resumed where it broke off, checked by its hash.

The hub's own client (2.4) deletes a partial file when a download fails, so an interrupted fetch of a
large model would begin again at zero; here the part stays and the next request asks for the rest.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx2
from huggingface_hub import get_session
from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # public, without __all__

from osaurus_grpc.errors import SourceInvalidError, SourceUnavailableError
from osaurus_grpc.models.sources.progress import Progress

logger = logging.getLogger(__name__)

# A cancelled fetch that waits for a silent server notices after this.
_TIMEOUT = httpx2.Timeout(HF_HUB_DOWNLOAD_TIMEOUT)
# Attempts in a row that bring no byte before giving up, and the wait before each but the first.
_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0)
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of one revision.

    Attributes:
        name: Its file name.
        url: Of exactly this content.
        size: Bytes.
        algorithm: "sha256" of the content, or "git-sha1" of the content as a git blob.
        checksum: By that algorithm, in hexadecimal digits.
    """

    name: str
    url: str
    size: int
    algorithm: str
    checksum: str


class _Part:
    """A file that is growing, with the hash of what it holds so far."""

    def __init__(self, file: RemoteFile, sink: BinaryIO) -> None:
        self._file = file
        self._sink = sink
        self.size = 0
        self._reset_hash()
        sink.seek(0)
        while chunk := sink.read(_READ_BYTES):
            self._hash.update(chunk)
            self.size += len(chunk)

    def _reset_hash(self) -> None:
        if self._file.algorithm == "sha256":
            self._hash = hashlib.sha256()
        else:
            self._hash = hashlib.sha1(b"blob %d\0" % self._file.size, usedforsecurity=False)

    def append(self, chunk: bytes) -> None:
        self._sink.write(chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        self._sink.seek(0)
        self._sink.truncate()
        self._reset_hash()
        self.size = 0

    @property
    def missing(self) -> int:
        return self._file.size - self.size

    @property
    def is_right(self) -> bool:
        return not self.missing and self._hash.hexdigest() == self._file.checksum


def download(file: RemoteFile, target: Path, *, headers: Mapping[str, str], progress: Progress) -> None:
    """Download a file to target; beside it, target.part keeps what came before an interruption.

    Raises:
        SourceUnavailableError: The server kept breaking off, or refused.
        SourceInvalidError: What it sends is not what its hash promises.
        FetchCancelledError: The caller cancelled; the part stays.
        OSError: The disk is full, for example.
    """
    if target.exists():
        progress.show("downloading", file.name, file.size, file.size)
        return
    part_path = target.with_name(f"{target.name}.part")
    with part_path.open("a+b") as sink:
        part = _Part(file, sink)
        if part.size > file.size:
            part.restart()
        _complete(file, part, headers, progress)
        if not part.is_right:
            # Once again from the start: the part may have been damaged by a crash.
            part.restart()
            _complete(file, part, headers, progress)
        # Under its final name the content is trusted, also after a power cut.
        sink.flush()
        os.fsync(sink.fileno())
    if not part.is_right:
        part_path.unlink()
        raise SourceInvalidError(
            f"{file.name} arrived damaged twice: its content does not have the published checksum."
        )
    part_path.replace(target)


def _complete(file: RemoteFile, part: _Part, headers: Mapping[str, str], progress: Progress) -> None:
    """Request until the file has its size."""
    failures, best = 0, part.size
    while part.missing:
        with _named_errors(file.name) as failure:
            _request(file, part, headers, progress)
        if not part.missing:
            break
        # Measured against the best attempt: a server without ranges starts over each time.
        failures = 0 if part.size > best else failures + 1
        best = max(best, part.size)
        if failures >= len(_RETRY_SECONDS) + 1:
            raise SourceUnavailableError(
                f"The download of {file.name} broke off and could not be resumed; run it again to go on."
            ) from (failure[0] if failure else None)
        logger.info("download interrupted file=%s bytes=%d failures=%d", file.name, part.size, failures)
        progress.wait(_RETRY_SECONDS[max(0, failures - 1)])
    progress.show("downloading", file.name, file.size, file.size)


@contextmanager
def _named_errors(name: str) -> Iterator[list[Exception]]:
    """Swallow transient failures, keeping the last one; raise the others by our names."""
    failure: list[Exception] = []
    try:
        yield failure
    except HfHubHTTPError as error:
        if error.response.status_code not in _TRANSIENT_STATUS:
            raise SourceUnavailableError(
                f"The hub refused {name} with HTTP status {error.response.status_code}."
            ) from error
        failure.append(error)
    except httpx2.TransportError as error:
        failure.append(error)


def _request(file: RemoteFile, part: _Part, headers: Mapping[str, str], progress: Progress) -> None:
    """One request for what is missing; returns early where the server closes early."""
    asked = {**headers, "Accept-Encoding": "identity"}
    if part.size:
        asked["Range"] = f"bytes={part.size}-"
    with get_session().stream(
        "GET", file.url, headers=asked, timeout=_TIMEOUT, follow_redirects=True
    ) as response:
        if response.status_code == 416:
            part.restart()
            return
        hf_raise_for_status(response)
        if part.size and response.status_code != 206:
            part.restart()  # the server does not know ranges
        for chunk in response.iter_bytes():
            if part.size + len(chunk) > file.size:
                part.restart()
                raise SourceInvalidError(f"{file.name} is longer than the hub says.")
            part.append(chunk)
            progress.show("downloading", file.name, part.size, file.size)
