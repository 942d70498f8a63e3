"""Generated stubs in other languages against one running core; see README.md.

Building them fetches their libraries and takes minutes, so they run where INTEROP_LANGUAGES is set: "all",
or the languages wanted, separated by commas.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.processes import NO_LIMITS, core_process
from tests.interop.clients import CASES, CLIENTS, HERE, ForeignClient

WANTED = os.environ.get("INTEROP_LANGUAGES", "")
pytestmark = [
    pytest.mark.skipif(not WANTED, reason="INTEROP_LANGUAGES names no language"),
    # Most of it is building.
    pytest.mark.timeout(1500),
]

Table = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def table(models_cache: Path) -> Iterator[Table]:
    """Language to its results, filled as the clients run; printed at the end."""
    found: Table = {}
    yield found
    print("\n\n| language |", " | ".join(CASES), "|")
    print("|---|" + "---|" * len(CASES))
    for language, results in found.items():
        print(f"| {language} |", " | ".join("failed" if results[case] else "passes" for case in CASES), "|")


@pytest.fixture(scope="module")
def address(endless_dir: Path) -> Iterator[str]:
    with core_process(endless_dir, *NO_LIMITS) as core:
        yield core.address


@pytest.fixture(scope="module", params=CLIENTS, ids=lambda client: client.language)
def results(request: pytest.FixtureRequest, address: str, models_cache: Path, table: Table) -> dict[str, str]:
    client: ForeignClient = request.param
    if WANTED != "all" and client.language not in WANTED.split(","):
        pytest.skip(f"{client.language} is not asked for")
    if missing := client.missing_tools():
        pytest.skip(f"not installed here: {', '.join(missing)}")
    cache = models_cache / "interop"
    cache.mkdir(exist_ok=True)
    table[client.language] = client.results(client.built(cache), address)
    return table[client.language]


@pytest.mark.parametrize("case", CASES)
def test_client(results: dict[str, str], case: str):
    assert results[case] == ""


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.language)
def test_every_client_can_be_built(client: ForeignClient):
    assert (HERE / client.language / client.build).is_file()
