"""Second names of installed models, kept in a file of the models directory: MODELS_DIR/.aliases.json.

The file maps names to repository ids, which stay what they are when other models come and go. It is
written whole and renamed into place; a server sees what another process wrote when it looks next.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Final

from filelock import FileLock, Timeout

from osaurus_grpc.errors import DiskFullError, InvalidRequestError, ModelBusyError, ModelUnusableError
from osaurus_grpc.models import naming

ALIASES_FILE: Final = ".aliases.json"
MAX_ALIASES: Final = 1_024
MAX_ALIAS_CHARACTERS: Final = 200
_LOCK_SECONDS: Final = 10.0
# Ollama's clients name copies "name:tag" and "user/name".
_SAFE_ALIAS: Final = re.compile(r"\w(?:[\w.+\-/:]*[\w.+\-])?")

_NONE: Final[Mapping[str, str]] = MappingProxyType({})

logger = logging.getLogger(__name__)


def kept_form(name: str) -> str:
    """The form in which an alias is kept and compared."""
    return naming.normalized(naming.without_library(name))


def check_alias(name: str, *, field: str) -> str:
    """A new alias in the form in which it is kept.

    Raises:
        InvalidRequestError: The name is none that an alias can have.
    """
    alias = kept_form(name)
    is_sound = len(alias) <= MAX_ALIAS_CHARACTERS and bool(_SAFE_ALIAS.fullmatch(alias))
    if not is_sound or alias in naming.DEFAULT_NAMES:
        raise InvalidRequestError(
            f"{field} must be a name of letters, digits and . _ - + / : that begins with a letter or digit "
            f"and does not end in / or :, of at most {MAX_ALIAS_CHARACTERS} characters.",
            field=field,
        )
    return alias


class AliasFile:
    """The aliases of one models directory.

    Args:
        models_dir: The directory; it need not exist.
    """

    def __init__(self, models_dir: Path) -> None:
        self._path = models_dir / ALIASES_FILE
        self._seen: tuple[int, int, int] | None = None
        self._aliases = _NONE

    def read(self) -> Mapping[str, str]:
        """Alias to repository id; read again only where the file changed."""
        try:
            status = self._path.stat()
        except OSError:
            self._seen, self._aliases = None, _NONE
            return _NONE
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen != self._seen:
            self._aliases = MappingProxyType(_parsed(self._path))
            self._seen = seen
        return self._aliases

    def add(self, alias: str, repo_id: str) -> None:
        """Let a name mean a model; one that meant another is changed.

        Args:
            alias: As check_alias() gives it.
            repo_id: The model.

        Raises:
            InvalidRequestError: There are as many aliases as may be.
            ModelBusyError: Another process holds the file.
            ModelUnusableError: The models directory cannot be written.
            DiskFullError: The disk is full.
        """
        with self._changing(alias) as aliases:
            if alias not in aliases and len(aliases) >= MAX_ALIASES:
                raise InvalidRequestError(f"There are {MAX_ALIASES} aliases, which is the limit.")
            aliases[alias] = repo_id

    def remove(self, alias: str) -> bool:
        """Drop an alias; False where there is none of that name. Raises as add() does."""
        if alias not in self.read():
            return False
        with self._changing(alias) as aliases:
            return aliases.pop(alias, None) is not None

    @contextmanager
    def _changing(self, alias: str) -> Iterator[dict[str, str]]:
        """The aliases as they are, written back when the block is left in order."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self._path}.lock", timeout=_LOCK_SECONDS):
                aliases = dict(_parsed(self._path))
                yield aliases
                _write(self._path, aliases)
        except Timeout:
            raise ModelBusyError("Another process changes the aliases.", model=alias) from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DiskFullError("The disk of the models directory is full.") from error
            raise ModelUnusableError("The models directory cannot be written.", model=alias) from error


def _parsed(path: Path) -> dict[str, str]:
    """What the file says; nothing, with a line in the log, where it is damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        aliases = document["aliases"]
        return {str(alias): str(repo_id) for alias, repo_id in aliases.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("event=aliases_unreadable error=%s", type(error).__name__)
        return {}


def _write(path: Path, aliases: Mapping[str, str]) -> None:
    text = json.dumps({"aliases": dict(sorted(aliases.items()))}, ensure_ascii=False, indent=2) + "\n"
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor, not a path
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
