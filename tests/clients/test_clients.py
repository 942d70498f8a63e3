"""Every client's cases pass, or fail as its file says. CLIENT_SUITES names the clients to run, or "all"."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clients import results
from tests.clients.environments import Client, clients
from tests.conftest import MINILM, SMOLLM, TINY
from tests.harness.processes import NO_LIMITS, core_process, rest_process

_CHOSEN = os.environ.get("CLIENT_SUITES", "").replace(",", " ").split()
_INSTALLERS = 4


def is_chosen(client: Client) -> bool:
    return client.name in _CHOSEN or "all" in _CHOSEN


@pytest.fixture(scope="session")
def server(tiny_dir: Path, smollm_dir: Path, minilm_dir: Path, tmp_path_factory) -> Iterator[str]:
    """Base URL of a shim whose core serves SmolLM2, tiny-llama and an embedding model."""
    models = tmp_path_factory.mktemp("models")
    for folder, name in ((tiny_dir, TINY), (smollm_dir, SMOLLM), (minilm_dir, MINILM)):
        (models / name).symlink_to(folder / name)
    # No case needs a longer answer, and one that forgets to bound it must not run for minutes.
    flags = (*NO_LIMITS, "--max-output-tokens", "256", "--default-model", SMOLLM)
    with core_process(models, *flags) as core, rest_process(core.address) as rest:
        yield rest.url


@pytest.fixture(scope="session")
def endless_server(endless_dir: Path) -> Iterator[str]:
    """Base URL of a shim whose tiny-llama goes on for longer than any buffer holds."""
    with core_process(endless_dir, *NO_LIMITS) as core, rest_process(core.address) as rest:
        yield rest.url


@pytest.fixture(scope="session")
def environments(models_cache: Path) -> Iterator[Path]:
    """Where environments are kept. The chosen clients' are made meanwhile, for it is mostly waiting."""
    cache = models_cache / "clients"
    cache.mkdir(exist_ok=True)
    with ThreadPoolExecutor(_INSTALLERS) as pool:
        made = [pool.submit(client.environment, cache) for client in clients() if is_chosen(client)]
        yield cache
        # What went wrong is told by the test that needs the environment, which tries again.
        for future in made:
            future.cancel()


@pytest.mark.smollm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("client", clients(), ids=lambda client: client.name)
def test_client(client: Client, request: pytest.FixtureRequest) -> None:
    if not is_chosen(client):
        pytest.skip('CLIENT_SUITES does not name it, nor says "all"')
    settings = {
        "SERVER_URL": request.getfixturevalue("server"),
        "ENDLESS_URL": request.getfixturevalue("endless_server"),
        "CHAT_MODEL": SMOLLM,
        "TINY_MODEL": TINY,
        "EMBEDDING_MODEL": MINILM,
    }
    cache: Path = request.getfixturevalue("environments")
    found = client.run(cache, settings)
    results.keep(cache, client, found)
    failed = [f"{case.name}: {case.reason}" for case in found if case.outcome == "failed"]
    assert not failed, "\n\n".join(failed)
    assert any(case.outcome == "passed" for case in found)
