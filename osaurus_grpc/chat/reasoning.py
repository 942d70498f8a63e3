"""Where a model's reasoning stands in what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from osaurus_grpc.chat.gate import Reasoning

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

# How much of a prompt's end can be the part that opens the answer.
_TAIL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ThinkMarks:
    """The marks around reasoning.

    Attributes:
        open: Before it. "" where only the template writes one, as a part of the prompt.
        close: Behind it.
        answer: Marks around the answer that follows reasoning, empty if there are none.
        parts: Marks around the parts of every answer, which are no part of it.
        signs: What a template holds that writes the marks piece by piece, empty if none does.
    """

    open: str
    close: str
    answer: tuple[str, str] = ("", "")
    parts: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()


# Harmony's messages carry a channel each; the marks are those that begin and end an analysis.
HARMONY = ThinkMarks("<|channel|>analysis<|message|>", "<|end|>")

_KNOWN = (
    ThinkMarks("<|channel>thought", "<channel|>"),  # Gemma 4
    ThinkMarks("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ThinkMarks("<seed:think>", "</seed:think>"),  # Seed-OSS
    ThinkMarks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ThinkMarks("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ThinkMarks(  # Kimi K3
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        parts=("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
        signs=("<|open|>", "<|close|>", "<|sep|>", "close_tag('think')"),
    ),
    ThinkMarks("<longcat_think>", "</longcat_think>"),
    ThinkMarks("<|think:start|>", "<|think:end|>"),
    ThinkMarks("<think:opensource>", "</think:opensource>", signs=("</think{}>",)),  # Hunyuan 3
    ThinkMarks("<mm:think>", "</mm:think>"),  # MiniMax M3
    ThinkMarks("", "[BEGIN FINAL RESPONSE]"),  # Apriel
    ThinkMarks("<think>", "</think>", ("<response>", "</response>")),  # Granite 3
    ThinkMarks("<think>", "</think>"),  # Qwen, DeepSeek, GLM, Kimi K2, MiniMax M2, Nemotron and others
)

_found: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, ThinkMarks | None]] = WeakKeyDictionary()


def is_harmony(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model writes gpt-oss's channels (https://cookbook.openai.com/articles/openai-harmony)."""
    vocabulary = tokenizer.added_tokens_encoder
    return all(mark in vocabulary for mark in ("<|channel|>", "<|message|>", "<|start|>", "<|call|>"))


def think_marks(tokenizer: PreTrainedTokenizerBase, template: str) -> ThinkMarks | None:
    """The marks that a model's template or vocabulary knows, else None.

    Args:
        tokenizer: The model's.
        template: The text of its chat template.
    """
    known = _found.get(tokenizer)
    if known is None or known[0] != template:
        known = _found[tokenizer] = (template, _detect(tokenizer, template))
    return known[1]


def _detect(tokenizer: PreTrainedTokenizerBase, template: str) -> ThinkMarks | None:
    if is_harmony(tokenizer):
        return HARMONY
    for marks in _KNOWN:
        is_named = marks.close in template
        is_named = is_named or (bool(marks.signs) and all(sign in template for sign in marks.signs))
        # A template that tells the model of them names them together.
        is_named = is_named and "".join(marks.answer) in template
        if is_named and (marks.open or "reasoning" in template):
            return marks
    vocabulary = tokenizer.added_tokens_encoder
    return next((marks for marks in _KNOWN if marks.open in vocabulary and marks.close in vocabulary), None)


def begins_open(tokenizer: PreTrainedTokenizerBase, marks: ThinkMarks | None, prompt: Sequence[int]) -> bool:
    """Whether the prompt's last words open the reasoning, so that the answer begins inside it."""
    if marks is None or marks is HARMONY:
        return False
    tail = str(tokenizer.decode(list(prompt[-_TAIL_TOKENS:]), skip_special_tokens=False)).rstrip()
    if not marks.open:
        return tail.endswith("Here are my reasoning steps:")
    return tail.endswith(marks.open)


def reasoning_of(
    tokenizer: PreTrainedTokenizerBase, marks: ThinkMarks | None, *, is_open: bool, max_tokens: int | None
) -> Reasoning | None:
    """How an answer reasons, for a gate; None where it cannot.

    Args:
        tokenizer: The model's.
        marks: The model's reasoning marks.
        is_open: The prompt opened the reasoning.
        max_tokens: Tokens after which it is closed.
    """
    if marks is None:
        return None
    open_ids = tuple(tokenizer.encode(marks.open, add_special_tokens=False)) if marks.open else ()
    special = set(tokenizer.added_tokens_decoder)
    # A mark that is spelled out may also begin what a grammar wants: only a token of its own decides.
    can_open = bool(open_ids) and open_ids[0] in special
    close_ids = tuple(tokenizer.encode(marks.close, add_special_tokens=False))
    if not is_open and not can_open:
        return None
    return Reasoning(open_ids if can_open else (), close_ids, marks.close.encode(), is_open, max_tokens)
