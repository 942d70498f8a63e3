"""The models that are installed: below the models directory and, read only, in the Hugging Face cache.

The models directory holds models as name/ or org/name/ and nothing deeper; hidden folders, the
staging area among them, are not looked at, linked folders are followed. Of the cache, the current
revision of each model repository counts. Only whole models are listed.

Every call looks whether something changed (one stat for each file, some tens of microseconds for a
model) and reads again only the folders that did.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from osaurus_grpc.errors import ModelExistsError, ModelNotFoundError
from osaurus_grpc.models import facts, naming
from osaurus_grpc.models.aliases import AliasFile, check_alias, kept_form
from osaurus_grpc.models.facts import Capability
from osaurus_grpc.models.inspection import (
    CONFIG_FILE,
    FileStat,
    IncompleteModelError,
    architecture,
    inspect,
    list_files,
)

__all__ = ["Capability", "Catalog", "ModelEntry"]

logger = logging.getLogger(__name__)

_CACHE_PREFIX = "models--"


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """An installed model.

    Attributes:
        id: The name it is listed by, unique among the installed models.
        repo_id: "org/name", or "name" where it lies directly in the models directory.
        path: Its folder.
        size_bytes: Bytes of the files in it.
        digest: 64 hexadecimal digits; see facts.digest().
        modify_time: When its files last changed, UTC.
        architecture: The model_type of its config.json.
        parameter_count: Weights, or 0 where the files do not tell.
        quantization: How weights are stored: "4bit", "bf16", "f32", ….
        context_length: Tokens, or 0 where the files do not tell.
        embedding_length: Width of the hidden state, or 0 where the files do not tell.
        capabilities: What it can do.
        is_managed: It lies below the models directory, so it may be removed.
        alias_of: The id of the model that this is a second name of; "" for a model itself.
    """

    id: str
    repo_id: str
    path: Path
    size_bytes: int
    digest: str
    modify_time: datetime
    architecture: str
    parameter_count: int
    quantization: str
    context_length: int
    embedding_length: int
    capabilities: frozenset[Capability]
    is_managed: bool
    alias_of: str = ""


class _Candidate(NamedTuple):
    """A folder that may be a model, with what tells whether it changed."""

    repo_id: str
    path: str
    is_managed: bool
    signature: tuple[FileStat, ...] | tuple[str, int, int]


class Catalog:
    """The installed models. Safe to use from several threads.

    Args:
        models_dir: The models directory; it need not exist.
        hub_cache_dir: The Hugging Face cache, read only; None leaves it out.
        default_model: What "" and "default" mean; "" is the only model that generates, if there is one.
        aliases: Further names and the models they mean.
        fallback_model: What an unknown name means; "" is an error.
    """

    def __init__(
        self,
        models_dir: Path,
        *,
        hub_cache_dir: Path | None = None,
        default_model: str = "",
        aliases: Mapping[str, str] = MappingProxyType({}),
        fallback_model: str = "",
    ) -> None:
        self._models_dir = models_dir
        self._hub_cache_dir = hub_cache_dir
        self._default_model = default_model
        self._aliases = dict(aliases)
        self._alias_file = AliasFile(models_dir)
        self._fallback_model = fallback_model
        self._lock = threading.Lock()
        self._candidates: dict[str, _Candidate] = {}
        self._inspected: dict[str, ModelEntry | None] = {}
        self._entries: tuple[ModelEntry, ...] = ()

    def entries(self) -> tuple[ModelEntry, ...]:
        """All models, sorted by id."""
        with self._lock:
            self._refresh()
            return self._entries

    def listed(self) -> tuple[ModelEntry, ...]:
        """All models, and their aliases as models of those names, sorted by id."""
        models = self.entries()
        return tuple(sorted((*models, *self._alias_entries(models)), key=lambda entry: entry.id))

    def _alias_entries(self, models: tuple[ModelEntry, ...]) -> Iterator[ModelEntry]:
        """Aliases of models that are installed, but for those that a model's own name hides."""
        by_repo_id = {entry.repo_id: entry for entry in models}
        ids = {entry.id for entry in models}
        for alias, repo_id in self._stored_aliases().items():
            if alias not in ids and (entry := by_repo_id.get(repo_id)) is not None:
                yield replace(entry, id=alias, alias_of=entry.id)

    def _stored_aliases(self) -> Mapping[str, str]:
        with self._lock:
            return self._alias_file.read()

    def find_listed(self, name: str) -> ModelEntry:
        """As find(), but an alias is found as listed() shows it."""
        wanted = kept_form(name)
        for entry in self._alias_entries(self.entries()):
            if entry.id == wanted:
                return entry
        return self.find(name)

    def add_alias(self, source: str, destination: str) -> ModelEntry:
        """Give a model a second name, in place of what that name meant as an alias.

        Returns:
            The model under its new name.

        Raises:
            InvalidRequestError: The new name is none that an alias can have.
            ModelNotFoundError: There is no such model.
            ModelExistsError: The new name means another model, or is the model's own.
            OsaurusError: The models directory cannot be written; see AliasFile.add().
        """
        alias = check_alias(destination, field="destination")
        entry = self.find(source)
        taken = naming.match(alias, {each.id: each.repo_id for each in self.entries()})
        is_configured = alias in {naming.normalized(each) for each in self._aliases}
        if alias == entry.id or is_configured or (taken is not None and taken != entry.id):
            raise ModelExistsError(f"There is a model of that name already: {alias}", model=alias)
        with self._lock:
            self._alias_file.add(alias, entry.repo_id)
        return replace(entry, id=alias, alias_of=entry.id)

    def remove_alias(self, name: str) -> bool:
        """Drop a second name; False where the name is none. Raises as AliasFile.remove()."""
        with self._lock:
            return self._alias_file.remove(kept_form(name))

    def find(self, name: str) -> ModelEntry:
        """The model that a request's name means.

        Raises:
            ModelNotFoundError: There is none, or the name means several.
        """
        entries = {entry.id: entry for entry in self.entries()}
        model_id = naming.resolve(
            name,
            {entry.id: entry.repo_id for entry in entries.values()},
            # What this server was told wins over what was once written down.
            aliases={**self._stored_aliases(), **self._aliases},
            default=self._default_model or _only_one(entries.values()),
            fallback=self._fallback_model,
        )
        if model_id is None:
            is_default = naming.normalized(name) in naming.DEFAULT_NAMES
            raise ModelNotFoundError((self._default_model or "default") if is_default else name)
        return entries[model_id]

    def default(self) -> ModelEntry | None:
        """What "" and "default" mean, or None."""
        try:
            return self.find("")
        except ModelNotFoundError:
            return None

    def chat_template(self, entry: ModelEntry) -> str:
        """The model's chat template (Jinja), or "" where it has none."""
        return facts.chat_template(entry.path)

    def _refresh(self) -> None:
        """Look for changed folders and read those again."""
        found = {candidate.path: candidate for candidate in self._scan()}
        if found == self._candidates:
            return
        self._inspected = {
            path: self._inspected[path] if self._candidates.get(path) == candidate else _inspected(candidate)
            for path, candidate in found.items()
        }
        self._candidates = found
        whole = [entry for entry in self._inspected.values() if entry is not None]
        managed = {entry.repo_id.casefold() for entry in whole if entry.is_managed}
        # The same repository in the models directory wins over the one in the cache.
        whole = [entry for entry in whole if entry.is_managed or entry.repo_id.casefold() not in managed]
        ids = naming.assign_ids(entry.repo_id for entry in whole)
        listed = (replace(entry, id=ids[entry.repo_id]) for entry in whole)
        self._entries = tuple(sorted(listed, key=lambda entry: entry.id))

    def _scan(self) -> Iterator[_Candidate]:
        for name, path in _folders(str(self._models_dir)):
            if files := _model_files(path):
                yield _Candidate(name, path, True, files)
                continue
            for inner, inner_path in _folders(path):
                if files := _model_files(inner_path):
                    yield _Candidate(f"{name}/{inner}", inner_path, True, files)
        if self._hub_cache_dir is not None:
            for name, path in _folders(str(self._hub_cache_dir)):
                if name.startswith(_CACHE_PREFIX):
                    yield from _cached_candidate(name, path)


def _only_one(entries: Iterable[ModelEntry]) -> str:
    """What "" means where nothing is configured: the only model that generates, if there is just one."""
    generating = [entry.id for entry in entries if entry.capabilities != {Capability.EMBEDDING}]
    return generating[0] if len(generating) == 1 else ""


def _folders(path: str) -> list[tuple[str, str]]:
    """Names and paths of the visible folders in a folder, links followed, sorted.

    A folder that cannot be read has none. Paths are strings in here: a scan happens for every
    request, and Path objects would take most of its time.
    """
    try:
        with os.scandir(path) as entries:
            return sorted((entry.name, entry.path) for entry in entries if _is_visible_folder(entry))
    except OSError:
        return []


def _is_visible_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.name[0] != "." and entry.is_dir()
    except OSError:
        return False  # a circle of links, or gone


def _model_files(path: str) -> tuple[FileStat, ...]:
    """The files of a folder with a config.json; none of another."""
    try:
        files = list_files(path)
    except OSError:
        return ()
    return files if any(file.name == CONFIG_FILE for file in files) else ()


def _cached_candidate(name: str, path: str) -> Iterator[_Candidate]:
    """The current revision of a repository in the cache.

    Blobs of the cache never change under their name, so the times of the folders tell of every change.
    """
    repo_id = name.removeprefix(_CACHE_PREFIX).replace("--", "/")
    try:
        with open(f"{path}/refs/main", encoding="ascii") as reference:  # noqa: PTH123  (see _folders)
            revision = reference.read(64).strip()
        if not revision.isalnum():
            return
        snapshot = f"{path}/snapshots/{revision}"
        changed = os.stat(snapshot).st_mtime_ns  # noqa: PTH116  (see _folders)
        blobs_changed = os.stat(f"{path}/blobs").st_mtime_ns  # noqa: PTH116  (see _folders)
    except (OSError, ValueError):
        return
    yield _Candidate(repo_id, snapshot, False, (revision, changed, blobs_changed))


def _inspected(candidate: _Candidate) -> ModelEntry | None:
    """Read a folder; None, with a line in the log, where it is not a whole model."""
    path = Path(candidate.path)
    try:
        folder = inspect(path)
    except IncompleteModelError as error:
        level = logging.WARNING if candidate.is_managed else logging.DEBUG
        logger.log(level, "model not listed model=%s reason=%r", candidate.repo_id, str(error))
        return None
    template = facts.chat_template(path)
    newest = max(file.mtime_ns for file in folder.files)
    return ModelEntry(
        id="",
        repo_id=candidate.repo_id,
        path=path,
        size_bytes=sum(file.size for file in folder.files),
        digest=facts.digest(folder),
        modify_time=datetime.fromtimestamp(newest / 1e9, UTC),
        architecture=architecture(folder.config),
        parameter_count=facts.parameter_count(folder),
        quantization=facts.quantization(folder),
        context_length=facts.context_length(folder.config),
        embedding_length=facts.embedding_length(folder.config),
        capabilities=facts.capabilities(folder.config, template),
        is_managed=candidate.is_managed,
    )
