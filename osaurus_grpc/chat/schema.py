"""JSON schemas as clients send them, rewritten into what the grammar library enforces.

The library (llguidance 1.9) ignores keywords that it does not know, reads numbers as 64-bit floats,
and interprets some keywords by the `$schema` they stand under. So a schema is not handed on: a new
one is built from what is known to be enforced, in the meaning of draft 2020-12, and anything else is
refused by name. The one built admits only values that the original admits, and fewer:

* An object that declares properties and says nothing of others has no others. (By the letter, JSON
  schema admits any; models ramble.)
* A schema that only speaks of objects, arrays, strings or numbers is for values of that type.
* Objects that a property of listed values would tell apart in a oneOf have that property.
* Integers without bounds have at most 19 digits; bounds that no float holds are moved inward.
* Formats: formats.py.

Annotations, and the names of vendors (`x-…`), say nothing about values and are left out.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Final, NamedTuple, Never

from osaurus_grpc.chat import schema_bounds
from osaurus_grpc.chat.formats import FORMATS
from osaurus_grpc.chat.schema_drafts import simplified
from osaurus_grpc.chat.schema_keywords import (
    ANNOTATIONS,
    APPLICATORS,
    LATEST,
    TYPES,
    UNENFORCED,
    Schema,
    are_names,
    as_meant,
    asserting_keywords,
    draft_of,
    is_reference,
    only_kind,
)
from osaurus_grpc.chat.schema_numbers import Numbers, bound_integers
from osaurus_grpc.chat.schema_overlap import Looks, Overlap, TooMuchToCompareError, telling_property
from osaurus_grpc.chat.schema_patterns import enforceable
from osaurus_grpc.chat.schema_references import References, Use, definition
from osaurus_grpc.chat.schema_unique import unique_lists
from osaurus_grpc.errors import InvalidRequestError

MAX_SCHEMA_CHARACTERS: Final = 262_144
MAX_SCHEMAS: Final = 10_000
_MAX_PATH_PARTS: Final = 96  # the library reads JSON of at most 128 levels
_MAX_LEVELS: Final = 192
# Of alternatives that each forbid one property of every other one.
_MAX_EXCLUSIONS: Final = 10_000
# At most one blank after a comma or a colon: models are used to one, and small ones loop on more.
_FORM: Final = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# Without \u: it would let any letter be written in the names of properties that are not declared, and so
# a declared one among them, against what is said of it.
_ESCAPES: Final = 'nrbtf\\"'
# Behind these a name of a property stands in a path.
_OF_NAMES: Final = frozenset({"properties", "patternProperties"})
# Control characters that have no shorter escape.
_CONTROL: Final = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")


class _OneOf(NamedTuple):
    """Alternatives that must be shown to be apart.

    Attributes:
        path: Where the oneOf stands.
        made: The schema that was made of the one with the oneOf.
        narrowed: What was made of the alternatives.
        said: The alternatives as the client wrote them.
    """

    path: str
    made: Schema
    narrowed: list[Schema | bool]
    said: list[object]


def prepared(text: str, *, strict: bool, field: str, lenient: bool = False) -> str:
    """A schema in the form that the grammar library takes, alone or behind `%json` in a Lark grammar.

    Args:
        text: The schema as JSON.
        strict: Refuse also keywords and formats that are none of JSON schema's; else they are left
            out, as JSON schema has it.
        field: Path of the request field that holds it, for errors.
        lenient: Leave out what cannot be enforced; of what is too much work, all: it is then any object.
            The grammar then admits more than the schema does; for schemas that are only asked to help.

    Raises:
        InvalidRequestError: It is no JSON, no schema, or says something that cannot be enforced; the
            message names the keyword and its path inside the schema.
    """
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise InvalidRequestError(
            f"{field} must have at most {MAX_SCHEMA_CHARACTERS} characters.", field=field
        )
    try:
        root = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        json.dumps(root, ensure_ascii=False).encode()
    except OverflowError:
        raise InvalidRequestError(f"{field} holds too large a number to enforce.", field=field) from None
    except RecursionError:
        raise InvalidRequestError(f"{field} is nested too deeply.", field=field) from None
    except ValueError:
        raise InvalidRequestError(f"{field} is not valid JSON.", field=field) from None
    if not isinstance(root, dict):
        raise InvalidRequestError(f"{field} must be a JSON object.", field=field)
    if _levels_of(root) > _MAX_LEVELS:
        raise InvalidRequestError(f"{field} is nested too deeply.", field=field)
    schema = _Rewriting(root, strict=strict, lenient=lenient, field=field).result()
    try:
        schema_bounds.require_bounded(schema, field)
    except InvalidRequestError:
        if not lenient:
            raise
        schema = {"type": "object"}
    form = _FORM if _has_control(schema) else {**_FORM, "json_allowed_escapes": _ESCAPES}
    return json.dumps({**schema, "x-guidance": form}, ensure_ascii=False)


def _levels_of(root: object) -> int:
    """How deep the values of JSON are nested; found without calls as deep."""
    levels = 0
    nodes: list[object] = [root]
    while nodes:
        levels += 1
        nodes = [
            inner
            for node in nodes
            if isinstance(node, dict | list)
            for inner in (node.values() if isinstance(node, dict) else node)
        ]
    return levels


def _has_control(node: object) -> bool:
    """Whether a constant or a name can only be written by its number."""
    match node:
        case str():
            return _CONTROL.search(node) is not None
        case dict():
            return any(_has_control(item) for pair in node.items() for item in pair)
        case list():
            return any(map(_has_control, node))
        case _:
            return False


def _refuse_constant(name: str) -> Never:
    raise ValueError(name)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise OverflowError(digits)
    return value


class _Rewriting:
    """One schema on its way to the library's form.

    A schema is "alone" where nothing else is asked of the same value: only then may its admitted
    values be narrowed, since two narrowed schemas may have no value in common.
    """

    def __init__(self, root: Schema, *, strict: bool, lenient: bool, field: str) -> None:
        self._root = root
        self._strict = strict
        self._lenient = lenient
        self._field = field
        self._count = 0
        self._references = References(root, self._refuse)
        self._numbers = Numbers(self._refuse, self._cannot)
        self._one_ofs: list[_OneOf] = []
        self._draft = draft_of(root)
        self._looks = Looks()
        # Keyword and path of a constant or a name that holds a control character.
        self._control: tuple[str, str] | None = None

    def result(self) -> Schema:
        """The rewritten schema.

        Raises InvalidRequestError.
        """
        schema = self._schema(self._root, "#", alone=True)
        if isinstance(schema, bool):
            self._refuse("not", "#/not", "leaves nothing that an answer could be.")
        definitions: Schema = {}
        for name, use in self._references.pending():
            target = _with_property(self._references.resolve(use.pointer), use.property)
            made = self._schema(target, use.pointer, alone=use.alone)
            if isinstance(made, dict):
                made["$comment"] = use.pointer
            definitions[name] = made
        self._require_apart(definitions)
        if definitions:
            schema["$defs"] = definitions
        if self._control is not None and _is_evadable(schema):
            keyword, path = self._control
            why = "holds a control character, which cannot be enforced beside objects with other properties."
            self._cannot(keyword, path, why)
        return schema

    def _refuse(self, keyword: str, path: str, why: str) -> Never:
        raise InvalidRequestError(
            f'The schema\'s "{keyword}" at {path} {why}',
            field=self._field,
            metadata={"keyword": keyword, "path": path},
        )

    def _cannot(self, keyword: str, path: str, why: str = "cannot be enforced.") -> None:
        """Refuse what is right and not enforced, unless that is to be left out."""
        if not self._lenient:
            self._refuse(keyword, path, why)

    def _schema(
        self, node: object, path: str, *, alone: bool, within: list[str] | None = None
    ) -> Schema | bool:
        """What a schema becomes; `within` are the types to which a schema around it keeps the same value."""
        self._count += 1
        if self._count > MAX_SCHEMAS:
            raise InvalidRequestError(
                f"{self._field} must hold at most {MAX_SCHEMAS} schemas.", field=self._field
            )
        if path.count("/") > _MAX_PATH_PARTS:
            raise InvalidRequestError(
                f"{self._field} is nested too deeply at {path[:100]}.", field=self._field
            )
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            *above, last = path.split("/")
            keyword = above[-1] if last.isdecimal() or above[-1] in _OF_NAMES else last
            raise InvalidRequestError(
                f"{self._field}: {path} must be a schema: an object or a boolean.",
                field=self._field,
                metadata={"keyword": keyword, "path": path},
            )
        base = node.get("$id")
        if path != "#" and isinstance(base, str) and not base.startswith("#") and _refers(node):
            if self._lenient:
                return True
            self._refuse("$id", f"{path}/$id", "cannot stand above a reference but at the schema's top.")
        if self._draft < LATEST and "prefixItems" in node and node.get("items", True) is not True:
            self._cannot(
                "prefixItems", f"{path}/prefixItems", "is no keyword of the draft that $schema names."
            )
        if "not" in node:
            node = {**node, "not": as_meant(node["not"], self._draft)}
        simple = simplified(self._with_names_found(node, path))
        if isinstance(simple, bool):
            return simple
        node = simple
        if node.get("uniqueItems") is True and (lists := self._unique(node, path)) is not None:
            return lists
        asserting = asserting_keywords(node)
        out: Schema = {}
        types = self._types(node, path)
        if types is None and alone and (family := only_kind(node)) and _is_within(family, within):
            types = [family]
        if types is not None:
            out["type"] = types[0] if len(types) == 1 else types
        for key, value in node.items():
            # Alternatives are alone where nothing but one type is said beside them.
            others = (asserting - {key}) & (APPLICATORS if key == "multipleOf" else asserting)
            is_alone = alone and not others and (types is None or len(types) == 1)
            self._keyword(out, key, value, f"{path}/{_escaped(key)}", types or within, is_alone)
        if types is not None and not asserting & APPLICATORS:
            bound_integers(out, types)
            if alone and "object" in types:
                _close(out)
        self._check_counts(out, path)
        return out

    def _with_names_found(self, node: Schema, path: str) -> Schema:
        """The same with what propertyNames refers to in its place; a format that is none says nothing."""
        if "propertyNames" not in node:
            return node
        path = f"{path}/propertyNames"
        _, names = self._references.end(node["propertyNames"], is_reference, f"{path}/$ref")
        if isinstance(names, dict) and not self._strict and isinstance(names.get("format"), str):
            names = {key: said for key, said in names.items() if key != "format" or said in FORMATS}
        return {**node, "propertyNames": names}

    def _types(self, node: Schema, path: str) -> list[str] | None:
        if "type" not in node:
            return None
        types = node["type"] if isinstance(node["type"], list) else [node["type"]]
        if not types or not all(isinstance(name, str) and name in TYPES for name in types):
            self._refuse("type", f"{path}/type", "is not a type of JSON schema.")
        return list(dict.fromkeys(types))

    def _keyword(
        self, out: Schema, key: str, value: object, path: str, types: list[str] | None, alone: bool
    ) -> None:
        """Put what one keyword says into the new schema."""
        match key:
            case "type":
                pass
            case "properties":
                out[key] = self._named(key, value, path)
            case "patternProperties":
                named = self._named(key, value, path)
                out[key] = {enforceable(name, narrow=False): schema for name, schema in named.items()}
            case "additionalProperties" | "items":
                out[key] = self._schema(value, path, alone=True)
            case "prefixItems":
                out[key] = self._several(key, value, path, alone=True)
            case "anyOf" | "allOf":
                schemas = self._several(
                    key, value, path, alone=alone and (key != "allOf" or _is_single(value)), within=types
                )
                self._combine(out, key, schemas)
            case "oneOf":
                self._one_of(out, value, path, types, alone)
            case "$ref":
                out[key] = self._references.use(Use(self._references.pointer(value, path), alone))
            case "enum" | "const":
                values = value if key == "enum" and isinstance(value, list) else [value]
                if key == "enum" and not (isinstance(value, list) and value):
                    self._refuse(key, path, "must be a list with at least one value.")
                if self._numbers.are_exact(key, values, path):
                    self._look_for_control(key, values, path)
                    out[key] = value
            case "required":
                if not are_names(value):
                    self._refuse(key, path, "must be a list of names.")
                self._look_for_control(key, value, path)
                out[key] = list(dict.fromkeys(value))
            case "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties" | "maxProperties":
                out[key] = self._numbers.size(key, value, path)
            case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
                self._numbers.put_bound(out, key, value, path, types)
            case "multipleOf":
                self._numbers.put_multiple(out, value, path, alone)
            case "pattern":
                if not isinstance(value, str):
                    self._refuse(key, path, "must be a string.")
                out[key] = enforceable(value, narrow=True)
            case "format":
                self._format(out, value, path, types)
            case _:
                self._other(key, value, path)

    def _other(self, key: str, value: object, path: str) -> None:
        if key in UNENFORCED:
            self._cannot(key, path)
        elif key not in ANNOTATIONS and not key.startswith("x-") and self._strict:
            self._refuse(key, path, "is not a keyword of JSON schema.")

    def _look_for_control(self, key: str, values: Sequence[object], path: str) -> None:
        if self._control is None and _has_control(list(values)):
            self._control = (key, path)

    def _named(self, key: str, value: object, path: str) -> Schema:
        if not isinstance(value, dict):
            self._refuse(key, path, "must be an object of schemas.")
        self._look_for_control(key, list(value), path)
        return {
            name: self._schema(schema, f"{path}/{_escaped(name)}", alone=True)
            for name, schema in value.items()
        }

    def _several(
        self, key: str, value: object, path: str, *, alone: bool, within: list[str] | None = None
    ) -> list[Schema | bool]:
        if not isinstance(value, list) or (not value and key != "prefixItems"):
            self._refuse(key, path, "must be a list with at least one schema.")
        return [
            self._schema(schema, f"{path}/{i}", alone=alone, within=within) for i, schema in enumerate(value)
        ]

    def _combine(self, out: Schema, key: str, schemas: list[Schema | bool]) -> None:
        if key == "allOf" or key in out:
            # A format beside a pattern has put an allOf of its own there.
            extra = schemas if key == "allOf" else [{key: schemas}]
            out.setdefault("allOf", []).extend(extra)
        else:
            out[key] = schemas

    def _one_of(self, out: Schema, value: object, path: str, types: list[str] | None, alone: bool) -> None:
        """Put alternatives of which a value may satisfy one only there as a union."""
        if not isinstance(value, list) or not value:
            self._refuse("oneOf", path, "must be a list with at least one schema.")
        said: list[object] = value
        names = [_required_only(node) for node in said]
        if all(names) and not self._lenient:
            self._combine(out, "anyOf", self._exclusively(names, path))
            return
        ends = [self._references.end(node, is_reference, f"{path}/{i}/$ref") for i, node in enumerate(said)]
        try:
            nodes = [node for _, node in ends]
            telling = telling_property(nodes, self._looks, self._draft) if alone else None
        except TooMuchToCompareError:
            self._cannot("oneOf", path, "cannot be enforced: its alternatives are too many to compare.")
            telling = None
        narrowed: list[Schema | bool] = []
        for i, node in enumerate(said):
            pointer = ends[i][0]
            if pointer is not None and telling is not None:
                narrowed.append({"$ref": self._references.use(Use(pointer, alone, telling))})
            else:
                node = _with_property(node, telling)
                narrowed.append(self._schema(node, f"{path}/{i}", alone=alone, within=types))
        if telling is None and not self._lenient:
            self._one_ofs.append(_OneOf(path, out, narrowed, said))
        self._combine(out, "anyOf", narrowed)

    def _unique(self, node: Schema, path: str) -> Schema | None:
        """The lists without repetition that a schema admits, one by one; None where that cannot be."""
        _, items = self._references.end(node.get("items"), is_reference, f"{path}/items/$ref")
        lists = unique_lists(node, items)
        self._count += len(lists or ())
        if lists is None or not all(
            self._numbers.are_exact("enum", values, f"{path}/items") for values in lists
        ):
            return None
        return {
            "type": "array",
            "anyOf": [
                {
                    "prefixItems": [{"const": value} for value in values],
                    "items": False,
                    "minItems": len(values),
                }
                for values in lists
            ],
        }

    def _exclusively(self, names: list[list[str]], path: str) -> list[Schema | bool]:
        """Alternatives that only ask for properties, each without one of every other."""
        if len(names) * sum(map(len, names)) > _MAX_EXCLUSIONS:
            self._refuse("oneOf", path, "cannot be enforced: its alternatives are too many to compare.")
        made: list[Schema | bool] = []
        for own in names:
            others = [[name for name in other if name not in own] for other in names if other is not own]
            if not all(others):
                self._refuse(
                    "oneOf", path, "cannot be enforced: one alternative's properties are in another."
                )
            forbidden = dict.fromkeys((other[0] for other in others), False)
            made.append({"type": "object", "required": own, "properties": forbidden})
        return made

    def _require_apart(self, definitions: Schema) -> None:
        """Refuse alternatives where a value that may be written could satisfy another one, too.

        What is written satisfies the narrowed schemas; whether it is valid is for the client's to say.
        """
        overlap = Overlap(
            left=lambda reference: definitions[definition(reference)],
            right=lambda reference: self._references.resolve(self._references.pointer(reference, "#")),
            draft=self._draft,
        )
        for path, made, narrowed, said in self._one_ofs:
            beside = {key: value for key, value in made.items() if value is not narrowed and key != "allOf"}
            for i, j in itertools.permutations(range(len(said)), 2):
                try:
                    if overlap.are_apart({"allOf": [narrowed[i], beside]}, said[j]):
                        continue
                except TooMuchToCompareError:
                    self._refuse(
                        "oneOf", path, "cannot be enforced: its alternatives are too many to compare."
                    )
                why = f"cannot be enforced: no type and no constant tells the alternatives {i} and {j} apart"
                self._refuse("oneOf", path, f"{why}; use anyOf.")

    def _format(self, out: Schema, value: object, path: str, types: list[str] | None) -> None:
        if not isinstance(value, str):
            self._refuse("format", path, "must be a string.")
        if types is not None and "string" not in types:
            return  # says nothing about other types
        expression = FORMATS.get(value)
        if expression is None:
            if self._strict:
                self._refuse("format", path, f'names "{value[:40]}", which cannot be enforced.')
            return
        only_strings = {"type": "string"} if types == ["string"] else {}
        out.setdefault("allOf", []).append({**only_strings, "pattern": f"^(?:{expression})$"})

    def _check_counts(self, out: Schema, path: str) -> None:
        """Refuse a number of properties that repeated names could feign."""
        least = out.get("minProperties", 0)
        is_open = out.get("additionalProperties", True) is not False or out.get("patternProperties")
        if least > 1 and is_open and least > len(out.get("required", ())) + 1:
            self._cannot("minProperties", f"{path}/minProperties")
            out.pop("minProperties")


def _is_within(kind: str, types: list[str] | None) -> bool:
    return types is None or kind in types or (kind == "number" and "integer" in types)


def _with_property(node: object, name: str | None) -> object:
    """A schema of objects that must have a property besides."""
    if name is None or not isinstance(node, dict) or not are_names(node.get("required", [])):
        return node
    return {**node, "required": [*node.get("required", ()), name]}


def _required_only(node: object) -> list[str]:
    """The properties that a schema asks for; empty where it says anything else."""
    if not isinstance(node, dict) or node.get("type", "object") != "object":
        return []
    said = {key for key in node if key not in ANNOTATIONS and not key.startswith("x-")} - {"type"}
    names = node.get("required")
    return names if said == {"required"} and are_names(names) else []


def _escaped(name: str) -> str:
    """A name as a part of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def _refers(node: object) -> bool:
    """Whether a reference stands in a schema; one in a constant counts, too."""
    if isinstance(node, dict):
        return isinstance(node.get("$ref"), str) or any(map(_refers, node.values()))
    return isinstance(node, list) and any(map(_refers, node))


def _is_evadable(node: object) -> bool:
    """Whether an object of a schema made has declared properties, and others that may have any name.

    Where a character may be written by its number, so may those of a declared name.
    """
    if isinstance(node, list):
        return any(map(_is_evadable, node))
    if not isinstance(node, dict):
        return False
    is_declared = any(node.get(key) for key in ("properties", "required", "patternProperties"))
    is_open = node.get("additionalProperties", True) is not False or bool(node.get("patternProperties"))
    return (is_declared and is_open) or any(map(_is_evadable, node.values()))


def _is_single(value: object) -> bool:
    return isinstance(value, list) and len(value) == 1


def _close(out: Schema) -> None:
    """Admit no properties but those declared, where others are only not forbidden."""
    open_words = {"additionalProperties", "patternProperties", "minProperties", "allOf"}
    has_all = all(name in out.get("properties", ()) for name in out.get("required", ()))
    if "properties" in out and has_all and not open_words & out.keys():
        out["additionalProperties"] = False
