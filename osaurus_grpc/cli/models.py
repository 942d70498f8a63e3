"""osaurus list, show, cp, rm and ps: the models on disk, and those in a running server's memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from osaurus_grpc.cli import runtime
from osaurus_grpc.cli.options import (
    add_api_key_option,
    add_models_options,
    api_key,
    catalog,
    command_parser,
    core_settings,
)
from osaurus_grpc.cli.output import CommandError, details, note, size_text, table, time_text
from osaurus_grpc.errors import ModelNotFoundError, OsaurusError

if TYPE_CHECKING:
    from osaurus_grpc.models.catalog import Catalog, ModelEntry
    from osaurus_grpc.v1.model_pb2 import Model


def list_models(arguments: Sequence[str]) -> int:
    """Print the installed models, one a line."""
    parser = command_parser("list", "List the installed models.")
    add_models_options(parser)
    entries = catalog(core_settings(parser.parse_args(arguments))).listed()
    if not entries:
        print("(no models installed)")
        note("get one with `osaurus pull smollm2-135m-instruct`.")
        return 0
    rows = [
        (
            entry.id,
            size_text(entry.size_bytes),
            entry.quantization or "-",
            str(entry.context_length or "-"),
            time_text(entry.modify_time),
        )
        for entry in entries
    ]
    print(table(("MODEL", "SIZE", "QUANTIZATION", "CONTEXT", "MODIFIED"), rows))
    return 0


def show_model(arguments: Sequence[str]) -> int:
    """Print what is known about one installed model."""
    parser = command_parser("show", "Describe an installed model.")
    parser.add_argument("name", metavar="NAME", help="the model")
    add_models_options(parser)
    values = parser.parse_args(arguments)
    models = catalog(core_settings(values))
    entry = _find(models, values.name)
    pairs = [
        ("model", entry.id),
        ("repository", entry.repo_id),
        ("folder", str(entry.path)),
        ("size", size_text(entry.size_bytes)),
        ("architecture", entry.architecture),
        ("parameters", f"{entry.parameter_count:,}" if entry.parameter_count else "unknown"),
        ("quantization", entry.quantization or "unknown"),
        ("context", f"{entry.context_length} tokens" if entry.context_length else "unknown"),
        ("embedding", f"{entry.embedding_length}" if entry.embedding_length else "unknown"),
        ("capabilities", ", ".join(sorted(each.name.lower() for each in entry.capabilities)) or "none"),
        ("modified", time_text(entry.modify_time)),
        ("digest", entry.digest),
        ("managed", "yes" if entry.is_managed else "no, it belongs to the Hugging Face cache"),
    ]
    print(details(pairs))
    return 0


def copy_model(arguments: Sequence[str]) -> int:
    """Give a model a second name; its files stay where they are."""
    parser = command_parser("cp", "Give an installed model a second name.")
    parser.add_argument("source", metavar="NAME", help="the model")
    parser.add_argument("destination", metavar="ALIAS", help="its second name")
    add_models_options(parser)
    values = parser.parse_args(arguments)
    models = catalog(core_settings(values))
    _find(models, values.source)
    entry = models.add_alias(values.source, values.destination)
    print(f"{entry.id} is now a name of {entry.alias_of}.")
    return 0


def remove_model(arguments: Sequence[str]) -> int:
    """Remove an installed model's files, out of a running server's memory first, or a second name."""
    parser = command_parser("rm", "Remove an installed model, or a second name of one.")
    parser.add_argument("name", metavar="NAME", help="the model or the second name")
    add_models_options(parser)
    add_api_key_option(parser)
    values = parser.parse_args(arguments)
    core = core_settings(values)
    models = catalog(core)
    if models.remove_alias(values.name):
        print(f"Removed the name {values.name}.")
        return 0
    entry = _find(models, values.name)
    if not entry.is_managed:
        raise CommandError(
            f"{entry.id} belongs to the Hugging Face cache, which Osaurus only reads. "
            "Remove it with `hf cache rm`, or hide the cache with --no-hub-cache when serving."
        )
    for server in runtime.running_servers(core.models_dir):
        asyncio.run(_unload(server, entry, api_key(values, core)))
    from osaurus_grpc.models import sources

    sources.remove(entry)
    print(f"Removed {entry.id} ({size_text(entry.size_bytes)}).")
    return 0


async def _unload(server: runtime.RunningServer, entry: ModelEntry, key: str) -> None:
    from osaurus_grpc.client import AsyncOsaurus

    async with AsyncOsaurus(server.grpc, key) as client:
        try:
            await client.unload_model(entry.id)
        except ModelNotFoundError:
            pass  # the server does not list it
        except OsaurusError as error:
            raise CommandError(
                f"the server at {server.http} may use {entry.id} and did not unload it: {error.message}"
            ) from None


def list_loaded(arguments: Sequence[str]) -> int:
    """Print the models that running servers hold in memory."""
    parser = command_parser("ps", "List the models that a running server holds in memory.")
    add_models_options(parser)
    add_api_key_option(parser)
    values = parser.parse_args(arguments)
    core = core_settings(values)
    servers = runtime.running_servers(core.models_dir if values.models_dir else None)
    if not servers:
        raise CommandError("no server is running. Start one with `osaurus serve`.")
    rows = []
    for server in servers:
        for model in asyncio.run(loaded_models(server, api_key(values, core))):
            until = time_text(_expire_time(model)) if model.HasField("expire_time") else "stays"
            rows.append((model.id, size_text(model.resident_bytes), until, server.http))
    if not rows:
        print("(no models loaded)")
        return 0
    print(table(("MODEL", "MEMORY", "UNTIL", "SERVER"), rows))
    return 0


async def loaded_models(server: runtime.RunningServer, key: str) -> list[Model]:
    """The models that a running server holds in memory. OsaurusError."""
    from osaurus_grpc.client import AsyncOsaurus
    from osaurus_grpc.v1.model_pb2 import ModelState

    async with AsyncOsaurus(server.grpc, key) as client:
        return [model for model in await client.list_models() if model.state == ModelState.MODEL_STATE_LOADED]


def _expire_time(model: Model) -> datetime:
    return model.expire_time.ToDatetime(UTC)


def _find(models: Catalog, name: str) -> ModelEntry:
    try:
        return models.find(name)
    except ModelNotFoundError as error:
        installed = ", ".join(entry.id for entry in models.entries())
        raise CommandError(
            f"{error.message}. " + (f"Installed: {installed}." if installed else "No model is installed.")
        ) from None
