"""How few tokens a text can have, told without tokenizing it.

Tokenizing takes about a second for a megabyte and a half. A text that cannot fit a context whatever
its tokens are is better refused before: if no token stands for more than n bytes, a text of m bytes
has at least m / n tokens. That holds only for bytes that end up in some token, so it is said only of
tokenizers whose parts are known to drop nothing else: byte-level BPE, less the bytes that its
vocabulary lacks, and SentencePiece BPE with byte fallback for all bytes; both without added tokens
that swallow the white space around them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from osaurus_grpc.chat.detokenize import byte_level_alphabet

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Below this, tokenizing is a matter of a tenth of a second.
_SHORT_TEXT_CHARACTERS: Final = 131_072
# By how much at most a normalizer makes a text shorter, in bytes of UTF-8. Decomposing shortens by 3
# (the Kelvin sign becomes K), and composing by 3, the most by which decomposing lengthens
# (https://unicode.org/faq/normalization.html, maximum expansion factors). "▁" is longer than a space.
_NORMALIZERS: Final = {"NFC": 9, "Prepend": 1, "Replace": 1}
_SPACE_REPLACEMENT: Final = ({"String": " "}, "▁")
_KEEPING_SPLITS: Final = frozenset({"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"})


class _Bound(NamedTuple):
    """What is known of a tokenizer.

    Attributes:
        bytes_per_token: Bytes of text that one token stands for at the most; 0 where that is not known.
        dropped: Bytes that end up in no token.
    """

    bytes_per_token: int = 0
    dropped: bytes = b""


_UNKNOWN: Final = _Bound()
_bounds: WeakKeyDictionary[PreTrainedTokenizerBase, _Bound] = WeakKeyDictionary()


def fewest_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """A number of tokens that a text has at the least; 0 where nothing can be said, or it is short."""
    if len(text) < _SHORT_TEXT_CHARACTERS:
        return 0
    bound = _bounds.get(tokenizer)
    if bound is None:
        bound = _bounds[tokenizer] = _bound(tokenizer)
    if not bound.bytes_per_token:
        return 0
    size = len(text.encode(errors="replace").translate(None, bound.dropped))
    return -(-size // bound.bytes_per_token)


def _bound(tokenizer: PreTrainedTokenizerBase) -> _Bound:
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return _UNKNOWN
    added = tokenizer.added_tokens_decoder.values()
    factor = _shortening(backend)
    if not factor or any(token.lstrip or token.rstrip for token in added):
        return _UNKNOWN
    vocabulary = backend.get_vocab()
    if backend.model.byte_fallback:
        is_whole = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        longest = max(len(piece.encode()) for piece in vocabulary)
        return _Bound(factor * longest) if is_whole else _UNKNOWN
    if not any(part["type"] == "ByteLevel" for part in _parts(backend.pre_tokenizer)):
        return _UNKNOWN
    alphabet = byte_level_alphabet()
    dropped = bytes(byte for letter, byte in alphabet.items() if letter not in vocabulary)
    # A normalizer may turn one byte into another.
    if dropped and backend.normalizer is not None:
        return _UNKNOWN
    letters = alphabet.keys()
    longest = max(len(piece) if letters >= set(piece) else len(piece.encode()) for piece in vocabulary)
    return _Bound(factor * longest, dropped)


def _shortening(backend: Tokenizer) -> int:
    """By how much the steps before the model can shorten a text at the most; 0 where that is not known."""
    factor = 1
    for part in _parts(backend.normalizer):
        if part["type"] == "Replace" and (part["pattern"], part["content"]) != _SPACE_REPLACEMENT:
            return 0
        factor *= _NORMALIZERS.get(part["type"], 0)
    for part in _parts(backend.pre_tokenizer):
        is_split = part["type"] == "Split" and part["behavior"] in _KEEPING_SPLITS
        if not is_split and part["type"] not in ("ByteLevel", "Digits"):
            return 0
    return factor


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """A component's parts as the library serializes them, sequences flattened."""
    if component is None:
        return
    state = json.loads(component.__getstate__())
    yield from state.get("normalizers") or state.get("pretokenizers") or [state]
