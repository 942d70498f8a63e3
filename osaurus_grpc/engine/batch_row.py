"""One sequence inside a batch: what is computed of it, and what is still to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from osaurus_grpc.engine.token_chain import Chain
from osaurus_grpc.engine.types import PromptImages

if TYPE_CHECKING:
    from osaurus_grpc.engine.logprobs import PromptScores
    from osaurus_grpc.engine.sampling import RowSampler
    from osaurus_grpc.engine.speculation import Drafts


@dataclass(slots=True, eq=False)
class BatchRow:
    """A sequence of a batch. Lives on the MLX thread.

    Attributes:
        uid: What the batch's caller knows it by.
        tokens: The tokens that are in its cache, in order.
        pending: Prompt tokens that are still to be computed.
        sampler: Its sampling state.
        end_tokens: Ids that end it.
        tokens_left: Tokens it may still gain.
        prompt_tokens: Length of its prompt, what was found in a cache included.
        caches: Its cache, one object a layer, while it has one of its own: until it joins a batch.
        chain: Names of its tokens.
        stable_tokens: Of its beginning, those that are likely to come again.
        pauses: Prompt lengths at which its prefill stops to have its state kept, in ascending order.
        drafts: Guesses what it says next while it runs alone; None where nobody does.
        scores: Gets the log-probabilities of its prompt's tokens; None where nobody asked.
        images: Those in its prompt, whose pieces are in tokens and pending by name; None is none.
    """

    uid: int
    tokens: list[int]
    pending: list[int]
    sampler: RowSampler
    end_tokens: frozenset[int]
    tokens_left: int
    prompt_tokens: int
    caches: list[Any]
    chain: Chain
    stable_tokens: int = 0
    pauses: list[int] = field(default_factory=list)
    drafts: Drafts | None = None
    scores: PromptScores | None = None
    images: PromptImages | None = None

    @property
    def position_delta(self) -> int:
        """What is added to a token's place behind the prompt to give its position."""
        return self.images.position_delta if self.images is not None else 0

    @property
    def processed(self) -> int:
        """Prompt tokens that need no computing any more."""
        return self.prompt_tokens - len(self.pending)

    @property
    def before_pause(self) -> int:
        """Pending tokens up to the next pause; all of them where none is left."""
        return next(
            (pause - self.processed for pause in self.pauses if pause > self.processed), len(self.pending)
        )
