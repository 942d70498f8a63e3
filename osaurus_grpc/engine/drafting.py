"""A draft model: a small model of the same vocabulary that guesses what a large one will say.

It has one sequence at a time and a KV cache of its own, which follows that sequence: what a guess had
wrong is cut off, and what is new is computed before the next guess. The cache outlives the sequence,
so a chat's next turn goes on from it.

A token is guessed with the settings of the sequence and the number that its own sampler will draw it
with. Where both models give the same distribution, that is the same token.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Sequence
from typing import Any, cast

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from osaurus_grpc.engine import layers
from osaurus_grpc.engine.head import OutputHead
from osaurus_grpc.engine.memory import KeptCaches
from osaurus_grpc.engine.sampling import BatchSampler, RowSampler
from osaurus_grpc.engine.slots import common_length
from osaurus_grpc.engine.speculation import Guess

# Tokens of a prompt read in one step, which others wait for.
_CHUNK_TOKENS = 512


class KeptBesideDraft:
    """The caches that can be dropped for want of memory, a draft model's among them and first.

    Args:
        kept: The others.
        draft: The draft model.
    """

    def __init__(self, kept: KeptCaches, draft: DraftModel) -> None:
        self._kept = kept
        self._draft = draft

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._kept.nbytes + self._draft.nbytes

    def allow(self, nbytes: int) -> None:
        """Hold no more than so many bytes from now on."""
        if self.nbytes > nbytes and self._draft.nbytes:
            self._draft.give_up()
        self._kept.allow(max(0, nbytes - self._draft.nbytes))


class DraftModel:
    """A model that guesses for one sequence at a time. Lives on the MLX thread.

    Args:
        model: An mlx-lm model.
        vocab_size: Token ids that both it and the model that it drafts for know.

    Raises:
        ValueError: Its KV cache cannot be cut back.
    """

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._head = OutputHead(model)
        self._sampler = BatchSampler()
        self._caches: list[Any] = make_prompt_cache(model)
        # What the caches hold, in order.
        self._tokens: list[int] = []
        # The sequence of the last guess, and how much of it is known to be what the caches hold.
        self._followed: Sequence[int] | None = None
        self._matched = 0
        # The sequence for whose sake the caches were dropped.
        self._given_up: Sequence[int] | None = None
        if not layers.is_plain(self._caches):
            raise ValueError("a draft model's caches must be plain")

    @property
    def nbytes(self) -> int:
        """Bytes of its caches."""
        return sum(int(cache.nbytes) for cache in self._caches if cache.keys is not None)

    def propose(self, tokens: Sequence[int], last: int, count: int, sampler: RowSampler) -> Guess:
        """Guess what comes after a sequence.

        Args:
            tokens: The sequence without its last token: one and the same object for a sequence.
            last: The last token.
            count: Tokens to guess, at least 1.
            sampler: The sequence's; left as it is.
        """
        if tokens is self._given_up:
            return Guess([])
        self._follow(tokens)
        missing = [*tokens[len(self._tokens) :], last]
        if max(missing) >= self._vocab_size:  # a place in the vocabulary that no text has
            self._given_up = tokens
            return Guess([])
        if len(missing) > _CHUNK_TOKENS:
            self._read(missing[:_CHUNK_TOKENS])
            return Guess([], is_timely=False)
        fed = mx.array([last])
        logits = self._head.logits(mx.array([missing]), self._caches, [len(missing) - 1])
        drawn: list[mx.array] = []
        shadow = sampler.shadow()
        for i in range(count):
            token, _ = self._sampler.sample([shadow], fed, logits[:, : self._vocab_size])
            drawn.append(token)
            if i + 1 < count:
                fed = token
                logits = self._model(token[:, None], cache=self._caches)[:, -1, :]
        guessed = cast("list[int]", mx.concatenate(drawn).tolist())
        self._tokens += [*missing, *guessed[:-1]]
        return Guess(guessed, is_timely=len(missing) <= count + 1)

    def _follow(self, tokens: Sequence[int]) -> None:
        """Cut off what is not of this sequence."""
        known = self._matched if tokens is self._followed else 0
        most = min(len(self._tokens), len(tokens))
        known += common_length(self._tokens[known:most], tokens[known:most], most)
        surplus = len(self._tokens) - known
        if surplus:
            for cache in self._caches:
                cache.trim(surplus)
            del self._tokens[known:]
        self._followed, self._matched, self._given_up = tokens, known, None

    def _read(self, tokens: list[int]) -> None:
        self._model(mx.array([tokens]), cache=self._caches)
        layers.evaluate(self._caches)
        self._tokens += tokens

    def give_up(self) -> None:
        """Drop the caches for want of memory; the sequence at hand gets no more guesses."""
        self._given_up = self._followed
        self.clear()

    def clear(self) -> None:
        """Drop the caches, whatever state an exception left them in."""
        self._caches = make_prompt_cache(self._model)
        self._tokens, self._followed, self._matched = [], None, 0
