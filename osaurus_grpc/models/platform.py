"""The machine: which device runs MLX, which BLAS the CPU uses, what dtype weights are held in.

Every module that needs MLX takes it from here (`from osaurus_grpc.models.platform import mx`): on
Linux without a GPU the BLAS must be loaded before MLX is, since MLX's wheel resolves its BLAS
symbols when it is imported and brings a reference implementation that is tens of times slower.

Importing this module therefore has effects, once: it may load a BLAS, imports MLX and mlx-lm, turns
kernel compilation off on a CPU, and puts back the limit on open files that mlx-lm lowers.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import dataclasses
import importlib
import importlib.metadata
import logging
import os
import platform as host_platform
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

from osaurus_grpc.models import cgroup, native_kernels
from osaurus_grpc.models.native_kernels import NativeKernels

__all__ = [
    "Blas",
    "Device",
    "PlatformReport",
    "WeightPlan",
    "default_blas_threads",
    "describe",
    "device",
    "measure_gemm",
    "memory_bytes",
    "mx",
    "physical_cores",
    "plan_weights",
    "set_blas_threads",
    "trim_memory",
]

logger = logging.getLogger(__name__)

_SLOW_BLAS = (
    "no fast BLAS was found: prompts are processed about 10 times and answers generated about 4 times "
    "slower than they could be; install the mkl package (x86-64) or a system OpenBLAS"
)


class Device(Enum):
    """What runs MLX."""

    METAL = "metal"
    CUDA = "cuda"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Blas:
    """The CPU's linear algebra library.

    Attributes:
        name: "MKL", "OpenBLAS", "Accelerate" or "reference".
        threads: How many it uses.
        reason: Why this one, for people.
        library: The loaded library, or None where none was loaded.
        kernels: What does products of a few rows in its place, and more, or None.
    """

    name: str
    threads: int
    reason: str
    library: ctypes.CDLL | None = None
    kernels: NativeKernels | None = None


def physical_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_blas_threads() -> int:
    """All cores but one, which the servers and MLX's own kernels need.

    BLAS threads meet at barriers; one that waits for a core which something else uses slows all of
    them by more than it adds.
    """
    return max(1, physical_cores() - 1)


def _mkl_candidates() -> Iterator[Path]:
    """Files of the PyPI package mkl that are its single dynamic library, newest layout first."""
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name.startswith("libmkl_rt.so"):
            yield Path(str(file.locate())).resolve()


def _openblas_candidates() -> Iterator[str]:
    """Names under which a system OpenBLAS may be loaded."""
    found = ctypes.util.find_library("openblas")
    if found:
        yield found
    yield from ("libopenblas.so.0", "libopenblas.so")


def _load(
    candidates: Iterator[Path] | Iterator[str], required: str
) -> tuple[ctypes.CDLL, NativeKernels | None] | None:
    """The first candidate that loads and has the symbol, and what stands in front of it.

    Its symbols become global, after those that are to be found first.
    """
    for candidate in candidates:
        try:
            library = ctypes.CDLL(str(candidate), mode=ctypes.RTLD_LOCAL)
        except OSError:
            continue
        if hasattr(library, required):
            is_wanted = os.environ.get("OSAURUS_NATIVE_KERNELS", "1") != "0"
            kernels = native_kernels.load(library) if is_wanted else None
            return ctypes.CDLL(str(candidate), mode=ctypes.RTLD_GLOBAL), kernels
    return None


def _has_cuda_backend() -> bool:
    """Whether an MLX wheel for CUDA is installed; it keeps the GPU's own libraries."""
    names = ("mlx-cuda-12", "mlx-cuda-13")
    return any(distribution.metadata["Name"] in names for distribution in importlib.metadata.distributions())


def _choose_blas() -> Blas:
    """Load the best BLAS for MLX's CPU back end. Must run before MLX is imported."""
    # The settings refuse what is no number; here it only must not stop an import.
    asked = os.environ.get("OSAURUS_BLAS_THREADS", "")
    threads = (int(asked) if asked.isdecimal() else 0) or default_blas_threads()
    if sys.platform == "darwin":
        return Blas("Accelerate", threads, "MLX on macOS links it")
    if "mlx.core" in sys.modules:
        reason = "MLX was imported before this module, so no BLAS could be chosen"
        logger.warning("event=slow_blas detail=%r", reason)
        return Blas("reference", 1, reason)
    if _has_cuda_backend():
        return Blas("reference", 1, "MLX runs on CUDA, which has its own")
    # Waiting threads sleep instead of spinning: the servers share these cores.
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if found := _load(_mkl_candidates(), "MKL_Set_Num_Threads"):
        return Blas("MKL", threads, "the mkl package is installed", *found)
    if found := _load(_openblas_candidates(), "openblas_set_num_threads"):
        return Blas("OpenBLAS", threads, "mkl is not installed and the system has OpenBLAS", *found)
    logger.warning("event=slow_blas detail=%r", _SLOW_BLAS)
    return Blas("reference", 1, _SLOW_BLAS)


def _import_transformers() -> None:
    """Import transformers so that it looks through its files once.

    It reads each of its models' files to learn what they define, and does so again for the package
    within it that holds them: most of a second of every start. What it found is kept, but under a
    path written in another way. Without the function by that name it is imported as it is.
    """
    transformers = importlib.import_module("transformers")
    names = importlib.import_module("transformers.utils.import_utils")
    look = getattr(names, "create_import_structure_from_path", None)
    if look is None:
        return
    models = Path(transformers.__file__ or "").parent / "models"

    def look_once(path: str | Path) -> Any:
        return look(models if Path(path) == models / "__init__.py" else path)

    names.create_import_structure_from_path = look_once  # type: ignore[attr-defined]
    try:
        importlib.import_module("transformers.models")
    finally:
        names.create_import_structure_from_path = look  # type: ignore[attr-defined]


def _import_mlx_lm() -> None:
    """Import mlx-lm without letting it lower the process's limit on open files, which it does for good."""
    set_limit = resource.setrlimit

    def keep_open_files_limit(which: int, limits: tuple[int, int]) -> None:
        if which != resource.RLIMIT_NOFILE:
            set_limit(which, limits)

    # Its advice is for people who write training code.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _import_transformers()
    resource.setrlimit = keep_open_files_limit
    try:
        importlib.import_module("mlx_lm")
    finally:
        resource.setrlimit = set_limit


blas = _choose_blas()

import mlx.core as mx  # noqa: E402  (the BLAS must be loaded first)

_import_mlx_lm()


if mx.default_device() == mx.Device(mx.DeviceType.cpu, 0):
    # Compiled kernels are built by the system's C++ compiler at first use, seconds each, and bring
    # nothing measurable there.
    mx.disable_compile()


def device() -> Device:
    """The device MLX runs on."""
    if mx.default_device() == mx.Device(mx.DeviceType.cpu, 0):
        return Device.CPU
    return Device.METAL if mx.metal.is_available() else Device.CUDA


def set_blas_threads(threads: int) -> None:
    """Use this many BLAS threads; 0 chooses. Does nothing where MLX does not use a loaded BLAS."""
    global blas
    wanted = threads or default_blas_threads()
    match blas.name:
        case "MKL" if blas.library is not None:
            blas.library.MKL_Set_Num_Threads(ctypes.c_int(wanted))
        case "OpenBLAS" if blas.library is not None:
            blas.library.openblas_set_num_threads(ctypes.c_int(wanted))
        case _:
            return
    if blas.kernels is not None:
        blas.kernels.threads = wanted
    blas = dataclasses.replace(blas, threads=wanted)


set_blas_threads(blas.threads)


def memory_bytes() -> int:
    """Memory that more models may take: what the device has left.

    On a CPU, what the machine has left, or the control group of this process where that is less.
    """
    if device() is Device.CPU:
        available = int(psutil.virtual_memory().available)
        allowed = cgroup.available_bytes()
        return available if allowed is None else min(available, allowed)
    info = mx.device_info()
    limit = int(info.get("max_recommended_working_set_size") or info.get("memory_size") or 0)
    return max(0, limit - int(mx.get_active_memory()))


def trim_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it otherwise (glibc).

    It takes blocks of up to 32 MiB from its heap once one of that size was freed, which those of weights
    are, and then keeps what is between blocks that are in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """How a model's weights are held.

    Attributes:
        dtype: Of dense weights and activations; None keeps what the files have.
        is_dequantized: Quantized weights are expanded to dtype.
        reason: Why, for people.
    """

    dtype: mx.Dtype | None
    is_dequantized: bool
    reason: str


def plan_weights(parameter_count: int, setting: str, *, is_quantized: bool = True) -> WeightPlan:
    """Decide how to hold a model's weights.

    Args:
        parameter_count: Weights of the model; 0 where that is not known.
        setting: "auto", "native", or a dtype's name.
        is_quantized: Whether the files hold quantized weights.

    On Metal and CUDA quantized weights have kernels of their own and stay. MLX's CPU kernels for
    quantized and 16-bit weights are scalar code: float32 weights through the BLAS process prompts
    about ten times and decode two to four times faster, at 4 bytes a weight.
    """
    if setting == "native":
        return WeightPlan(None, False, "asked for: weights stay as the files have them")
    if setting != "auto":
        return WeightPlan(getattr(mx, setting), setting == "float32", "asked for")
    if device() is not Device.CPU:
        return WeightPlan(None, False, f"{device().value} has kernels for quantized and 16-bit weights")
    if parameter_count * 4 <= 0.6 * memory_bytes():
        return WeightPlan(mx.float32, True, "float32 through the BLAS is the CPU's fastest path")
    if not is_quantized:
        return WeightPlan(None, False, "float32 weights would not fit in memory: they stay as they are")
    return WeightPlan(
        mx.float32, False, "float32 weights would not fit in memory: quantized weights, float32 activations"
    )


@dataclass(frozen=True, slots=True)
class PlatformReport:
    """What was chosen on this machine, for people.

    Attributes:
        device: What runs MLX, with its name where it has one.
        blas: The CPU's BLAS, or None where the CPU does not compute.
        weights: How weights are held.
        memory_bytes: Memory that models may take.
        cores: Cores this process may use.
        system: Operating system and processor architecture.
        warnings: What costs speed and can be changed.
    """

    device: str
    blas: Blas | None
    weights: WeightPlan
    memory_bytes: int
    cores: int
    system: str
    warnings: tuple[str, ...]


def describe(setting: str = "auto") -> PlatformReport:
    """Report what was chosen and why, for a small model and this dtype setting."""
    chosen = device()
    name = str(mx.device_info().get("device_name", "")) if chosen is not Device.CPU else ""
    return PlatformReport(
        device=f"{chosen.value} ({name})" if name else chosen.value,
        blas=blas if chosen is Device.CPU else None,
        weights=plan_weights(0, setting),
        memory_bytes=memory_bytes(),
        cores=physical_cores(),
        system=f"{host_platform.system()} {host_platform.machine()}",
        warnings=(_SLOW_BLAS,) if chosen is Device.CPU and blas.name == "reference" else (),
    )


def measure_gemm(size: int = 1024, repeats: int = 5) -> float:
    """Speed of a square float32 matrix product in GFLOP/s, the best of some repeats.

    Must run on a thread that may use MLX.
    """
    left, right = mx.random.normal((size, size)), mx.random.normal((size, size))
    mx.eval(left, right)
    mx.eval(left @ right)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(left @ right)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
