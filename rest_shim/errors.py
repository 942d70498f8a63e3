"""What goes wrong, from the core's status to the body a client reads.

    gRPC status + ErrorInfo --backend--> CoreError --refusal_from_core()--> Refusal
    a bad request ------------------------------------------------------> Refusal
    Refusal --openai_body() | ollama_body() | anthropic_body()--> JSON

One table maps each ErrorReason; a second one maps the bare gRPC codes of calls that never reached
the core, or of a core that is not ours.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

FAILED_TEXT = "The server failed to answer this request; its log has the details."
UNREACHABLE_TEXT = "The inference core does not answer; try again shortly."

_DEFAULT_RETRY_SECONDS = 2.0


class CoreError(Exception):
    """A call to the core ended with a status other than OK.

    Args:
        code: Name of the gRPC code, for example "NOT_FOUND".
        reason: Name of the ErrorReason without its prefix, or "" where the status carries none.
        message: The status's text. Safe to show only where reason is set.
        field: Path of the offending field in the protobuf request, or "".
        retry_after_seconds: The core's RetryInfo, or None.
        metadata: What is variable in the message, as the status's ErrorInfo names it.
    """

    def __init__(
        self,
        code: str,
        reason: str = "",
        message: str = "",
        *,
        field: str = "",
        retry_after_seconds: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code} {reason}".rstrip())
        self.code = code
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_seconds = retry_after_seconds
        self.metadata: Mapping[str, str] = metadata or {}


class Refusal(Exception):
    """A request that is answered with an error; the text is shown to the client.

    Args:
        status: HTTP status.
        message: What is wrong, in full.
        kind: OpenAI's error type.
        code: OpenAI's error code.
        param: Path of the offending field in the JSON request, or None.
        reason: What is wrong with that field, without its name, where the message is made of both.
        headers: Further response headers.
        details: What programs read of it beside the text, in Anthropic's dialect.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str = "invalid_request",
        param: str | None = None,
        reason: str = "",
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.reason = reason
        self.headers: dict[str, str] = dict(headers or {})
        self.details: dict[str, object] = dict(details or {})


@dataclass(frozen=True, slots=True)
class _Verdict:
    status: int
    kind: str
    code: str
    # The offending field of the protobuf request, where the core names none.
    field: str = ""
    # SDKs retry every 5xx and 409; "false" tells them that it is no use.
    is_retryable: bool = True
    # As if not retryable, unless the core says after what time to try again.
    is_retryable_if_told: bool = False
    needs_retry_after: bool = False
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


_INVALID = _Verdict(400, "invalid_request_error", "invalid_request")
_FAILED = _Verdict(500, "server_error", "internal_server_error")
_AWAY = _Verdict(503, "server_error", "service_unavailable", needs_retry_after=True)
_BUSY = _Verdict(429, "rate_limit_error", "rate_limit_exceeded", needs_retry_after=True)
_NO_KEY = _Verdict(401, "authentication_error", "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
_TIMEOUT = _Verdict(504, "server_error", "request_timeout", is_retryable=False)
_LATER = _Verdict(501, "server_error", "not_implemented", is_retryable=False)
_NO_MODEL = _Verdict(404, "invalid_request_error", "model_not_found", field="model")

_BY_REASON: Mapping[str, _Verdict] = {
    "INVALID_FIELD": _INVALID,
    "CONTEXT_LENGTH_EXCEEDED": _Verdict(
        400, "invalid_request_error", "context_length_exceeded", field="messages"
    ),
    "MODEL_NOT_FOUND": _NO_MODEL,
    "RECORD_NOT_FOUND": _Verdict(404, "invalid_request_error", "not_found"),
    "UNSUPPORTED_CAPABILITY": _Verdict(400, "invalid_request_error", "unsupported_capability"),
    "MODEL_UNUSABLE": _Verdict(500, "server_error", "model_unusable", field="model", is_retryable=False),
    "OVERLOADED": _BUSY,
    "RATE_LIMITED": _BUSY,
    # What never fits is told apart from what does not fit now by the core's RetryInfo alone.
    "INSUFFICIENT_MEMORY": _Verdict(503, "server_error", "service_unavailable", is_retryable_if_told=True),
    "DRAINING": _AWAY,
    "UNAUTHENTICATED": _NO_KEY,
    "DEADLINE_EXCEEDED": _TIMEOUT,
    "ENGINE_FAILED": _FAILED,
    "NOT_IMPLEMENTED": _LATER,
    "SOURCE_UNAVAILABLE": _Verdict(502, "server_error", "source_unavailable"),
    "SOURCE_INVALID": _Verdict(400, "invalid_request_error", "source_invalid"),
    "DISK_FULL": _Verdict(507, "server_error", "disk_full", is_retryable=False),
    "MODEL_BUSY": _Verdict(409, "invalid_request_error", "model_busy", is_retryable=False),
    "MODEL_EXISTS": _Verdict(409, "invalid_request_error", "model_exists", is_retryable=False),
}

# The texts of these statuses come from a gRPC library, not from our core, and are not shown.
_BY_CODE: Mapping[str, tuple[_Verdict, str]] = {
    "INVALID_ARGUMENT": (_INVALID, "The core refused the request."),
    "NOT_FOUND": (_NO_MODEL, "Model not found."),
    "UNAUTHENTICATED": (_NO_KEY, "A valid API key is needed."),
    "PERMISSION_DENIED": (_NO_KEY, "A valid API key is needed."),
    "DEADLINE_EXCEEDED": (_TIMEOUT, "The request took longer than this server allows."),
    "RESOURCE_EXHAUSTED": (_AWAY, "The request is larger than the core takes, or the core is overloaded."),
    "UNAVAILABLE": (_AWAY, UNREACHABLE_TEXT),
    "CANCELLED": (_AWAY, "The core ended the request before it was answered."),
    "UNIMPLEMENTED": (_LATER, "The core does not implement this call."),
}


def refusal_from_core(error: CoreError, json_path: Callable[[str], str] = str) -> Refusal:
    """What an HTTP client is told about a call's status.

    Args:
        error: The status.
        json_path: The dialect's translation of a protobuf field path to its own JSON path.
    """
    verdict = _BY_REASON.get(error.reason)
    if verdict is not None:
        message = error.message or FAILED_TEXT
    else:
        verdict, message = _BY_CODE.get(error.code, (_FAILED, FAILED_TEXT))
    field = error.field or verdict.field
    param = json_path(field) if field else None
    reason = "" if param is None else _without_name(message, error.field)
    if reason and param != error.field:
        message = f"Invalid '{param}': {reason}"
    headers = dict(verdict.headers)
    retry_after = error.retry_after_seconds
    if retry_after is None and verdict.needs_retry_after:
        retry_after = _DEFAULT_RETRY_SECONDS
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    if not verdict.is_retryable or (verdict.is_retryable_if_told and retry_after is None):
        headers["x-should-retry"] = "false"
    return Refusal(
        verdict.status,
        message,
        kind=verdict.kind,
        code=verdict.code,
        param=param,
        reason=reason,
        headers=headers,
    )


def _without_name(message: str, field: str) -> str:
    """A core's sentence about a field without the field's name; "" where it does not begin with it."""
    for name in (field, field.removeprefix("sampling.")):
        rest = message.removeprefix(name)
        if name and rest != message and rest[:1] in (" ", ":"):
            return rest.lstrip(" :")
    return ""


def internal_refusal() -> Refusal:
    """The answer to an exception nobody foresaw."""
    return Refusal(500, FAILED_TEXT, kind=_FAILED.kind, code=_FAILED.code)


def draining_refusal() -> Refusal:
    """The answer to a request that the server's end leaves no time for, as the core words it."""
    return refusal_from_core(CoreError("UNAVAILABLE", "DRAINING", "The server is shutting down."))


def crowded_refusal() -> Refusal:
    """The answer to a large request for which there is no room beside others."""
    text = "Too many large requests are being answered; try again shortly."
    headers = {"Retry-After": str(math.ceil(_DEFAULT_RETRY_SECONDS))}
    return Refusal(503, text, kind=_AWAY.kind, code=_AWAY.code, headers=headers)


def not_implemented_refusal(what: str) -> Refusal:
    """The answer to a call whose work is not in this release."""
    return Refusal(
        501,
        f"{what} is not implemented in this release.",
        kind=_LATER.kind,
        code=_LATER.code,
        headers={"x-should-retry": "false"},
    )


def refusal_from_status(status: int, message: str = "") -> Refusal:
    """A refusal for an error that the HTTP library found: 404, 405, 413 and their like."""
    text = message or HTTPStatus(status).phrase
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return Refusal(status, text, code="request_too_large")
    if status == HTTPStatus.NOT_FOUND:
        return Refusal(status, text, code="not_found")
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        return Refusal(status, text, code="method_not_allowed")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Refusal(status, text, kind=_FAILED.kind, code=_FAILED.code)
    return Refusal(status, text)


def openai_body(refusal: Refusal) -> dict[str, object]:
    """OpenAI's error object; all four keys are required by its schema."""
    return {
        "error": {
            "message": refusal.message,
            "type": refusal.kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def ollama_body(refusal: Refusal) -> dict[str, object]:
    """Ollama's error object: a string on one line, since its Go client reads line by line."""
    return {"error": " ".join(refusal.message.splitlines())}


# "messages[0].content[1]" is "messages.0.content.1" there.
_INDEX = re.compile(r"\[(\d+)\]")

_ANTHROPIC_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_body(refusal: Refusal, request_id: str) -> dict[str, object]:
    """Anthropic's error object. It has no place for the field's path, so that its text begins with it."""
    fallback = "api_error" if refusal.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    error: dict[str, object] = {
        "type": _ANTHROPIC_TYPES.get(refusal.status, fallback),
        "message": refusal.message,
    }
    if refusal.param and refusal.status == HTTPStatus.BAD_REQUEST:
        place = _INDEX.sub(r".\1", refusal.param)
        error["message"] = f"{place}: {refusal.reason or refusal.message}"
    if refusal.details:
        error["details"] = refusal.details
    return {"type": "error", "error": error, "request_id": request_id}
