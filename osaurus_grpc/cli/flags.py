"""The flags of `osaurus serve`: its own, and all of the two processes it starts.

Each process reads its own settings from flags, environment and settings file; serve adds nothing to
that order. It accepts the flags of both, checks them, and hands each process those that were on its
own command line, as they were written. Where both processes have a flag, both get it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence


class FlagGroup:
    """Collects what a settings module declares, on a parser that knows only the command line.

    It stands in for the ConfigArgParse parser that a settings module's add_arguments() expects:
    environment variables and defaults are left to the process that reads them.

    Args:
        parser: Gets the flags.
        known: Flags declared so far on that parser, by any group.
        excluded: Flags that serve sets itself.
    """

    def __init__(
        self,
        parser: argparse.ArgumentParser,
        title: str,
        known: dict[str, argparse.Action],
        excluded: Sequence[str] = (),
    ) -> None:
        self._group = parser.add_argument_group(title)
        self._known = known
        self._excluded = excluded
        self._flags: dict[str, argparse.Action] = {}

    def add_argument(self, *names: str, **options: object) -> None:
        """Declare a flag as argparse does; the environment variable is dropped."""
        flag = names[0]
        if flag in self._excluded:
            return
        if flag in self._known:
            shared = self._known[flag]
            shared.help = f"{shared.help}; for both processes"
        else:
            default = options.get("default")
            options.pop("env_var", None)
            options["default"] = argparse.SUPPRESS
            if isinstance(options.get("help"), str):
                options["help"] = str(options["help"]).replace("%(default)s", str(default))
            if callable(check := options.get("type")):
                options["type"] = _as_written(check)
            # The signature it is typed with has no room for options passed on as they came.
            self._known[flag] = self._group.add_argument(*names, **options)  # type: ignore[arg-type]  # as said
        self._flags[flag] = self._known[flag]

    def command_line(self, values: argparse.Namespace) -> list[str]:
        """The flags of this group that were given, for the process that they are for."""
        given = vars(values)
        arguments: list[str] = []
        for flag, action in self._flags.items():
            match given.get(action.dest):
                case None | False:
                    pass
                case True:
                    arguments.append(flag)
                case list() as items:
                    arguments.extend(f"{flag}={item}" for item in items)
                case text:
                    arguments.append(f"{flag}={text}")
        return arguments


def _as_written(check: Callable[[str], object]) -> Callable[[str], str]:
    """An argparse type that refuses what another one refuses, and keeps the text."""

    def keep(text: str) -> str:
        check(text)
        return text

    keep.__name__ = getattr(check, "__name__", "value")
    return keep
