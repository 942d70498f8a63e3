"""Keeps the text of a conversation from being read as control tokens.

A chat template writes control tokens such as `<|im_end|>` as text, and tokenizing the rendered text
turns them into single tokens, wherever they came from. A web page pasted into a message could thus
end the user's turn and begin a system turn of its own. Most local servers let it. Here, a special
token's name inside a message is cut after its first character, by a rare character that the
conversation does not hold, before the template renders it; the rendered text is tokenized in the
pieces between the cuts, so the model reads the name spelled out. Conversations without such names,
nearly all of them, are rendered and tokenized as they are.

Only tokens that the tokenizer marks special are treated so. Others (`<think>`, `<tool_call>` in many
vocabularies) are part of what templates look for in messages, and give no turn away.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from osaurus_grpc.chat.types import JSON

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

# CJK extension B, of which some are always unused. Printable, since templates that print an object
# would escape a private-use character.
_RARE = range(0x20000, 0x2A6D7)
_NOTHING = re.compile("(?!)")


class Spliced(str):
    """A text of which some parts are the server's own, whose control tokens are meant.

    Attributes:
        parts: The text in pieces, each with whether it is the server's own.
    """

    __slots__ = ("parts",)
    parts: tuple[tuple[str, bool], ...]

    @classmethod
    def of(cls, parts: Iterable[tuple[str, bool]]) -> Spliced:
        """Joins the parts."""
        pieces = tuple(parts)
        text = cls("".join(text for text, _ in pieces))
        text.parts = pieces
        return text


class Shield:
    """Cuts special tokens' names in one conversation's texts.

    Args:
        tokenizer: The model's tokenizer.
        texts: All texts that will be passed through `cut`, to choose a mark that none contains.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
        self._tokenizer = tokenizer
        self._names = _special_names(tokenizer)
        self._mark = ""
        if any(map(self._names.search, texts)):
            used = set().union(*texts)
            self._mark = next(char for char in map(chr, _RARE) if char not in used)

    def cut(self, value: JSON) -> JSON:
        """Returns the value with every special token's name in its strings and keys cut."""
        if not self._mark:
            return value
        if isinstance(value, Spliced):
            return "".join(text if is_own else str(self.cut(text)) for text, is_own in value.parts)
        if isinstance(value, str):
            return self._names.sub(rf"\g<0>{self._mark}", value)
        if isinstance(value, dict):
            return {str(self.cut(key)): self.cut(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.cut(item) for item in value]
        return value

    def uncut(self, rendered: str) -> str:
        """A rendered conversation as the messages have it."""
        return rendered.replace(self._mark, "") if self._mark else rendered

    def encode(self, rendered: str) -> list[int]:
        """Tokenizes a rendered conversation, whose template writes the beginning-of-sequence token."""
        first, *rest = self._pieces(rendered)
        token_ids = self._encode(first)
        for piece in rest:
            token_ids += encode_inner(self._tokenizer, piece)
        return token_ids

    def encode_rest(self, rendered: str) -> list[int]:
        """Tokenizes what is left of a rendered conversation whose beginning is tokens already."""
        return [
            token_id for piece in self._pieces(rendered) for token_id in encode_inner(self._tokenizer, piece)
        ]

    def recut(self, rendered: str, other: Shield) -> str:
        """What another shield of the same tokenizer rendered, with this one's cuts."""
        return rendered.replace(other._mark, self._mark) if other._mark else rendered

    def is_control_token_next(self, rendered: str) -> bool:
        """Whether a control token of the template's own begins the text."""
        return self._names.match(rendered) is not None

    def _pieces(self, rendered: str) -> list[str]:
        return rendered.split(self._mark) if self._mark else [rendered]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def encode_inner(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenizes a text that stands within another one.

    Behind a newline that is taken away again: SentencePiece puts a space at a text's start.
    """

    def encode(piece: str) -> list[int]:
        return list(tokenizer.encode(piece, add_special_tokens=False))

    newline = encode("\n")
    token_ids = encode("\n" + text)
    if token_ids[: len(newline)] == newline:
        return token_ids[len(newline) :]
    return encode(text)


_names: WeakKeyDictionary[PreTrainedTokenizerBase, re.Pattern[str]] = WeakKeyDictionary()


def _special_names(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the first character of every special token's name, overlapping ones included.

    A name of one character cannot be cut and is left alone.
    """
    pattern = _names.get(tokenizer)
    if pattern is None:
        rests: defaultdict[str, list[str]] = defaultdict(list)
        for token in tokenizer.added_tokens_decoder.values():
            if token.special and len(token.content) > 1:
                rests[token.content[0]].append(re.escape(token.content[1:]))
        branches = [f"{re.escape(first)}(?={'|'.join(names)})" for first, names in rests.items()]
        pattern = _names[tokenizer] = re.compile("|".join(branches)) if branches else _NOTHING
    return pattern
