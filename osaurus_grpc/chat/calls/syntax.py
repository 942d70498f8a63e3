"""The descriptions of call syntaxes: what stands before, between and after the parts of a call.

Marks are given as the model's template writes them, with the spaces and newlines around them; the
reader takes any white space there, the grammar writes exactly this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class JsonObject:
    """A call is one JSON object that holds the name and the arguments.

    Attributes:
        name_key: The key of the name.
        arguments_key: The key of the arguments.
        id_key: A key that must hold a call id of nine letters and digits behind the arguments, "" if
            none.
        index_key: A key that holds the call's number as a string before the name, "" if none.
    """

    name_key: str = "name"
    arguments_key: str = "arguments"
    id_key: str = ""
    index_key: str = ""


@dataclass(frozen=True, slots=True)
class NamedJson:
    """A call is a name, a mark, and the arguments as a JSON object.

    Attributes:
        before: Before the name.
        after: Between the name and the arguments.
        alternatives: Other marks that models write there, each with a call id behind it.
        counts: The name is followed by ":" and the call's number (Kimi).
        id_close: Before the name stand a call id and this mark, "" if not (Solar).
        id_open: Behind the name stand this mark and a call id, "" if not (Mistral Small 3.2).
    """

    before: str
    after: str
    alternatives: tuple[str, ...] = ()
    counts: bool = False
    id_close: str = ""
    id_open: str = ""


@dataclass(frozen=True, slots=True)
class TaggedParameters:
    """A call is a name and then, one by one, each argument between marks.

    Values that the schema says are strings stand there as they are, all others as JSON.

    Attributes:
        name_open: Before the function's name.
        name_close: Behind it.
        key_open: Before an argument's name.
        key_close: Behind it.
        value_close: Behind the value.
        end: Behind the last argument.
        string_key_close: In the place of key_close before a string, where that differs.
        separator: Between two arguments, and before the first and the end.
        quotes: Marks that a string may stand in, for it to hold anything (MiniCPM's CDATA).
    """

    name_open: str
    name_close: str
    key_open: str
    key_close: str
    value_close: str
    end: str
    string_key_close: str = ""
    separator: str = ""
    quotes: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class InlineParameters:
    """A call is a name and a list of `key=value`, as in a program.

    Attributes:
        name_open: Before the function's name.
        open: Behind it.
        assign: Between key and value.
        close: Behind the last argument.
        separator: Between two arguments.
        quote: The mark around strings that stand as they are; "" writes them as JSON.
    """

    name_open: str
    open: str
    assign: str
    close: str
    separator: str
    quote: str = ""


@dataclass(frozen=True, slots=True)
class XtmlElements:
    """A call and each of its arguments are elements with attributes; see xtml.

    Attributes:
        name_open: Before the function's name.
    """

    name_open: str = '<|open|>call tool="'


@dataclass(frozen=True, slots=True)
class NestedElements:
    """A call is elements all the way down; see elements.

    Attributes:
        name_open: Before the function's name.
    """

    name_open: str = ']<]minimax[>[<invoke name="'


CallBody: TypeAlias = (
    JsonObject | NamedJson | TaggedParameters | InlineParameters | XtmlElements | NestedElements
)


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How one family of models writes calls.

    Attributes:
        name: The family, for logs.
        body: What a call consists of.
        section_open: Before the first call, "" if nothing.
        section_close: Behind the last one, "" if nothing.
        is_list: The calls stand in brackets.
        list_marks: These brackets, with the white space inside them.
        repeats_section: Every call has a section of its own.
        call_open: Before each call.
        call_close: Behind each call.
        separator: Between two calls, or two sections where each call has one.
        also_opens: Further marks that models begin a call with.
        opens_bare: A call may begin without any mark, at the beginning of the answer only (Llama 3).
        leads: Marks, each of which may stand before the first call of an answer that has to call.
        tail: A mark that may stand behind the last call.
        wraps: Marks that models may put around calls without being asked to.
        recipient: The prompt ends with call_open, and what the answer begins with says whom it is for: a
            line with this word the user, one with a tool's name that tool (Functionary 3.2).
        is_shown_as_text: Templates that know of it write no strings' quotes, so that calls of earlier turns
            reach them as the text of messages.
        is_native: The model was trained on it; else it is asked for in the system prompt.
    """

    name: str
    body: CallBody
    section_open: str = ""
    section_close: str = ""
    is_list: bool = False
    list_marks: tuple[str, str] = ("[", "]")
    repeats_section: bool = False
    call_open: str = ""
    call_close: str = ""
    separator: str = ""
    also_opens: tuple[str, ...] = ()
    opens_bare: bool = False
    leads: tuple[str, ...] = ()
    tail: str = ""
    wraps: tuple[str, str] = ("", "")
    recipient: str = ""
    is_shown_as_text: bool = False
    is_native: bool = True

    @property
    def begin(self) -> str:
        """What opens a section, the bracket of a list included."""
        return self.section_open + (self.list_marks[0] if self.is_list else "")

    @property
    def end(self) -> str:
        """What closes a section, the bracket of a list included."""
        return (self.list_marks[1] if self.is_list else "") + self.section_close

    @property
    def opening(self) -> str:
        """All that stands before the name of the first call."""
        match self.body:
            case JsonObject(name_key=name_key):
                inner = f'{{"{name_key}": "'
            case NamedJson(before=inner) | TaggedParameters(name_open=inner):
                pass
            case InlineParameters(name_open=inner) | XtmlElements(name_open=inner):
                pass
            case NestedElements(name_open=inner):
                pass
        return f"{self.begin}{self.call_open}{inner}"

    @property
    def is_unmarked(self) -> bool:
        """Whether no mark alone tells a call from text, so that an answer is held from its first token."""
        return bool(self.recipient) or (self.opens_bare and isinstance(self.body, InlineParameters))

    @property
    def trigger(self) -> str:
        """What shows that a call begins, without the white space around it."""
        if self.opens_bare:
            return self.opening
        inner = ""
        match self.body:
            case NamedJson(before=inner) | TaggedParameters(name_open=inner):
                pass
            case InlineParameters(name_open=inner) | XtmlElements(name_open=inner):
                pass
            case NestedElements(name_open=inner):
                pass
            case JsonObject():
                pass
        return self.section_open.strip() or self.call_open.strip() or inner.strip()

    @property
    def marks(self) -> tuple[str, ...]:
        """What the reader looks for in an answer's text."""
        own = () if self.opens_bare else (self.trigger,)
        return (*own, *self.also_opens)

    @property
    def around(self) -> tuple[str, ...]:
        """Marks that may stand around calls or content, and are no part of either."""
        return tuple(mark for mark in (*self.leads, self.tail, *self.wraps) if mark)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text that the names of special tokens may be part of."""
        body = self.body
        parts: tuple[str, ...] = ()
        match body:
            case NamedJson():
                parts = (body.before, body.after, *body.alternatives, body.id_close, body.id_open)
            case TaggedParameters():
                parts = (body.name_open, body.name_close, body.key_open, body.key_close)
                parts += (body.string_key_close, body.value_close, body.end)
            case InlineParameters():
                parts = (body.name_open, body.open, body.assign, body.close, body.separator, body.quote)
            case JsonObject() | XtmlElements() | NestedElements():
                pass
        own = (self.section_open, self.section_close, self.call_open, self.call_close, self.separator)
        return tuple(text for text in (*own, *parts, *self.also_opens, *self.around) if text)
