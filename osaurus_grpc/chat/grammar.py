"""Grammars that answers must follow: compiled off the event loop, kept, and bounded.

Compiling is the library's (llguidance, https://github.com/guidance-ai/llguidance), whose Rust code
needs no GIL. Its limits are what bounds a hostile grammar: the work of compiling one, the work of a
step, and the memory of its automaton. They do not bound its recursion, which goes as deep as one rule
refers to the next and would overflow a usual stack, and with it end the process: hence the threads'
large ones.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import llguidance
import numpy as np

from osaurus_grpc.chat import schema
from osaurus_grpc.chat.compiling import CompilingThreads
from osaurus_grpc.chat.constraint import GrammarConstraint, Trigger
from osaurus_grpc.chat.schema_errors import plain_reason, raise_for
from osaurus_grpc.chat.vocabulary import TokenizedModel, Vocabulary
from osaurus_grpc.errors import InvalidRequestError

__all__ = ["Grammar", "GrammarConstraint", "Grammars", "TokenizedModel", "Trigger"]

MAX_GRAMMAR_CHARACTERS: Final = 262_144
MAX_REGEX_CHARACTERS: Final = 16_384
# For the reason of schema_bounds.MAX_MEETINGS; characters of texts are counted with the operators.
MAX_INTERSECTIONS: Final = 16

_MAX_ENTRIES: Final = 256
_MAX_KEPT_CHARACTERS: Final = 4_194_304
_PROBED_STEPS: Final = 8
_JSON_DIRECTIVE: Final = "%json"


def _limits() -> llguidance.LLParserLimits:
    """Bounds of a grammar's work and memory; see the tests of hostile grammars for what they let through."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=60_000,
        step_max_items=30_000,
        max_items_in_row=2_000,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        verbose_errors=False,
    )


class Grammar:
    """A compiled grammar for one model. Threads may share it.

    Args:
        vocabulary: The model's.
        matcher: At the grammar's beginning; copied, never advanced.
        field: The request field it comes from, for errors.
    """

    def __init__(self, vocabulary: Vocabulary, matcher: llguidance.LLMatcher, field: str) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._field = field

    def constraint(self, begin: Trigger | None = None, *, repeats: bool = False) -> GrammarConstraint:
        """Hold one answer to this grammar.

        Args:
            begin: What must be generated before the grammar begins; None begins at once.
            repeats: Once the grammar is done, wait for begin again and do not end the answer.
        """
        return GrammarConstraint(
            self._vocabulary, self._matcher.deep_copy, field=self._field, begin=begin, repeats=repeats
        )


@dataclass(frozen=True, slots=True)
class _Source:
    """What a grammar is compiled from, and where it came from."""

    kind: str
    text: str
    field: str


class Grammars:
    """Compiles grammars and keeps those last used. One a process, used on its event loop."""

    def __init__(self) -> None:
        self._threads = CompilingThreads()
        self._vocabularies: WeakKeyDictionary[Any, asyncio.Future[Vocabulary]] = WeakKeyDictionary()
        self._compiled: WeakKeyDictionary[Any, OrderedDict[_Source, asyncio.Future[Grammar]]] = (
            WeakKeyDictionary()
        )

    async def json_schema(
        self, model: TokenizedModel, text: str, *, strict: bool = False, field: str = "schema_json"
    ) -> Grammar:
        """JSON that satisfies a schema.

        Args:
            model: Whose tokens.
            text: The schema as JSON.
            strict: As JsonSchemaFormat.strict.
            field: Path of the request field that holds the schema, for errors.

        Raises:
            InvalidRequestError: The schema is none, or it cannot be enforced.
            CapabilityError: Nothing can be enforced on this model's tokens.
            OverloadedError: Too many grammars are being compiled, or waiting for it took too long.
        """

        def work(vocabulary: Vocabulary) -> llguidance.LLMatcher:
            prepared = schema.prepared(text, strict=strict, field=field)
            try:
                return _compile(vocabulary, _schema_grammar(prepared), field)
            except InvalidRequestError:
                raise_for(prepared, lambda part: _reason(_schema_grammar(part)), field)
                raise

        kind = "strict json_schema" if strict else "json_schema"
        return await self._grammar(model, _Source(kind, text, field), work)

    async def json_object(self, model: TokenizedModel, *, field: str = "response_format") -> Grammar:
        """Any JSON object. Raises as json_schema() does."""
        return await self.json_schema(model, '{"type":"object"}', field=field)

    async def regex(self, model: TokenizedModel, pattern: str, *, field: str = "regex") -> Grammar:
        """Text that matches a regular expression in full (Rust syntax, without look-around).

        Raises as json_schema() does.
        """
        _require_length(pattern, MAX_REGEX_CHARACTERS, field)
        return await self._grammar(
            model,
            _Source("regex", pattern, field),
            lambda vocabulary: _compile(vocabulary, llguidance.LLMatcher.grammar_from_regex(pattern), field),
        )

    async def lark(self, model: TokenizedModel, text: str, *, field: str = "grammar") -> Grammar:
        """Text that a grammar in llguidance's form of Lark derives.

        Schemas embedded with `%json` are checked as json_schema() checks them. Raises as that does.
        """
        _require_length(text, MAX_GRAMMAR_CHARACTERS, field)
        return await self._grammar(
            model,
            _Source("lark", text, field),
            lambda vocabulary: _compile(
                vocabulary, llguidance.LLMatcher.grammar_from_lark(_with_schemas(text, field)), field
            ),
        )

    async def enforceable(self, text: str, *, field: str) -> str:
        """What of a schema can be enforced, ready to stand behind `%json` in a Lark grammar.

        Keywords that cannot be enforced are left out; where the rest cannot be either, it is any
        object. For schemas that are only asked to help.

        Raises:
            InvalidRequestError: It is no JSON or no schema.
            OverloadedError: Too many grammars are being compiled.
        """

        def work() -> str:
            prepared = schema.prepared(text, strict=False, lenient=True, field=field)
            if _reason(_schema_grammar(prepared)):
                prepared = schema.prepared('{"type":"object"}', strict=False, field=field)
            return prepared

        return await self._threads.run(work, size=len(text))

    def close(self) -> None:
        """End the compiling threads; what is being compiled is not waited for."""
        self._threads.close()

    async def _grammar(
        self, model: TokenizedModel, source: _Source, work: Callable[[Vocabulary], llguidance.LLMatcher]
    ) -> Grammar:
        vocabulary = await self._vocabulary(model)
        kept = self._compiled.setdefault(model.tokenizer, OrderedDict())
        if compiling := kept.get(source):
            kept.move_to_end(source)
        else:

            async def compiled() -> Grammar:
                matcher = await self._threads.run(lambda: work(vocabulary), size=len(source.text))
                return Grammar(vocabulary, matcher, source.field)

            compiling = kept[source] = asyncio.ensure_future(compiled())
            compiling.add_done_callback(partial(_forget_failed, kept, source))
            while len(kept) > _MAX_ENTRIES or (
                len(kept) > 1 and sum(len(other.text) for other in kept) > _MAX_KEPT_CHARACTERS
            ):
                kept.popitem(last=False)
        # Shared: one caller that leaves must not end it for the others.
        return await asyncio.shield(compiling)

    async def _vocabulary(self, model: TokenizedModel) -> Vocabulary:
        building = self._vocabularies.get(model.tokenizer)
        if building is None:
            building = asyncio.ensure_future(self._threads.run(lambda: Vocabulary(model), size=0))
            building.add_done_callback(partial(_forget_failed, self._vocabularies, model.tokenizer))
            self._vocabularies[model.tokenizer] = building
        return await asyncio.shield(building)


def _forget_failed(
    kept: MutableMapping[Any, asyncio.Future[Any]], key: object, work: asyncio.Future[Any]
) -> None:
    """Drop shared work that failed, so that the next caller has it done anew.

    All who waited for it may have left; asyncio would then log its exception, which quotes the client.
    """
    has_failed = work.cancelled() or work.exception() is not None
    if has_failed and kept.get(key) is work:
        del kept[key]


def _require_length(text: str, limit: int, field: str) -> None:
    if len(text) > limit:
        raise InvalidRequestError(f"{field} must have at most {limit} characters.", field=field)


def _schema_grammar(prepared: str) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(prepared)


def _with_schemas(text: str, field: str) -> str:
    """A Lark grammar with its embedded schemas in the form that schema.prepared() gives them."""
    first, *rest = text.split(_JSON_DIRECTIVE)
    parts = [first]
    intersections = first.count("&")
    for part in rest:
        start = len(part) - len(part.lstrip())
        try:
            _, end = json.JSONDecoder().raw_decode(part, start)
        except (ValueError, RecursionError):
            raise InvalidRequestError(
                f"{field}: {_JSON_DIRECTIVE} must be followed by a JSON schema.", field=field
            ) from None
        parts += [f"{_JSON_DIRECTIVE} ", schema.prepared(part[start:end], strict=False, field=field)]
        parts.append(part[end:])
        intersections += part.count("&", end)
    if intersections > MAX_INTERSECTIONS:
        raise InvalidRequestError(
            f'{field} must have at most {MAX_INTERSECTIONS} "&" outside of schemas.', field=field
        )
    return "".join(parts)


def _reason(grammar: str) -> str:
    """Why a grammar cannot be compiled; "" where it can."""
    return llguidance.LLMatcher.validate_grammar(grammar, limits=_limits())


def _compile(vocabulary: Vocabulary, grammar: str, field: str) -> llguidance.LLMatcher:
    matcher = llguidance.LLMatcher(vocabulary.tokens, grammar, log_level=0, limits=_limits())
    if matcher.is_error():
        reason = plain_reason(matcher.get_error())
        raise InvalidRequestError(f"{field} cannot be enforced: {reason}", field=field)
    _probe(vocabulary, matcher.deep_copy(), field)
    return matcher


def _probe(vocabulary: Vocabulary, matcher: llguidance.LLMatcher, field: str) -> None:
    """Take the first steps, as far as there is no choice: what fails there need not wait for a model.

    Raises InvalidRequestError.
    """
    for _ in range(_PROBED_STEPS):
        mask = vocabulary.mask_of(matcher)
        if matcher.is_error() or not mask.any():
            raise InvalidRequestError(
                f"{field} cannot be enforced: it admits nothing, or following it takes too much work.",
                field=field,
            )
        choices = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if len(choices) > 1 or matcher.is_stopped():
            return
        matcher.consume_token(int(choices[0]))
