"""The core process: settings, logging, serve."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Sequence

from osaurus_grpc import settings as core_settings
from osaurus_grpc.server import start


def set_up_logging(level: str) -> None:
    """Log to stderr, one line an event, in key=value form."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s level=%(levelname)s logger=%(name)s %(message)s",
    )
    # They log what they fetch and parse at levels meant for their own developers.
    for chatty in ("httpx", "httpcore", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the core until it is told to stop.

    Args:
        arguments: The command line without the program's name; None is this process's.

    Returns:
        The exit status: 0 after a stop in order, 1 where the core could not start.
    """
    settings = core_settings.read(arguments)
    set_up_logging(settings.log_level)
    try:
        start.require_startable(settings)
        # Imported here: MLX, transformers and gRPC take seconds, and a wrong flag should not wait for them.
        from osaurus_grpc.server import app

        asyncio.run(app.serve(settings))
    except start.StartError as error:
        sys.stderr.write(f"osaurus-core: {error}\n")
        return 1
    finally:
        # The gRPC server sits in reference cycles. Freed by the interpreter's own end, it waits for a
        # thread that the end stops by force, and the process dies of SIGABRT.
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
