"""The osaurus command: finds the subcommand, runs it, turns its errors into a line and a status.

A subcommand's module is imported only when it is the one that runs, so that `osaurus list` does not
wait for MLX or gRPC. Exit statuses: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from osaurus_grpc import __version__
from osaurus_grpc.cli.output import CommandError, note
from osaurus_grpc.errors import OsaurusError


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its module below osaurus_grpc.cli and the function there, which takes arguments."""

    name: str
    summary: str
    module: str
    function: str = "main"

    def load(self) -> Callable[[Sequence[str]], int]:
        """The function that runs the command and returns its exit status."""
        module = importlib.import_module(f"osaurus_grpc.cli.{self.module}")
        function: Callable[[Sequence[str]], int] = getattr(module, self.function)
        return function


COMMANDS = (
    Command("serve", "start the gRPC core and the HTTP server, fetching a model if needed", "serve"),
    Command("run", "ask a model one question, or chat with it in the terminal", "run"),
    Command("pull", "fetch a model", "pull"),
    Command("list", "list the installed models", "models", "list_models"),
    Command("show", "describe an installed model", "models", "show_model"),
    Command("cp", "give an installed model a second name", "models", "copy_model"),
    Command("rm", "remove an installed model or a second name of one", "models", "remove_model"),
    Command("ps", "list the models that a running server holds in memory", "models", "list_loaded"),
    Command("status", "tell whether a server runs, and where", "status", "show_status"),
    Command("stop", "stop a running server", "status", "stop_server"),
    Command("doctor", "show what was chosen for this machine and measure it", "doctor"),
    Command("version", "print the version", "main", "print_version"),
)


class _LineFormatter(logging.Formatter):
    """Log lines for a person at a terminal: where an error came from is told on request only."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's message, with its traceback only where OSAURUS_DEBUG is set."""
        if not os.environ.get("OSAURUS_DEBUG"):
            record = copy.copy(record)
            record.exc_info = record.exc_text = None
        return super().format(record)


def usage() -> str:
    """The overview of all subcommands."""
    width = max(len(command.name) for command in COMMANDS)
    lines = (f"  {command.name.ljust(width)}  {command.summary}" for command in COMMANDS)
    return "\n".join(
        (
            "usage: osaurus COMMAND [ARGUMENTS]",
            "",
            "A local LLM server: OpenAI- and Ollama-compatible over HTTP, typed over gRPC.",
            "",
            "commands:",
            *lines,
            "",
            "osaurus COMMAND --help says what a command takes.",
        )
    )


def print_version(arguments: Sequence[str]) -> int:
    """Print the version."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise CommandError(f"version takes no arguments, and got {arguments[0]!r}.", exit_status=2)
    print(f"osaurus {__version__}")
    return 0


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments:
        print(usage(), file=sys.stderr)
        return 2
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        if not rest or name != "help":
            print(usage())
            return 0
        name, rest = rest[0], ["--help"]
    if name in ("-v", "--version"):
        return print_version(())
    for command in COMMANDS:
        if command.name == name:
            return command.load()(rest)
    print(usage(), file=sys.stderr)
    close = difflib.get_close_matches(name, [command.name for command in COMMANDS], n=1)
    note(f"there is no command {name!r}" + (f"; did you mean {close[0]}?" if close else "."))
    return 2


def _run(arguments: Sequence[str]) -> int:
    try:
        return _dispatch(arguments)
    except CommandError as error:
        if str(error):
            note(str(error))
        return error.exit_status
    except OsaurusError as error:
        note(error.message)
        return 1
    except KeyboardInterrupt:
        note("interrupted.")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as in `osaurus list | head -1`. What is still buffered
        # goes nowhere, or the interpreter would complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        note(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the process's exit status."""
    for stream in (sys.stdout, sys.stderr):
        # An answer may hold characters that the terminal's encoding lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter("osaurus: %(message)s"))
    logging.basicConfig(handlers=(handler,), level=logging.WARNING)
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as exit_request:  # argparse: --help and usage errors
        return int(exit_request.code or 0)
    except Exception as error:
        # The last line of defence: a person sees no traceback.
        if os.environ.get("OSAURUS_DEBUG"):
            raise
        note(f"this is a bug: {type(error).__name__}: {error}. OSAURUS_DEBUG=1 shows where it happened.")
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
