"""The shim as a process: python -m rest_shim."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

from rest_shim.app import StartError, serve_until
from rest_shim.descriptors import ExhaustionHandler, raise_limit
from rest_shim.settings import Settings, read


async def _serve(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(ExhaustionHandler())

    def stop_once(number: signal.Signals) -> None:
        stop.set()
        # A second signal finds the default handling again, and ends the process at once.
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop_once, number)
    await serve_until(settings, stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the shim until SIGTERM or SIGINT; the exit status."""
    settings = read(arguments)
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s level=%(levelname)s logger=%(name)s %(message)s",
        stream=sys.stderr,
    )
    raise_limit()
    try:
        asyncio.run(_serve(settings))
    except StartError as error:
        print(f"osaurus-rest: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
