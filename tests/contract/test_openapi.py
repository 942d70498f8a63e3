"""The description of the HTTP API, and generated requests against the real core and tiny-llama.

OSAURUS_GENERATED_REQUESTS sets how many requests are made in all; CI makes a few, a release 2,000.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from rest_shim.openapi.document import OPERATIONS, document
from rest_shim.openapi.operation import Operation
from tests.conftest import TINY
from tests.harness.processes import NO_LIMITS, core_process, rest_process

REQUESTS = int(os.environ.get("OSAURUS_GENERATED_REQUESTS", "150"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
# Enough to meet finish reasons and log-probabilities.
MAX_TOKENS = "4"

SCHEMA = schemathesis.openapi.from_dict(dict(document()))


@pytest.fixture(scope="module")
def url(tiny_dir: Path) -> Iterator[str]:
    """A server of its own: generated requests unload models and make aliases."""
    flags = (*NO_LIMITS, "--max-output-tokens", MAX_TOKENS)
    with core_process(tiny_dir, *flags) as core, rest_process(core.address) as rest:
        yield rest.url


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_generated_requests(url: str, operation: Operation) -> None:
    described = SCHEMA[operation.path][operation.method]
    is_aimed = operation.method == "POST"

    @settings(
        max_examples=max(2, REQUESTS // len(OPERATIONS)),
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def ask(data: st.DataObject) -> None:
        # Half of the bodies are wrong.
        mode = data.draw(st.sampled_from(list(GenerationMode))) if is_aimed else GenerationMode.POSITIVE
        case = data.draw(described.as_strategy(generation_mode=mode))
        # Most requests reach the model; a name that is generated is none. Deleting is left out.
        if is_aimed and isinstance(case.body, dict) and data.draw(st.integers(0, 4)):
            case.body["model"] = TINY
        case.call_and_validate(base_url=url, checks=CHECKS)

    ask()
