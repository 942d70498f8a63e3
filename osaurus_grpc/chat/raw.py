"""Raw text to prompt tokens, without a chat template: plain continuation, and a gap to fill.

A raw prompt is the caller's own business, so names of control tokens in it are read as control
tokens; that is how callers bring a template of their own. (In conversations they are text; see
control_tokens.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from osaurus_grpc.chat.control_tokens import encode_inner
from osaurus_grpc.chat.detokenize import Detokenizer
from osaurus_grpc.errors import CapabilityError, InvalidRequestError

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Gap:
    """A prompt whose answer fills a gap.

    Attributes:
        token_ids: The prompt.
        end_tokens: Tokens by which a model says that the gap is filled, beside its end of sequence.
    """

    token_ids: tuple[int, ...]
    end_tokens: frozenset[int]


@dataclass(frozen=True, slots=True)
class _GapMarks:
    """Control tokens around the texts before and after a gap, as a family of models learned them.

    Attributes:
        before: Stands before the text before the gap.
        after: Stands before the text after the gap.
        last: Ends the prompt, or "".
        starts_after: The text after the gap comes first.
    """

    before: str
    after: str
    last: str
    starts_after: bool = False


_GAP_MARKS: Final = (
    # Qwen2.5-Coder and CodeGemma; StarCoder, StarCoder2, Granite and StableCode; DeepSeek-Coder and
    # DeepSeek-V2/V3; CodeLlama. Forms as in the models' own cards.
    _GapMarks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    _GapMarks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    _GapMarks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    _GapMarks("▁<PRE>", "▁<SUF>", "▁<MID>"),
    # Codestral, as mistral-common's encode_fim has it.
    _GapMarks("[PREFIX]", "[SUFFIX]", "", starts_after=True),
)
# What these models write behind the filled gap: padding, or the beginning of a next file.
_GAP_ENDS: Final = (
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<|file_separator|>",
    "<fim_pad>",
    "<file_sep>",
    "<repo_name>",
    "<reponame>",
    "<filename>",
    "▁<EOT>",
    "<|endoftext|>",
)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokenizes a text as the tokenizer begins a plain text: with its beginning-of-sequence token, if any.

    One that the text itself begins with is not doubled, and an end-of-sequence token is not added.

    Returns:
        Token ids, at least one.

    Raises:
        InvalidRequestError: The text is empty and the tokenizer has no token to begin with.
    """
    beginning = _beginning(tokenizer)
    token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if token_ids[: len(beginning)] != beginning:
        token_ids = beginning + token_ids
    if token_ids:
        return token_ids
    first = _id_of(tokenizer.bos_token_id)
    if first is None:
        raise InvalidRequestError("text must not be empty for this model.", field="text")
    return (first,)


def encode_gap(tokenizer: PreTrainedTokenizerBase, before: str, after: str) -> Gap:
    """Tokenizes the texts before and after a gap, in the form that the model learned.

    Raises:
        CapabilityError: The tokenizer has no tokens for that.
    """
    for marks in _GAP_MARKS:
        names = [name for name in (marks.before, marks.after, marks.last) if name]
        ids = {name: _token_id(tokenizer, name) for name in names}
        found = {name: token_id for name, token_id in ids.items() if token_id is not None}
        if len(found) == len(names):
            break
    else:
        raise CapabilityError(
            "The model cannot fill in the middle; leave out suffix.", capability="insert", field="suffix"
        )
    head = [found[marks.before], *tokenizer.encode(before, add_special_tokens=False)]
    tail = [found[marks.after], *encode_inner(tokenizer, after)]
    parts = tail + head if marks.starts_after else head + tail
    last = [found[marks.last]] if marks.last else []
    ends = {_token_id(tokenizer, name) for name in _GAP_ENDS}
    return Gap(
        token_ids=(*_beginning(tokenizer), *parts, *last),
        end_tokens=frozenset(end for end in ends if end is not None),
    )


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of tokens that a caller sent, control tokens by their names."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    return "".join(map(detokenizer.step, token_ids)) + detokenizer.finish()


def without_beginning(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[int]:
    """A rendered conversation without its beginning-of-sequence token, to stand behind other tokens.

    In some vocabularies that token also begins each turn, and then it is kept.
    """
    first = _id_of(tokenizer.bos_token_id)
    is_beginning = first is not None and token_ids[0] == first and token_ids.count(first) == 1
    return token_ids[1:] if is_beginning and len(token_ids) > 1 else token_ids


def _beginning(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before every plain text."""
    token_ids = list(tokenizer.encode("", add_special_tokens=True))
    end = _id_of(tokenizer.eos_token_id)
    # Some tokenizers use one token for both.
    if end != _id_of(tokenizer.bos_token_id):
        while token_ids and token_ids[-1] == end:
            token_ids.pop()
    return tuple(token_ids)


def _token_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The id of a token of the vocabulary, or None where it has none of that name."""
    token_id = _id_of(tokenizer.convert_tokens_to_ids(name))
    return None if token_id is None or token_id == tokenizer.unk_token_id else token_id


def _id_of(value: object) -> int | None:
    """Transformers types the ids of single tokens as if they could be lists."""
    return value if isinstance(value, int) else None
