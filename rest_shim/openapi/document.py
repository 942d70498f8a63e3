"""The OpenAPI document as a whole.

Every route also answers under the other prefixes; the description names each once, under the prefix
of its own clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import metadata
from types import UnionType
from typing import Any

from pydantic import TypeAdapter

from rest_shim.openapi import anthropic, ollama, openai, responses
from rest_shim.openapi.operation import JSON, Link, Operation

OPENAPI_VERSION = "3.1.0"
_REF = "#/components/schemas/{model}"

OPERATIONS: tuple[Operation, ...] = (
    *openai.OPERATIONS,
    *responses.OPERATIONS,
    *anthropic.OPERATIONS,
    *ollama.OPERATIONS,
)

_STATUS_TEXTS = {
    400: "The request is wrong",
    401: "A key is needed",
    403: "The Host or the Origin may not do this",
    404: "There is no such model or object",
    408: "The body did not arrive in time",
    409: "The model is in use, or there is one of that name",
    413: "The body is too large",
    415: "The body is compressed in a way that is not known here",
    429: "Too many requests",
    500: "The server failed",
    501: "The core cannot do this yet",
    503: "The core is away or busy, or too many large requests are being answered",
    504: "The answer took too long",
}


# Statuses that may tell when to ask again.
_RETRIED = (429, 503)


@cache
def document() -> Mapping[str, object]:
    """The description of all routes, in JSON."""
    schemas = _Schemas()
    paths: dict[str, dict[str, object]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schemas)
    return {
        "openapi": OPENAPI_VERSION,
        "info": {
            "title": "Osaurus",
            "version": metadata.version("osaurus"),
            "description": "A local server of language models that speaks the APIs of OpenAI, Ollama and "
            "Anthropic. Every route answers bare and under /v1, /api and /v1/api.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas.components(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # A key is needed only where the server was started with one.
        "security": [{}, {"key": []}],
    }


class _Schemas:
    """Schemas by reference; each definition is kept once, under its own name."""

    def __init__(self) -> None:
        self._found: dict[str, object] = {}

    def reference(self, shape: Any) -> object:
        """The schema of a type, with its definitions among the components."""
        if isinstance(shape, Mapping):
            return shape
        if isinstance(shape, UnionType):
            # One by one: they may come from different dialects.
            return {"anyOf": [self.reference(part) for part in shape.__args__]}
        adapter: TypeAdapter[Any] = TypeAdapter(shape)
        made = adapter.json_schema(ref_template=_REF)
        definitions = made.pop("$defs", {})
        name = made.get("title")
        if isinstance(name, str) and made.get("type") == "object":
            definitions[name] = made
            made = {"$ref": _REF.format(model=name)}
        prefix = _prefix(shape)
        for key, definition in definitions.items():
            whole = _told(definition, prefix)
            if self._found.setdefault(prefix + key, whole) != whole:
                raise ValueError(f"two schemas have the name {prefix + key}")
        return _told(made, prefix)

    def components(self) -> Mapping[str, object]:
        """All definitions, by name."""
        return dict(sorted(self._found.items()))


def _prefix(shape: Any) -> str:
    """Dialects have classes of the same name."""
    for dialect in ("ollama", "anthropic", "responses"):
        if getattr(shape, "__module__", "") == f"rest_shim.{dialect}.schema":
            return dialect.capitalize()
    return ""


# Bounds that pydantic leaves in its own words where a validator runs before them.
_WORDS = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}
# The variants are told apart by their types, which oneOf would try to do by their fields.
_WORDS |= {"oneOf": "anyOf"}


def _told(value: Any, prefix: str) -> Any:
    """A schema in the words of JSON Schema, whose references name the prefixed definitions."""
    if isinstance(value, list):
        return [_told(item, prefix) for item in value]
    if not isinstance(value, dict):
        return value
    made: dict[str, object] = {}
    for key, item in value.items():
        if key == "$ref" and isinstance(item, str):
            head, _, name = item.rpartition("/")
            made[key] = f"{head}/{prefix}{name}"
        elif key == "properties" and isinstance(item, dict):
            made[key] = {name: _told(inner, prefix) for name, inner in item.items()}
        elif key in {"min_length", "max_length"}:
            unit = "Items" if value.get("type") == "array" else "Length"
            made[key[:3] + unit] = item
        elif key != "discriminator":
            made[_WORDS.get(str(key), str(key))] = _told(item, prefix)
    return made


def _operation(operation: Operation, schemas: _Schemas) -> Mapping[str, object]:
    made: dict[str, object] = {"operationId": operation.name, "summary": operation.summary}
    if operation.parameters:
        made["parameters"] = list(operation.parameters)
    if operation.body is not None:
        content = {JSON: {"schema": schemas.reference(operation.body)}}
        made["requestBody"] = {"required": True, "content": content}
    answer = _answer(200, "The answer", operation.answers, schemas)
    if operation.links:
        answer["links"] = {name: _link(link) for name, link in operation.links.items()}
    answers: dict[str, object] = {"200": answer}
    for status in sorted(operation.statuses):
        answers[str(status)] = _answer(status, _STATUS_TEXTS[status], {JSON: operation.error}, schemas)
    made["responses"] = answers
    return made


def _answer(
    status: int, text: str, shapes: Mapping[str, object | None], schemas: _Schemas
) -> dict[str, object]:
    made: dict[str, object] = {"description": text, "headers": _headers(status)}
    if shapes:
        made["content"] = {
            kind: {} if shape is None else {"schema": schemas.reference(shape)}
            for kind, shape in shapes.items()
        }
    return made


def _headers(status: int) -> Mapping[str, object]:
    said: dict[str, object] = {
        "x-request-id": {
            "description": "Names the request in the server's log; a client may choose it.",
            "required": True,
            "schema": {"type": "string", "minLength": 1},
        }
    }
    if status in _RETRIED:
        said["Retry-After"] = {
            "description": "Seconds after which to ask again; left out where that is no use.",
            "schema": {"type": "integer", "minimum": 1},
        }
    return said


def _link(link: Link) -> Mapping[str, object]:
    made: dict[str, object] = {"operationId": link.operation}
    if link.parameters:
        made["parameters"] = dict(link.parameters)
    if link.body:
        made["requestBody"] = dict(link.body)
    return made
