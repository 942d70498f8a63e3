"""What keeping KV caches in 8 or 4 bits costs. Run it as `python -m tests.benchmarks.quantization`.

The beginnings of English texts (Python's own reference) are prefilled once and kept in prompt caches
that quantize to nothing, 8 and 4 bits (`--prompt-cache-bits`); the texts then go on from what each
cache gives back. Shown, for the tokens after the beginning, against the beginning as it was computed:
the text's perplexity, the mean divergence of the next-token distributions (Kullback-Leibler, in nats),
the share of tokens whose most likely successor is the same, and how many tokens of a greedy answer come
before the first that differs; then the bytes a token takes in the cache and the CPU seconds of keeping
and of finding a beginning, as shares of those of computing it.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

import argparse
import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from osaurus_grpc.engine.cache_layout import CacheLayout, Row
from osaurus_grpc.engine.prompt_cache import PromptCache
from osaurus_grpc.engine.token_chain import BLOCK_TOKENS, Chain
from osaurus_grpc.models import cpu_kernels
from tests.benchmarks import plots
from tests.benchmarks.baseline import load
from tests.benchmarks.subjects import MODEL, default_models_dir

BITS = (0, 8, 4)
_TEXTS = ("assignment", "execmodel", "customization", "strings", "try", "import", "typesmapping", "calls")
_PLENTY = 2**34

Logs = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Text:
    """A text's tokens: its kept beginning, and what follows."""

    beginning: list[int]
    rest: list[int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One text with one number of bits.

    Attributes:
        bytes_per_token: Of what was kept.
        keep_share: CPU seconds of keeping the beginning, of those of computing it.
        find_share: The same of finding it.
        log_probs: Of the vocabulary at each place of the rest, shape (places, vocabulary).
        answer: What the model says greedily after the beginning.
    """

    bytes_per_token: float
    keep_share: float
    find_share: float
    log_probs: Logs
    answer: list[int]


def _texts(folder: Path, count: int, beginning: int, rest: int) -> list[Text]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for name in _TEXTS[:count]:
        ids = tokenizer(topics[name][: 6 * (beginning + rest)])["input_ids"]
        if len(ids) < beginning + rest:
            raise SystemExit(f"the text {name!r} has {len(ids)} tokens only")
        texts.append(Text(ids[:beginning], ids[beginning : beginning + rest]))
    return texts


def _samples(model: Any, text: Text, answer_tokens: int) -> dict[int, Sample]:
    """One text with every number of bits."""
    caches = make_prompt_cache(model)
    started = time.process_time()
    model(mx.array([text.beginning]), cache=caches)
    mx.eval([cache.state for cache in caches])
    seconds = time.process_time() - started
    samples = {}
    for bits in BITS:
        store = PromptCache(CacheLayout(make_prompt_cache(model)), _PLENTY, bits=bits)
        started = time.process_time()
        store.store(Chain(), Row(caches, 0, text.beginning))
        kept = time.process_time()
        prompt = [*text.beginning, *text.rest]
        prefix = store.lookup(Chain(prompt), prompt)
        assert prefix is not None
        assert prefix.length == len(text.beginning)
        mx.eval([cache.state for cache in prefix.caches])
        found = time.process_time()
        samples[bits] = Sample(
            bytes_per_token=store.nbytes / len(text.beginning),
            keep_share=(kept - started) / seconds,
            find_share=(found - kept) / seconds,
            log_probs=_log_probs(model, text.rest, copy.deepcopy(prefix.caches)),
            answer=_greedy(model, text.rest[0], prefix.caches, answer_tokens),
        )
    return samples


def _log_probs(model: Any, tokens: Sequence[int], caches: list[Any]) -> Logs:
    """Of the next token, behind each of these."""
    logits = model(mx.array([tokens]), cache=caches)[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def _greedy(model: Any, first: int, caches: list[Any], count: int) -> list[int]:
    answer: list[int] = []
    token = first
    for _ in range(count):
        token = int(model(mx.array([[token]]), cache=caches)[0, -1].argmax().item())
        answer.append(token)
    return answer


@dataclass(frozen=True, slots=True)
class Price:
    """What one number of bits costs, over all texts; all against caches kept as they are.

    Attributes:
        bits: 0 is as they are.
        perplexity: Of the texts' rests.
        divergence: Mean Kullback-Leibler divergence of next-token distributions, in nats.
        agreement: Share of places with the same most likely token.
        same_tokens: Median length of the greedy answers' common beginning.
        bytes_per_token: Kept.
        keep_share: As Sample has it, the median.
        find_share: The same.
    """

    bits: int
    perplexity: float
    divergence: float
    agreement: float
    same_tokens: float
    bytes_per_token: float
    keep_share: float
    find_share: float


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


def _price(bits: int, texts: Sequence[Text], found: Sequence[dict[int, Sample]]) -> Price:
    losses, divergences, agreements = [], [], []
    for text, samples in zip(texts, found, strict=True):
        plain, kept = samples[0].log_probs, samples[bits].log_probs
        targets = np.array(text.rest[1:])
        losses.append(-kept[np.arange(len(targets)), targets])
        divergences.append((np.exp(plain) * (plain - kept)).sum(axis=-1))
        agreements.append(plain.argmax(axis=-1) == kept.argmax(axis=-1))
    return Price(
        bits=bits,
        perplexity=math.exp(float(np.concatenate(losses).mean())),
        divergence=float(np.concatenate(divergences).mean()),
        agreement=float(np.concatenate(agreements).mean()),
        same_tokens=statistics.median(_common(s[0].answer, s[bits].answer) for s in found),
        bytes_per_token=statistics.fmean(s[bits].bytes_per_token for s in found),
        keep_share=statistics.median(s[bits].keep_share for s in found),
        find_share=statistics.median(s[bits].find_share for s in found),
    )


def measure(count: int, beginning: int, rest: int, answer: int) -> list[Price]:
    """The price of each number of bits over so many texts."""
    folder = default_models_dir() / MODEL
    texts = _texts(folder, count, beginning // BLOCK_TOKENS * BLOCK_TOKENS, rest)
    cpu_kernels.install()
    model = load(folder)
    _samples(model, Text(texts[0].beginning[: 4 * BLOCK_TOKENS], texts[0].rest[:8]), 2)  # warm up
    found = [_samples(model, text, answer) for text in texts]
    return [_price(bits, texts, found) for bits in BITS]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=len(_TEXTS), help="(default %(default)s)")
    parser.add_argument("--beginning", type=int, default=512, help="tokens kept (default %(default)s)")
    parser.add_argument("--rest", type=int, default=192, help="tokens after it (default %(default)s)")
    parser.add_argument("--answer", type=int, default=32, help="greedy tokens (default %(default)s)")
    parser.add_argument("--plots", type=Path, default=plots.PLOTS)
    options = parser.parse_args()
    prices = measure(options.texts, options.beginning, options.rest, options.answer)
    print(
        "| kept in | bytes a token | perplexity | divergence (nats) | same next token | same greedy tokens "
        f"of {options.answer} | keeping / computing | finding / computing |\n" + "|---" * 8 + "|"
    )
    for p in prices:
        print(
            f"| {f'{p.bits} bits' if p.bits else 'as it is'} | {p.bytes_per_token:.0f} | {p.perplexity:.3f} "
            f"| {p.divergence:.5f} | {100 * p.agreement:.1f} % | {p.same_tokens:g} "
            f"| {p.keep_share:.3f} | {p.find_share:.3f} |"
        )
    plain = prices[0]
    plots.bars(
        options.plots / "quantization.png",
        title="Kept KV caches in 8 and 4 bits",
        y="of what it is without",
        groups={
            f"{p.bits} bits" if p.bits else "as it is": {
                "bytes": p.bytes_per_token / plain.bytes_per_token,
                "perplexity": p.perplexity / plain.perplexity,
                "same next token": p.agreement,
                "same greedy answer": p.same_tokens / options.answer,
            }
            for p in prices
        },
    )


if __name__ == "__main__":
    main()
