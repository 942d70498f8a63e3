"""A model's tokens as the grammar library sees them: bytes, special tokens, ends of a sequence.

The library can read a tokenizer's file itself. It is given each token's bytes instead, those that
detokenize.py decodes, so that what a grammar lets through is exactly what clients read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Protocol

import llguidance
import numpy as np
import numpy.typing as npt

from osaurus_grpc.chat.detokenize import concatenates, every_token_bytes
from osaurus_grpc.errors import CapabilityError

_WORD_BITS: Final = 32
_ALL: Final = 0xFFFFFFFF
# So much decides about a text's first token.
_FORCED_CHARACTERS: Final = 256


class TokenizedModel(Protocol):
    """What a grammar needs to know of a model; models.residency.LoadedModel has it."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, transformers' class."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end an answer."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""


class _TokenTable:
    """The library's interface to a tokenizer (llguidance.TokenizerWrapper), by its names."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Any, tokens: Sequence[bytes], special: Sequence[int], end: int) -> None:
        self.eos_token_id = end
        self.tokens = tokens
        self.special_token_ids = special
        # The Rust part only: it must not keep an unloaded model's tokenizer object alive.
        self._backend = tokenizer.backend_tokenizer
        hidden = frozenset(special)
        # Of several tokens with the same bytes the first.
        backwards = zip(range(len(tokens) - 1, -1, -1), reversed(tokens), strict=True)
        self._by_bytes = {data: token_id for token_id, data in backwards if data and token_id not in hidden}
        self._longest = max(map(len, self._by_bytes), default=0)

    def __call__(self, text: str) -> list[int]:
        """The library asks for the usual tokens of text that a grammar leaves no choice about.

        Their bytes must be the text's, which the tokenizer's own answer need not give: SentencePiece
        puts a space at a text's start. It asks anew at every step, and needs the first token only.
        """
        text = text[:_FORCED_CHARACTERS]
        ids = list(self._backend.encode(text, add_special_tokens=False).ids)
        data = text.encode()
        return ids if b"".join(self.tokens[i] for i in ids) == data else self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token at each place, as far as there is one."""
        ids: list[int] = []
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._by_bytes), None)
            if end is None:
                break
            ids.append(self._by_bytes[data[start:end]])
            start = end
        return ids


class Vocabulary:
    """A model's tokens. Building one takes some tenths of a second of CPU; threads may share it.

    Args:
        model: The model; not kept.

    Attributes:
        tokens: The library's object.
        vocab_size: Width of the logits.
        words: 32-bit words of a mask.
        unended: A mask of everything but the tokens that end a sequence; not to be written to.

    Raises:
        CapabilityError: The tokenizer's tokens have no bytes of their own, such as WordPiece's, whose
            text depends on the neighbours.
    """

    def __init__(self, model: TokenizedModel) -> None:
        tokenizer = model.tokenizer
        if not concatenates(tokenizer):
            raise CapabilityError(
                "Structured output is not supported with this model's tokenizer.",
                capability="structured_output",
            )
        self.vocab_size = model.vocab_size
        self.words = -(-self.vocab_size // _WORD_BITS)
        # Logits may be wider than the tokenizer, and are narrower where an added token has none.
        count = max(self.vocab_size, len(tokenizer))
        self._bytes = every_token_bytes(tokenizer, count)
        special = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
        ends = sorted(end for end in model.eos_token_ids if 0 <= end < self.vocab_size)
        if not ends:
            raise CapabilityError(
                "Structured output is not supported: the model names no token that ends an answer.",
                capability="structured_output",
            )
        self._special = frozenset(special)
        table = _TokenTable(tokenizer, self._bytes, special, ends[0])
        self.tokens = llguidance.LLTokenizer(table, eos_token=ends)  # type: ignore[arg-type]  # typed as the library's own class, used by its names
        self._everything = np.full(self.words, _ALL, np.uint32)
        forbid(self._everything, range(self.vocab_size, self.words * _WORD_BITS))
        self.unended = self._everything.copy()
        forbid(self.unended, ends)
        self._overruns: dict[tuple[bytes, bool], npt.NDArray[np.uint32]] = {}
        self._by_bytes = sorted(range(count), key=self._bytes.__getitem__)

    def bytes_of(self, token_id: int) -> bytes:
        """A token's text in bytes; empty for special tokens, which are no text."""
        return b"" if token_id in self._special else self._bytes[token_id]

    def running_past(self, text: bytes) -> Iterator[int]:
        """Ids of the tokens that begin with a text and hold more than blanks behind it."""
        tokens = self._bytes
        first = bisect_left(self._by_bytes, text, key=tokens.__getitem__)
        for token_id in self._by_bytes[first:]:
            if not tokens[token_id].startswith(text):
                return
            if token_id not in self._special and tokens[token_id][len(text) :].strip():
                yield token_id

    def overrun_mask(self, text: bytes, *, may_end: bool) -> npt.NDArray[np.uint32]:
        """A mask without the tokens that hold a text and more than blanks behind it.

        Args:
            text: The text.
            may_end: Whether tokens that end a sequence are let through.

        Returns:
            uint32, shape (words,); not to be written to.
        """
        key = (text, may_end)
        mask = self._overruns.get(key)
        if mask is None:
            mask = (self._everything if may_end else self.unended).copy()
            holding = (token_id for token_id, data in enumerate(self._bytes) if text in data)
            forbid(
                mask,
                (
                    token_id
                    for token_id in holding
                    if token_id not in self._special and self._bytes[token_id].partition(text)[2].strip()
                ),
            )
            self._overruns[key] = mask
        return mask

    def mask_of(self, matcher: llguidance.LLMatcher) -> npt.NDArray[np.uint32]:
        """The tokens a matcher lets through next, uint32, shape (words,)."""
        mask = np.zeros(-(-self.tokens.vocab_size // _WORD_BITS), np.uint32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        mask = mask[: self.words]
        mask[-1] &= self._everything[-1]
        return mask


def forbid(mask: npt.NDArray[np.uint32], token_ids: Iterable[int]) -> None:
    """Clear the bits of token ids in a mask."""
    for token_id in token_ids:
        word, bit = divmod(token_id, _WORD_BITS)
        if word < len(mask):
            mask[word] &= np.uint32(_ALL ^ (1 << bit))
