"""osaurus serve: fetches the model, starts the core and the shim, says where they are, keeps them up."""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from osaurus_grpc import settings as core_module
from osaurus_grpc.cli import runtime
from osaurus_grpc.cli.flags import FlagGroup
from osaurus_grpc.cli.install import ensure_installed
from osaurus_grpc.cli.options import catalog, command_parser
from osaurus_grpc.cli.output import CommandError, note
from osaurus_grpc.cli.process import Child, ChildEndedError
from osaurus_grpc.cli.supervisor import Addresses, GivingUpError, NotReadyError, Supervisor
from osaurus_grpc.models import ownership
from rest_shim import settings as rest_module

# A process that drains needs a moment more than its drain time to go.
GRACE_SECONDS = 10.0
SUGGESTED_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a command line of serve asks for.

    Attributes:
        model: To fetch if missing, to load and to make the default; "" for none.
        core: The core's settings, as it will read them.
        rest: The shim's.
        core_arguments: The core's command line; keys are not on it.
        rest_arguments: The shim's.
    """

    model: str
    core: core_module.Settings
    rest: rest_module.Settings
    core_arguments: tuple[str, ...]
    rest_arguments: tuple[str, ...]


def read_plan(arguments: Sequence[str]) -> Plan:
    """Read the command line, the environment and the settings file. SystemExit where they are wrong."""
    parser = command_parser(
        "serve",
        "Start a server: the gRPC core with its models, and the HTTP server in front of it.",
        usage="[--model NAME] [FLAG ...] (--help lists the flags)",
        epilog="Every flag can also be set in the environment or in ~/.osaurus/config.toml; see the README.",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        default=os.environ.get("OSAURUS_MODEL", ""),
        help="fetch this model if it is missing, load it, and make it the default",
    )
    known: dict[str, argparse.Action] = {}
    core_flags = FlagGroup(parser, "the gRPC core", known)
    core_module.add_arguments(core_flags)
    rest_flags = FlagGroup(parser, "the HTTP server", known, excluded=("--core",))
    rest_module.add_arguments(rest_flags)
    for flags in (core_flags, rest_flags):
        flags.add_argument("--config", metavar="FILE", help="TOML file with settings")
    values = parser.parse_args(arguments)
    core_arguments = core_flags.command_line(values)
    rest_arguments = rest_flags.command_line(values)
    return Plan(
        model=values.model,
        core=core_module.read(core_arguments),
        rest=rest_module.read(rest_arguments),
        core_arguments=tuple(text for text in core_arguments if not text.startswith("--api-key=")),
        rest_arguments=tuple(rest_arguments),
    )


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal ends it. Returns the exit status."""
    plan = read_plan(arguments)
    _make_models_dir(plan)
    try:
        with ownership.models_dir_lock(
            plan.core.models_dir, is_shared=not plan.core.reject_shared_models_dir
        ):
            _check_addresses(plan)
            return asyncio.run(_Serving(plan).run())
    except ownership.ModelsDirInUseError:
        raise CommandError(_in_use_text(plan)) from None


def _make_models_dir(plan: Plan) -> None:
    path = plan.core.models_dir
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_usable = os.access(path, os.R_OK | os.X_OK)
    except OSError as error:
        raise CommandError(
            f"the models directory {path} cannot be made ({error.strerror}); "
            "choose another with --models-dir."
        ) from None
    if not is_usable:
        raise CommandError(f"the models directory {path} cannot be read; choose another with --models-dir.")


def _in_use_text(plan: Plan) -> str:
    others = runtime.running_servers(plan.core.models_dir)
    who = (
        f"another server, {others[0].http} (process {others[0].pid}), uses the models directory"
        if others
        else "another server, which is starting or stopping or another user's, uses the models directory"
    )
    return (
        f"{who} {plan.core.models_dir}. Stop it with `osaurus stop`, choose another directory with "
        "--models-dir, or share this one with --share-models-dir."
    )


def _check_addresses(plan: Plan) -> None:
    """Refuse what the processes would refuse, before a model is fetched."""
    for host, is_allowed in (
        (plan.core.host, plan.core.insecure_expose),
        (plan.rest.host, plan.rest.insecure_expose),
    ):
        if not (core_module.is_loopback(host) or rest_module.is_loopback(host)) and not (
            is_allowed or plan.core.api_keys
        ):
            raise CommandError(
                f"{host} can be reached from other machines. Set a key in OSAURUS_API_KEY, or allow "
                "everyone in with --insecure-expose."
            )
    _check_port(plan.rest.host, plan.rest.port, "HTTP", "--port")
    _check_port(plan.core.host, plan.core.grpc_port, "gRPC", "--grpc-port")
    if plan.rest.port == plan.core.grpc_port != 0:
        raise CommandError(f"HTTP and gRPC cannot share port {plan.rest.port}; choose another with --port.")


def _check_port(host: str, port: int, kind: str, flag: str) -> None:
    """Refuse a port that something listens on."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise CommandError(f"--host: {host} is not an address of this machine.") from None
    for family, kind_of_socket, protocol, _, address in found:
        with socket.socket(family, kind_of_socket, protocol) as probe:
            # As the servers do: connections of a server that has just ended do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                _explain_bind(error, host, port, kind, flag, is_only=len(found) == 1)


def _explain_bind(error: OSError, host: str, port: int, kind: str, flag: str, *, is_only: bool) -> None:
    match error.errno:
        case errno.EADDRINUSE:
            raise CommandError(f"the {kind} port {port} on {host} is taken; choose another with {flag}.")
        case errno.EACCES:
            raise CommandError(
                f"the {kind} port {port} is reserved for the system; choose another with {flag}."
            )
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT if not is_only:
            pass  # "localhost" where one of the two protocol families is off
        case _:
            raise CommandError(f"--host: {host} is not an address of this machine.")


class _Serving:
    """One run of serve, from the fetch to the end."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._supervisor: Supervisor | None = None
        self._interrupts = 0

    async def run(self) -> int:
        """Serve until a signal comes: 0; or until there is no use in going on: 1."""
        work = asyncio.create_task(self._serve())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup ignores SIGHUP for us, so that the server outlives its terminal.
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._on_signal, number, work)
        try:
            await work
        except asyncio.CancelledError:
            print("Stopped.", flush=True)
            return 0
        except ChildEndedError as error:
            # Its own message is on stderr and says why.
            note(f"{error}, so the server was not started.")
        except (GivingUpError, NotReadyError) as error:
            note(str(error))
        return 1

    def _on_signal(self, number: signal.Signals, work: asyncio.Task[None]) -> None:
        if number is signal.SIGINT:
            self._interrupts += 1
        if self._interrupts > 1:
            if self._supervisor is not None:
                self._supervisor.kill()
        elif not work.cancelling():
            if self._supervisor is not None:
                note("stopping; answers in progress are finished first. Ctrl-C again ends them.")
            work.cancel()

    async def _serve(self) -> None:
        plan = self._plan
        model_id = ""
        if plan.model:
            model_id = (await ensure_installed(plan.model, plan.core)).id
        self._supervisor = _supervisor(plan, model_id)
        try:
            note(f"loading {model_id}." if model_id else "starting.")
            addresses = await self._supervisor.start()
            self._record(addresses)
            print(welcome(plan, addresses, model_id), flush=True)
            await self._supervisor.watch()
        finally:
            await self._supervisor.stop()
            runtime.forget(os.getpid())

    def _record(self, addresses: Addresses) -> None:
        server = runtime.RunningServer(
            pid=os.getpid(),
            http=addresses.http,
            grpc=addresses.grpc,
            models_dir=self._plan.core.models_dir,
            started=runtime.now(),
        )
        try:
            runtime.record(server)
        except OSError as error:
            note(f"`osaurus status` and `osaurus stop` will not find this server: {error.strerror}.")


def _supervisor(plan: Plan, model_id: str) -> Supervisor:
    core_arguments = list(plan.core_arguments)
    if model_id:
        if not plan.core.default_model:
            core_arguments.append(f"--default-model={model_id}")
        if not plan.core.preload_model:
            core_arguments.append(f"--preload-model={model_id}")
    # This process holds the models directory's lock already.
    if plan.core.reject_shared_models_dir:
        core_arguments.append("--share-models-dir")
    environment = {"OSAURUS_API_KEY": json.dumps(plan.core.api_keys)} if plan.core.api_keys else {}
    return Supervisor(
        core=Child("the gRPC core", "osaurus_grpc", core_arguments, environment),
        shim=Child("the HTTP server", "rest_shim", plan.rest_arguments),
        core_grace_seconds=plan.core.drain_seconds + GRACE_SECONDS,
        shim_grace_seconds=plan.rest.drain_seconds + GRACE_SECONDS,
    )


def welcome(plan: Plan, addresses: Addresses, model_id: str) -> str:
    """What a person needs to use the server that has just started."""
    models = catalog(plan.core)
    if not model_id and (default := models.default() or next(iter(models.entries()), None)):
        model_id = default.id
    lines = [
        f"Osaurus is ready{f' with {model_id}' if plan.model else ''}.",
        "",
        f"  OpenAI base URL  {addresses.http}/v1",
        f"  Ollama host      {addresses.http}",
        f"  gRPC address     {addresses.grpc}",
        f"  models           {plan.core.models_dir}",
        "",
    ]
    if model_id:
        lines += ["Try it:", "", f"  {curl_line(addresses.http, model_id, bool(plan.core.api_keys))}"]
    else:
        lines += ["No model is installed yet. Get one, in another terminal, with:", ""]
        lines += [f"  osaurus pull {SUGGESTED_MODEL}"]
    return "\n".join([*lines, "", "Stop with Ctrl-C, or with `osaurus stop`."])


def curl_line(http: str, model_id: str, needs_key: bool) -> str:
    """A command that asks the server something, to be pasted into a shell."""
    body = json.dumps(
        {
            "model": model_id,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
        },
        ensure_ascii=False,
    ).replace("'", "'\\''")
    key = ' -H "Authorization: Bearer $OSAURUS_API_KEY"' if needs_key else ""
    return f"curl {http}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
