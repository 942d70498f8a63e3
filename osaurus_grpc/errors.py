"""Everything that can go wrong, as one tree.

    OsaurusError
    ├── InvalidRequestError          INVALID_ARGUMENT     INVALID_FIELD
    │   └── ContextLengthError       INVALID_ARGUMENT     CONTEXT_LENGTH_EXCEEDED
    ├── UnauthenticatedError         UNAUTHENTICATED      UNAUTHENTICATED
    ├── CapabilityError              FAILED_PRECONDITION  UNSUPPORTED_CAPABILITY
    ├── FeatureNotImplementedError   UNIMPLEMENTED        NOT_IMPLEMENTED
    ├── ModelError
    │   ├── ModelNotFoundError       NOT_FOUND            MODEL_NOT_FOUND
    │   ├── ModelUnusableError       FAILED_PRECONDITION  MODEL_UNUSABLE
    │   ├── ModelBusyError           ABORTED              MODEL_BUSY
    │   └── ModelExistsError         ALREADY_EXISTS       MODEL_EXISTS
    ├── RecordNotFoundError          NOT_FOUND            RECORD_NOT_FOUND
    ├── SourceError
    │   ├── SourceUnavailableError   UNAVAILABLE          SOURCE_UNAVAILABLE
    │   ├── SourceInvalidError       FAILED_PRECONDITION  SOURCE_INVALID
    │   └── DiskFullError            RESOURCE_EXHAUSTED   DISK_FULL
    ├── CapacityError
    │   ├── OverloadedError          RESOURCE_EXHAUSTED   OVERLOADED
    │   ├── RateLimitedError         RESOURCE_EXHAUSTED   RATE_LIMITED
    │   ├── InsufficientMemoryError  RESOURCE_EXHAUSTED   INSUFFICIENT_MEMORY
    │   └── DrainingError            UNAVAILABLE          DRAINING
    ├── RequestDeadlineError         DEADLINE_EXCEEDED    DEADLINE_EXCEEDED
    └── EngineError                  INTERNAL             ENGINE_FAILED

The first column is the gRPC code, the second the ErrorReason; both travel as names, so that rooms
which know no gRPC can raise these. An error's text is shown to clients: it names what the client
said or can change, and never an exception, a path or a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


class OsaurusError(Exception):
    """Base of all errors that reach a client.

    Args:
        message: Shown to the client.
        metadata: What is variable in the message, for programs; keys in lower camel or snake case.
    """

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "ENGINE_FAILED"

    def __init__(self, message: str, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))


class InvalidRequestError(OsaurusError):
    """A field of the request is missing, of the wrong form or out of range.

    Args:
        message: What is wrong, in full.
        field: Path of the field in the request, for example "messages[2].content", or "" where the
            request as a whole is wrong.
    """

    code = "INVALID_ARGUMENT"
    reason = "INVALID_FIELD"

    def __init__(self, message: str, *, field: str = "", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message, metadata=metadata)
        self.field = field


class ContextLengthError(InvalidRequestError):
    """The prompt does not fit the model's context, or the memory there is for it.

    Args:
        limit: Tokens of prompt and answer that fit.
        prompt_tokens: The prompt's.
        field: Where the prompt is.
        is_estimate: The prompt has at least so many tokens, and was not tokenized to count them.
        message: What is wrong, in full, where it is not the model's context.
    """

    reason = "CONTEXT_LENGTH_EXCEEDED"

    def __init__(
        self,
        *,
        limit: int,
        prompt_tokens: int,
        field: str = "messages",
        is_estimate: bool = False,
        message: str = "",
    ) -> None:
        count = f"at least {prompt_tokens}" if is_estimate else str(prompt_tokens)
        super().__init__(
            message
            or f"The prompt has {count} tokens; the model's context holds {limit}, the answer included.",
            field=field,
            metadata={"limit": str(limit), "prompt_tokens": str(prompt_tokens)},
        )


class UnauthenticatedError(OsaurusError):
    """Keys are on and the call carries none, or a wrong one."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class CapabilityError(OsaurusError):
    """The model, or this release, cannot do what was asked."""

    code = "FAILED_PRECONDITION"
    reason = "UNSUPPORTED_CAPABILITY"

    def __init__(self, message: str, *, capability: str, field: str = "") -> None:
        super().__init__(message, metadata={"capability": capability, "field": field})
        self.field = field


class FeatureNotImplementedError(OsaurusError):
    """The call exists in the contract and not yet in this release, or not at all."""

    code = "UNIMPLEMENTED"
    reason = "NOT_IMPLEMENTED"


class ModelError(OsaurusError):
    """Something about one model.

    Args:
        message: Shown to the client.
        model: The model's name as the client or the catalog says it.
    """

    def __init__(self, message: str, *, model: str) -> None:
        super().__init__(message, metadata={"model": model})
        self.model = model


class ModelNotFoundError(ModelError):
    """No model of that name is installed."""

    code = "NOT_FOUND"
    reason = "MODEL_NOT_FOUND"

    def __init__(self, model: str) -> None:
        super().__init__(f"Model not found: {model}", model=model)


class ModelUnusableError(ModelError):
    """The model is installed but cannot be loaded."""

    code = "FAILED_PRECONDITION"
    reason = "MODEL_UNUSABLE"


class ModelBusyError(ModelError):
    """Another operation holds the model."""

    code = "ABORTED"
    reason = "MODEL_BUSY"


class ModelExistsError(ModelError):
    """A model of that name is installed."""

    code = "ALREADY_EXISTS"
    reason = "MODEL_EXISTS"


class RecordNotFoundError(OsaurusError):
    """There is no record of that id, or no longer."""

    code = "NOT_FOUND"
    reason = "RECORD_NOT_FOUND"

    def __init__(self, record: str) -> None:
        super().__init__(f"Record not found: {record}", metadata={"record": record})
        self.record = record


class SourceError(OsaurusError):
    """A model could not be brought in."""


class SourceUnavailableError(SourceError):
    """The source could not be reached, does not know the model, or broke off."""

    code = "UNAVAILABLE"
    reason = "SOURCE_UNAVAILABLE"


class SourceInvalidError(SourceError):
    """What the source holds cannot be used."""

    code = "FAILED_PRECONDITION"
    reason = "SOURCE_INVALID"


class DiskFullError(SourceError):
    """The disk is full."""

    code = "RESOURCE_EXHAUSTED"
    reason = "DISK_FULL"


class CapacityError(OsaurusError):
    """The server cannot take the request now.

    Args:
        message: Shown to the client.
        retry_after_seconds: When a retry makes sense, or None where it does not.
    """

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class OverloadedError(CapacityError):
    """Too many requests are running or waiting."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"


class RateLimitedError(CapacityError):
    """The model's requests-per-minute limit is reached."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RATE_LIMITED"


class InsufficientMemoryError(CapacityError):
    """The model needs more memory than there is."""

    code = "RESOURCE_EXHAUSTED"
    reason = "INSUFFICIENT_MEMORY"


class DrainingError(CapacityError):
    """The server is shutting down."""

    code = "UNAVAILABLE"
    reason = "DRAINING"

    def __init__(self) -> None:
        super().__init__("The server is shutting down.", retry_after_seconds=2.0)


class RequestDeadlineError(OsaurusError):
    """The caller's deadline passed before the answer was complete."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class EngineError(OsaurusError):
    """The engine failed. The text is fixed; the details are in the log."""

    def __init__(self) -> None:
        super().__init__("The engine failed to answer this request; the server's log has the details.")
