"""Runs a module as a child that never outlives its parent: python -m osaurus_grpc.cli.lifeline MODULE ...

The parent holds the write end of the pipe that is this process's standard input and never writes.
When the parent ends, in whatever way, the kernel closes the pipe, the read below returns, and this
process ends at once. That works the same on Linux and macOS, and needs no code between fork and exec.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading


def _end_with_parent(descriptor: int) -> None:
    while os.read(descriptor, 4096):
        pass
    # The parent is gone and nobody waits for an orderly end. Skips everything that could block.
    os._exit(1)


def main() -> None:
    """Watch the parent, then become the module named by the first argument."""
    # The module must not read, or pass on, the pipe: it finds an empty standard input.
    lifeline = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    threading.Thread(target=_end_with_parent, args=(lifeline,), name="lifeline", daemon=True).start()
    module, sys.argv = sys.argv[1], sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
