"""Regular expressions of schemas: what they exclude stays out, in values and in names of properties."""

from __future__ import annotations

import json
import re

import pytest

from osaurus_grpc.chat.grammar import Grammars, TokenizedModel
from osaurus_grpc.chat.schema_patterns import enforceable
from tests.chat.test_grammar import allowed, grammars, model  # noqa: F401  (fixtures)


@pytest.mark.parametrize(
    ("pattern", "narrow", "made"),
    [
        ("a[^b]", False, r"a[^[\x00]b]"),
        ("[^-b][^]b]", False, r"[^-[\x00]b][^][\x00]b]"),
        (r"\[^a\]", True, r"\[^a\]"),
        (r"[\u0000-\u001f][\x00-a]", False, r"[\x01-\u001f][\x01-a]"),
        (r"\u0000-a", True, r"\u0000-a"),
        (r"\P{L}[\PLa]", False, r"[^[\x00]\p{L}][[^[\x00]\pL]a]"),
        (r"\W\D.", False, r"\W\D."),
        (r"\w\d\s", True, r"\w\d\s"),
        (r"[\s\S]", True, r"[\s[^[\x00]\s\x1c-\x1f\x{feff}]]"),
        (r"a.[.]\.", True, r"a[^[\x00]\n\r][.]\."),
        (r"[\D]", True, r"[[^[\x00]\p{Nd}]]"),
        (r"\\W", True, r"\\W"),
        ("[[ab]]", True, r"[\[ab]]"),
        ("[[:alpha:]]", False, r"[\[:alpha:]]"),
        ("[^a&&b~~c--d]", False, r"[^[\x00]a&\&b~\~c-\-d]"),
        ("[^--/]", False, r"[^[\x00]\--/]"),
        ("[--/]", False, r"[\--/]"),
        (r"[^\w\d]", True, r"[^[\x00]\p{Alphabetic}\p{M}\p{N}\p{Pc}\p{Nd}]"),
        (r"[^\W]", True, r"[^[\x00][^[\x00]a-zA-Z0-9_]]"),
    ],
)
def test_what_is_written_for_it(pattern: str, narrow: bool, made: str) -> None:
    assert enforceable(pattern, narrow=narrow) == made
    assert enforceable(made, narrow=narrow) == made


ADMITTED = [
    ('^[^"]+$', 'a"', False),
    ('^[^"]+$', "a\\", True),
    ('^[^"]+$', "a\n", True),
    ("^[^\\\\]+$", "a\\", False),
    ('^[^]"]+$', 'a"', False),
    ('^[^-"]+$', 'a"', False),
    ('^[^-"]+$', "a,", True),
    ('^[\\[^"]+$', "[^", True),
    (r"^\P{P}+$", 'a"', False),
    (r"^\P{P}+$", "ab", True),
    (r"^[\P{P}-]+$", "\\", False),
    (r"^[\P{P}-]+$", "a-", True),
    (r"^[\u0000-\u001fa]+$", 'a"', False),
    (r"^[\u0000-\u001fa]+$", "a\n", True),
    (r"^[\W\d]+$", ",1\"", True),
]  # fmt: skip
IN_VALUES = [
    (r"^.+$", "a\r", False),
    (r"^.+$", "ab", True),
    (r"^\W+$", ",\"", True),
    (r"^\D+$", "a", True),
    (r"^[^\w]$", "\u00b2", False),
    (r"^[^\W]$", "\u0301", False),
    (r"^[^\W]$", "a", True),
    (r"^[^\S]$", "\ufeff", False),
    (r"^[^\D]$", "5", True),
    (r"^[^--/]$", ".", False),
    (r"^[^ab&&b]$", "a", False),
    (r"^[[ab]]$", "a", False),
]  # fmt: skip


def admits(grammar: object, model: TokenizedModel, text: str) -> bool:  # noqa: F811
    """Whether a text, given to its last token but one, may go on with the last."""
    constraint = grammar.constraint()  # type: ignore[attr-defined]
    for character in text:
        for token_id in model.tokenizer.encode(character, add_special_tokens=False):
            if token_id not in allowed(constraint, model):
                return False
            constraint.accept(token_id)
    return True


@pytest.mark.asyncio(loop_scope="module")  # the fixtures' own
@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")  # Python's, of classes that it takes literally
@pytest.mark.parametrize(("pattern", "text", "is_admitted"), ADMITTED + IN_VALUES)
async def test_values(
    grammars: Grammars,  # noqa: F811
    model: TokenizedModel,  # noqa: F811
    pattern: str,
    text: str,
    is_admitted: bool,
) -> None:
    if "P{" not in pattern and text != "a\r":
        assert bool(re.search(pattern, text)) is is_admitted
    grammar = await grammars.json_schema(model, json.dumps({"type": "string", "pattern": pattern}), field="f")
    assert admits(grammar, model, json.dumps(text, ensure_ascii=False)) is is_admitted


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("pattern", "text", "is_admitted"), ADMITTED)
async def test_names_of_properties(
    grammars: Grammars,  # noqa: F811
    model: TokenizedModel,  # noqa: F811
    pattern: str,
    text: str,
    is_admitted: bool,
) -> None:
    schema = {"type": "object", "patternProperties": {pattern: {"const": 1}}, "additionalProperties": False}
    grammar = await grammars.json_schema(model, json.dumps(schema), field="f")
    assert admits(grammar, model, f"{{{json.dumps(text)}: 1}}") is is_admitted
