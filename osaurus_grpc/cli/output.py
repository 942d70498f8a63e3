"""What commands print: sentences on stderr, results on stdout, tables and units for people."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from datetime import datetime


class CommandError(Exception):
    """A command cannot do what was asked. Its text is for the person at the terminal.

    Args:
        message: One or more sentences; what happened and what to do.
        exit_status: Of the process: 1 for a failure, 2 for wrong usage.
    """

    def __init__(self, message: str, *, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def note(message: str) -> None:
    """Tell the person what is going on, apart from the command's result."""
    # Whoever read this may have gone; a server goes on without.
    with contextlib.suppress(OSError):
        print(f"osaurus: {message}", file=sys.stderr, flush=True)


def size_text(size_bytes: int) -> str:
    """A size in decimal units, as disks and downloads are sold: "98.4 MB"."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def time_text(moment: datetime) -> str:
    """A moment in this machine's time zone, to the minute."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces; the same in a terminal and in a pipe."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )
    return "\n".join(lines)


def details(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, one pair a line, values aligned."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in pairs)
