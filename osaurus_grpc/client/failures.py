"""Failed calls as the exceptions of osaurus_grpc.errors that the server raised.

The reason in the status's google.rpc.ErrorInfo names the exception; what has no ErrorInfo never
reached the API and becomes a TransportError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships no types

from osaurus_grpc import errors

ERROR_DOMAIN = "osaurus.ai"


class TransportError(errors.OsaurusError):
    """The call failed on its way: nothing listens, the connection broke, or a foreign server answered."""

    code = "UNAVAILABLE"
    reason = ""


def error_from_call(error: grpc.RpcError, address: str) -> errors.OsaurusError:
    """The exception that a failed call stands for, of the asyncio or the blocking stubs."""
    message = str(error.details() or "")
    info, details = _error_info(error)
    if info is not None and info.domain == ERROR_DOMAIN:
        if build := _BUILDERS.get(info.reason):
            return build(message, info.metadata, details)
        return errors.OsaurusError(message, metadata=info.metadata)
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.RequestDeadlineError(f"The server at {address} did not answer in time.")
        case grpc.StatusCode.UNAVAILABLE:
            return TransportError(f"The server at {address} cannot be reached, or went away.")
        case code:
            return TransportError(f"The call to {address} failed with {code.name}: {message}")


def _error_info(
    error: grpc.RpcError,
) -> tuple[error_details_pb2.ErrorInfo | None, status_pb2.Status]:
    """The status details in the trailing metadata, and the ErrorInfo among them."""
    status = status_pb2.Status()
    trailing: Any = error.trailing_metadata() or ()  # its stub knows one of the two kinds of pairs
    for key, value in trailing:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            status = status_pb2.Status.FromString(value)
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info, status
    return None, status


def _field(status: status_pb2.Status) -> str:
    """Path of the first field that a BadRequest among the details complains about, or ""."""
    for detail in status.details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request) and bad_request.field_violations:
            return str(bad_request.field_violations[0].field)
    return ""


def _retry_seconds(status: status_pb2.Status) -> float | None:
    """The delay that a RetryInfo among the details asks for, or None."""
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            return float(retry.retry_delay.ToNanoseconds() / 1e9)
    return None


_Builder = Callable[[str, Mapping[str, str], status_pb2.Status], errors.OsaurusError]


def _plain(kind: type[errors.OsaurusError]) -> _Builder:
    return lambda message, metadata, status: kind(message, metadata=metadata)


def _of_model(kind: type[errors.ModelError]) -> _Builder:
    return lambda message, metadata, status: kind(message, model=metadata.get("model", ""))


def _of_capacity(kind: type[errors.CapacityError]) -> _Builder:
    return lambda message, metadata, status: kind(message, retry_after_seconds=_retry_seconds(status))


def _context_length(
    message: str, metadata: Mapping[str, str], status: status_pb2.Status
) -> errors.OsaurusError:
    return errors.ContextLengthError(
        limit=int(metadata.get("limit") or 0),
        prompt_tokens=int(metadata.get("prompt_tokens") or 0),
        field=_field(status),
        message=message,
    )


_BUILDERS: Mapping[str, _Builder] = {
    "INVALID_FIELD": lambda message, metadata, status: errors.InvalidRequestError(
        message, field=_field(status), metadata=metadata
    ),
    "CONTEXT_LENGTH_EXCEEDED": _context_length,
    "UNAUTHENTICATED": _plain(errors.UnauthenticatedError),
    "UNSUPPORTED_CAPABILITY": lambda message, metadata, status: errors.CapabilityError(
        message, capability=metadata.get("capability", ""), field=metadata.get("field", "")
    ),
    "NOT_IMPLEMENTED": _plain(errors.FeatureNotImplementedError),
    "MODEL_NOT_FOUND": lambda message, metadata, status: errors.ModelNotFoundError(metadata.get("model", "")),
    "MODEL_UNUSABLE": _of_model(errors.ModelUnusableError),
    "MODEL_BUSY": _of_model(errors.ModelBusyError),
    "MODEL_EXISTS": _of_model(errors.ModelExistsError),
    "SOURCE_UNAVAILABLE": _plain(errors.SourceUnavailableError),
    "SOURCE_INVALID": _plain(errors.SourceInvalidError),
    "DISK_FULL": _plain(errors.DiskFullError),
    "RECORD_NOT_FOUND": lambda message, metadata, status: errors.RecordNotFoundError(
        metadata.get("record", "")
    ),
    "OVERLOADED": _of_capacity(errors.OverloadedError),
    "RATE_LIMITED": _of_capacity(errors.RateLimitedError),
    "INSUFFICIENT_MEMORY": _of_capacity(errors.InsufficientMemoryError),
    "DRAINING": lambda message, metadata, status: errors.DrainingError(),
    "DEADLINE_EXCEEDED": _plain(errors.RequestDeadlineError),
    "ENGINE_FAILED": lambda message, metadata, status: errors.EngineError(),
}
