"""A typed error as a gRPC status with google.rpc details. Pure.

Every status carries ErrorInfo; BadRequest, RetryInfo and ResourceInfo come along where they say
more. Details travel in a response trailer, and clients refuse trailers above 8 to 16 KiB, so what a
client wrote is cut before it comes back to it.
"""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships no types
from grpc_status import rpc_status  # type: ignore[import-untyped]  # ships no types

from osaurus_grpc.errors import (
    CapabilityError,
    CapacityError,
    ContextLengthError,
    InvalidRequestError,
    ModelError,
    OsaurusError,
    RecordNotFoundError,
)
from osaurus_grpc.server.convert import duration_from_seconds
from osaurus_grpc.server.validation import FieldViolation, FieldViolationsError

ERROR_DOMAIN: Final = "osaurus.ai"
MODEL_RESOURCE_TYPE: Final = "osaurus.ai/Model"
RECORD_RESOURCE_TYPE: Final = "osaurus.ai/Record"
MAX_MESSAGE_CHARACTERS: Final = 320
MAX_VALUE_CHARACTERS: Final = 128
MAX_VIOLATIONS: Final = 8


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _violations(error: OsaurusError) -> tuple[FieldViolation, ...]:
    match error:
        case FieldViolationsError():
            return error.violations[:MAX_VIOLATIONS]
        case ContextLengthError() | InvalidRequestError() | CapabilityError() if error.field:
            return (FieldViolation(error.field, error.message),)
        case _:
            return ()


def _details(error: OsaurusError) -> list[ProtoMessage]:
    details: list[ProtoMessage] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=ERROR_DOMAIN,
            metadata={key: _cut(value, MAX_VALUE_CHARACTERS) for key, value in error.metadata.items()},
        )
    ]
    if violations := _violations(error):
        bad_request = error_details_pb2.BadRequest()
        for violation in violations:
            bad_request.field_violations.add(
                field=_cut(violation.field, MAX_VALUE_CHARACTERS),
                description=_cut(violation.description, MAX_VALUE_CHARACTERS),
            )
        details.append(bad_request)
    if isinstance(error, CapacityError) and error.retry_after_seconds is not None:
        delay = duration_from_seconds(error.retry_after_seconds)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, ModelError):
        details.append(_resource(MODEL_RESOURCE_TYPE, error.model, error))
    if isinstance(error, RecordNotFoundError):
        details.append(_resource(RECORD_RESOURCE_TYPE, error.record, error))
    return details


def _resource(kind: str, name: str, error: OsaurusError) -> ProtoMessage:
    resource: ProtoMessage = error_details_pb2.ResourceInfo(
        resource_type=kind,
        resource_name=_cut(name, MAX_VALUE_CHARACTERS),
        description=_cut(error.message, MAX_VALUE_CHARACTERS),
    )
    return resource


def status_from_error(error: OsaurusError) -> grpc.Status:
    """The status a client receives for an error."""
    packed = []
    for detail in _details(error):
        holder = AnyMessage()
        holder.Pack(detail)
        packed.append(holder)
    code, _ = grpc.StatusCode[error.code].value
    message = _cut(error.message, MAX_MESSAGE_CHARACTERS)
    status: grpc.Status = rpc_status.to_status(status_pb2.Status(code=code, message=message, details=packed))
    return status
