"""Where templates and tokenizers lie, for tests that ask for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.families.packages import PackagesMissingError, families_folder


@pytest.fixture(scope="session")
def folder(models_cache: Path) -> Path:
    """The folder with "templates" and "tokenizers", fetched on first use."""
    if os.environ.get("FAMILY_TEMPLATES") != "all":
        pytest.skip('FAMILY_TEMPLATES does not say "all"')
    try:
        return families_folder(models_cache)
    except PackagesMissingError as error:
        pytest.skip(f"missing, and cannot be fetched: {error}")
