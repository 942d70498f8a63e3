"""Builds tokenizer.json and tokenizer_config.json from a vocabulary.

transformers can read a tokenizer out of a GGUF file only where torch is installed, so it is built here
with the `tokenizers` library: byte-level BPE for GGUF's "gpt2" model, BPE with byte fallback for its
"llama" model (SentencePiece).
"""

from __future__ import annotations

from typing import Any, Final

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as splitters

from osaurus_grpc.errors import SourceInvalidError
from osaurus_grpc.models.sources.gguf.pretokenizers import PRE_TOKENIZERS
from osaurus_grpc.models.sources.gguf.vocabulary import Vocabulary, wrong

_SPACE: Final = "▁"  # SentencePiece's sign for a space
_MAX_TOKEN_CHARS: Final = 256  # longer SentencePiece pieces do not exist; merging is quadratic in it


def _model_vocabulary(vocabulary: Vocabulary) -> dict[str, int]:
    return {text: number for number, text in enumerate(vocabulary.tokens)}


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    ids = _model_vocabulary(vocabulary)
    for left, right in merges:
        if left not in ids or right not in ids or left + right not in ids:
            raise SourceInvalidError("The GGUF file is corrupt: its merges name a token that does not exist.")
    return models.BPE(ids, merges, **options)


def _stored_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    merges = []
    for text in vocabulary.merges:
        space = text.find(" ", 1)  # a token may begin with one
        if space < 0 or space == len(text) - 1:
            raise wrong("ggml.merges")
        merges.append((text[:space], text[space + 1 :]))
    return merges


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """GGUF's "gpt2" model."""
    name = vocabulary.pre or "default"
    splitter = PRE_TOKENIZERS.get(name)
    if splitter is None:
        raise SourceInvalidError(
            f"The GGUF file's tokenizer uses the pre-tokenizer {name[:64]!r}, which cannot be converted."
        )
    if not vocabulary.merges:
        raise wrong("ggml.merges")
    tokenizer = Tokenizer(_bpe(vocabulary, _stored_merges(vocabulary), ignore_merges=splitter.ignores_merges))
    if splitter.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitters.Sequence(
        [splitters.Split(Regex(pattern), "isolated") for pattern in splitter.patterns]
        + [splitters.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _scored_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Merges that do what SentencePiece's BPE does: join the neighbours whose union scores best.

    As transformers' `generate_merges` (convert_slow_tokenizer.py): every way to cut a token into two,
    in order of falling score. Of equal scores the token with the lower id goes first.
    """
    ids = {
        text: number
        for number, text in enumerate(vocabulary.tokens)
        if vocabulary.types[number] in (TokenType.NORMAL, TokenType.UNUSED)
    }
    merges = []
    for text, number in ids.items():
        if len(text) > _MAX_TOKEN_CHARS:
            raise SourceInvalidError("The GGUF file is corrupt: its vocabulary holds an overlong token.")
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                merges.append((-vocabulary.scores[number], number, ids[left], left, right))
    merges.sort()
    return [(left, right) for _, _, _, left, right in merges]


def _sentence_piece(vocabulary: Vocabulary) -> Tokenizer:
    """GGUF's "llama" model: Llama 1 and 2, Mistral, Gemma."""
    if not vocabulary.scores:
        raise wrong("ggml.scores")
    unknown = vocabulary.unk if vocabulary.unk is not None else 0
    tokenizer = Tokenizer(
        _bpe(
            vocabulary,
            _scored_merges(vocabulary),
            unk_token=vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = vocabulary.add_space_prefix is not False
    replace = normalizers.Replace(" ", _SPACE)
    prepend = [normalizers.Prepend(_SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, replace])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Control tokens become special ones; user-defined tokens are found before the text is split."""
    added = [
        AddedToken(text, normalized=False, special=kind == TokenType.CONTROL)
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if text and kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if tokenizer.get_vocab_size() != len(vocabulary.tokens):
        raise SourceInvalidError("The GGUF file is corrupt: its special tokens are not in its vocabulary.")


def _adds(vocabulary: Vocabulary) -> tuple[bool, bool]:
    """Whether a prompt begins with BOS and ends with EOS."""
    if vocabulary.model == "llama":
        bos = vocabulary.add_bos is not False
    else:
        splitter = PRE_TOKENIZERS[vocabulary.pre or "default"]
        bos = splitter.adds_bos if vocabulary.add_bos is None else vocabulary.add_bos
    return bos and vocabulary.bos is not None, bool(vocabulary.add_eos) and vocabulary.eos is not None


def _frame(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Puts BOS and EOS around a prompt, where the vocabulary asks for it."""
    adds_bos, adds_eos = _adds(vocabulary)
    begin = [vocabulary.bos] if adds_bos and vocabulary.bos is not None else []
    end = [vocabulary.eos] if adds_eos and vocabulary.eos is not None else []
    if not begin and not end:
        return
    names = {number: f"token{number}" for number in (*begin, *end)}  # free of the template's own signs
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[names[n] for n in begin] + ["$A:0"] + [names[n] for n in end],
        pair=[names[n] for n in begin] + ["$A:0", "$B:1"] + [names[n] for n in end],
        special_tokens=[
            {"id": name, "ids": [number], "tokens": [vocabulary.tokens[number]]}
            for number, name in names.items()
        ],
    )


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Builds the tokenizer.

    Raises:
        SourceInvalidError: Its model or pre-tokenizer cannot be converted, or it contradicts itself.
    """
    match vocabulary.model:
        case "gpt2":
            tokenizer = _byte_level(vocabulary)
        case "llama":
            tokenizer = _sentence_piece(vocabulary)
        case other:
            raise SourceInvalidError(
                f"The GGUF file's tokenizer is of the kind {other[:64]!r}, which cannot be converted."
            )
    _add_tokens(tokenizer, vocabulary)
    _frame(tokenizer, vocabulary)
    return tokenizer


def tokenizer_config(vocabulary: Vocabulary, context_length: int) -> dict[str, Any]:
    """tokenizer_config.json: the special tokens, the chat template and how to load tokenizer.json."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    named = {"bos": vocabulary.bos, "eos": vocabulary.eos, "unk": vocabulary.unk, "pad": vocabulary.pad}
    config.update(
        {f"{name}_token": vocabulary.tokens[number] for name, number in named.items() if number is not None}
    )
    if vocabulary.chat_template:
        config["chat_template"] = vocabulary.chat_template
    return config
