r"""The pre-tokenizers that "tokenizer.ggml.pre" names.

Source: llama.cpp, src/llama-vocab.cpp (`llm_tokenizer_bpe` for the patterns, `llama_vocab::impl::load`
for the names and flags), which adapts the patterns of each model's own tokenizer.json. Two of its
adaptations are taken back, because they work around limits of its regex engine: where it writes
`((?=[\p{L}])([^a-z]))` for a class of letters, the model's own class is used.

A file whose "pre" is missing or "default" was made without knowing the right one; llama.cpp warns of
degraded quality and uses a mixture of patterns. So does this, without the warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

_CONTRACTIONS: Final = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_OTHER: Final = r"[^\r\n\p{L}\p{N}]?"


def _words(digits: str, letters: str = r"\p{L}", others: str = r"[^\s\p{L}\p{N}]") -> str:
    """The family that began with GPT-4: contractions, words with one leading sign, digits, signs."""
    return rf"{_CONTRACTIONS}|{_OTHER}{letters}+|{digits}| ?{others}+[\r\n]*|{_SPACES}"


def _cased_words(digits: str, suffix: str = "") -> str:
    """The family that splits at a change from lower to upper case (GPT-4o, Tekken)."""
    return (
        rf"{_OTHER}{_UPPER}*{_LOWER}+{suffix}|{_OTHER}{_UPPER}+{_LOWER}*{suffix}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is split before byte-pair merging.

    Attributes:
        patterns: Applied one after the other, each to the pieces the last one left.
        ignores_merges: Whether a piece that is a token is taken whole, whatever the merges say.
        adds_bos: Whether a prompt begins with the BOS token where the metadata does not say.
        composes: Whether text is brought into Unicode's form NFC first. llama.cpp does not; the
            tokenizer.json of Qwen 2, 2.5 and 3 does.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False
    composes: bool = False


_DEFAULT: Final = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_PLAIN: Final = PreTokenizer((_GPT2,))
_DIGITS: Final = PreTokenizer((r"\p{N}", _GPT2))
_QWEN2: Final = PreTokenizer((_words(r"\p{N}"),), composes=True)
_SINGLE_DIGITS: Final = PreTokenizer((_words(r"\p{N}"),))
_LLAMA3: Final = PreTokenizer((_words(r"\p{N}{1,3}"),), ignores_merges=True, adds_bos=True)
_GLM4: Final = PreTokenizer((_words(r"\p{N}{1,3}"),), ignores_merges=True)
_LLAMA3_MERGED: Final = PreTokenizer((_words(r"\p{N}{1,3}"),))
_GPT4O: Final = PreTokenizer((_cased_words(r"\p{N}{1,3}", _CONTRACTIONS + "?"),))
_DEEPSEEK3: Final = PreTokenizer(
    (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    )
)
_DEEPSEEK_CODER: Final = PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"))
_FALCON: Final = PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))

PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = MappingProxyType(
    {
        "default": _DEFAULT,
        **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "mellum", "exaone4", "gigachat"), _PLAIN),
        **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
        "qwen2": _QWEN2,
        **dict.fromkeys(("deepseek-r1-qwen", "megrez", "stablelm2"), _SINGLE_DIGITS),
        "qwen35": PreTokenizer((_words(r"\p{N}", r"[\p{L}\p{M}]", r"[^\s\p{L}\p{M}\p{N}]"),)),
        **dict.fromkeys(
            ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3
        ),
        "glm4": _GLM4,
        **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3_MERGED),
        "tekken": PreTokenizer((_cased_words(r"\p{N}"),), ignores_merges=True, adds_bos=True),
        **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
        "deepseek-v3": _DEEPSEEK3,
        "deepseek-coder": _DEEPSEEK_CODER,
        "falcon": _FALCON,
    }
)
