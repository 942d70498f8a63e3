"""Continuous batching of one model: sequences join, are prefilled in chunks, decode together, leave.

The scheme is that of mlx-lm's BatchGenerator; the parts are prefill (rows with caches of their own)
and decoding (one cache a layer for all rows). Beginnings are taken from a slot, which is a finished
sequence's cache continued in place, or else from the prompt cache, whose blocks are copied. What was
computed goes into the prompt cache between steps, never before a first token.

mlx-lm's caches change from release to release; mlx-lm is pinned, and self_test() proves at start-up
that a batch of them still gives what its rows give alone.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import maybe_set_recommended_wired_limit

from osaurus_grpc.engine import layers
from osaurus_grpc.engine.batch_row import BatchRow
from osaurus_grpc.engine.cache_layout import Row
from osaurus_grpc.engine.decoding import DecodeBatch
from osaurus_grpc.engine.logprobs import PromptScores
from osaurus_grpc.engine.prefill import Prefill
from osaurus_grpc.engine.prompt_cache import Prefix, PromptCache
from osaurus_grpc.engine.sampling import RowSampler
from osaurus_grpc.engine.slots import Slot
from osaurus_grpc.engine.speculation import Speculation, Trial
from osaurus_grpc.engine.token_chain import Chain
from osaurus_grpc.engine.types import PromptImages, Token
from osaurus_grpc.errors import OsaurusError


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt advanced to so many of so many tokens.

    Attributes:
        uid: The sequence.
        processed: Tokens of its prompt that need no computing any more.
        total: Tokens of its prompt.
        scores: Its tokens whose log-probabilities became known, where somebody asked.
    """

    uid: int
    processed: int
    total: int
    scores: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Decoded:
    """A sequence gained a token, or ended.

    Attributes:
        uid: The sequence.
        token: The new token; None where there is none, because the sequence failed or was to have none.
        end: None while the sequence goes on; "end_token" where the token is its end and no part of it;
            else "stop", "length" or the error of a constraint that failed. The row has left the batch.
    """

    uid: int
    token: Token | None
    end: str | OsaurusError | None


BatchEvent = Prefilled | Decoded


@dataclass(frozen=True, slots=True, eq=False)
class _Left:
    """A row that left, and the slot with its caches."""

    row: BatchRow
    slot: Slot


class Batch:
    """The running sequences of one model. Every method runs on the MLX thread.

    Args:
        model: An mlx-lm model.
        end_tokens: Ids that end a sequence.
        batch_size: Rows at most; what is beyond it must not be inserted.
        prompt_cache: Where beginnings are found and kept; None keeps none.
        speculation: How a sequence that is alone guesses ahead; None guesses nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        end_tokens: Sequence[int],
        batch_size: int,
        prompt_cache: PromptCache | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self._model = model
        self._end_tokens = frozenset(end_tokens)
        self._batch_size = batch_size
        self._prompt_cache = prompt_cache
        self._speculation = speculation
        self._prefill = Prefill(model)
        self._decoding = DecodeBatch(model, batch_size)
        self._next_uid = 0
        # What the prompt cache has no records of yet; the oldest first.
        self._unsaved: deque[BatchRow | _Left] = deque()
        # Weights that macOS may page out make every step slow (mlx-lm #652).
        self._wired_limit = maybe_set_recommended_wired_limit()

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
        guesses: bool = True,
        scores: PromptScores | None = None,
        images: PromptImages | None = None,
    ) -> tuple[int, int]:
        """Add a sequence, to be prefilled from the next step on.

        Args:
            prompt: Its tokens, pieces of images by name.
            max_tokens: Tokens to generate at most; 0 computes the prompt only.
            sampler: Chooses them.
            ignore_eos: Generate max_tokens, whatever the model says.
            chain: The prompt's names; None makes them.
            stable_tokens: How many tokens at its beginning are likely to come again.
            guesses: Whether it may guess ahead; one with images does not.
            scores: Gets the log-probabilities of the prompt's tokens, all of which are computed then.
            images: Those in the prompt; None is none.

        Returns:
            Its uid, and how many of its prompt's tokens need not be computed.

        Raises:
            ValueError: An empty prompt, or a negative max_tokens.
        """
        if not prompt or max_tokens < 0:
            raise ValueError("a sequence needs a prompt and a number of tokens to generate")
        guesses = guesses and images is None  # guesses come from the prompt, and its names are no tokens
        chain = chain.copy() if chain else Chain()
        store, prefix = self._prompt_cache, None
        if store is not None:
            chain.extend(prompt)
            prefix = self._beginning(store, chain, prompt) if scores is None else None
        found = prefix.length if prefix else 0
        row = BatchRow(
            uid=self._next_uid,
            tokens=list(prompt[:found]),
            pending=list(prompt[found:]),
            sampler=sampler,
            end_tokens=frozenset() if ignore_eos else self._end_tokens,
            tokens_left=max_tokens,
            prompt_tokens=len(prompt),
            caches=prefix.caches if prefix else make_prompt_cache(self._model),
            chain=chain,
            stable_tokens=stable_tokens,
            pauses=store.pauses(found, len(prompt), stable_tokens) if store is not None else [],
            drafts=self._speculation.drafts() if self._speculation is not None and guesses else None,
            scores=scores,
            images=images,
        )
        self._next_uid += 1
        self._prefill.rows.append(row)
        return row.uid, found

    def _beginning(self, store: PromptCache, chain: Chain, prompt: Sequence[int]) -> Prefix | None:
        """As much of a prompt as is known."""
        slot = store.find_slot(chain, prompt)
        if slot is None:
            return store.lookup(chain, prompt)
        for left in self._unsaved:
            if isinstance(left, _Left) and left.slot is slot:
                self._save(left)  # what is cut off may be somebody's next beginning
                self._unsaved.remove(left)
                break
        if slot not in store.slots:  # where there was not room for both, its records pushed it out
            return store.lookup(chain, prompt)
        return store.take(slot, prompt)

    def remove(self, uid: int) -> None:
        """Drop a sequence at whatever stage it is; unknown uids are ignored.

        What was computed of it is kept for the next request that begins alike.
        """
        for row in self._decoding.rows:
            if row.uid == uid:
                self._leave([row])
                return
        for row in self._prefill.rows:
            if row.uid == uid:
                self._prefill.rows.remove(row)
                self._retire(row, row.caches)
                return

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' caches, padding and room to grow included."""
        rows = (cache for row in self._prefill.rows for cache in row.caches)
        return sum(int(cache.nbytes) for cache in (*rows, *self._decoding.caches))

    @property
    def prefilling(self) -> int:
        """Sequences whose prompt is not processed yet."""
        return len(self._prefill.rows)

    @property
    def decoding(self) -> int:
        """Sequences that gain a token every step."""
        return len(self._decoding.rows)

    @property
    def spare_rows(self) -> int:
        """Rows beyond those it has that it may hold memory for, where that spares copies."""
        return self._decoding.spare_rows

    @spare_rows.setter
    def spare_rows(self, rows: int) -> None:
        self._decoding.spare_rows = rows

    @property
    def trial(self) -> Trial | None:
        """The guess that the last step verified, if it did."""
        return self._decoding.trial

    @property
    def is_timely(self) -> bool:
        """Whether the last step's decoding began a pass and did nothing besides."""
        return self._decoding.is_timely

    def __len__(self) -> int:
        return self.prefilling + self.decoding

    def step(self, prefill_tokens: int, awaited: Container[int] = ()) -> list[BatchEvent]:
        """One decode step of all rows, then prefill.

        Args:
            prefill_tokens: Tokens to prefill over all prompts, padding included, at least 1.
            awaited: Sequences whose prompts others wait for: they are kept as soon as they are computed.

        Any exception leaves the batch undefined: it must be thrown away (close()).
        """
        return [*self.decode(awaited), *self.prefill(prefill_tokens, awaited)]

    def prefill(self, prefill_tokens: int, awaited: Container[int] = ()) -> list[BatchEvent]:
        """Process prompts; the second half of step(), and so are its arguments."""
        events: list[BatchEvent] = []
        store = self._prompt_cache
        # Rows that joined the prompts since may leave less room for spare ones.
        self._decoding.fit()
        for row in self._prefill.step(prefill_tokens, self._decoding):
            if row.pending and store is not None and (row.uid in awaited or not store.is_plain):
                # Windows move on and states change: what is to be kept of them is kept now.
                self._store(row, row.caches, 0, is_end=row.processed in row.pauses)
            told = row.scores.take() if row.scores is not None else ()
            events.append(Prefilled(row.uid, row.processed, row.prompt_tokens, told))
            if not (row.pending or row.tokens_left):
                self._retire(row, row.caches)
                events.append(Decoded(row.uid, None, "length"))
        return events

    def decode(self, awaited: Container[int] = ()) -> list[BatchEvent]:
        """One token for every row whose prompt is processed, but for those whose pass is only started.

        The first half of step().
        """
        events: list[BatchEvent] = []
        ended: list[BatchRow] = []
        fresh: list[BatchRow] = []
        for row, token, end in self._decoding.step(guesses=not self._prefill.rows):
            events.append(Decoded(row.uid, token, end))
            if end is not None:
                ended.append(row)
            elif self._prompt_cache is not None and len(row.tokens) == row.prompt_tokens:
                # Its first token is out: there is time for others now.
                (fresh if row.uid in awaited else self._unsaved).append(row)
        for row in fresh:
            self._save(row)
        self._leave(ended)
        return events

    # What was computed is kept.

    def _leave(self, leaving: Sequence[BatchRow]) -> None:
        """Let rows out of the decode batch, and keep what was computed of them."""
        decoding = self._decoding
        for i, row in enumerate(decoding.rows):
            if row not in leaving:
                continue
            if row in self._unsaved:
                self._unsaved.remove(row)
            if len(decoding.rows) == 1:
                self._retire(row, decoding.caches)
            else:
                self._store(row, decoding.caches, i, is_end=True)
        decoding.drop(leaving)

    def _retire(self, row: BatchRow, caches: list[Any]) -> None:
        """Keep the caches of a row that was alone in them: in place, and as records when there is time."""
        if self._prompt_cache is None or not row.tokens:
            return
        slot = self._prompt_cache.leave(row.tokens, caches) if layers.is_plain(caches) else None
        if slot is None:
            self._store(row, caches, 0, is_end=True)
        else:
            self._unsaved.append(_Left(row, slot))

    @property
    def is_tidy(self) -> bool:
        """Whether all that can be kept is."""
        return not self._unsaved

    def tidy(self) -> None:
        """Make the records of one sequence that has none yet, between two steps.

        An exception leaves the batch undefined, as one of step() does.
        """
        if self._unsaved:
            self._save(self._unsaved.popleft())

    def _save(self, what: BatchRow | _Left) -> None:
        """Make the records of a row that decodes, or of one that left its caches in a slot."""
        assert self._prompt_cache is not None
        if isinstance(what, BatchRow):
            self._store(what, self._decoding.caches, self._decoding.rows.index(what))
        elif what.slot in self._prompt_cache.slots:
            self._store(what.row, what.slot.caches, 0, is_end=True)
            self._prompt_cache.make_room(what.slot)

    def _store(self, row: BatchRow, caches: list[Any], index: int, *, is_end: bool = False) -> None:
        """Make what records of a row are missing."""
        if self._prompt_cache is not None:
            view = Row(caches, index, row.tokens)
            self._prompt_cache.store(row.chain, view, stable_tokens=row.stable_tokens, is_end=is_end)

    def close(self) -> None:
        """Give up all sequences and free their caches; also after an exception."""
        self._prefill.clear()
        self._decoding.clear()
        self._unsaved.clear()
        if self._speculation is not None and self._speculation.draft is not None:
            self._speculation.draft.clear()
        if self._prompt_cache is not None:
            self._prompt_cache.slots.clear()
        mx.clear_cache()
        if self._wired_limit is not None:
            mx.synchronize()
            mx.set_wired_limit(self._wired_limit)
            self._wired_limit = None


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
