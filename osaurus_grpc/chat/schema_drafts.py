"""What older drafts of JSON schema, and rarer keywords, say in the usual words of draft 2020-12."""

from __future__ import annotations

import json
from typing import Final

from osaurus_grpc.chat.formats import FORMATS
from osaurus_grpc.chat.schema_keywords import ANNOTATIONS, APPLICATORS, TYPES, Schema, are_names
from osaurus_grpc.chat.schema_overlap import canonical, listed_values

# Of a schema that is said once for each of several names: its characters times these.
_MAX_CHARACTERS: Final = 100_000


def simplified(node: Schema) -> Schema | bool:
    """The same schema with what older drafts and other keywords say in draft 2020-12's usual ones.

    False is one that admits nothing.
    """
    node = dict(node)
    if isinstance(node.get("items"), list):
        node = _renamed(node, "items", "prefixItems")
        if "additionalItems" in node:
            node = _renamed(node, "additionalItems", "items")
    node.pop("additionalItems", None)
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(node.get(exclusive), bool) and node.pop(exclusive) and bound in node:
            node = _renamed(node, bound, exclusive)
    if node.get("uniqueItems") is False or ("uniqueItems" in node and node.get("maxItems") in (0, 1)):
        del node["uniqueItems"]
    if node.get("unevaluatedProperties") is True:
        del node["unevaluatedProperties"]
    if node.get("unevaluatedItems") is True:
        del node["unevaluatedItems"]
    if (
        node.get("unevaluatedProperties") is False
        and "additionalProperties" not in node
        and not APPLICATORS & node.keys()
    ):
        node = _renamed(node, "unevaluatedProperties", "additionalProperties")
    if "propertyNames" in node:
        node = _with_names(node)
    if node.get("type") == "object":
        node = _with_dependencies(node)
    return _without(node) if "not" in node else node


def _with_names(node: Schema) -> Schema:
    """Express propertyNames by keywords that are enforced, where that can be done."""
    names = node["propertyNames"]
    rest = {key: value for key, value in node.items() if key != "propertyNames"}
    if names is True:
        return rest
    if names is False:
        return {**rest, "maxProperties": 0}
    if not isinstance(names, dict):
        return node
    said = {key: value for key, value in names.items() if key not in ANNOTATIONS}
    if said.pop("type", "string") not in ("string", ["string"]):
        return node
    if not said:
        return rest
    value = rest.get("additionalProperties", True)
    if {"properties", "patternProperties"} & rest.keys():
        return node
    if (pattern := _pattern_of(said)) is not None:
        return {**rest, "patternProperties": {pattern: value}, "additionalProperties": False}
    listed = said.get("enum", [said.get("const")]) if len(said) == 1 else None
    if are_names(listed) and len(listed) * len(json.dumps(value)) <= _MAX_CHARACTERS:
        properties = dict.fromkeys(listed, value)
        return {**rest, "properties": properties, "additionalProperties": False}
    return node


def _pattern_of(said: Schema) -> str | None:
    """The regular expression that says the same of strings; None where there is none."""
    if said.keys() == {"pattern"} and isinstance(said["pattern"], str):
        return said["pattern"]
    if said.keys() == {"format"} and isinstance(said["format"], str) and said["format"] in FORMATS:
        return f"^(?:{FORMATS[said['format']]})$"
    least, most = said.get("minLength", 0), said.get("maxLength")
    if said.keys() <= {"minLength", "maxLength"} and _is_count(least) and (most is None or _is_count(most)):
        return rf"^[\s\S]{{{least},{'' if most is None else most}}}$"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _without(node: Schema) -> Schema | bool:
    """Say without "not" what is excluded, where the rest can be listed."""
    excluded = node["not"]
    rest = {key: value for key, value in node.items() if key != "not"}
    if excluded is False:
        return rest
    said = excluded if isinstance(excluded, dict) else {}
    said = {key: value for key, value in said.items() if key not in ANNOTATIONS}
    if excluded is True or (isinstance(excluded, dict) and not said):
        return False
    match list(said.items()):
        case [("type", str() | list() as types)]:
            left = _types_without(rest.get("type", sorted(TYPES - {"integer"})), types)
            return node if left is None else bool(left) and {**rest, "type": left}
        case [("enum" | "const", _)] if isinstance(rest.get("enum"), list):
            values = listed_values(said)
            if values is None:
                return node
            gone = {canonical(value) for value in values}
            left = [value for value in rest["enum"] if canonical(value) not in gone]
            return bool(left) and {**rest, "enum": left}
        case [("required", names)] if rest.get("type") == "object" and are_names(names) and names:
            return _and(rest, {"anyOf": [{"properties": {name: False}} for name in names]})
        case _:
            return node


def _types_without(types: object, gone: str | list[object]) -> list[object] | None:
    """Types without others; None where a part of one would have to go, or one is no type."""
    types = types if isinstance(types, list) else [types]
    gone = gone if isinstance(gone, list) else [gone]
    if not gone or not all(isinstance(kind, str) and kind in TYPES for kind in (*types, *gone)):
        return None
    types, gone = list(dict.fromkeys(types)), list(dict.fromkeys(gone))
    if "integer" in gone and "number" in types and "number" not in gone:
        return None
    return [kind for kind in types if kind not in gone and (kind != "integer" or "number" not in gone)]


def _with_dependencies(node: Schema) -> Schema:
    """Say by alternatives what the properties of an object depend on."""
    alternatives: list[Schema] = []
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        said = node.get(keyword)
        if not isinstance(said, dict) or not all(
            isinstance(needed, list | dict | bool) for needed in said.values()
        ):
            continue
        node = {key: value for key, value in node.items() if key != keyword}
        for name, needed in said.items():
            schema = {"required": needed} if isinstance(needed, list) else needed
            there = {"required": [name], "allOf": [schema]}
            alternatives.append({"anyOf": [{"properties": {name: False}}, there]})
    return _and(node, *alternatives) if alternatives else node


def _and(node: Schema, *more: Schema) -> Schema:
    """A schema that says more besides."""
    parts = node.get("allOf", [])
    return {**node, "allOf": [*parts, *more]} if isinstance(parts, list) else node


def _renamed(node: Schema, old: str, new: str) -> Schema:
    """The same with a keyword under another name, in its place; one of that name is dropped."""
    return {new if key == old else key: value for key, value in node.items() if key != new or old not in node}
