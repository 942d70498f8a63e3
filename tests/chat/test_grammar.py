"""Grammars followed by a dice instead of a model: whatever a model prefers, only this can come out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
import re
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
from transformers import PreTrainedTokenizerFast

from osaurus_grpc.chat.detokenize import Detokenizer
from osaurus_grpc.chat.grammar import Grammar, GrammarConstraint, Grammars, TokenizedModel, Trigger
from osaurus_grpc.errors import CapabilityError, InvalidRequestError, OverloadedError
from tests.chat import tokenizers
from tests.chat.hostile_schemas import HOSTILE
from tests.harness.schemas import SCHEMAS

_ENOUGH = 400

# Grammars belong to a loop, and all tests share them: taking a vocabulary in is most of a test's work.
pytestmark = pytest.mark.asyncio(loop_scope="module")


def model_of(tokenizer: Any, *, wider: int = 0, ends: frozenset[int] | None = None) -> TokenizedModel:
    return SimpleNamespace(  # type: ignore[return-value]  # it has what is asked for
        tokenizer=tokenizer,
        eos_token_ids=frozenset({tokenizer.eos_token_id}) if ends is None else ends,
        vocab_size=len(tokenizer) + wider,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def grammars() -> AsyncIterator[Grammars]:
    made = Grammars()
    yield made
    made.close()


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> TokenizedModel:
    return model_of(tokenizer, wider=37, ends=frozenset({0, 2}))


def admitted(constraint: GrammarConstraint, model: TokenizedModel) -> npt.NDArray[np.intp]:
    mask = constraint.mask()
    if mask is None:
        return np.arange(model.vocab_size)
    assert mask.dtype == np.uint32
    assert mask.shape == (-(-model.vocab_size // 32),)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[model.vocab_size :].any()
    return np.flatnonzero(bits)


def allowed(constraint: GrammarConstraint, model: TokenizedModel) -> list[int]:
    return admitted(constraint, model).tolist()


@functools.cache
def _closing(tokenizer: Any, width: int) -> npt.NDArray[np.bool_]:
    """Which tokens end a string, an array or an object."""
    closing = np.zeros(width, np.bool_)
    for token_id, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        closing[token_id] = not set(piece or "").isdisjoint('"]}')
    return closing


def throw(
    constraint: GrammarConstraint, model: TokenizedModel, seed: int, *, haste: float = 0.5
) -> list[int]:
    """Token ids of a random answer; haste is how often a token that may end something is preferred."""
    dice = random.Random(seed)
    ends = sorted(model.eos_token_ids)
    ids: list[int] = []
    for _ in range(_ENOUGH):
        if constraint.is_done:
            return ids
        choices = admitted(constraint, model)
        closing = choices[np.isin(choices, ends)]
        if not len(closing):
            closing = choices[_closing(model.tokenizer, model.vocab_size)[choices]]
        chosen = int(dice.choice(closing if len(closing) and dice.random() < haste else choices))
        constraint.accept(chosen)
        if chosen in model.eos_token_ids:
            return ids
        ids.append(chosen)
    raise AssertionError(f"no end: {text_of(ids, model)[:200]}")


def text_of(ids: list[int], model: TokenizedModel) -> str:
    detokenizer = Detokenizer(model.tokenizer)
    return "".join(map(detokenizer.step, ids)) + detokenizer.finish()


@pytest.mark.parametrize("name", SCHEMAS)
async def test_an_answer_satisfies_its_schema(grammars: Grammars, model: TokenizedModel, name: str) -> None:
    schema = SCHEMAS[name]
    grammar = await grammars.json_schema(model, json.dumps(schema), strict=True)
    validator = jsonschema.Draft202012Validator(
        _modern(schema), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    texts = set()
    for seed in range(8):
        text = text_of(throw(grammar.constraint(), model, seed), model)
        # The names that a pattern admits may come twice; declared ones may not.
        hook = None if name == "map" else _without_repetition
        value = json.loads(text, object_pairs_hook=hook)
        validator.validate(value)
        assert "\n" not in text
        assert "  " not in re.sub(r'"(\\.|[^"\\])*"', "", text)
        texts.add(text)
    assert len(texts) > 1 or name in {"no properties", "constant"}


def _modern(schema: Any) -> Any:
    """The older tuple's keywords by their names in draft 2020-12, the validator's."""
    if isinstance(schema.get("items"), list):
        return {**schema, "prefixItems": schema["items"], "items": schema["additionalItems"]}
    return schema


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    assert len(value) == len(pairs)
    return value


@pytest.mark.parametrize(
    ("bounds", "excluded", "admitted_too"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, "0", "0.1"),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, "-0", "-0.1"),
        ({"exclusiveMinimum": 10, "maximum": 10.01}, "10", "10.001"),
        ({"minimum": -1.5, "exclusiveMaximum": -1}, "-1", "-1.1"),
        ({"exclusiveMinimum": 123_456, "exclusiveMaximum": 123_456.5}, "123456", "123456.1"),
    ],
)
async def test_an_excluded_bound_is_not_admitted(
    grammars: Grammars, model: TokenizedModel, bounds: Any, excluded: str, admitted_too: str
) -> None:
    grammar = await grammars.json_schema(model, json.dumps({"type": "number", **bounds}))
    for text, is_admitted in ((excluded, False), (admitted_too, True)):
        constraint = grammar.constraint()
        for token_id in model.tokenizer.encode(text):
            assert token_id in allowed(constraint, model)
            constraint.accept(token_id)
        may_end = constraint.is_done or bool(model.eos_token_ids & set(allowed(constraint, model)))
        assert may_end is is_admitted


async def test_properties_come_in_the_schemas_order(grammars: Grammars, model: TokenizedModel) -> None:
    names = ["z", "m", "a", "k"]
    schema = {"type": "object", "properties": {n: {"type": "null"} for n in names}, "required": names}
    grammar = await grammars.json_schema(model, json.dumps(schema))
    assert list(json.loads(text_of(throw(grammar.constraint(), model, 1), model))) == names


async def test_a_json_object_is_any(grammars: Grammars, model: TokenizedModel) -> None:
    grammar = await grammars.json_object(model)
    values = [
        json.loads(text_of(throw(grammar.constraint(), model, seed, haste=0.8), model)) for seed in range(6)
    ]
    assert all(isinstance(value, dict) for value in values)
    assert any(values)


async def test_a_regular_expression_matches_in_full(grammars: Grammars, model: TokenizedModel) -> None:
    pattern = r"(cat|dög)s?: [0-9]{1,4}(\.[0-9]+)? €"
    grammar = await grammars.regex(model, pattern)
    for seed in range(10):
        assert re.fullmatch(pattern, text_of(throw(grammar.constraint(), model, seed), model))


async def test_a_lark_grammar_with_a_schema_inside(grammars: Grammars, model: TokenizedModel) -> None:
    schema = json.dumps(SCHEMAS["eighteen digits"])
    lark = f'start: "<call>" body "</call>"\nbody: %json {schema}\n'
    grammar = await grammars.lark(model, lark)
    for seed in range(5):
        text = text_of(throw(grammar.constraint(), model, seed), model)
        value = json.loads(text.removeprefix("<call>").removesuffix("</call>"))
        jsonschema.validate(value, SCHEMAS["eighteen digits"])


async def test_a_schema_inside_a_lark_grammar_is_checked(grammars: Grammars, model: TokenizedModel) -> None:
    for inside in ('{"multipleOf": 1000003}', '{"not": {}}', "nothing", '{"x-guidance": 3'):
        with pytest.raises(InvalidRequestError) as raised:
            await grammars.lark(model, f"start: %json {inside}", field="grammar")
        assert raised.value.field == "grammar"


class TestTriggers:
    @pytest_asyncio.fixture(loop_scope="module")
    async def grammar(self, grammars: Grammars, model: TokenizedModel) -> Grammar:
        return await grammars.regex(model, "[0-9]{3}")

    def walk(self, constraint: GrammarConstraint, model: TokenizedModel, text: str) -> None:
        for token_id in model.tokenizer.encode(text, add_special_tokens=False):
            assert token_id in allowed(constraint, model)
            constraint.accept(token_id)

    @pytest.mark.parametrize(
        "trigger", [Trigger(text="</think>"), Trigger(text=">"), Trigger(token_ids=(1,))]
    )
    async def test_a_grammar_begins_after_its_trigger(
        self, grammar: Grammar, model: TokenizedModel, trigger: Trigger
    ) -> None:
        constraint = grammar.constraint(trigger)
        self.walk(constraint, model, "free to say 12 anything <think </thin")
        assert not constraint.is_active
        assert not set(allowed(constraint, model)) & model.eos_token_ids
        if trigger.token_ids:
            constraint.accept(1)
        else:
            self.walk(constraint, model, "</think>")
        assert constraint.is_active
        assert re.fullmatch("[0-9]{3}", text_of(throw(constraint, model, 1), model))
        assert constraint.is_done

    async def test_no_token_runs_past_the_trigger(self, grammar: Grammar, model: TokenizedModel) -> None:
        tokenizer = model.tokenizer
        pieces = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
        constraint = grammar.constraint(Trigger(text="><"))
        running = {i for i, piece in pieces.items() if re.search(r"><\s*\S", piece)}
        assert running
        assert not running & set(allowed(constraint, model))
        self.walk(constraint, model, "<a>")
        running = {i for i, piece in pieces.items() if re.match(r"<\s*\S", piece)}
        running -= set(tokenizer.added_tokens_decoder)
        assert running
        assert not running & set(allowed(constraint, model))
        assert tokenizer.encode("<")[0] in allowed(constraint, model)

    async def test_the_answer_may_end_before_where_it_is_let(
        self, grammar: Grammar, model: TokenizedModel
    ) -> None:
        constraint = grammar.constraint(Trigger(token_ids=(1,), is_required=False))
        assert constraint.mask() is None
        assert model.eos_token_ids <= set(
            allowed(grammar.constraint(Trigger(text="x", is_required=False)), model)
        )

    async def test_a_grammar_that_repeats_waits_again(self, grammar: Grammar, model: TokenizedModel) -> None:
        constraint = grammar.constraint(Trigger(text="<"), repeats=True)
        self.walk(constraint, model, "one <")
        for digit in "123":
            self.walk(constraint, model, digit)
        assert not constraint.is_done
        assert not constraint.is_active
        assert model.eos_token_ids <= set(allowed(constraint, model))
        self.walk(constraint, model, " two <")
        assert constraint.is_active

    async def test_a_fork_begins_anew(self, grammar: Grammar, model: TokenizedModel) -> None:
        constraint = grammar.constraint(Trigger(text="<"))
        self.walk(constraint, model, "one <12")
        copy = constraint.fork()
        assert not copy.is_active
        self.walk(copy, model, "one <12")
        assert allowed(copy, model) == allowed(constraint, model)
        self.walk(copy, model, "3")
        assert copy.is_done
        assert not constraint.is_done


class TestTokenizers:
    @pytest.mark.parametrize("kind", [tokenizers.byte_fallback, tokenizers.metaspace])
    async def test_other_tokenizers(self, grammars: Grammars, kind: Any) -> None:
        model = model_of(kind(), wider=3)
        grammar = await grammars.regex(model, "(hello |w|é){2,4}")
        for seed in range(10):
            text = text_of(throw(grammar.constraint(), model, seed), model)
            assert re.fullmatch("(hello |w|é){2,4}", text)

    async def test_bytes_make_characters_that_have_no_token(self, grammars: Grammars) -> None:
        model = model_of(tokenizers.byte_fallback())
        grammar = await grammars.regex(model, "[€世]{3}")
        assert re.fullmatch("[€世]{3}", text_of(throw(grammar.constraint(), model, 0), model))

    async def test_text_without_a_token_is_refused(self, grammars: Grammars) -> None:
        with pytest.raises(InvalidRequestError, match="admits nothing"):
            await grammars.regex(model_of(tokenizers.metaspace()), "[0-9]+")
        later = await grammars.regex(model_of(tokenizers.metaspace()), "[ab][0-9]")
        constraint = later.constraint()
        constraint.accept(allowed(constraint, model_of(tokenizers.metaspace()))[0])
        with pytest.raises(InvalidRequestError, match="no token"):
            constraint.mask()

    @pytest.mark.parametrize("kind", [tokenizers.word_piece, tokenizers.word_suffix])
    async def test_tokens_without_text_of_their_own_are_refused(self, grammars: Grammars, kind: Any) -> None:
        with pytest.raises(CapabilityError):
            await grammars.json_object(model_of(kind()))

    async def test_special_tokens_are_no_text(self, grammars: Grammars, model: TokenizedModel) -> None:
        grammar = await grammars.regex(model, "(?s:.*)")
        choices = set(allowed(grammar.constraint(), model))
        special = set(model.tokenizer.all_special_ids) - model.eos_token_ids
        assert special
        assert not special & choices
        assert model.eos_token_ids <= choices

    async def test_a_model_without_an_end_is_refused(self, grammars: Grammars) -> None:
        with pytest.raises(CapabilityError):
            await grammars.json_object(model_of(tokenizers.metaspace(), ends=frozenset()))


class TestCompiling:
    async def test_a_grammar_is_kept(self, grammars: Grammars, model: TokenizedModel) -> None:
        first = await grammars.json_schema(model, '{"type":"null"}')
        assert await grammars.json_schema(model, '{"type":"null"}') is first
        assert await grammars.json_schema(model, '{"type":"null"}', strict=True) is not first
        together = await asyncio.gather(*(grammars.regex(model, "a+") for _ in range(20)))
        assert len({id(grammar) for grammar in together}) == 1

    async def test_an_unloaded_tokenizer_is_let_go(self, grammars: Grammars) -> None:
        import gc
        import weakref

        tokenizer: PreTrainedTokenizerFast | None = tokenizers.metaspace()
        gone = weakref.ref(tokenizer)
        await grammars.regex(model_of(tokenizer), "[ab]+")
        tokenizer = None
        # A compiling thread answers before it forgets what it was asked.
        deadline = time.monotonic() + 60
        while gone() is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            gc.collect()
        assert gone() is None

    async def test_what_fails_behind_callers_that_left_is_nobodys_error(
        self, grammars: Grammars, model: TokenizedModel
    ) -> None:
        import gc

        reported: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        try:
            left = asyncio.ensure_future(grammars.regex(model, "(unclosed", field="f"))
            await asyncio.sleep(0)
            left.cancel()
            await asyncio.wait([left])
            # The other one waits for the same work, so it has failed by now.
            with pytest.raises(InvalidRequestError):
                await grammars.regex(model, "(unclosed", field="f")
            left = asyncio.ensure_future(grammars.regex(model, "(unclosed too", field="f"))
            await asyncio.sleep(0)
            left.cancel()
            # Behind it in the same thread, or in the other one, which then has nothing to do.
            for _ in range(2):
                await asyncio.gather(*(grammars.regex(model, f"b{{{i}}}") for i in range(1, 5)))
            kept = {source.text for source in grammars._compiled[model.tokenizer]}
            assert not {"(unclosed", "(unclosed too"} & kept
            gc.collect()
        finally:
            loop.set_exception_handler(None)
        assert not reported

    async def test_too_many_at_once_are_refused(self, grammars: Grammars, model: TokenizedModel) -> None:
        results = await asyncio.gather(
            *(grammars.regex(model, f"a{{{i}}}") for i in range(1, 120)), return_exceptions=True
        )
        assert any(isinstance(result, Grammar) for result in results)
        refused = [result for result in results if not isinstance(result, Grammar)]
        assert refused
        assert all(isinstance(result, OverloadedError) for result in refused)

    @pytest.mark.parametrize(
        ("schema", "keyword", "path"),
        [
            (
                {"properties": {"a": {"type": "string", "pattern": "(?=x)y"}}},
                "pattern",
                "#/properties/a/pattern",
            ),
            ({"items": {"type": "string", "pattern": "["}}, "pattern", "#/items/pattern"),
            (
                {"properties": {"a": {"oneOf": [{"type": "integer"}, {"minimum": 3}]}}},
                "oneOf",
                "#/properties/a/oneOf",
            ),
            (
                {"$defs": {"x": {"patternProperties": {"a": {}, "b": {}}}}, "items": {"$ref": "#/$defs/x"}},
                "patternProperties",
                "#/$defs/x/patternProperties",
            ),
            ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum", "#/minimum"),
            ({"allOf": [{"type": "integer", "enum": ["a"], "const": "b"}]}, "const", "#/allOf/0/const"),
            ({"items": {"type": "null", "enum": ["a"], "$ref": "#"}}, "$ref", "#/items/$ref"),
        ],
    )
    async def test_what_the_compiler_refuses_is_named(
        self, grammars: Grammars, model: TokenizedModel, schema: Any, keyword: str, path: str
    ) -> None:
        with pytest.raises(InvalidRequestError) as raised:
            await grammars.json_schema(model, json.dumps(schema), field="schema_json")
        assert raised.value.field == "schema_json"
        assert f'"{keyword}" at {path} cannot be enforced' in raised.value.message

    @pytest.mark.parametrize(
        ("schema", "words"),
        [
            ({"pattern": "(?=x)y"}, "is not understood: look-around, including look-ahead"),
            ({"pattern": "["}, "is not understood: unclosed character class."),
            ({"pattern": "a\\bc"}, "an anchor or a word boundary where none can be."),
            ({"pattern": "^(ab)*$", "minLength": 5000}, "too much work together."),
            ({"format": "date", "minLength": 30}, "no text satisfies it."),
            ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "use anyOf."),
            ({"type": "number", "minimum": 1e308}, "too large or too small numbers."),
            ({"minItems": 5, "maxItems": 3}, "minItems (5) is greater than maxItems (3)."),
            ({"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 6}, "range is a multiple of 7."),
            ({"allOf": [{"$ref": "#"}], "type": "object"}, "refers to itself beside other keywords."),
            ({"prefixItems": [{"type": "integer"}] * 5_000}, "too large."),
            ({"properties": {f"p{i}": {} for i in range(5_000)}}, "too many properties are not required."),
        ],
    )
    async def test_refusals_are_in_plain_words(
        self, grammars: Grammars, model: TokenizedModel, schema: Any, words: str
    ) -> None:
        with pytest.raises(InvalidRequestError) as raised:
            await grammars.json_schema(model, json.dumps(schema), field="schema_json")
        assert raised.value.message.endswith(words) or words in raised.value.message.split(": ", 1)[1]
        assert raised.value.metadata["path"].startswith("#")
        assert not re.search(r"json-schema:|coerce|Some\(|Regex /", raised.value.message)

    async def test_a_schema_that_only_helps_is_weakened(self, grammars: Grammars) -> None:
        made = json.loads(await grammars.enforceable('{"type":"array","uniqueItems":true}', field="f"))
        assert (made["type"], "uniqueItems" in made) == ("array", False)
        made = json.loads(await grammars.enforceable('{"type":"string","pattern":"(?=x)"}', field="f"))
        assert made["type"] == "object"


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_schema_is_followed_or_refused(
    grammars: Grammars, model: TokenizedModel, name: str
) -> None:
    """The compiler's and the matcher's budgets bound the work; a hang fails by the test's time limit."""
    try:
        grammar = await grammars.json_schema(model, json.dumps(HOSTILE[name]))
    except InvalidRequestError:
        return
    _stumble(grammar.constraint(), model)


@pytest.mark.parametrize(
    "pattern",
    ["((a{1,1000}){1,1000}){1,1000}", "(a|b)*a(a|b){300}", "(.*a.{20}){5}", r"(\p{L}{1,100}\w{1,100}){1,50}"],
)
async def test_a_hostile_expression_is_followed_or_refused(
    grammars: Grammars, model: TokenizedModel, pattern: str
) -> None:
    try:
        grammar = await grammars.regex(model, pattern)
    except InvalidRequestError:
        return
    _stumble(grammar.constraint(), model)


@pytest.mark.parametrize(
    "lark",
    [
        'start: a\na: a a | "x" | ',
        'start: a\na: b c\nb: a | "x" |\nc: a | b | "y" |',
        "start: (a|b|c)*\na: /[a-z]*/\nb: /[a-z]*/\nc: /[a-z0-9]*/",
        'start: (("a"{1,1000}){1,1000}){1,1000}',
        f"start: {' | '.join(f'r{i}' for i in range(2_000))}"
        + "".join(f'\nr{i}: "x{i}" start?' for i in range(2_000)),
        "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(11_000)) + 'r11000: "x"\n',
        "start: T0\n" + "".join(f"T{i}: T{i + 1}\n" for i in range(11_000)) + 'T11000: "x"\n',
        "start: T\nT: " + " & ".join(f"/(.*x{i}y.*|z{i})/" for i in range(100)),
        "start: a\na: a",
        "start: missing",
        "",
    ],
)  # fmt: skip
async def test_a_hostile_grammar_is_followed_or_refused(
    grammars: Grammars, model: TokenizedModel, lark: str
) -> None:
    try:
        grammar = await grammars.lark(model, lark)
    except InvalidRequestError:
        return
    _stumble(grammar.constraint(), model)


def _stumble(constraint: GrammarConstraint, model: TokenizedModel) -> None:
    """Some steps, until the end or the typed error; any other error fails the test."""
    dice = random.Random(3)
    with contextlib.suppress(InvalidRequestError):
        for _ in range(40):
            chosen = int(dice.choice(admitted(constraint, model)))
            constraint.accept(chosen)
            if constraint.is_done or chosen in model.eos_token_ids:
                return


async def test_running_out_of_work_is_a_typed_error(grammars: Grammars, model: TokenizedModel) -> None:
    grammar = await grammars.regex(model, r"(\p{L}{1,100}\w{1,100}){1,50}", field="response_format.regex")
    constraint = grammar.constraint()

    def follow() -> None:
        for token_id in model.tokenizer.encode("abcdefghijkl" * 20):
            constraint.mask()
            constraint.accept(token_id)

    with pytest.raises(InvalidRequestError) as raised:
        follow()
    assert raised.value.field == "response_format.regex"
    assert "takes too much work" in raised.value.message
