"""Draws on the host, for a device that is the host: what sampling.py does with MLX, in numpy.

MLX's CPU back end sorts a vocabulary of 49,152 tokens in 7 ms and takes 1 ms for its exponentials,
of each row and step; numpy needs a tenth of that. The price is that the logits are awaited.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from osaurus_grpc.engine.types import SamplingParams

# Tokens that are looked at before all of them are sorted: what top_p and min_p keep is mostly among them.
_FIRST_LOOK = 512


def draw_token(logits: npt.NDArray[np.float32], params: SamplingParams, key: int, *, truncates: bool) -> int:
    """One token: the first in a race in which each arrives after an exponential time, at its weight's rate.

    Args:
        logits: Shape (vocab_size,); -inf is never chosen.
        params: Their temperature is above 0.
        key: As race() takes it.
        truncates: Whether top_k, top_p or min_p leave something out.
    """
    shifted = logits - logits.max()
    times = race(key, len(logits))
    if not truncates:
        return int((_weights(shifted, params.temperature) / times).argmax())
    order = _kept(shifted, params)
    return int(order[(_weights(shifted[order], params.temperature) / times[order]).argmax()])


def race(key: int, vocab_size: int) -> npt.NDArray[np.float64]:
    """Exponentially distributed times of all tokens, given by a key of 64 bits."""
    # float64: the times that matter are those near 0, where float32 would have ties.
    return np.random.Generator(np.random.SFC64(key)).standard_exponential(vocab_size)


def _kept(shifted: npt.NDArray[np.float32], params: SamplingParams) -> npt.NDArray[np.intp]:
    """Tokens that top_k, top_p and min_p leave, in descending order of their logits.

    The most probable ones are looked at first. Where their mass is not enough for top_p, more are.
    """
    vocab_size = len(shifted)
    most = min(params.top_k or vocab_size, vocab_size)
    needed = 0.0
    if params.top_p < 1.0:
        needed = params.top_p * float(np.exp(shifted).sum(dtype=np.float64))
    looked_at = min(most, _FIRST_LOOK)
    while True:
        order = _top(shifted, looked_at)
        kept = looked_at
        if params.min_p > 0.0:
            kept = int(np.searchsorted(-shifted[order], -np.log(params.min_p), side="right"))
        if needed:
            # A token is kept where the mass before it is below what is needed.
            mass = np.cumsum(np.exp(shifted[order[:kept]]), dtype=np.float64)
            kept = min(kept, int(np.searchsorted(mass, needed)) + 1)
        if kept < looked_at or looked_at == most:
            return order[: max(1, kept)]
        looked_at = min(most, looked_at * 16)


def _top(shifted: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """The tokens of the largest logits, in descending order."""
    if count == len(shifted):
        return np.argsort(-shifted)
    candidates = np.argpartition(shifted, len(shifted) - count)[-count:]
    return candidates[np.argsort(-shifted[candidates])]


def _weights(shifted: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float32]:
    """Unnormalised probabilities at a temperature."""
    with np.errstate(over="ignore"):  # a cold temperature makes -inf of a low logit
        weights: npt.NDArray[np.float32] = np.exp(shifted / np.float32(temperature))
    return weights
