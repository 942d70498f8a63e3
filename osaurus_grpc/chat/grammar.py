"""Grammars that answers must follow: compiled off the event loop, kept, and bounded.

Compiling is the library's (llguidance, https://github.com/guidance-ai/llguidance), whose Rust code
needs no GIL. Its limits are what bounds a hostile grammar: the work of compiling one, the work of a
step, and the memory of its automaton.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import llguidance

from osaurus_grpc.chat import schema
from osaurus_grpc.chat.constraint import GrammarConstraint, Trigger
from osaurus_grpc.chat.vocabulary import TokenizedModel, Vocabulary
from osaurus_grpc.errors import InvalidRequestError, OverloadedError

__all__ = ["Grammar", "GrammarConstraint", "Grammars", "TokenizedModel", "Trigger"]

MAX_GRAMMAR_CHARACTERS: Final = 262_144
MAX_REGEX_CHARACTERS: Final = 16_384

_THREADS: Final = 2
_MAX_COMPILING: Final = 64
_MAX_ENTRIES: Final = 256
_MAX_KEPT_CHARACTERS: Final = 4_194_304
# A compiler error is shown to the client as far as it speaks of what the client sent.
_MAX_REASON_CHARACTERS: Final = 500


def _limits() -> llguidance.LLParserLimits:
    """Bounds of a grammar's work and memory; see the tests of hostile grammars for what they let through."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
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
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._vocabularies: WeakKeyDictionary[Any, asyncio.Future[Vocabulary]] = WeakKeyDictionary()
        self._compiled: WeakKeyDictionary[Any, OrderedDict[_Source, Grammar]] = WeakKeyDictionary()
        self._compiling = 0

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
            OverloadedError: Too many grammars are being compiled.
        """

        def source() -> str:
            prepared = schema.prepared(text, strict=strict, field=field)
            return llguidance.LLMatcher.grammar_from_json_schema(prepared)

        kind = "strict json_schema" if strict else "json_schema"
        return await self._grammar(model, _Source(kind, text, field), source)

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
            lambda: llguidance.LLMatcher.grammar_from_regex(pattern),
        )

    async def lark(self, model: TokenizedModel, text: str, *, field: str = "grammar") -> Grammar:
        """Text that a grammar in llguidance's form of Lark derives.

        A schema embedded with `%json` must have gone through schema.prepared(). Raises as
        json_schema() does.
        """
        _require_length(text, MAX_GRAMMAR_CHARACTERS, field)
        return await self._grammar(
            model,
            _Source("lark", text, field),
            lambda: llguidance.LLMatcher.grammar_from_lark(text),
        )

    def close(self) -> None:
        """End the compiling threads; what is being compiled is not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _grammar(self, model: TokenizedModel, source: _Source, make: Callable[[], str]) -> Grammar:
        vocabulary = await self._vocabulary(model)
        kept = self._compiled.setdefault(model.tokenizer, OrderedDict())
        if grammar := kept.get(source):
            kept.move_to_end(source)
            return grammar
        matcher = await self._run(lambda: _compile(vocabulary, make(), source.field))
        grammar = kept[source] = Grammar(vocabulary, matcher, source.field)
        while len(kept) > _MAX_ENTRIES or (
            len(kept) > 1 and sum(len(other.text) for other in kept) > _MAX_KEPT_CHARACTERS
        ):
            kept.popitem(last=False)
        return grammar

    async def _vocabulary(self, model: TokenizedModel) -> Vocabulary:
        building = self._vocabularies.get(model.tokenizer)
        if building is None:
            building = asyncio.ensure_future(self._run(lambda: Vocabulary(model)))
            self._vocabularies[model.tokenizer] = building
        try:
            # Shared: one caller that leaves must not end it for the others.
            return await asyncio.shield(building)
        finally:
            if building.done() and (building.cancelled() or building.exception() is not None):
                self._vocabularies.pop(model.tokenizer, None)

    async def _run(self, work: Callable[[], Any]) -> Any:
        """Do something in a compiling thread."""
        if self._compiling >= _MAX_COMPILING:
            raise OverloadedError("Too many grammars are being compiled.", retry_after_seconds=1.0)
        self._compiling += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._compiling -= 1


def _require_length(text: str, limit: int, field: str) -> None:
    if len(text) > limit:
        raise InvalidRequestError(f"{field} must have at most {limit} characters.", field=field)


def _compile(vocabulary: Vocabulary, grammar: str, field: str) -> llguidance.LLMatcher:
    matcher = llguidance.LLMatcher(vocabulary.tokens, grammar, log_level=0, limits=_limits())
    if matcher.is_error():
        reason = matcher.get_error()[:_MAX_REASON_CHARACTERS]
        raise InvalidRequestError(f"{field} cannot be enforced: {reason}", field=field)
    return matcher
