"""osaurus doctor: what was chosen for this machine and why, and how fast that is."""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform as host_platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from osaurus_grpc import __version__
from osaurus_grpc.cli.options import add_models_options, catalog, command_parser, core_settings
from osaurus_grpc.cli.output import CommandError, details, note, size_text
from osaurus_grpc.errors import ModelNotFoundError, OsaurusError
from osaurus_grpc.settings import Settings

if TYPE_CHECKING:
    from osaurus_grpc.engine.engine import Engine
    from osaurus_grpc.models.catalog import Catalog, ModelEntry
    from osaurus_grpc.models.platform import PlatformReport

_PROMPT_TOKENS = 128
_DECODE_TOKENS = 24
_MEASURE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """How fast one model answers one request.

    Attributes:
        prompt_tokens_per_second: Prefill.
        decode_seconds: For each generated token.
    """

    prompt_tokens_per_second: float
    decode_seconds: float


def main(arguments: Sequence[str]) -> int:
    """Print the report; 1 where something that was measured failed."""
    parser = command_parser(
        "doctor", "Show what was chosen for this machine and why, and measure how fast that is."
    )
    parser.add_argument(
        "--model", metavar="NAME", default="", help="measure with this model (default: the smallest)"
    )
    add_models_options(parser)
    values = parser.parse_args(arguments)
    core = core_settings(values)
    entry = _model(catalog(core), values.model)

    from osaurus_grpc.models import platform

    platform.set_blas_threads(core.blas_threads)
    print(details(_choices(platform.describe(core.dtype), core)), flush=True)
    for warning in platform.describe(core.dtype).warnings:
        note(f"warning: {warning}.")
    if core.draft_model:
        print(details([("draft model", draft_text(catalog(core), core.draft_model))]), flush=True)
    print("\nmeasured now:", flush=True)
    return asyncio.run(_measure(entry, core))


def _model(models: Catalog, name: str) -> ModelEntry | None:
    """The model to measure with."""
    if name:
        try:
            return models.find(name)
        except ModelNotFoundError as error:
            raise CommandError(f"{error.message}.") from None
    return min(models.entries(), key=lambda entry: entry.size_bytes, default=None)


def draft_text(models: Catalog, name: str) -> str:
    """For which of the installed models the draft model can guess."""
    from osaurus_grpc.models.loading import drafted_models

    try:
        draft = models.find(name)
        others = [entry for entry in models.entries() if entry.id != draft.id]
        helped = [entry.id for entry in drafted_models(draft, others)]
    except OsaurusError as error:
        return error.message
    unhelped = [entry.id for entry in others if entry.id not in helped]
    text = f"{draft.id}: guesses for {', '.join(helped) or 'no installed model'}"
    return text + (f"; not for {', '.join(unhelped)}, of another vocabulary" if unhelped else "")


def _choices(report: PlatformReport, core: Settings) -> list[tuple[str, str]]:
    """The report's lines: what, and why."""
    weights = str(report.weights.dtype).removeprefix("mlx.core.") if report.weights.dtype else "as stored"
    expanded = ", expanded where quantized" if report.weights.is_dequantized else ""
    pairs = [
        ("Osaurus", __version__),
        ("system", f"{report.system}, {report.cores} cores usable"),
        ("Python", host_platform.python_version()),
        *((name, _version(name)) for name in ("mlx", "mlx-lm", "grpcio")),
        ("device", report.device),
        ("weights", f"{weights}{expanded}: {report.weights.reason}"),
    ]
    if report.blas is not None:
        blas = report.blas
        pairs.append(("BLAS", f"{blas.name}, {_plural(blas.threads, 'thread')}: {blas.reason}"))
        kernels = "our own, compiled at installation" if blas.kernels else _NO_KERNELS
        pairs.append(("CPU kernels", kernels))
    pairs.append(("memory", f"{size_text(report.memory_bytes)} for models"))
    pairs.append(("models directory", str(core.models_dir)))
    return pairs


_NO_KERNELS = (
    "those of the BLAS, MLX and numpy, which are slower; ours need x86-64 Linux with AVX2, and a C compiler "
    "when Osaurus is installed"
)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


async def _measure(entry: ModelEntry | None, core: Settings) -> int:
    from osaurus_grpc.engine.engine import Engine
    from osaurus_grpc.models.platform import measure_gemm

    engine = Engine(max_batch_size=1, max_waiting_requests=1, prefill_chunk_tokens=core.prefill_chunk_tokens)
    async with asyncio.timeout(_MEASURE_SECONDS):
        try:
            await engine.start()
        except RuntimeError as error:  # mlx-lm is not the release that the engine was written for
            raise CommandError(f"{error}.") from None
        try:
            speed = await engine.call(measure_gemm)
            print(f"  matrix product, 1024 x 1024, float32: {speed:.0f} GFLOP/s", flush=True)
            if entry is None:
                note("no model is installed, so no decoding was measured; `osaurus pull` gets one.")
                return 0
            return await _measure_model(engine, entry, core)
        finally:
            await engine.stop()


async def _measure_model(engine: Engine, entry: ModelEntry, core: Settings) -> int:
    from osaurus_grpc.models.residency import Residency

    residency = Residency(engine, max_loaded_models=1, keep_alive_seconds=-1.0, dtype=core.dtype)
    try:
        async with residency.lease(entry) as lease:
            await _generate(engine, entry.id, prompt_tokens=8, decode_tokens=2)  # first steps are slow
            found = await _generate(
                engine,
                entry.id,
                prompt_tokens=max(1, min(_PROMPT_TOKENS, lease.model.context_length - _DECODE_TOKENS)),
                decode_tokens=_DECODE_TOKENS,
            )
            memory = size_text(lease.model.resident_bytes)
            print(f"  {entry.id}: {memory} in memory, loaded in {lease.load_seconds:.1f} s")
    except OsaurusError as error:
        note(error.message)
        return 1
    finally:
        await residency.close()
    print(f"  prefill: {found.prompt_tokens_per_second:.0f} tokens/s")
    print(
        f"  decode: {found.decode_seconds * 1000:.1f} ms a token, {1 / found.decode_seconds:.1f} tokens/s",
        flush=True,
    )
    return 0


async def _generate(engine: Engine, model_id: str, *, prompt_tokens: int, decode_tokens: int) -> Measurement:
    """Run one greedy request of exactly these lengths and take the engine's own times."""
    from osaurus_grpc.engine.types import GenerationFinished, GenerationRequest, SamplingParams

    request = GenerationRequest(
        request_id="doctor",
        model_id=model_id,
        prompt=tuple(range(1, prompt_tokens + 1)),
        max_tokens=decode_tokens,
        sampling=SamplingParams(temperature=0.0),
        ignore_eos=True,
    )
    finished: GenerationFinished | None = None
    async for event in engine.generate(request):
        if isinstance(event, GenerationFinished):
            finished = event
    assert finished is not None, "the last event"
    return Measurement(
        prompt_tokens_per_second=prompt_tokens / max(finished.prompt_seconds, 1e-9),
        decode_seconds=max(finished.decode_seconds, 1e-9) / max(1, finished.completion_tokens - 1),
    )
