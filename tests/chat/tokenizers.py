"""Small tokenizers of the kinds that models come with, built from scratch."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_fallback(*, strips_first_space: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2's: SentencePiece BPE with "▁" for spaces and `<0xNN>` for bytes without a piece."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlortw.,é", "▁h", "▁w"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "h"), ("▁", "w")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips_first_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return wrapped(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """As T5's: a unigram model over words that begin with "▁"."""
    pieces = [*SPECIAL, "▁", "▁hello", "▁world", *"abcdefghijklmnopqrstuvwxyz", "é", "世"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return wrapped(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's."""
    pieces = [*SPECIAL, "play", "##ing", "##ed", "walk", "é", "##é", "."]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return wrapped(tokenizer)


def word_suffix() -> PreTrainedTokenizerFast:
    """As GPT-1's: "</w>" ends a word, a form that nothing here decodes itself."""
    pieces = [*SPECIAL, "a</w>", "b</w>", "ab</w>", "a", "b"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("a", "b</w>")], unk_token="<unk>", end_of_word_suffix="</w>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    return wrapped(tokenizer)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """As transformers hands it to us."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
