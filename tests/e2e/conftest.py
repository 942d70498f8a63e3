from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import Served, serving


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory that only this test's commands use."""
    path = tmp_path / "home"
    path.mkdir()
    return path


def _linked(path: Path, models: Path) -> Path:
    """A models directory of its own with the tiny model of another."""
    path.mkdir()
    (path / "tiny-llama").symlink_to(models / "tiny-llama")
    return path


@pytest.fixture
def models_dir(tmp_path: Path, tiny_dir: Path) -> Path:
    """A models directory with the tiny model, which no other test's server uses."""
    return _linked(tmp_path / "models", tiny_dir)


@pytest.fixture
def endless_models_dir(tmp_path: Path, endless_dir: Path) -> Path:
    """The same with a tiny model whose answers do not end by themselves."""
    return _linked(tmp_path / "endless-models", endless_dir)


@pytest.fixture(scope="module")
def served_dir(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """The models directory of tiny_served, which no other test's server uses either."""
    return _linked(tmp_path_factory.mktemp("served") / "models", tiny_dir)


@pytest.fixture(scope="module")
def tiny_served(tmp_path_factory: pytest.TempPathFactory, served_dir: Path) -> Iterator[Served]:
    """`osaurus serve --model tiny-llama`, for tests that leave it running."""
    arguments = ("--model=tiny-llama", f"--models-dir={served_dir}", "--max-output-tokens=16")
    with serving(tmp_path_factory.mktemp("home"), *arguments) as served:
        yield served
