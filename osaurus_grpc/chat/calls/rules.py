"""Rules of a grammar in llguidance's form of Lark, and what tools' schemas put into them.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from osaurus_grpc.chat.schema import prepared
from osaurus_grpc.chat.types import ToolSpec
from osaurus_grpc.errors import InvalidRequestError

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

# What an object's schema may say, beside annotations, where arguments are written one by one.
_OBJECT_KEYWORDS: Final = frozenset(
    {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
)
_ANNOTATIONS: Final = frozenset(
    {"title", "description", "$schema", "$id", "$comment", "examples", "default", "strict"}
)
_CLOSING: Final = frozenset({"additionalProperties", "unevaluatedProperties"})
_COMBINING: Final = frozenset(
    {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "if", "dependentSchemas"}
)


@dataclass(frozen=True, slots=True)
class CheckedTool:
    """A tool whose schema is fit for a grammar.

    Attributes:
        tool: The tool.
        schema: Its schema, an object's.
        schema_text: The same, prepared.
        field: Path of the request's field that it came from.
    """

    tool: ToolSpec
    schema: Mapping[str, Any]
    schema_text: str
    field: str


def checked_tool(tool: ToolSpec, index: int, *, is_strict: bool) -> CheckedTool:
    """Readies a tool's schema.

    Args:
        tool: The tool.
        index: Its place in the request.
        is_strict: Refuse what cannot be enforced, instead of leaving it unenforced.

    Raises:
        InvalidRequestError: The schema cannot be enforced; names the tool's schema.
    """
    field = f"tools[{index}].function.parameters_json"
    schema = json.loads(tool.schema_json)
    if not _COMBINING & schema.keys():
        schema.setdefault("type", "object")
        if "properties" in schema and not _CLOSING & schema.keys():
            # Closed where the client does not say: models that are held to a form make up members.
            schema |= {"additionalProperties": False, "properties": _declared(schema)}
    text = prepared(json.dumps(schema, ensure_ascii=False), strict=is_strict, field=field)
    return CheckedTool(tool, schema, text, field)


def _declared(schema: Mapping[str, Any]) -> Any:
    """The properties of an open object, with those that are required and not declared: of any value."""
    properties, required = schema["properties"], schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        # What is no schema is refused later.
        return properties
    missing = [name for name in required if isinstance(name, str) and name not in properties]
    return {**properties, **{name: {} for name in missing}}


class Rules:
    """Collects the rules of one grammar.

    Args:
        tokenizer: The model's; names of its special tokens stand in a grammar by their ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.special = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        """The special tokens, by their names."""
        self._rules: list[str] = []

    @property
    def text(self) -> str:
        """The grammar."""
        return "%llguidance {}\n" + "\n".join(self._rules) + "\n"

    def add(self, name: str, body: str) -> None:
        """A rule."""
        self._rules.append(f"{name}: {body}")

    def literal(self, text: str) -> str:
        """A text as a grammar has it, the special tokens in it by their ids."""
        return " ".join(
            f"<[{self.special[part]}]>" if part in self.special else json.dumps(part, ensure_ascii=False)
            for part in self.parts(text)
        )

    def parts(self, text: str) -> Iterator[str]:
        """The text cut at the names of special tokens."""
        while text:
            places = [(text.find(name), -len(name)) for name in self.special if name in text]
            place, length = min(places, default=(len(text), 0))
            if place:
                yield text[:place]
            if length:
                yield text[place : place - length]
            text = text[place - length :]

    def string(self, rule: str, schema: Mapping[str, Any], close: str) -> None:
        """A string that stands as it is, and the mark behind it."""
        listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if listed is not None:
            values = " | ".join(self.literal(str(value)) or '""' for value in listed)
            self.add(rule, f"({values}) {self.literal(close)}")
            return
        # White space before the mark is a part of the string for the grammar, and of the mark for readers.
        close = close.lstrip()
        end = self.literal(close)
        lead, *rest = self.parts(close)
        if lead in self.special:
            self.add(rule.upper(), "/(?s:.*)/")
            self.add(rule, f"{rule.upper()} {end}")
        elif rest:
            # The mark is text around a special token (DeepSeek's DSML): what looks like its beginning
            # ends the string only if that token follows.
            self.add(f"{rule}_s[lazy]", f"/(?s:.*){escaped(lead)}/")
            self.add(rule, f"{rule}_s+ {self.literal(''.join(rest))}")
        else:
            self.add(f"{rule}[lazy]", f"/(?s:.*){escaped(close)}/")


def parameters(tool: CheckedTool) -> list[tuple[str, Any, bool]]:
    """An object schema's properties, in order: name, schema, whether it is required.

    Raises:
        InvalidRequestError: The schema says more than which properties there are.
    """
    schema = tool.schema
    further = [
        key for key in schema if key not in _OBJECT_KEYWORDS | _ANNOTATIONS and not key.startswith("x-")
    ]
    properties = schema.get("properties", {})
    missing = [name for name in schema.get("required", ()) if name not in properties]
    if schema.get("type") != "object" or further or missing or not isinstance(properties, Mapping):
        what = f'"{further[0]}"' if further else "a schema that does not list the arguments"
        raise InvalidRequestError(
            f"{tool.field}: {what} cannot be enforced in the form in which this model writes calls.",
            field=tool.field,
        )
    required = frozenset(schema.get("required", ()))
    return [(str(name), value, name in required) for name, value in properties.items()]


def embedded(schema: Any, tool: CheckedTool) -> str:
    """A property's schema with the definitions that it may refer to, prepared."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    definitions = {key: tool.schema[key] for key in ("$defs", "definitions") if key in tool.schema}
    text = json.dumps({**definitions, **schema}, ensure_ascii=False)
    return prepared(text, strict=False, field=tool.field)


def escaped(text: str) -> str:
    """A text for a regular expression between slashes."""
    return "".join(f"\\{char}" if char in r"\/.^$|?*+()[]{}-&#~" else char for char in text)
