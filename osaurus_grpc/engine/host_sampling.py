"""Draws on the host, for a device that is the host: what sampling.py does with MLX, in numpy.

MLX's CPU back end sorts a vocabulary of 49,152 tokens in 7 ms and takes 1 ms for its exponentials,
of each row and step; numpy needs a tenth of that. The price is that the logits are awaited.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from osaurus_grpc.engine.types import SamplingParams

# Tokens less probable than the most probable one by this much are looked at only where the others are too
# little, or too many to be sorted.
_NEAR = 8.0
_MOST_NEAR = 4096
# Bins of logits: so many to 1, and all beyond the last one in it.
_BINS_TO_ONE = 16.0
_LAST_BIN = 1024.0
# The multipliers and shifts of splitmix64 (Steele, Lea and Flood, 2014), which makes a number look random.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)
_TO_53_BITS = np.uint64(11)


def draw_token(logits: npt.NDArray[np.float32], params: SamplingParams, key: int, *, truncates: bool) -> int:
    """One token: the first in a race in which each arrives after an exponential time, at its weight's rate.

    Args:
        logits: Shape (vocab_size,); -inf is never chosen.
        params: Their temperature is above 0.
        key: Of 64 bits; gives the times.
        truncates: Whether top_k, top_p or min_p leave something out.
    """
    shifted = logits - logits.max()
    if not truncates:
        return int((_weights(shifted, params.temperature) / race(key, len(logits))).argmax())
    order = _kept(shifted, params)
    return int(order[(_weights(shifted[order], params.temperature) / race_of(key, order)).argmax()])


def race(key: int, vocab_size: int) -> npt.NDArray[np.float64]:
    """Exponentially distributed times of all tokens."""
    # float64: the times that matter are those near 0, where float32 would have ties.
    return np.random.Generator(np.random.SFC64(key)).standard_exponential(vocab_size)


def race_of(key: int, tokens: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Exponentially distributed times of some tokens, each the same whichever others there are."""
    mixed = np.uint64(key) + (tokens.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    for shift, multiplier in _MIX:
        mixed = (mixed ^ (mixed >> shift)) * multiplier
    mixed ^= mixed >> _LAST_SHIFT
    # In the midst of steps of 2^-53, so that no time is 0.
    return -np.log1p(-((mixed >> _TO_53_BITS).astype(np.float64) + 0.5) * 2.0**-53)


def _kept(shifted: npt.NDArray[np.float32], params: SamplingParams) -> npt.NDArray[np.intp]:
    """Tokens that top_k, top_p and min_p leave, in any order."""
    most = min(params.top_k or len(shifted), len(shifted))
    needed = 0.0
    if params.top_p < 1.0:
        needed = params.top_p * float(np.exp(shifted).sum(dtype=np.float64))
    least = np.log(params.min_p) if params.min_p > 0.0 else -np.inf
    # Nearly always what is kept is among the tokens near the most probable one, and these are few.
    near = np.flatnonzero(shifted >= max(least, -_NEAR))
    if len(near) <= _MOST_NEAR:
        kept = _first(shifted, near, most, needed)
        if len(kept) < len(near) or len(near) >= most or least >= -_NEAR:
            return kept
    return _kept_of_many(shifted, most, needed, least)


def _first(
    shifted: npt.NDArray[np.float32], tokens: npt.NDArray[np.intp], most: int, needed: float
) -> npt.NDArray[np.intp]:
    """The most probable ones of some tokens, one at least.

    Args:
        shifted: The logits of all.
        tokens: Those to choose from.
        most: So many at most.
        needed: A token is among them where the mass before it is below this; 0 keeps all.
    """
    order = tokens[np.argsort(-shifted[tokens])][:most]
    if needed:
        mass = np.cumsum(np.exp(shifted[order]), dtype=np.float64)
        order = order[: int(np.searchsorted(mass, needed)) + 1]
    return order


def _kept_of_many(
    shifted: npt.NDArray[np.float32], most: int, needed: float, least: float
) -> npt.NDArray[np.intp]:
    """_kept() without a sort: only the bin of logits in which the border lies is sorted."""
    bins = np.minimum(shifted * -_BINS_TO_ONE, _LAST_BIN).astype(np.intp)
    border = int(np.searchsorted(np.cumsum(np.bincount(bins)), most))
    mass = np.zeros(0)
    if needed:
        mass = np.cumsum(np.bincount(bins, weights=np.exp(shifted)))
        # Sums in another order may differ in their last bits.
        border = min(border, int(np.searchsorted(mass, needed)), len(mass) - 1)
    kept = np.flatnonzero(bins < border)
    before = float(mass[border - 1]) if needed and border else 0.0
    if len(kept) < most and (not needed or before < needed):
        rest = _first(shifted, np.flatnonzero(bins == border), most - len(kept), needed and needed - before)
        kept = np.concatenate([kept, rest])
    return kept[shifted[kept] >= least]


def _weights(shifted: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float32]:
    """Unnormalised probabilities at a temperature."""
    with np.errstate(over="ignore"):  # a cold temperature makes -inf of a low logit
        weights: npt.NDArray[np.float32] = np.exp(shifted / np.float32(temperature))
    return weights
