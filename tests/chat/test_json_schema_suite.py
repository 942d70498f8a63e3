"""The official test suite of JSON schema: what a schema forbids is never admitted.

Set JSON_SCHEMA_SUITE=all to fetch it (in the sources of the Python package jsonschema, kept) and run this.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from filelock import FileLock

from osaurus_grpc.chat.grammar import Grammar, Grammars, TokenizedModel
from osaurus_grpc.errors import InvalidRequestError
from tests.chat.test_grammar import allowed, grammars, model  # noqa: F401  (fixtures)
from tests.families.packages import Package, PackagesMissingError

DRAFTS = ("draft4", "draft6", "draft7", "draft2019-09", "draft2020-12")
# Annotations for us: what they say of strings is no regular expression.
UNENFORCED = ("optional/content.json", "optional/format/regex.json", "optional/format/ecmascript-regex.json")
# So many of the latest draft's schemas are enforced; the others are refused by name.
LEAST_ENFORCED = 220
_LOCK_SECONDS = 280


def _kept(path: PurePosixPath) -> str:
    parts = path.parts[1:]
    return "/".join(parts[2:]) if parts[:2] == ("json", "tests") and path.suffix == ".json" else ""


SUITE = Package("sdist", "jsonschema==4.26.0", _kept)


@pytest.fixture(scope="module")
def suite(models_cache: Path) -> Path:
    """A folder with the tests of each draft."""
    if os.environ.get("JSON_SCHEMA_SUITE") != "all":
        pytest.skip('JSON_SCHEMA_SUITE does not say "all"')
    folder = models_cache / "json-schema-suite-4.26.0"
    with FileLock(models_cache / "json-schema-suite.lock", timeout=_LOCK_SECONDS):
        if not (folder / ".whole").exists():
            folder.mkdir(exist_ok=True)
            try:
                SUITE.fetch(folder)
            except PackagesMissingError as error:
                pytest.skip(f"missing, and cannot be fetched: {error}")
            (folder / ".whole").touch()
    return folder


def texts_of(value: object) -> Iterator[str]:
    """Ways to write a value; the last has escapes that nothing asks for."""
    plain = json.dumps(value, ensure_ascii=False)
    yield plain
    yield json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    yield json.dumps(value)
    yield re.sub(r'"([a-zA-Z])([^"]*)":', lambda found: f'"\\u{ord(found[1]):04x}{found[2]}":', plain)


def admits(grammar: Grammar, model: TokenizedModel, text: str) -> bool:  # noqa: F811
    constraint = grammar.constraint()
    for token_id in model.tokenizer.encode(text, add_special_tokens=False):
        if constraint.is_done or token_id not in allowed(constraint, model):
            return False
        constraint.accept(token_id)
    return constraint.is_done or bool(model.eos_token_ids & set(allowed(constraint, model)))


def cases(suite: Path, draft: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((suite / draft).rglob("*.json")):
        name = str(path.relative_to(suite / draft))
        for case in json.loads(path.read_text()):
            # A format says nothing in the required tests, and something in the optional ones.
            if isinstance(case["schema"], dict) and name not in {*UNENFORCED, "format.json"}:
                yield name, case


@pytest.mark.timeout(900)
@pytest.mark.asyncio(loop_scope="module")  # the fixtures' own
@pytest.mark.parametrize("draft", DRAFTS)
async def test_nothing_that_is_invalid_is_admitted(
    grammars: Grammars,  # noqa: F811
    model: TokenizedModel,  # noqa: F811
    suite: Path,
    draft: str,
) -> None:
    enforced = admitted = 0
    wrong: list[tuple[str, str, str, object]] = []
    for name, case in cases(suite, draft):
        try:
            grammar = await grammars.json_schema(model, json.dumps(case["schema"]), field="f")
        except InvalidRequestError as error:
            if error.field != "f" or ("cannot be enforced" not in error.message and not error.metadata):
                wrong.append((name, case["description"], error.message, None))
            continue
        enforced += 1
        for test in case["tests"]:
            is_admitted = any(admits(grammar, model, text) for text in texts_of(test["data"]))
            admitted += is_admitted
            if is_admitted and not test["valid"]:
                wrong.append((name, case["description"], test["description"], test["data"]))
    assert not wrong
    # Less is admitted than is valid, as chat/schema.py says, but not little.
    assert admitted > enforced
    assert draft != DRAFTS[-1] or enforced >= LEAST_ENFORCED
