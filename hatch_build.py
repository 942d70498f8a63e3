"""Compiles our kernels for CPUs while the package is built, where that can be done.

Where it cannot (another processor or system, no C compiler), the package is built without it and leaves
everything to the BLAS and to numpy.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = "osaurus_grpc/models/native"
_SOURCES = ("gemm.c", "numbers.c", "attention.c", "threads.c")
_LIBRARY = f"{_FOLDER}/libosaurus_native.so"
# The instructions are named rather than taken from this processor, so that the package runs on others.
_FLAGS = ("-std=c11", "-O3", "-mavx2", "-mfma", "-mf16c", "-fPIC", "-shared")
_SECONDS = 120


class NativeBuildHook(BuildHookInterface):
    """hatchling's hook for wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say that what is built is for this platform."""
        del version
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return
        root = Path(self.root)
        if not _compile([root / _FOLDER / source for source in _SOURCES], root / _LIBRARY):
            self.app.display_warning(
                "no C compiler: it will run on the BLAS and numpy alone, which is slower"
            )
            return
        build_data["artifacts"].append(_LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"


def _compile(sources: list[Path], library: Path) -> bool:
    """Compile; returns whether there is a library. What a running process has mapped is not written to."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return False
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            compiled = Path(folder) / library.name
            command = [compiler, *_FLAGS, *map(str, sources), "-lm", "-pthread", "-o", str(compiled)]
            subprocess.run(command, check=True, timeout=_SECONDS)
            compiled.replace(library)
    except (OSError, subprocess.SubprocessError):
        return False
    return True
