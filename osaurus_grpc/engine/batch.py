"""Continuous batching of one model: the adapter around mlx-lm's BatchGenerator.

This is the only module that touches mlx-lm's private parts, which change from release to release;
mlx-lm is pinned, and self_test() proves at start-up that what is relied on still holds:

* BatchGenerator keeps the rows of a batch, their caches and our per-row samplers aligned while
  sequences join and leave; it left-pads, prefills in chunks and holds one decode step in flight.
* Its prompt and decode batches are replaced by subclasses here. The decode batch samples all rows
  at once with settings of their own, computes log-probabilities only for rows that asked, and hands
  out no caches of finished rows (mlx-lm slices and synchronises every layer for them).
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import mlx.nn as nn
import numpy as np
from mlx_lm.generate import (
    BatchGenerator,
    GenerationBatch,
    PromptProcessingBatch,
    StopSequences,
)

from osaurus_grpc.engine.cache_layout import Row
from osaurus_grpc.engine.prompt_cache import PromptCache
from osaurus_grpc.engine.sampling import BatchSampler, LogprobRow, RowSampler
from osaurus_grpc.engine.token_chain import Chain
from osaurus_grpc.engine.types import Token, TokenLogprob
from osaurus_grpc.errors import OsaurusError

# Recurrent states and the offsets of some caches are rebound every step without being evaluated and
# would grow a graph without bound (mlx-lm #1672); evaluating them this often keeps it short.
_STATE_EVALUATION_STEPS = 64


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt advanced to so many of so many tokens."""

    uid: int
    processed: int
    total: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """A sequence gained a token, or ended.

    Attributes:
        uid: The sequence.
        token: The new token; None where the sequence ended with its end-of-sequence token, or failed.
        end: None while the sequence goes on, else "stop", "length" or the error of a constraint that
            failed; the row has left the batch.
    """

    uid: int
    token: Token | None
    end: str | OsaurusError | None


BatchEvent = Prefilled | Decoded


class _DecodeBatch(GenerationBatch):  # type: ignore[misc]  # mlx-lm ships no types
    """mlx-lm's decode batch with our sampling. Its samplers are RowSamplers, one a row."""

    uids: list[int]
    prompt_cache: list[Any]
    tokens: list[list[int]]
    samplers: list[RowSampler]
    max_tokens: list[int]
    _next_tokens: mx.array
    _next_logprobs: list[LogprobRow | None]

    def _step(self) -> tuple[list[int], list[LogprobRow | None]]:
        # After mlx_lm.generate.GenerationBatch._step: the step for the next token is built and
        # started before this step's token is awaited, so the device always has work.
        fed = self._current_tokens = self._next_tokens
        self._current_logprobs = self._next_logprobs
        logits = self.model(fed[:, None], cache=self.prompt_cache)[:, -1, :]
        sampler = self.__dict__.setdefault("_batch_sampler", BatchSampler())
        tokens, details = sampler.sample(self.samplers, fed, logits)
        self._next_tokens, self._next_logprobs = tokens, details
        pending = [array for detail in details if detail is not None for array in detail.arrays()]
        mx.async_eval(tokens, pending, self._penalty_states())  # type: ignore[no-untyped-call]  # MLX's stub
        mx.eval(fed)
        ids = cast("list[int]", fed.tolist())
        for row, token in zip(self.tokens, ids, strict=True):
            row.append(token)
        return ids, self._current_logprobs

    def _penalty_states(self) -> list[mx.array]:
        return [
            array for row in self.samplers if row.penalties is not None for array in row.penalties.state()
        ]

    def next(self) -> list[Decoded]:
        """The tokens of the step that is due; rows that end leave the batch."""
        if not self.uids:
            return []
        ids, details = self._step()
        events: list[Decoded] = []
        keep: list[int] = []
        for i, uid in enumerate(self.uids):
            self._num_tokens[i] += 1
            if self._matchers[i].advance(ids[i]):
                events.append(Decoded(uid, None, "stop"))
                continue
            guard = self.samplers[i].guard
            if guard is not None and guard.failure is not None:
                events.append(Decoded(uid, None, guard.failure))
                continue
            end = "length" if self._num_tokens[i] >= self.max_tokens[i] else None
            if guard is not None and guard.is_done:
                end = "stop"
            events.append(Decoded(uid, _token(ids[i], details[i]), end))
            if end is None:
                keep.append(i)
        if len(keep) < len(self.uids):
            for i in sorted(set(range(len(self.uids))) - set(keep)):
                self.leaving(self, i)
            self.filter(keep)
        return events

    @staticmethod
    def leaving(batch: _DecodeBatch, row: int) -> None:
        """Called with each row that ended, before its cache is dropped; the batch's owner sets it."""


class _PromptBatch(PromptProcessingBatch):  # type: ignore[misc]  # mlx-lm ships no types
    """mlx-lm's prompt batch, which hands its rows to our decode batch."""

    uids: list[int]
    prompt_cache: list[Any]
    tokens: list[list[int]]
    samplers: list[RowSampler]
    logits_processors: list[Any]
    max_tokens: list[int]
    stop_sequences: list[Any]

    def split(self, indices: list[int]) -> _PromptBatch:
        """Take rows out; without a copy of their caches where no row stays."""
        if len(indices) < len(self.uids):
            return cast("_PromptBatch", super().split(indices))
        taken = self.__class__.__new__(self.__class__)
        taken.__dict__.update(self.__dict__)
        self._forget_rows()
        return taken

    def _forget_rows(self) -> None:
        self.uids, self.prompt_cache, self.tokens = [], [], []
        self.samplers, self.logits_processors, self.max_tokens, self.stop_sequences = [], [], [], []

    def generate(self, tokens: list[list[int]]) -> _DecodeBatch:
        if any(len(row) > 1 for row in tokens):
            self.prompt([row[:-1] for row in tokens])
        batch = _DecodeBatch(
            self.model,
            self.uids,
            mx.array([row[-1] for row in tokens]),
            self.prompt_cache,
            self.tokens,
            self.samplers,
            self.fallback_sampler,
            self.logits_processors,
            self.stop_sequences,
            self.max_tokens,
        )
        self._forget_rows()
        return batch


class _Generator(BatchGenerator):  # type: ignore[misc]  # mlx-lm ships no types
    """mlx-lm's generator over our two batches."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        super().__init__(model, completion_batch_size=batch_size, prefill_batch_size=batch_size)
        self.clear()

    def clear(self) -> None:
        """Drop all sequences with their caches, whatever state an exception left them in."""
        self._prompt_batch = _PromptBatch.empty(self.model, self.sampler)
        self._generation_batch = _DecodeBatch.empty(self.model, self.sampler)
        self._unprocessed_sequences.clear()
        self._currently_processing.clear()

    def _make_batch(self, n: int) -> _PromptBatch:
        batch = super()._make_batch(n)
        batch.__class__ = _PromptBatch  # same attributes, other generate()
        return cast("_PromptBatch", batch)


def _token(token_id: int, detail: LogprobRow | None) -> Token:
    """A token with its log-probabilities, which were evaluated with it."""
    if detail is None:
        return Token(token_id)
    ids, values = np.asarray(detail.top_ids), np.asarray(detail.top)
    top = tuple(
        TokenLogprob(int(i), float(value)) for i, value in zip(ids.tolist(), values.tolist(), strict=True)
    )
    return Token(token_id, float(np.asarray(detail.chosen)), top)


@dataclass(slots=True)
class _Reuse:
    """What is known of a sequence's place in the prompt cache.

    Attributes:
        chain: Names of its tokens.
        found: Prompt tokens that were not computed but found.
        stable_tokens: Of its stable beginning.
        pauses: Tokens after which its prefill stops to have its state kept.
    """

    chain: Chain
    found: int = 0
    stable_tokens: int = 0
    pauses: list[int] = field(default_factory=list)


class Batch:
    """The running sequences of one model. Every method runs on the MLX thread.

    Args:
        model: An mlx-lm model.
        end_tokens: Ids that end a sequence.
        batch_size: Rows at most.
        prompt_cache: Where beginnings are found and kept; None keeps none.
    """

    def __init__(
        self,
        model: nn.Module,
        end_tokens: Sequence[int],
        batch_size: int,
        prompt_cache: PromptCache | None = None,
    ) -> None:
        self._generator = _Generator(model, batch_size)
        self._prompt_cache = prompt_cache
        self._generator._generation_batch.leaving = self._keep_end
        self._reuse: dict[int, _Reuse] = {}
        self._end = StopSequences([(token,) for token in end_tokens] or None)
        self._no_end = StopSequences(None)
        self._steps = 0

    def match_length(self, chain: Chain, prompt: Sequence[int]) -> int:
        """Tokens at a prompt's beginning that need not be computed."""
        return 0 if self._prompt_cache is None else self._prompt_cache.match_length(chain, prompt)

    def insert(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampler: RowSampler,
        *,
        ignore_eos: bool = False,
        chain: Chain | None = None,
        stable_tokens: int = 0,
    ) -> tuple[int, int]:
        """Add a sequence, to be prefilled from the next step on.

        Args:
            prompt: Its tokens.
            max_tokens: Tokens to generate at most.
            sampler: Chooses them.
            ignore_eos: Generate max_tokens, whatever the model says.
            chain: The prompt's names; None makes them.
            stable_tokens: How many tokens at its beginning are likely to come again.

        Returns:
            Its uid, and how many of its prompt's tokens need not be computed.

        Raises:
            ValueError: An empty prompt, or a max_tokens below 1.
        """
        reuse = _Reuse(chain.copy() if chain else Chain(), stable_tokens=stable_tokens)
        caches = None
        if self._prompt_cache is not None:
            reuse.chain.extend(prompt)
            prefix = self._prompt_cache.lookup(reuse.chain, prompt)
            if prefix is not None:
                reuse.found, caches = prefix.length, [prefix.caches]
            reuse.pauses = self._prompt_cache.pauses(reuse.found, len(prompt), stable_tokens)
        places = [reuse.found, *reuse.pauses, len(prompt)]
        (uid,) = self._generator.insert_segments(
            [[list(prompt[start:end]) for start, end in pairwise(places)]],
            max_tokens=[max_tokens],
            caches=caches,
            all_tokens=[list(prompt[: reuse.found])],
            samplers=[sampler],
            stop_sequences=[self._no_end if ignore_eos else self._end],
        )
        self._reuse[uid] = reuse
        return int(uid), reuse.found

    def remove(self, uid: int) -> None:
        """Drop a sequence at whatever stage it is; unknown uids are ignored.

        What was computed of it is kept for the next request that begins alike.
        """
        generator = self._generator
        for batch in (generator._generation_batch, generator._prompt_batch):
            if uid in batch.uids:
                self._keep_end(batch, batch.uids.index(uid))
        generator.remove([uid])
        self._reuse.pop(uid, None)

    def _keep_end(self, batch: _PromptBatch | _DecodeBatch, row: int) -> None:
        """Keep a row that leaves, for requests that go on from where it ends."""
        self._keep(batch, row, is_end=True)
        self._reuse.pop(batch.uids[row], None)

    def _keep(self, batch: _PromptBatch | _DecodeBatch, row: int, *, is_end: bool) -> None:
        """Keep a row's cache for requests that begin alike."""
        reuse = self._reuse.get(batch.uids[row])
        if self._prompt_cache is not None and reuse is not None:
            self._prompt_cache.store(
                reuse.chain,
                Row(batch.prompt_cache, row, batch.tokens[row]),
                stable_tokens=reuse.stable_tokens,
                is_end=is_end,
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' caches, padding and room to grow included."""
        return int(self._generator.prompt_cache_nbytes)

    @property
    def prefilling(self) -> int:
        """Sequences whose prompt is not processed yet."""
        return len(self._generator._prompt_batch) + len(self._generator._unprocessed_sequences)

    @property
    def decoding(self) -> int:
        """Sequences that gain a token every step."""
        return len(self._generator._generation_batch)

    def __len__(self) -> int:
        return self.prefilling + self.decoding

    def step(self, prefill_tokens: int) -> list[BatchEvent]:
        """One decode step of all rows, then one prefill chunk.

        Args:
            prefill_tokens: Tokens to prefill over all prompts, padding included, at least 1.

        Any exception leaves the batch undefined: it must be thrown away (close()).
        """
        generator = self._generator
        chunk = max(1, prefill_tokens // max(1, self.prefilling))
        generator.prefill_step_size = chunk
        generator._prompt_batch.prefill_step_size = chunk
        prompts, decoded = generator.next()
        self._steps += 1
        if self._steps % _STATE_EVALUATION_STEPS == 0:
            mx.eval([cache.state for cache in generator._generation_batch.prompt_cache])
        return [*decoded, *(self._prefilled(response) for response in prompts)]

    def _prefilled(self, response: PromptProcessingBatch.Response) -> Prefilled:
        """A prompt's progress, what was found counted in; what is processed of it is kept."""
        uid = response.uid
        processed, total = response.progress
        reuse = self._reuse[uid]
        generator = self._generator
        batch = generator._generation_batch if response.end_of_prompt else generator._prompt_batch
        processed, total = processed + reuse.found, total + reuse.found
        self._keep(batch, batch.uids.index(uid), is_end=processed in reuse.pauses)
        return Prefilled(uid, processed, total)

    def close(self) -> None:
        """Give up all sequences and free their caches; also after an exception."""
        self._generator.clear()
        self._reuse.clear()
        mx.clear_cache()
        self._generator.close()


def self_test() -> None:
    """Prove on a tiny random model that mlx-lm behaves as this module expects.

    Raises RuntimeError where it does not, naming what broke. Takes some milliseconds.
    """
    from mlx_lm.models.llama import Model, ModelArgs

    from osaurus_grpc.engine.types import SamplingParams

    args = ModelArgs(
        model_type="llama", hidden_size=16, num_hidden_layers=1, intermediate_size=16,
        num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5, vocab_size=32,
    )  # fmt: skip
    model = Model(args)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    greedy = SamplingParams(temperature=0.0)

    def run(prompts: list[list[int]]) -> list[list[int]]:
        batch = Batch(model, (), len(prompts))
        answers: dict[int, list[int]] = {}
        try:
            for prompt in prompts:
                row = RowSampler(greedy, prompt, (), top_logprobs=1, seed=0, vocab_size=32)
                uid, _ = batch.insert(prompt, 4, row)
                answers[uid] = []
                for event in batch.step(8):
                    if isinstance(event, Decoded) and event.token is not None:
                        answers[event.uid].append(event.token.token_id)
            for _ in range(64):
                if not len(batch):
                    break
                for event in batch.step(8):
                    if isinstance(event, Decoded) and event.token is not None:
                        answers[event.uid].append(event.token.token_id)
        finally:
            batch.close()
        return list(answers.values())

    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
    try:
        together = run(prompts)
        alone = [run([prompt])[0] for prompt in prompts]
    except Exception as error:
        raise RuntimeError(f"mlx-lm does not behave as expected: {type(error).__name__}") from error
    if together != alone or any(len(answer) != 4 for answer in together):
        raise RuntimeError("mlx-lm does not behave as expected: a batch and its rows alone differ")
