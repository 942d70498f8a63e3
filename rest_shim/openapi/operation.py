"""What is said of one route in the description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

JSON = "application/json"
EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
TEXT = "text/plain"

TEXT_SCHEMA: Mapping[str, object] = {"type": "string"}

# What any request may meet: a foreign Host, no key, a core that fails or is away.
COMMON_ERRORS = (401, 403, 500, 501, 503, 504)
# What a request with a body may meet besides.
BODY_ERRORS = (400, 408, 413, 415, 429)
MODEL_ERRORS = (404,)


class Shape(BaseModel):
    """Base of the shapes of answers. No field is in an answer that its shape does not name."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Link:
    """What a client may do next with what one operation gave.

    Attributes:
        operation: The next operation's id.
        parameters: Its parameters, as runtime expressions of OpenAPI.
        body: Fields of its body, as runtime expressions.
    """

    operation: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Operation:
    """One route, under the prefix that its own clients use.

    Attributes:
        method: HTTP method.
        path: Path with the prefix; placeholders as OpenAPI writes them.
        name: The operation's id.
        summary: What it does.
        answers: Shapes of a 200 answer by media type, one or several; None for a stream, whose events
            OpenAPI 3.1 has no words for. Empty for an answer without a body.
        error: The shape of errors, or several.
        statuses: Statuses of errors.
        body: Schema of the request's body, or several.
        parameters: Parameters of path, query and headers, as OpenAPI writes them.
        links: Operations that use what a 200 answer gave, by name.
    """

    method: str
    path: str
    name: str
    summary: str
    answers: Mapping[str, object | None]
    error: object
    statuses: Sequence[int] = COMMON_ERRORS
    body: object | None = None
    parameters: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    links: Mapping[str, Link] = field(default_factory=dict)


def path_parameter(name: str, example: str) -> Mapping[str, Any]:
    """A placeholder of a path."""
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema, "example": example}


def query_parameter(name: str, schema: Mapping[str, object]) -> Mapping[str, Any]:
    """A parameter of a query."""
    return {"name": name, "in": "query", "required": False, "schema": schema}
