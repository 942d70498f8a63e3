"""What is particular to one model's way of answering: its template, its marks, its call syntax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from osaurus_grpc.chat.calls import harmony
from osaurus_grpc.chat.calls.answer import AnswerReader
from osaurus_grpc.chat.calls.families import FALLBACK, detect
from osaurus_grpc.chat.calls.pieces import ToolTable
from osaurus_grpc.chat.calls.syntax import CallSyntax
from osaurus_grpc.chat.reasoning import HARMONY, ThinkMarks, think_marks
from osaurus_grpc.chat.types import ToolSpec

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """How a model writes.

    Attributes:
        syntax: How it writes calls.
        marks: The marks around its reasoning, None if it has none.
        shown: Special tokens that are part of either.
    """

    syntax: CallSyntax
    marks: ThinkMarks | None
    shown: frozenset[int]

    def reader(
        self,
        *,
        is_reasoning: bool,
        tools: Sequence[ToolSpec],
        streams_calls: bool,
        is_forced: bool = False,
    ) -> AnswerReader | None:
        """A reader for one answer, None where an answer is nothing but content.

        Args:
            is_reasoning: The prompt opened the reasoning.
            tools: What may be called.
            streams_calls: As AnswerReader's.
            is_forced: As AnswerReader's.
        """
        is_addressed = bool(self.syntax.recipient)
        if self.marks is None and not tools and not is_addressed:
            return None
        return AnswerReader(
            marks=self.marks,
            is_reasoning=is_reasoning,
            syntax=self.syntax if tools or is_addressed else None,
            tools=ToolTable.of(tools),
            streams_calls=streams_calls,
            is_forced=is_forced,
        )


_styles: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, ChatStyle]] = WeakKeyDictionary()


def style_of(tokenizer: PreTrainedTokenizerBase, template: str, *, is_native: bool) -> ChatStyle:
    """A model's style.

    Args:
        tokenizer: The model's.
        template: The text of its chat template.
        is_native: The template shows tools to the model; else they are put in the system prompt.
    """
    known = _styles.get(tokenizer)
    key = f"{is_native}{template}"
    if known is None or known[0] != key:
        syntax = detect(tokenizer, template)
        # A model that nobody told of a syntax is told of the plain one.
        if not is_native and syntax.name == "llama":
            syntax = FALLBACK
        marks = think_marks(tokenizer, template)
        known = _styles[tokenizer] = (key, ChatStyle(syntax, marks, _shown(tokenizer, syntax, marks)))
    return known[1]


def _shown(
    tokenizer: PreTrainedTokenizerBase, syntax: CallSyntax, marks: ThinkMarks | None
) -> frozenset[int]:
    texts = list(syntax.texts)
    if marks is HARMONY:
        texts += harmony.MARKS
    elif marks is not None:
        texts += (marks.open, marks.close)
    return frozenset(
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and any(token.content in text for text in texts)
    )
