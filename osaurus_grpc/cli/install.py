"""Makes sure that a model is installed: finds it, or fetches it in a process of its own.

Fetching may read and convert gigabytes and loads MLX for that; what it takes is given back with its
process, and serve and run stay small.
"""

from __future__ import annotations

from osaurus_grpc.cli.options import catalog
from osaurus_grpc.cli.output import CommandError, note
from osaurus_grpc.cli.process import Child, ending_text
from osaurus_grpc.errors import ModelNotFoundError
from osaurus_grpc.models.catalog import ModelEntry
from osaurus_grpc.settings import Settings

_STOP_SECONDS = 15.0


async def ensure_installed(name: str, core: Settings) -> ModelEntry:
    """The installed model of that name, fetched first where it is missing.

    Raises:
        CommandError: It cannot be had. Why is on stderr already.
    """
    models = catalog(core)
    try:
        return models.find(name)
    except ModelNotFoundError:
        note(f"{name} is not installed; fetching it.")
        return models.find(await _fetch(name, core))


async def _fetch(name: str, core: Settings) -> str:
    """Run `osaurus pull` and return the id that it prints."""
    arguments = ["pull", f"--models-dir={core.models_dir}", "--", name]
    child = Child("the fetch", "osaurus_grpc.cli.main", arguments)
    try:
        await child.spawn()
        output = await child.output()
        status = await child.wait()
    finally:
        await child.stop(_STOP_SECONDS)
    if status > 0:
        raise CommandError("")
    if status < 0:
        raise CommandError(f"the fetch of {name} {ending_text(status)}.")
    return output.strip()
