"""Request bodies: bytes to JSON to a checked schema, each failure a Refusal that names its place.

The decoder is stricter than json.loads where leniency would surface later as a server error:
duplicate keys, NaN, numbers beyond float64, lone surrogates (no UTF-8 form, so no protobuf string), deep
nesting and bodies of very many tiny values, which would keep the process busy, are refused here.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Annotated, NoReturn, TypeVar

from aiohttp import web
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from rest_shim.arrival import SMALL_BYTES, read_bytes
from rest_shim.errors import Refusal

MAX_DEPTH = 128
# Brackets and commas of the whole text, those inside strings included: more than a prompt of a
# million tokens has.
MAX_BRACKETS = 250_000
MAX_COMMAS = 1_000_000

EMPTY_BODY_TEXT = "missing request body"

# A union member's tag shows up in a pydantic error's location; this prefix tells it from a key.
TAG_PREFIX = "~"

# Of a key that a client made up, in a path shown to it.
_MAX_KEY_CHARACTERS = 64

# What pydantic appends where an object's key is wrong, and not its value.
_KEY_ITSELF = "[key]"

# The error type of unions that are told apart by "type"; where one is given, it is what is wrong.
UNKNOWN_VARIANT = "unknown_variant"

# The error type whose message is shown as it is.
VERBATIM = "verbatim"

_Schema = TypeVar("_Schema", bound=BaseModel)


class Body(BaseModel):
    """Base of all schemas: unknown keys are ignored, null means absent, types are not coerced."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Says that null may stand for a field that may be left out."""
        made = handler(schema)
        shape = handler.resolve_ref_schema(made)
        required = shape.get("required", ())
        properties = shape.get("properties", {})
        for name in properties.keys() - set(required):
            if {"type": "null"} not in properties[name].get("anyOf", ()):
                properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
        return made


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# JSON has one number type: 2.0 is a whole number, as OpenAI's API takes it. True is not.
Integer = Annotated[int, BeforeValidator(_whole)]


def verbatim(message: str) -> PydanticCustomError:
    """An error for validators whose whole text is shown to the client."""
    # Braces would be taken for placeholders of pydantic's own formatting.
    return PydanticCustomError(VERBATIM, "{text}", {"text": message})


async def read_body(request: web.Request, schema: type[_Schema], timeout_seconds: float) -> _Schema:
    """The request's body, checked; JSON whatever its Content-Type says (curl -d sends a form's).

    Raises:
        Refusal: It did not arrive as it should, or is not what the schema asks for.
        web.HTTPRequestEntityTooLarge: It is too large.
    """
    data = await read_bytes(request, timeout_seconds)
    if len(data) <= SMALL_BYTES:
        return validate(schema, parse_object(data))
    # Running streams go on meanwhile.
    return await asyncio.to_thread(lambda: validate(schema, parse_object(data)))


def parse_object(data: bytes) -> dict[str, object]:
    """A JSON object from bytes.

    Raises:
        Refusal: The bytes are no JSON object that this server takes.
    """
    if not data.strip():
        raise Refusal(400, EMPTY_BODY_TEXT)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refusal(400, "The request body is not valid UTF-8.") from None
    brackets = text.count("{") + text.count("[")
    if brackets > MAX_BRACKETS or text.count(",") > MAX_COMMAS:
        raise Refusal(400, "The request body holds too many values.")
    value = _decode(text)
    if not isinstance(value, dict):
        raise Refusal(400, "The request body must be a JSON object.")
    if brackets > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        _refuse_depth()
    if "\\ud" in text or "\\uD" in text:
        _refuse_lone_surrogates(value)
    return value


def validate(schema: type[_Schema], value: object) -> _Schema:
    """A request checked against its schema.

    Raises:
        Refusal: With the JSON path of the first thing that is wrong as its param.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _refusal(first) from None


def json_path(location: tuple[int | str, ...]) -> str:
    """A pydantic location in JSON terms, for example "messages[0].content"."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part == _KEY_ITSELF:
            # It is said of the key before it.
            continue
        elif not part.startswith(TAG_PREFIX):
            key = part if len(part) <= _MAX_KEY_CHARACTERS else f"{part[:_MAX_KEY_CHARACTERS]}..."
            path += f".{key}" if path else key
    return path


def _refusal(error: ErrorDetails) -> Refusal:
    path = json_path(error["loc"])
    value = error["input"]
    if error["type"] == UNKNOWN_VARIANT and isinstance(value, dict) and "type" in value:
        path += ".type"
    match error["type"]:
        case "missing":
            reason = error["msg"]
            message = f"Missing required parameter: '{path}'."
        case "verbatim":
            reason = message = error["msg"]
        case "model_type" | "dict_type":
            # pydantic's own words name a class of ours.
            reason = "Input should be an object"
            message = f"Invalid '{path}': input should be an object."
        case _:
            reason = error["msg"].removeprefix("Value error, ").rstrip(".")
            message = f"Invalid '{path}': {reason[:1].lower()}{reason[1:]}."
    return Refusal(400, message, param=path or None, reason=reason)


def _decode(text: str) -> object:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        message = (
            f"The request body is not valid JSON: {error.msg} (line {error.lineno} column {error.colno})."
        )
        raise Refusal(400, message) from None
    except RecursionError:
        _refuse_depth()
    except ValueError:
        # Python's own bound on the digits of an integer.
        raise Refusal(400, "The request body holds a number that is too large.") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise Refusal(400, "The request body holds an object with a duplicate key.")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise Refusal(400, "The request body holds a number that is too large.")
    return value


def _no_constant(name: str) -> NoReturn:
    raise Refusal(400, f"The request body is not valid JSON: {name} is not a JSON number.")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant)


def _depth(value: object) -> int:
    """Levels of nesting, without recursion."""
    deepest = 0
    pending: list[tuple[object, int]] = [(value, 1)]
    while pending:
        item, level = pending.pop()
        if isinstance(item, dict | list):
            deepest = max(deepest, level)
            children = item.values() if isinstance(item, dict) else item
            pending.extend((child, level + 1) for child in children if isinstance(child, dict | list))
    return deepest


def _refuse_depth() -> NoReturn:
    raise Refusal(400, f"The request body is nested deeper than {MAX_DEPTH} levels.")


def _refuse_lone_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refusal(400, "The request body holds a lone surrogate, which is no character.") from None
