"""The keywords of JSON schema, by what they say about values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeGuard

Schema = dict[str, Any]

TYPES: Final = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
ANNOTATIONS: Final = frozenset(
    {
        "$anchor", "$comment", "$defs", "$dynamicAnchor", "$id", "$recursiveAnchor", "$schema", "$vocabulary",
        "contentEncoding", "contentMediaType", "contentSchema", "default", "definitions", "deprecated",
        "description", "discriminator", "example", "examples", "externalDocs", "id", "nullable",
        "propertyOrdering", "readOnly", "title", "writeOnly", "xml",
    }
)  # fmt: skip
# Keywords of JSON schema that say something about values and cannot be enforced, or not in general.
UNENFORCED: Final = frozenset(
    {
        "$dynamicRef", "$recursiveRef", "contains", "dependencies", "dependentRequired", "dependentSchemas",
        "else", "if", "maxContains", "minContains", "not", "propertyNames", "then", "unevaluatedItems",
        "unevaluatedProperties", "uniqueItems",
    }
)  # fmt: skip
FAMILIES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "string"),
    **dict.fromkeys(
        ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), "number"
    ),
    **dict.fromkeys(("items", "prefixItems", "additionalItems", "minItems", "maxItems"), "array"),
    **dict.fromkeys(
        ("properties", "patternProperties", "additionalProperties", "required", "minProperties",
         "maxProperties", "propertyNames"), "object"
    ),
}  # fmt: skip
LATEST: Final = 2020
_DRAFTS: Final = re.compile(r"draft-0?([3-7])\b|draft/(2019)-09")
UNIONS: Final = ("anyOf", "oneOf", "allOf")
APPLICATORS: Final = frozenset({*UNIONS, "$ref", "enum", "const"})


def draft_of(root: Schema) -> int:
    """The draft of JSON schema that a schema names: 4, 6, 7, 2019 or the latest."""
    name = root.get("$schema")
    found = _DRAFTS.search(name) if isinstance(name, str) else None
    return int(found[1] or found[2]) if found else LATEST


def as_meant(node: Any, draft: int) -> Any:
    """A schema without the keywords that an older draft ignores, and newer ones know.

    They may be enforced all the same, but tell nothing apart.
    """
    if draft == LATEST or not isinstance(node, dict):
        return node
    if draft <= 7 and isinstance(node.get("$ref"), str):
        return {"$ref": node["$ref"]}
    unknown = {"prefixItems"} if draft > 4 else {"prefixItems", "const"}
    return {key: value for key, value in node.items() if key not in unknown}


def asserting_keywords(node: Schema) -> set[str]:
    """The keywords of a schema that say something about values, its type apart."""
    return {key for key in node if key in FAMILIES or key in APPLICATORS}


def only_kind(node: object) -> str | None:
    """The only type that a schema speaks of without naming it; None where there is no such type."""
    if not isinstance(node, dict) or "type" in node or (asserting := asserting_keywords(node)) & APPLICATORS:
        return None
    families = {FAMILIES[key] for key in asserting}
    return families.pop() if len(families) == 1 else None


def is_reference(node: Schema) -> bool:
    """Whether a schema is a reference and says nothing else."""
    return "$ref" in node and all(key == "$ref" or key in ANNOTATIONS or key.startswith("x-") for key in node)


def are_names(value: object) -> TypeGuard[list[str]]:
    """Whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
