"""What older drafts of JSON schema, and rarer keywords, say in the usual words of draft 2020-12."""

from __future__ import annotations

from osaurus_grpc.chat.schema_keywords import ANNOTATIONS, APPLICATORS, Schema, are_names


def simplified(node: Schema) -> Schema:
    """The same schema with what older drafts and other keywords say in draft 2020-12's usual ones."""
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
    return node


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
    if said.pop("type", "string") != "string" or not said:
        return rest if not said else node
    value = rest.get("additionalProperties", True)
    if {"properties", "patternProperties"} & rest.keys():
        return node
    if (pattern := _pattern_of(said)) is not None:
        return {**rest, "patternProperties": {pattern: value}, "additionalProperties": False}
    listed = said.get("enum", [said.get("const")]) if len(said) == 1 else None
    if are_names(listed):
        properties = dict.fromkeys(listed, value)
        return {**rest, "properties": properties, "additionalProperties": False}
    return node


def _pattern_of(said: Schema) -> str | None:
    """The regular expression that says the same of strings; None where there is none."""
    if said.keys() == {"pattern"} and isinstance(said["pattern"], str):
        return said["pattern"]
    least, most = said.get("minLength", 0), said.get("maxLength", "")
    if said.keys() <= {"minLength", "maxLength"} and isinstance(least, int) and isinstance(most, int | str):
        return rf"^[\s\S]{{{least},{most}}}$"
    return None


def _renamed(node: Schema, old: str, new: str) -> Schema:
    """The same with a keyword under another name, in its place; one of that name is dropped."""
    return {new if key == old else key: value for key, value in node.items() if key != new or old not in node}
