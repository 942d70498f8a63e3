"""Options that several commands share, and the core's settings as a command sees them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from osaurus_grpc import settings

if TYPE_CHECKING:
    from osaurus_grpc.models.catalog import Catalog


def command_parser(
    name: str, description: str, *, epilog: str = "", usage: str | None = None
) -> argparse.ArgumentParser:
    """A parser of one subcommand's arguments.

    Args:
        name: The subcommand.
        description: What it does.
        epilog: What --help ends with.
        usage: Its arguments in short, where all of them would bury the error above which they stand.
    """
    return argparse.ArgumentParser(
        prog=f"osaurus {name}",
        description=description,
        epilog=epilog,
        usage=None if usage is None else f"osaurus {name} {usage}",
        allow_abbrev=False,
    )


def add_models_options(parser: argparse.ArgumentParser) -> None:
    """Declare --models-dir and --config."""
    parser.add_argument(
        "--models-dir",
        metavar="DIR",
        default="",
        help="where models live (default ~/MLXModels, or OSU_MODELS_DIR)",
    )
    parser.add_argument("--config", metavar="FILE", default="", help="TOML file with settings")


def core_settings(values: argparse.Namespace) -> settings.Settings:
    """The core's settings, with what the command line says about models in front.

    Raises SystemExit where the environment or the settings file is wrong.
    """
    arguments = []
    if values.models_dir:
        arguments.append(f"--models-dir={values.models_dir}")
    if values.config:
        arguments.append(f"--config={values.config}")
    return settings.read(arguments)


def add_api_key_option(parser: argparse.ArgumentParser) -> None:
    """Declare --api-key, for commands that call a running server."""
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default="",
        help="key of a server that asks for one; better given as OSAURUS_API_KEY",
    )


def api_key(values: argparse.Namespace, core: settings.Settings) -> str:
    """The key to show to a running server, or ""."""
    return str(values.api_key) or next(iter(core.api_keys), "")


def catalog(core: settings.Settings) -> Catalog:
    """The installed models. An unknown name is an error here, whatever the server falls back to."""
    from osaurus_grpc.models.catalog import Catalog

    return Catalog(
        core.models_dir,
        hub_cache_dir=core.hub_cache_dir,
        default_model=core.default_model,
        aliases=dict(core.aliases),
    )
