"""The table of results: what came of each client's cases when it was last run.

`python -m tests.clients.results` prints it as Markdown, for README.md.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.clients.environments import Case, Client, clients


def keep(cache: Path, client: Client, cases: list[Case]) -> None:
    """Keep a client's results beside its environment."""
    text = json.dumps([asdict(case) for case in cases], indent=1)
    (cache / f"{client.name}.json").write_text(text)


def table(cache: Path) -> str:
    """A Markdown table of all clients, then the cases that are expected to fail, with why."""
    rows = ["| client | passed | expected to fail | skipped |", "|---|---|---|---|"]
    notes: dict[str, list[str]] = {}
    for client in clients():
        path = cache / f"{client.name}.json"
        if not path.exists():
            continue
        cases = [Case(**case) for case in json.loads(path.read_text())]
        count = Counter(case.outcome for case in cases)
        if count["failed"]:
            raise SystemExit(f"{client.name} has {count['failed']} failed cases")
        rows.append(
            f"| `{client.name}` | {count['passed']} | {count['expected'] or ''} | {count['skipped'] or ''} |"
        )
        for case in cases:
            if case.outcome == "expected":
                notes.setdefault(f"`{client.name}`: {case.reason}", []).append(f"`{case.name}`")
    return "\n".join([*rows, "", *(f"- {why}: {', '.join(names)}" for why, names in notes.items())])


if __name__ == "__main__":
    test_cache = Path(os.environ.get("OSAURUS_TEST_CACHE") or "~/.cache/osaurus-tests").expanduser()
    print(table(test_cache / "clients"))
