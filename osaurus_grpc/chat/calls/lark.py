"""The grammar of a family's calls for a request's tools, in llguidance's form of Lark.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. Only the given tools' names can be
written, and their arguments follow their schemas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, assert_never

from osaurus_grpc.chat.calls import elements, xtml
from osaurus_grpc.chat.calls.families import HARMONY
from osaurus_grpc.chat.calls.rules import CheckedTool, Rules, embedded, escaped, parameters
from osaurus_grpc.chat.calls.syntax import (
    CallSyntax,
    InlineParameters,
    JsonObject,
    NamedJson,
    NestedElements,
    TaggedParameters,
    XtmlElements,
)
from osaurus_grpc.chat.calls.values import is_plain_string

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

# Calls in one answer: models that are made to call have to come to an end.
MAX_CALLS: Final = 16


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
    if is_forced or syntax.is_unmarked:
        return CallGrammar(text)
    trigger = builder.trigger
    ids = builder.trigger_ids
    repeats = is_parallel and (syntax.repeats_section or not syntax.section_open)
    return CallGrammar(text, "" if ids else trigger, ids, repeats)


class _Builder:
    """Collects the rules of one grammar."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, syntax: CallSyntax) -> None:
        self._syntax = syntax
        self._tokenizer = tokenizer
        self._rules = Rules(tokenizer)
        self._rule = self._rules.add
        self._literal = self._rules.literal
        self.trigger = "to=functions." if syntax is HARMONY else self._special_core(syntax.trigger)

    def grammar(self, tools: Sequence[CheckedTool], *, is_forced: bool, is_parallel: bool) -> str:
        syntax = self._syntax
        alternatives = " | ".join(self._call(tool, f"t{i}") for i, tool in enumerate(tools))
        self._rule("call", alternatives)
        many = MAX_CALLS - 1 if is_parallel else 0
        if syntax is HARMONY:
            self._harmony(is_forced=is_forced)
        elif syntax.is_unmarked:
            self._unmarked(tools, is_forced=is_forced, many=many)
        else:
            self._sections(is_forced=is_forced, many=many)
        return self._rules.text

    @property
    def trigger_ids(self) -> tuple[int, ...]:
        """The trigger's token ids where it begins and ends with special tokens, else none."""
        parts = list(self._rules.parts(self.trigger))
        if not parts or parts[0] not in self._rules.special or parts[-1] not in self._rules.special:
            return ()
        return tuple(self._tokenizer.encode(self.trigger, add_special_tokens=False))

    def _special_core(self, trigger: str) -> str:
        """A mark from its first special token to its last one, all of it where it has none."""
        parts = list(self._rules.parts(trigger))
        places = [index for index, part in enumerate(parts) if part in self._rules.special]
        return "".join(parts[places[0] : places[-1] + 1]) if places else trigger

    def _sections(self, *, is_forced: bool, many: int) -> None:
        syntax = self._syntax
        inner = self._literal(self._call_opening())
        close = self._literal(self._call_closing())
        section = self._literal(syntax.begin)
        section_close = self._literal(syntax.end)
        if syntax.tail:
            section_close += f" ({self._literal(syntax.tail)})?"
        separator = self._literal(syntax.separator)
        self._rule("unit", f"{inner} call {close}")
        if is_forced:
            leads = [f"({self._literal(lead)})?" for lead in syntax.leads]
            first = " ".join([*leads, section, "unit"])
        else:
            rest = (syntax.begin + self._call_opening()).partition(self.trigger)[2]
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

    def _unmarked(self, tools: Sequence[CheckedTool], *, is_forced: bool, many: int) -> None:
        """Whole answers: calls, or text in which nothing looks like one."""
        syntax = self._syntax
        between = syntax.call_open if syntax.recipient else syntax.separator
        more = f"({self._literal(between)} call){{0,{many}}}" if many else ""
        rest = f"{more} {self._literal(syntax.end)}"
        calls = f"{self._literal(syntax.begin)} call {rest}"
        options = [calls] if is_forced else []
        before, behind = syntax.wraps
        if before in self._rules.special:
            options.append(f"{self._literal(before)} {calls} ({self._literal(behind)})?")
        if not is_forced:
            # What begins a call has to be one token of the grammar, or the text would take it.
            for index, tool in enumerate(tools):
                self._rule(f"h{index}[lazy]", f"/{_unmarked_head(syntax, escaped(tool.tool.name))}/")
            heads = " | ".join(f"h{index} t{index}_rest" for index in range(len(tools)))
            names = "|".join(escaped(tool.tool.name) for tool in tools)
            self._rule("TEXT", f"/(?s:.*)/ & ~/{_unmarked_head(syntax, f'({names})')}(?s:.*)/")
            options += [f"({heads}) {rest}", "TEXT"]
        self._rule("start", " | ".join(options))

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
            case InlineParameters(name_open=inner) | XtmlElements(name_open=inner):
                pass
            case NestedElements(name_open=inner):
                pass
        return syntax.call_open + inner

    def _call_closing(self) -> str:
        body = self._syntax.body
        inner = ""
        if isinstance(body, JsonObject):
            inner = "" if body.id_key else "}"
        return inner + self._syntax.call_close

    def _call(self, tool: CheckedTool, rule: str) -> str:
        """One tool's part of a call, from its name to the end of its arguments; gives the rule."""
        body = self._syntax.body
        match body:
            case JsonObject():
                self._rule(rule, self._object(body, tool))
            case NamedJson():
                self._rule(f"{rule}_rest", f"%json {tool.schema_text}")
                self._rule(rule, f"{self._named(body, tool)} {rule}_rest")
            case TaggedParameters():
                self._tagged(body, tool, rule)
            case InlineParameters():
                self._inline(body, tool, rule)
            case XtmlElements():
                xtml.add_rules(self._rules, tool, rule)
            case NestedElements():
                elements.add_rules(self._rules, tool, rule)
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
            return f"{name} ({after} | {other})"
        if body.counts:
            name += ' ":" /[0-9]{1,2}/'
        if body.id_close:
            name = f"/[a-zA-Z0-9]{{9}}/ {self._literal(body.id_close)} {name}"
        if body.id_open:
            name = f"{name} {self._literal(body.id_open)} /[a-zA-Z0-9]{{9}}/"
        return f"{name} {self._literal(body.after)}"

    def _tagged(self, body: TaggedParameters, tool: CheckedTool, rule: str) -> None:
        parts = [self._literal(tool.tool.name + body.name_close)]
        for number, (key, schema, is_required) in enumerate(parameters(tool)):
            name = f"{rule}_{number}"
            is_string = is_plain_string(schema)
            key_close = body.string_key_close if is_string and body.string_key_close else body.key_close
            head = self._literal(f"{body.key_open}{key}{key_close}")
            if is_string:
                self._rules.string(f"{name}_v", schema, body.value_close)
                value = f"{name}_v {self._literal(body.separator)}"
            else:
                text = embedded(schema, tool)
                value = f"%json {text} {self._literal(body.value_close + body.separator)}"
            self._rule(name, f"{head} {value}")
            parts.append(name if is_required else f"{name}?")
        self._rule(rule, f"{' '.join(parts)} {self._literal(body.end)}")

    def _inline(self, body: InlineParameters, tool: CheckedTool, rule: str) -> None:
        arguments = parameters(tool)
        # Rule a_i: arguments from the i-th on, none before them; b_i: some before them.
        last = len(arguments)
        self._rule(f"{rule}_a{last}", '""')
        self._rule(f"{rule}_b{last}", '""')
        for number in range(last - 1, -1, -1):
            key, schema, is_required = arguments[number]
            name = f"{rule}_p{number}"
            head = self._literal(f"{key}{body.assign}")
            if body.quote and is_plain_string(schema):
                self._rules.string(f"{name}v", schema, body.quote)
                self._rule(name, f"{head} {self._literal(body.quote)} {name}v")
            else:
                self._rule(name, f"{head} %json {embedded(schema, tool)}")
            skip_a = "" if is_required else f" | {rule}_a{number + 1}"
            skip_b = "" if is_required else f" | {rule}_b{number + 1}"
            after = f"{rule}_b{number + 1}"
            self._rule(f"{rule}_a{number}", f"{name} {after}{skip_a}")
            separator = self._literal(body.separator)
            self._rule(f"{rule}_b{number}", f"{separator} {name} {after}{skip_b}")
        opening = self._literal(tool.tool.name + body.open)
        self._rule(f"{rule}_rest", f"{rule}_a0 {self._literal(body.close)}")
        self._rule(rule, f"{opening} {rule}_rest")


def _unmarked_head(syntax: CallSyntax, name: str) -> str:
    """What an answer holds up to a call's arguments, as a regular expression."""
    match syntax.body:
        case NamedJson(after=behind) | InlineParameters(open=behind):
            pass
        case _:
            behind = ""
    opening = escaped(syntax.begin + syntax.call_open)
    before = f"((?s:.*){opening})?" if syntax.recipient else f"[ \\n]*{opening}"
    return f"{before}{name}{escaped(behind)}".replace("\n", "\\n")
