"""The description of the HTTP API, and generated requests against the real core and tiny-llama: each by
itself, and along the description's links one after the other.

OSAURUS_GENERATED_REQUESTS sets how many requests are made in all; CI makes a few, a release 2,000.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.transport import Response
from schemathesis.generation.stateful.state_machine import StepInput, StepOutput
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    use_after_free,
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
    response_headers_conformance,
    response_schema_conformance,
]
# A load of the model may be part of it.
SECONDS = 120
# The same requests in every run; a release draws others.
DRAWS: dict[str, Any] = (
    {} if "OSAURUS_GENERATED_REQUESTS" in os.environ else {"derandomize": True, "database": None}
)
# Requests of one scenario, and the share of all requests that are made in scenarios.
STEPS = 10
SHARE = 0.4
# Enough to meet finish reasons and log-probabilities.
MAX_TOKENS = "4"

SCHEMA = schemathesis.openapi.from_dict(dict(document()))


@pytest.fixture(scope="module")
def url(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server and a models directory of its own: generated requests unload models and make aliases."""
    models = tmp_path_factory.mktemp("models")
    (models / TINY).symlink_to(tiny_dir / TINY)
    flags = (*NO_LIMITS, "--max-output-tokens", MAX_TOKENS)
    with core_process(models, *flags) as core, rest_process(core.address) as rest:
        yield rest.url


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_generated_requests(url: str, operation: Operation) -> None:
    described = SCHEMA[operation.path][operation.method]
    is_aimed = operation.method == "POST"

    @settings(
        max_examples=max(2, REQUESTS // len(OPERATIONS)),
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        **DRAWS,
    )
    @given(data=st.data())
    def ask(data: st.DataObject) -> None:
        # Half of the bodies are wrong.
        mode = data.draw(st.sampled_from(list(GenerationMode))) if is_aimed else GenerationMode.POSITIVE
        case = data.draw(described.as_strategy(generation_mode=mode))
        # Most requests reach the model; a name that is generated is none. Deleting is left out.
        if is_aimed and isinstance(case.body, dict) and data.draw(st.integers(0, 4)):
            case.body["model"] = TINY
        case.call_and_validate(base_url=url, checks=CHECKS, timeout=SECONDS)

    ask()


class Clients(SCHEMA.as_state_machine()):  # type: ignore[misc]  # made at run time
    """Clients that go on with what earlier answers gave them."""

    url = ""
    reached: ClassVar[set[tuple[str, int]]] = set()
    copies = count()

    def step(self, input: StepInput) -> StepOutput:
        case = input.case
        linked = (
            input.transition.request_body.definition
            if input.transition and input.transition.request_body
            else {}
        )
        if case.method == "POST" and isinstance(case.body, dict):
            # Most requests shall reach the model and give something to go on with.
            if "model" not in linked:
                case.body["model"] = TINY
            if case.operation.definition.raw["operationId"] == "ollamaCopy":
                case.body |= {"source": TINY, "destination": f"copy-{next(self.copies)}"}
        made: StepOutput = super().step(input)
        if input.transition is not None:
            self.reached.add((input.transition.id, made.response.status_code))
        return made

    def call(self, case: Case, **kwargs: Any) -> Response:
        return case.call(base_url=self.url, timeout=SECONDS, **kwargs)

    def validate_response(self, response: Response, case: Case, *_: Any, **__: Any) -> None:
        case.validate_response(response, checks=[*CHECKS, use_after_free])


def test_requests_that_follow_from_each_other(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clients, "url", url)
    monkeypatch.setattr(Clients, "reached", set())
    Clients.run(
        settings=settings(
            max_examples=max(4, int(REQUESTS * SHARE) // STEPS),
            stateful_step_count=STEPS,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            **DRAWS,
        )
    )
    assert len(Clients.reached) > 2
