"""Ollama's prompt templates, as far as single prompts use them.

Ollama's templates are programs of Go's text/template. Those that requests bring are of its older form:
text around `.System`, `.Prompt`, `.Suffix` and `.Response`, some of it within `if`. That much is run here;
everything else (`range`, functions, variables) is refused, since half a template is a wrong prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_FIELD = re.compile(r"\.(System|Prompt|Suffix|Response)")
_CONDITION = re.compile(r"if\s+(?P<not>not\s+)?\.(?P<field>System|Prompt|Suffix|Response)")
_TRIMS = re.compile(r"(-(?=\s))?(.*?)((?<=\s)-)?", re.DOTALL)
_COMMENT = re.compile(r"/\*.*\*/", re.DOTALL)
# Go's own white space for trimming.
_SPACE = " \t\r\n"

SUPPORTED = ".System, .Prompt, .Suffix, .Response, if, else and end"


class UnsupportedTemplateError(Exception):
    """A template holds what is not run here, or is none."""


@dataclass(slots=True)
class _Branch:
    """An `if` that is not ended.

    Attributes:
        is_live: Whether the branch that is being read counts.
        was_taken: Whether a branch of it counted.
        is_outer_live: Whether what stands around it counts.
        is_last: Whether its `else` was read.
    """

    is_live: bool
    was_taken: bool
    is_outer_live: bool
    is_last: bool = False


def render(template: str, fields: Mapping[str, str]) -> str:
    """The prompt that a template makes.

    Args:
        template: Its text.
        fields: Values of System, Prompt and Suffix; one that is missing is empty. What follows .Response
            is left out: the model writes there.

    Raises:
        UnsupportedTemplateError: As said.
    """
    made: list[str] = []
    branches: list[_Branch] = []
    is_answered = False
    for text, action in _pieces(template):
        is_live = not branches or branches[-1].is_live
        if is_live and not is_answered:
            made.append(text)
        if action is None:
            break
        field = _FIELD.fullmatch(action)
        if field is None:
            _control(action, branches, fields)
        elif is_live and field[1] == "Response":
            is_answered = True
        elif is_live and not is_answered:
            made.append(fields.get(field[1], ""))
    if branches:
        raise UnsupportedTemplateError
    return "".join(made)


def _pieces(template: str) -> Iterator[tuple[str, str | None]]:
    """Each text with the action that follows it, which is None at the end.

    A "-" within the braces, with a space beside it, eats the space of the text on its side.
    """
    position, trims = 0, False
    while (start := template.find("{{", position)) >= 0:
        end = template.find("}}", start)
        if end < 0:
            raise UnsupportedTemplateError
        action = template[start + 2 : end]
        mark = _TRIMS.fullmatch(action)
        assert mark is not None  # it takes any text
        yield _trimmed(template[position:start], trims, mark[1] is not None), mark[2].strip(_SPACE)
        trims = mark[3] is not None
        position = end + 2
    yield _trimmed(template[position:], trims, False), None


def _trimmed(text: str, left: bool, right: bool) -> str:
    if left:
        text = text.lstrip(_SPACE)
    return text.rstrip(_SPACE) if right else text


def _control(body: str, branches: list[_Branch], fields: Mapping[str, str]) -> None:
    """Begin, turn or end an `if`."""
    is_live = not branches or branches[-1].is_live
    if _COMMENT.fullmatch(body):
        return
    if body == "end" and branches:
        branches.pop()
        return
    keyword, _, rest = body.partition(" ")
    if keyword != "else":
        is_true = _holds(body, fields)
        branches.append(_Branch(is_live and is_true, is_true, is_live))
        return
    if not branches or branches[-1].is_last:
        raise UnsupportedTemplateError
    branch = branches[-1]
    is_true = _holds(rest.strip(), fields) if rest else True
    branch.is_last = not rest
    branch.is_live = branch.is_outer_live and is_true and not branch.was_taken
    branch.was_taken = branch.was_taken or is_true


def _holds(body: str, fields: Mapping[str, str]) -> bool:
    condition = _CONDITION.fullmatch(body)
    if condition is None:
        raise UnsupportedTemplateError
    return bool(fields.get(condition["field"], "")) != (condition["not"] is not None)
