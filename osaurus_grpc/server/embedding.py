"""An embedding request's way: model → place → lease → tokens → vectors.

Texts get the special tokens that the model's tokenizer puts around a text; inputs of token ids are
taken as they are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from osaurus_grpc.chat.length import fewest_tokens
from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.errors import ContextLengthError, InvalidRequestError
from osaurus_grpc.models.loading import LoadedModel
from osaurus_grpc.models.residency import Residency
from osaurus_grpc.server import calls
from osaurus_grpc.server.admission import Admission
from osaurus_grpc.server.convert import measured_duration, seconds_from_duration
from osaurus_grpc.server.listing import Listing
from osaurus_grpc.server.validation import (
    FieldViolation,
    duration_violations,
    name_violations,
    require_valid,
    token_violations,
)
from osaurus_grpc.telemetry import Telemetry
from osaurus_grpc.v1 import embedding_pb2, usage_pb2

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

MAX_INPUTS: Final = 2_048


def embed_violations(request: embedding_pb2.EmbedRequest) -> list[FieldViolation]:
    """Everything that is wrong with a request, as far as that can be told without the model."""
    return [*name_violations("model", request.model), *_violations(request)]


def _violations(request: embedding_pb2.EmbedRequest) -> Iterator[FieldViolation]:
    if request.inputs and request.token_inputs:
        yield FieldViolation("token_inputs", "Only one of inputs and token_inputs may be set.")
    if not 1 <= len(request.inputs) + len(request.token_inputs) <= MAX_INPUTS:
        yield FieldViolation("inputs", f"inputs must have at least one and at most {MAX_INPUTS} entries.")
    for i, text in enumerate(request.inputs):
        if not text:
            yield FieldViolation(f"inputs[{i}]", f"inputs[{i}] must not be empty.")
    for i, tokens in enumerate(request.token_inputs):
        if not tokens.token_ids:
            yield FieldViolation(f"token_inputs[{i}]", f"token_inputs[{i}] must not be empty.")
    if request.HasField("dimensions") and request.dimensions < 1:
        yield FieldViolation("dimensions", "dimensions must be at least 1.")
    if request.HasField("keep_alive"):
        yield from duration_violations("keep_alive", request.keep_alive)


# Texts that are tokenized together.
_TEXTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class _Frame:
    """The special tokens that a tokenizer puts around a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Frame:
        bare = tokenizer.encode("a", add_special_tokens=False)
        whole = tokenizer.encode("a", add_special_tokens=True)
        start = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
        return cls(tuple(whole[:start]), tuple(whole[start + len(bare) :]))

    def cut(self, token_ids: Sequence[int], limit: int) -> Sequence[int]:
        """At most limit tokens, the special ones kept."""
        if len(token_ids) <= limit:
            return token_ids
        kept = max(0, limit - len(self.after))
        return [*token_ids[:kept], *self.after][:limit]


def tokenize(request: embedding_pb2.EmbedRequest, model: LoadedModel) -> list[Sequence[int]]:
    """A validated request's inputs as token ids, each within the model's context.

    Raises:
        InvalidRequestError: A text has no tokens, or a token is not the model's.
        ContextLengthError: An input is too long and may not be cut.
    """
    limit = model.context_length
    for i, tokens in enumerate(request.token_inputs):
        field = f"token_inputs[{i}].token_ids"
        require_valid([*token_violations(field, tokens.token_ids, model.vocab_size)])
    inputs: list[Sequence[int]] = [list(tokens.token_ids) for tokens in request.token_inputs]
    frame = _Frame((), ())
    if request.inputs:
        frame = _Frame.of(model.tokenizer)
        _require_fit(request, model)
    made: list[Sequence[int]] = []
    # A few at a time, so that an input that is too long is refused before those after it are looked at.
    for start in range(0, len(request.inputs), _TEXTS_AT_ONCE):
        texts = list(request.inputs[start : start + _TEXTS_AT_ONCE])
        found = model.tokenizer(texts, add_special_tokens=True)["input_ids"]
        made.extend(_fitting(found, start, request, limit, frame))
    return made or list(_fitting(inputs, 0, request, limit, frame))


def _require_fit(request: embedding_pb2.EmbedRequest, model: LoadedModel) -> None:
    """Refuse a text that is longer than any that fits, before it is tokenized."""
    if request.truncate:
        return
    for i, text in enumerate(request.inputs):
        fewest = fewest_tokens(model.tokenizer, text)
        if fewest > model.context_length:
            raise _too_long(f"inputs[{i}]", fewest, model.context_length, is_estimate=True)


def _too_long(field: str, tokens: int, limit: int, *, is_estimate: bool = False) -> ContextLengthError:
    """An input is no prompt, and nothing answers it."""
    count = f"at least {tokens}" if is_estimate else str(tokens)
    text = f"{field} has {count} tokens; the model's context holds {limit}."
    return ContextLengthError(limit=limit, prompt_tokens=tokens, field=field, message=text)


def _fitting(
    inputs: Sequence[Sequence[int]],
    start: int,
    request: embedding_pb2.EmbedRequest,
    limit: int,
    frame: _Frame,
) -> Iterator[Sequence[int]]:
    name = "inputs" if request.inputs else "token_inputs"
    for i, token_ids in enumerate(inputs, start):
        if not token_ids:
            raise InvalidRequestError(f"{name}[{i}] holds no tokens.", field=f"{name}[{i}]")
        if len(token_ids) > limit and not request.truncate:
            raise _too_long(f"{name}[{i}]", len(token_ids), limit)
        yield frame.cut(token_ids, limit)


def finished(vectors: list[list[float]], *, dimensions: int | None, normalize: bool) -> np.ndarray:
    """The vectors as they are sent: cut, then scaled to length 1 where that is wanted.

    Returns:
        float32, shape (inputs, dimensions). A vector of zeros stays one.
    """
    values = np.asarray(vectors, dtype=np.float32)[:, :dimensions]
    if normalize:
        lengths = np.linalg.norm(values, axis=1, keepdims=True)
        values = (values / np.where(lengths > 0, lengths, np.float32(1))).astype(np.float32)
    return values


class Embedding:
    """Answers embedding requests; the arguments are those of Generation."""

    def __init__(
        self,
        *,
        listing: Listing,
        residency: Residency,
        engine: Engine,
        admission: Admission,
        telemetry: Telemetry,
    ) -> None:
        self._listing = listing
        self._residency = residency
        self._engine = engine
        self._admission = admission
        self._telemetry = telemetry

    async def embed(self, request: embedding_pb2.EmbedRequest) -> embedding_pb2.EmbedResponse:
        """The vectors of a request's inputs.

        Raises:
            OsaurusError: Anything that errors.py lists.
        """
        call = calls.current()
        require_valid(embed_violations(request))
        entry = await self._listing.find(request.model)
        call.model = entry.id
        keep_alive = seconds_from_duration(request.keep_alive) if request.HasField("keep_alive") else None
        with self._admission.admit(entry.id):
            async with self._residency.lease(entry, keep_alive) as lease:
                inputs = await asyncio.to_thread(tokenize, request, lease.model)
                call.prompt_tokens = sum(len(token_ids) for token_ids in inputs)
                started = time.perf_counter()
                vectors = await self._engine.embed(entry.id, inputs)
                width = len(vectors[0])
                if request.dimensions > width:
                    raise InvalidRequestError(
                        f"dimensions must be at most {width}, which is what this model gives.",
                        field="dimensions",
                    )
                values = finished(
                    vectors,
                    dimensions=request.dimensions or None,
                    normalize=request.normalize if request.HasField("normalize") else True,
                )
                timings = usage_pb2.Timings(
                    total_duration=measured_duration(time.perf_counter() - call.arrived),
                    prompt_duration=measured_duration(time.perf_counter() - started),
                )
                if lease.load_seconds > 0:
                    timings.load_duration.CopyFrom(measured_duration(lease.load_seconds))
        self._telemetry.tokens(model=entry.id, prompt=call.prompt_tokens, completion=0)
        return embedding_pb2.EmbedResponse(
            model=entry.id,
            embeddings=[
                embedding_pb2.Embedding(index=i, values=row) for i, row in enumerate(values.tolist())
            ],
            usage=usage_pb2.Usage(prompt_tokens=call.prompt_tokens),
            timings=timings,
        )
