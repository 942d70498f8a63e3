"""Making a model folder of a GGUF file, as part of a fetch."""

from __future__ import annotations

from pathlib import Path

from osaurus_grpc.models.sources.gguf import ConvertProgress, convert
from osaurus_grpc.models.sources.progress import Progress
from osaurus_grpc.models.sources.staging import Staging


def convert_gguf(source: Path, staging: Staging, progress: Progress) -> None:
    """Convert a GGUF file into staging.model.

    Raises:
        SourceInvalidError: The file is damaged, or of a kind that cannot be converted.
        DiskFullError: There is not enough room.
        FetchCancelledError: The caller cancelled.
    """

    def report(step: ConvertProgress) -> None:
        progress.show(step.status, "", step.completed_bytes, step.total_bytes)

    convert(source, staging.model, report=report, name=staging.name)
