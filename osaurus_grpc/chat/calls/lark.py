"""The grammar of a family's calls for a request's tools, in llguidance's form of Lark.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. Only the given tools' names can be
written, and their arguments follow their schemas.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, assert_never

from osaurus_grpc.chat.calls.families import HARMONY
from osaurus_grpc.chat.calls.syntax import (
    CallSyntax,
    InlineParameters,
    JsonObject,
    NamedJson,
    TaggedParameters,
)
from osaurus_grpc.chat.calls.values import is_plain_string
from osaurus_grpc.chat.schema import prepared
from osaurus_grpc.chat.types import ToolSpec
from osaurus_grpc.errors import InvalidRequestError

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

# Calls in one answer: models that are made to call have to come to an end.
MAX_CALLS: Final = 16
# What an object's schema may say, beside annotations, where arguments are written one by one.
_OBJECT_KEYWORDS: Final = frozenset(
    {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
)
_ANNOTATIONS: Final = frozenset(
    {"title", "description", "$schema", "$id", "$comment", "examples", "default", "strict"}
)
_COMBINING: Final = frozenset(
    {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "if", "dependentSchemas"}
)


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """What calls may look like.

    Attributes:
        text: The grammar, which begins behind the trigger where there is one.
        trigger: The text behind which it begins; "" begins at once.
        trigger_ids: The same as token ids, where it is special tokens.
        repeats: After one call another may begin in the same way.
    """

    text: str
    trigger: str = ""
    trigger_ids: tuple[int, ...] = ()
    repeats: bool = False


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
        if "properties" in schema:
            # Closed where the client does not say: models that are held to a form make up members.
            schema.setdefault("additionalProperties", False)
    text = prepared(json.dumps(schema, ensure_ascii=False), strict=is_strict, field=field)
    return CheckedTool(tool, schema, text, field)


def call_grammar(
    syntax: CallSyntax,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[CheckedTool],
    *,
    is_forced: bool,
    is_parallel: bool,
) -> CallGrammar:
    """The grammar of the calls of some tools.

    Args:
        syntax: How the model writes calls.
        tokenizer: The model's.
        tools: Those that may be called, at least one.
        is_forced: The answer is calls and nothing else; else the grammar begins behind the mark that
            opens one.
        is_parallel: Several calls may be made.

    Raises:
        InvalidRequestError: A schema cannot be enforced in this syntax; names the tool's schema.
    """
    builder = _Builder(tokenizer, syntax)
    text = builder.grammar(tools, is_forced=is_forced, is_parallel=is_parallel)
    if is_forced:
        return CallGrammar(text)
    trigger = builder.trigger
    ids = builder.special_ids(trigger)
    repeats = is_parallel and (syntax.repeats_section or not syntax.section_open)
    return CallGrammar(text, "" if ids else trigger, ids, repeats)


class _Builder:
    """Collects the rules of one grammar."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, syntax: CallSyntax) -> None:
        self._syntax = syntax
        self._special = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self._rules: list[str] = []
        self.trigger = "to=functions." if syntax is HARMONY else syntax.trigger

    def grammar(self, tools: Sequence[CheckedTool], *, is_forced: bool, is_parallel: bool) -> str:
        syntax = self._syntax
        alternatives = " | ".join(self._call(tool, f"t{i}") for i, tool in enumerate(tools))
        self._rule("call", alternatives)
        if syntax is HARMONY:
            self._harmony(is_forced=is_forced)
        else:
            self._sections(is_forced=is_forced, many=MAX_CALLS - 1 if is_parallel else 0)
        return "%llguidance {}\n" + "\n".join(self._rules) + "\n"

    def special_ids(self, text: str) -> tuple[int, ...]:
        """The token ids of a text that consists of special tokens only, else none."""
        parts = list(self._parts(text))
        ids = [self._special[part] for part in parts if part in self._special]
        return tuple(ids) if len(ids) == len(parts) else ()

    def _sections(self, *, is_forced: bool, many: int) -> None:
        syntax = self._syntax
        inner = self._literal(self._call_opening())
        close = self._literal(self._call_closing())
        section = self._literal(f"{syntax.section_open}{'[' if syntax.is_list else ''}")
        section_close = self._literal(f"{']' if syntax.is_list else ''}{syntax.section_close}")
        separator = self._literal(syntax.separator)
        self._rule("unit", f"{inner} call {close}")
        if is_forced:
            first = f"{section} unit"
        else:
            rest = (syntax.section_open + ("[" if syntax.is_list else "") + self._call_opening()).partition(
                self.trigger
            )[2]
            # The token that ends the mark may hold the white space behind it.
            stripped = rest.lstrip()
            self._rule("space", "/[ \\t\\n]{0,2}/" if stripped != rest else '""')
            first = f"space {self._literal(stripped)} call {close}"
        if not syntax.repeats_section:
            more = f"({separator} unit){{0,{many}}}" if many else ""
            if not is_forced and not syntax.section_open:
                more = ""
            self._rule("start", f"{first} {more} {section_close}")
        elif is_forced and many:
            self._rule("section", f"{section} unit {section_close}")
            self._rule("start", f"section ({separator} section){{0,{many}}}")
        else:
            self._rule("start", f"{first} {section_close}")

    def _harmony(self, *, is_forced: bool) -> None:
        if not is_forced:
            self._rule("start", "call")
            return
        analysis = self._literal("<|channel|>analysis<|message|>")
        end = self._literal("<|end|><|start|>assistant")
        opening = self._literal("<|channel|>commentary to=functions.")
        self._rule("THOUGHT", "/(?s:.*)/")
        self._rule("start", f"({analysis} THOUGHT {end})? {opening} call")

    def _call_opening(self) -> str:
        syntax = self._syntax
        match syntax.body:
            case JsonObject(index_key=""):
                inner = f'{{"{syntax.body.name_key}": "'
            case JsonObject():
                inner = f'{{"{syntax.body.index_key}": "'
            case NamedJson(before=inner):
                pass
            case TaggedParameters(name_open=inner):
                pass
            case InlineParameters(name_open=inner):
                pass
        return syntax.call_open + inner

    def _call_closing(self) -> str:
        body = self._syntax.body
        inner = ""
        if isinstance(body, JsonObject):
            inner = "" if body.id_key else "}"
        return inner + self._syntax.call_close

    def _call(self, tool: CheckedTool, rule: str) -> str:
        """One tool's part of a call, from its name to the end of its arguments."""
        body = self._syntax.body
        match body:
            case JsonObject():
                self._rule(rule, self._object(body, tool))
            case NamedJson():
                self._rule(rule, self._named(body, tool))
            case TaggedParameters():
                self._tagged(body, tool, rule)
            case InlineParameters():
                self._inline(body, tool, rule)
            case _ as unreachable:
                assert_never(unreachable)
        return rule

    def _object(self, body: JsonObject, tool: CheckedTool) -> str:
        parts = [f"%json {tool.schema_text}"]
        parts.insert(0, self._literal(f'{tool.tool.name}", "{body.arguments_key}": '))
        if body.index_key:
            parts[:0] = ["/[0-9]{1,2}/", self._literal(f'", "{body.name_key}": "')]
        if body.id_key:
            parts += [self._literal(f', "{body.id_key}": "'), "/[a-zA-Z0-9]{9}/", self._literal('"}')]
        return " ".join(parts)

    def _named(self, body: NamedJson, tool: CheckedTool) -> str:
        name = self._literal(tool.tool.name)
        if self._syntax is HARMONY:
            after = f"{self._literal(' <|constrain|>json<|message|>')}"
            other = self._literal("<|channel|>commentary json<|message|>")
            return f"{name} ({after} | {other}) %json {tool.schema_text}"
        if body.counts:
            name += ' ":" /[0-9]{1,2}/'
        if body.id_close:
            name = f"/[a-zA-Z0-9]{{9}}/ {self._literal(body.id_close)} {name}"
        return f"{name} {self._literal(body.after)} %json {tool.schema_text}"

    def _tagged(self, body: TaggedParameters, tool: CheckedTool, rule: str) -> None:
        parts = [self._literal(tool.tool.name + body.name_close)]
        for number, (key, schema, is_required) in enumerate(_parameters(tool)):
            name = f"{rule}_{number}"
            is_string = is_plain_string(schema)
            key_close = body.string_key_close if is_string and body.string_key_close else body.key_close
            head = self._literal(f"{body.key_open}{key}{key_close}")
            if is_string:
                self._string(f"{name}_v", schema, body.value_close.strip())
                value = f"{name}_v {self._literal(body.separator)}"
            else:
                text = _embedded(schema, tool)
                value = f"%json {text} {self._literal(body.value_close + body.separator)}"
            self._rule(name, f"{head} {value}")
            parts.append(name if is_required else f"{name}?")
        self._rule(rule, f"{' '.join(parts)} {self._literal(body.end)}")

    def _string(self, rule: str, schema: Mapping[str, Any], close: str) -> None:
        """A string that stands as it is, and the mark behind it."""
        listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        end = self._literal(close)
        if listed is not None:
            values = " | ".join(self._literal(str(value)) or '""' for value in listed)
            self._rule(rule, f"({values}) {end}")
        elif self.special_ids(close):
            self._rule(rule.upper(), "/(?s:.*)/")
            self._rule(rule, f"{rule.upper()} {end}")
        else:
            self._rule(f"{rule}[lazy]", f"/(?s:.*){_escaped(close)}/")

    def _inline(self, body: InlineParameters, tool: CheckedTool, rule: str) -> None:
        parameters = _parameters(tool)
        # Rule a_i: arguments from the i-th on, none before them; b_i: some before them.
        last = len(parameters)
        self._rule(f"{rule}_a{last}", '""')
        self._rule(f"{rule}_b{last}", '""')
        for number in range(last - 1, -1, -1):
            key, schema, is_required = parameters[number]
            name = f"{rule}_p{number}"
            head = self._literal(f"{key}{body.assign}")
            if body.quote and is_plain_string(schema):
                self._string(f"{name}v", schema, body.quote)
                self._rule(name, f"{head} {self._literal(body.quote)} {name}v")
            else:
                self._rule(name, f"{head} %json {_embedded(schema, tool)}")
            skip_a = "" if is_required else f" | {rule}_a{number + 1}"
            skip_b = "" if is_required else f" | {rule}_b{number + 1}"
            after = f"{rule}_b{number + 1}"
            self._rule(f"{rule}_a{number}", f"{name} {after}{skip_a}")
            separator = self._literal(body.separator)
            self._rule(f"{rule}_b{number}", f"{separator} {name} {after}{skip_b}")
        opening = self._literal(tool.tool.name + body.open)
        self._rule(rule, f"{opening} {rule}_a0 {self._literal(body.close)}")

    def _rule(self, name: str, body: str) -> None:
        self._rules.append(f"{name}: {body}")

    def _literal(self, text: str) -> str:
        """A text as a grammar has it, the special tokens in it by their ids."""
        return " ".join(
            f"<[{self._special[part]}]>" if part in self._special else json.dumps(part, ensure_ascii=False)
            for part in self._parts(text)
        )

    def _parts(self, text: str) -> Iterator[str]:
        """The text cut at the names of special tokens."""
        while text:
            places = [(text.find(name), -len(name)) for name in self._special if name in text]
            place, length = min(places, default=(len(text), 0))
            if place:
                yield text[:place]
            if length:
                yield text[place : place - length]
            text = text[place - length :]


def _parameters(tool: CheckedTool) -> list[tuple[str, Any, bool]]:
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


def _embedded(schema: Any, tool: CheckedTool) -> str:
    """A property's schema with the definitions that it may refer to, prepared."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    definitions = {key: tool.schema[key] for key in ("$defs", "definitions") if key in tool.schema}
    text = json.dumps({**definitions, **schema}, ensure_ascii=False)
    return prepared(text, strict=False, field=tool.field)


def _escaped(text: str) -> str:
    """A text for a regular expression between slashes."""
    return "".join(f"\\{char}" if char in r"\/.^$|?*+()[]{}-&#~" else char for char in text)
