"""osaurus status and stop: is a server running, and where; end it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence

from osaurus_grpc.cli import runtime
from osaurus_grpc.cli.models import loaded_models
from osaurus_grpc.cli.options import (
    add_api_key_option,
    add_models_options,
    api_key,
    command_parser,
    core_settings,
)
from osaurus_grpc.cli.output import CommandError, details, time_text
from osaurus_grpc.errors import OsaurusError

# Longer than a server takes to drain by default.
STOP_SECONDS = 90.0
_POLL_SECONDS = 0.1


def show_status(arguments: Sequence[str]) -> int:
    """Print every running server: 0 where there is one, 1 and "stopped" where there is none."""
    parser = command_parser("status", "Tell whether a server runs, and where. Exit status 1 if none does.")
    add_models_options(parser)
    add_api_key_option(parser)
    values = parser.parse_args(arguments)
    core = core_settings(values)
    servers = runtime.running_servers(core.models_dir if values.models_dir else None)
    if not servers:
        print("stopped")
        return 1
    print("\n\n".join(_describe(server, api_key(values, core)) for server in servers))
    return 0


def _describe(server: runtime.RunningServer, key: str) -> str:
    try:
        loaded = ", ".join(model.id for model in asyncio.run(loaded_models(server, key))) or "none"
    except OsaurusError as error:
        loaded = f"unknown: {error.message}"
    return "running\n" + details(
        (
            ("HTTP", server.http),
            ("gRPC", server.grpc),
            ("process", str(server.pid)),
            ("since", time_text(server.started)),
            ("models directory", str(server.models_dir)),
            ("models loaded", loaded),
        )
    )


def stop_server(arguments: Sequence[str]) -> int:
    """End the running server and wait for that."""
    parser = command_parser("stop", "Stop a running server. Answers in progress are finished first.")
    parser.add_argument("--all", action="store_true", help="stop all servers")
    parser.add_argument(
        "--timeout-seconds",
        type=float,
        default=STOP_SECONDS,
        metavar="S",
        help="how long to wait (default %(default)s)",
    )
    add_models_options(parser)
    values = parser.parse_args(arguments)
    models_dir = core_settings(values).models_dir if values.models_dir else None
    servers = runtime.running_servers(models_dir)
    if not servers:
        raise CommandError("no server is running.")
    if len(servers) > 1 and not values.all:
        listed = ", ".join(f"{server.http} on {server.models_dir}" for server in servers)
        raise CommandError(f"several servers run: {listed}. Choose one with --models-dir, or use --all.")
    for server in servers:
        try:
            os.kill(server.pid, signal.SIGTERM)
        except ProcessLookupError:
            continue
        except PermissionError:
            raise CommandError(f"process {server.pid} belongs to another user.") from None
    _wait_for_end(servers, values.timeout_seconds)
    print("stopped")
    return 0


def _wait_for_end(servers: Sequence[runtime.RunningServer], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while alive := [server for server in servers if server.is_alive()]:
        if time.monotonic() > deadline:
            numbers = ", ".join(str(server.pid) for server in alive)
            raise CommandError(f"the server did not end within {timeout:g} s (process {numbers}).")
        time.sleep(_POLL_SECONDS)
