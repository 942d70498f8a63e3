"""JSON schemas as clients send them, made ready for the grammar library."""

from __future__ import annotations

import json
from typing import Final, Never

from osaurus_grpc.errors import InvalidRequestError

MAX_SCHEMA_CHARACTERS: Final = 262_144

# At most one blank after a comma or a colon: models are used to one, and small ones loop on more.
_FORM: Final = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def prepared(text: str, *, strict: bool, field: str) -> str:
    """A schema in the form that is handed to the grammar library, or put behind `%json` in a Lark grammar.

    Args:
        text: The schema as JSON.
        strict: As JsonSchemaFormat.strict.
        field: Path of the request field that holds it, for errors.

    Raises:
        InvalidRequestError: It is no JSON, no schema, or says something that cannot be enforced; the
            message names the keyword and its path inside the schema.
    """
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise InvalidRequestError(
            f"{field} must have at most {MAX_SCHEMA_CHARACTERS} characters.", field=field
        )
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidRequestError(f"{field} is not valid JSON.", field=field) from None
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"{field} must be a JSON object.", field=field)
    return json.dumps({**schema, "x-guidance": _FORM}, ensure_ascii=False)


def _refuse_constant(name: str) -> Never:
    raise ValueError(name)
