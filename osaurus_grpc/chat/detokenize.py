"""Tokens to text, one at a time, and the bytes of single tokens.

Byte-level BPE (GPT-2's alphabet) and SentencePiece with byte fallback are decoded here from each
token's own bytes: exact, in constant time a token, and faster than any library call. The
`tokenizers` library's DecodeStream serves the other fast tokenizers. It does not serve those two,
because it raises "Invalid prefix" on byte-fallback tokens that form no character, decodes everything
held again with every token while a model writes invalid bytes, and loses a token's good characters
together with the incomplete one that follows them.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, assert_never
from weakref import WeakKeyDictionary, ref

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "�"
_SPACE_PIECE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# How the library serializes the two decoder parts of SentencePiece models that we do ourselves.
_SPACE_STEP = {"type": "Replace", "pattern": {"String": _SPACE_PIECE}, "content": " "}
_STRIP_STEP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class Detokenizer:
    """Decodes one sequence of generated tokens as it grows.

    A character whose bytes are spread over tokens comes out with the last of them. Bytes that can
    become no character come out as U+FFFD; an incomplete character at the very end is dropped. The
    concatenated text equals the tokenizer's own decode of all tokens in every other respect, except
    that within a run of SentencePiece byte tokens which is invalid as a whole, the valid characters
    are kept (the library replaces every byte of such a run, which a stream cannot take back).

    Args:
        tokenizer: The model's tokenizer.
        skip_special_tokens: Leave special tokens out of the text. Added tokens that are not marked
            special, such as many models' `<think>`, always show.
        context: Where the text continues another one, the last tokens of that, so that a space
            between the two is kept. SentencePiece drops the space at a text's start.
        shown: Special tokens that show all the same, as their names.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
        shown: frozenset[int] = frozenset(),
    ) -> None:
        vocabulary = _vocabulary(tokenizer)
        strategy: _Strategy
        if vocabulary.kind in (_PieceKind.BYTE_LEVEL, _PieceKind.BYTE_FALLBACK):
            strategy = _ByteDecoding(vocabulary, skip_special_tokens, at_start=not context)
        elif vocabulary.backend is not None:
            strategy = _StreamDecoding(vocabulary.backend, skip_special_tokens, context)
        else:
            strategy = _WindowDecoding(tokenizer, skip_special_tokens, context)
        if shown and skip_special_tokens:
            strategy = _ShowingSome(strategy, vocabulary, shown)
        self._finish = strategy.finish
        self.step = strategy.step  # a bound method: one call less on the path of every token
        """Takes the next token id and returns the text it completes, often "" or several characters."""

    def finish(self) -> str:
        """Returns the text still held, without an incomplete last character."""
        return self._finish()


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes:
    """A token's own bytes; those of an id that the tokenizer does not know are empty.

    Exact for byte-level BPE, SentencePiece (a leading "▁" is a space, `<0xNN>` a byte) and WordPiece
    (without the continuation mark). Special tokens are their names. Kept per tokenizer.
    """
    return _vocabulary(tokenizer)[token_id]


def every_token_bytes(tokenizer: PreTrainedTokenizerBase, count: int) -> list[bytes]:
    """token_bytes() of all ids below a count, at once."""
    vocabulary = _vocabulary(tokenizer)
    return [vocabulary[token_id] for token_id in range(count)]


def concatenates(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text is its tokens' own bytes one after the other, but for a space at its start."""
    return _vocabulary(tokenizer).kind not in (_PieceKind.WORD_PIECE, _PieceKind.DECODED)


class _PieceKind(Enum):
    """How a vocabulary's pieces stand for bytes."""

    BYTE_LEVEL = auto()
    BYTE_FALLBACK = auto()
    METASPACE = auto()
    WORD_PIECE = auto()
    DECODED = auto()  # unknown: the tokenizer's own decode of the single token


class _Strategy(ABC):
    @abstractmethod
    def step(self, token_id: int) -> str: ...

    def finish(self) -> str:
        return ""


class _ByteDecoding(_Strategy):
    """Concatenates the tokens' bytes through an incremental UTF-8 decoder."""

    def __init__(self, vocabulary: _Vocabulary, skip_special_tokens: bool, *, at_start: bool) -> None:
        self._bytes = vocabulary
        self._texts = vocabulary.visible_texts if skip_special_tokens else vocabulary.texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_partial = False
        self._strips_space = at_start and vocabulary.strips_first_space

    def step(self, token_id: int) -> str:
        text = self._texts[token_id]
        if text is None or (self._is_partial and text):
            text = self._decoder.decode(self._bytes[token_id])
            self._is_partial = bool(self._decoder.getstate()[0])
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text


class _ShowingSome(_Strategy):
    """Shows chosen special tokens, which the strategy leaves out."""

    def __init__(self, inner: _Strategy, vocabulary: _Vocabulary, shown: frozenset[int]) -> None:
        self._inner = inner
        self._names = {token_id: vocabulary.name(token_id) for token_id in shown}

    def step(self, token_id: int) -> str:
        name = self._names.get(token_id)
        text = self._inner.step(token_id)
        return text if name is None else text + name

    def finish(self) -> str:
        return self._inner.finish()


class _StreamDecoding(_Strategy):
    """The library's DecodeStream."""

    def __init__(self, backend: Tokenizer, skip_special_tokens: bool, context: Sequence[int]) -> None:
        self._backend = backend
        self._skip = skip_special_tokens
        self._stream = DecodeStream(list(context), skip_special_tokens=skip_special_tokens)

    def step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._backend, token_id) or ""
        except Exception:  # noqa: BLE001  the binding raises bare Exception where text already out would change
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            return self._stream.step(self._backend, token_id) or ""


class _WindowDecoding(_Strategy):
    """Decodes a short window again with every token, for tokenizers without a Rust backend."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool, context: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context = list(context)  # tokens whose text is out, for spacing
        self._held: list[int] = []

    def step(self, token_id: int) -> str:
        self._held.append(token_id)
        known = self._decode(self._context)
        text = self._decode(self._context + self._held)
        if len(text) <= len(known) or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._held = self._held, []
        return text[len(known) :]

    def finish(self) -> str:
        known = self._decode(self._context)
        return self._decode(self._context + self._held)[len(known) :].rstrip(_REPLACEMENT)

    def _decode(self, token_ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
            )
        )


class _Texts(dict[int, str | None]):
    """Token id to its text, or None where its bytes are no whole characters; filled on first use."""

    def __init__(self, vocabulary: _Vocabulary, *, hidden: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(hidden, ""))
        self._bytes = vocabulary

    def __missing__(self, token_id: int) -> str | None:
        try:
            text: str | None = self._bytes[token_id].decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


class _Vocabulary(dict[int, bytes]):
    """Token id to bytes, filled on first use; threads may share it, since filling twice is harmless.

    It keeps the Rust backend but not the tokenizer alive, so that an unloaded model's is freed.

    Attributes:
        kind: How pieces stand for bytes.
        backend: The Rust tokenizer, where there is one.
        strips_first_space: Decoding drops one space at the start (Llama 2's tokenizers).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self._tokenizer = ref(tokenizer)
        self.backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        steps = _decoder_steps(self.backend)
        self.kind = _piece_kind(steps)
        self.strips_first_space = any(step["type"] == "Strip" for step in steps)
        first = steps[0] if steps else {}
        self._space_piece = str(first.get("replacement", _SPACE_PIECE))
        self._continuation = str(first.get("prefix", ""))
        special = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        self.texts = _Texts(self, hidden=frozenset())
        self.visible_texts = _Texts(self, hidden=special)

    def __missing__(self, token_id: int) -> bytes:
        data = self._compute(token_id)
        self[token_id] = data
        return data

    def name(self, token_id: int) -> str:
        """How the token is written in a vocabulary's file, which of special tokens is their text."""
        piece = self.backend.id_to_token(token_id) if self.backend is not None else None
        return piece if piece is not None else self[token_id].decode("utf-8", "replace")

    def _compute(self, token_id: int) -> bytes:
        piece = self.backend.id_to_token(token_id) if self.backend is not None else None
        match self.kind:
            case _PieceKind.DECODED:
                return self._decoded(token_id)
            case _ if piece is None:
                return b""
            case _PieceKind.BYTE_LEVEL:
                return _byte_level_bytes(piece)
            case _PieceKind.BYTE_FALLBACK if byte := _BYTE_PIECE.fullmatch(piece):
                return bytes.fromhex(byte[1])
            case _PieceKind.BYTE_FALLBACK | _PieceKind.METASPACE:
                return piece.replace(self._space_piece, " ").encode()
            case _PieceKind.WORD_PIECE:
                return piece.removeprefix(self._continuation).encode()
            case _ as unreachable:
                assert_never(unreachable)

    def _decoded(self, token_id: int) -> bytes:
        if self.backend is not None:
            return self.backend.decode([token_id], skip_special_tokens=False).encode()
        tokenizer = self._tokenizer()
        return str(tokenizer.decode([token_id])).encode() if tokenizer is not None else b""


_vocabularies: WeakKeyDictionary[PreTrainedTokenizerBase, _Vocabulary] = WeakKeyDictionary()


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> _Vocabulary:
    vocabulary = _vocabularies.get(tokenizer)
    if vocabulary is None:
        vocabulary = _vocabularies[tokenizer] = _Vocabulary(tokenizer)
    return vocabulary


def _decoder_steps(backend: Tokenizer | None) -> list[dict[str, object]]:
    """The decoder's parts as the library serializes them, a sequence flattened."""
    if backend is None or backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _piece_kind(steps: list[dict[str, object]]) -> _PieceKind:
    match [step["type"] for step in steps]:
        case ["ByteLevel"] | ["ByteLevel", "Fuse"]:
            return _PieceKind.BYTE_LEVEL
        case ["Replace", "ByteFallback", "Fuse", *rest] if steps[0] == _SPACE_STEP:
            is_known = not rest or steps[3:] == [_STRIP_STEP]
            return _PieceKind.BYTE_FALLBACK if is_known else _PieceKind.DECODED
        case ["Metaspace"]:
            return _PieceKind.METASPACE
        case ["WordPiece"]:
            return _PieceKind.WORD_PIECE
        case _:
            return _PieceKind.DECODED


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    alphabet = {chr(byte): byte for byte in own}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


# From stand-ins to the characters of latin-1 that have their bytes; others that are in latin-1 leave it.
_BYTE_LEVEL = dict.fromkeys(range(256), "\uffff") | {
    ord(char): chr(byte) for char, byte in byte_level_alphabet().items()
}


def _byte_level_bytes(piece: str) -> bytes:
    """As the library's decoder has it: a piece with any other character is text, not stand-ins."""
    try:
        return piece.translate(_BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()
