"""Bringing one model into memory: tokenizer, weights, a trial run, and its place in the engine."""

from __future__ import annotations

from osaurus_grpc.models.platform import WeightPlan, mx, plan_weights  # isort: skip  # loads the BLAS

import asyncio
import hashlib
import importlib.metadata
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from osaurus_grpc.errors import ModelUnusableError
from osaurus_grpc.models import cpu_kernels
from osaurus_grpc.models.catalog import ModelEntry
from osaurus_grpc.models.embedding import Embedder, Pooling, configured_pooling
from osaurus_grpc.models.encoder import ENCODER_TYPES, UnsupportedEncoderError, load_encoder
from osaurus_grpc.models.inspection import CONFIG_FILE, read_json_object

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Weights are read in groups of this size, so that running streams of other models go on in between.
_GROUP_BYTES = 128 * 2**20
_UNKNOWN_CONTEXT_LENGTH = 32_768
# Special tokens by which chat templates end a turn; a model whose configuration forgets to name its
# own would talk on to itself.
_TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|endoftext|>"),
    *("<|call|>", "<|return|>"),
)
# gpt-oss ends each of several messages of a turn with this.
_MESSAGE_END = "<|end|>"


class MlxHost(Protocol):
    """What residency needs of the engine: a thread that may use MLX, and a place for models."""

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function on the MLX thread."""
        ...

    async def attach(
        self,
        model_id: str,
        model: object,
        end_tokens: tuple[int, ...],
        vocab_size: int,
        *,
        identity: str,
        draft_id: str,
    ) -> None:
        """Take a model that generates into service.

        Its identity changes with whatever changes what it computes. The model of draft_id, where that
        is not "", drafts for it.
        """
        ...

    def attach_embedder(self, model_id: str, embedder: Embedder) -> None:
        """Take what makes embedding vectors with a model into service."""
        ...

    async def detach(self, model_id: str) -> None:
        """Take a model out of service."""
        ...

    async def free(self) -> None:
        """Return the memory of dropped models to the system."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        entry: What the catalog says of it.
        tokenizer: transformers' tokenizer.
        eos_token_ids: Ids that end an answer.
        context_length: Tokens of prompt and answer at most.
        vocab_size: Width of the logits; may exceed the tokenizer's vocabulary.
        resident_bytes: Memory the weights take.
        load_seconds: What loading took.
        fingerprint: "fp_" and ten hexadecimal digits; changes with weights, dtype and engine.
    """

    entry: ModelEntry
    tokenizer: Any
    eos_token_ids: frozenset[int]
    context_length: int
    vocab_size: int
    resident_bytes: int
    load_seconds: float
    fingerprint: str


async def load_model(
    host: MlxHost, entry: ModelEntry, dtype: str, draft: LoadedModel | None = None
) -> LoadedModel:
    """Load a model and take it into service.

    Args:
        host: The engine.
        entry: The model.
        dtype: As Settings.dtype.
        draft: A loaded model that drafts for it.

    Raises:
        ModelUnusableError: Its files are damaged, or its architecture is not known, or the draft model
            has another vocabulary.
    """
    started = time.monotonic()
    await host.call(cpu_kernels.install)
    tokenizer, eos_token_ids = await asyncio.to_thread(_load_tokenizer, entry)
    if draft is not None:
        await asyncio.to_thread(_require_same_vocabulary, entry, tokenizer, draft)
    is_encoder = not is_generating(entry)
    build = _build_encoder if is_encoder else _build
    model: Any = await host.call(lambda: build(entry, dtype))
    for group in _groups(model):
        await host.call(partial(_evaluate, entry, group))
    embedder = _embedder(entry, model)
    context_length = entry.context_length or _UNKNOWN_CONTEXT_LENGTH
    if is_encoder and embedder is not None:
        await host.call(lambda: _probe_encoder(entry, embedder))
        vocab_size, context_length = model.config.vocab_size, model.config.context_length
    else:
        vocab_size = await host.call(lambda: _probe(entry, model))
        identity = _identity(entry, dtype)
        ends = tuple(sorted(eos_token_ids))
        draft_id = draft.entry.id if draft is not None else ""
        await host.attach(entry.id, model, ends, vocab_size, identity=identity, draft_id=draft_id)
    if embedder is not None:
        host.attach_embedder(entry.id, embedder)
    return LoadedModel(
        entry=entry,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        context_length=context_length,
        vocab_size=vocab_size,
        resident_bytes=_resident_bytes(model),
        load_seconds=time.monotonic() - started,
        fingerprint=_fingerprint(entry, dtype),
    )


def is_generating(entry: ModelEntry) -> bool:
    """Whether a model generates text, rather than making embedding vectors only."""
    return entry.architecture not in ENCODER_TYPES


def _require_same_vocabulary(entry: ModelEntry, tokenizer: Any, draft: LoadedModel) -> None:
    """A draft model guesses token ids: they must mean the same in both models."""
    if tokenizer.get_vocab() != draft.tokenizer.get_vocab():
        raise ModelUnusableError(
            f"Model '{entry.id}' cannot be loaded: the draft model '{draft.entry.id}' has another "
            "vocabulary; choose one of the same family with --draft-model, or start without.",
            model=entry.id,
        )


def _plan(entry: ModelEntry, dtype: str) -> WeightPlan:
    is_dense = entry.quantization.lower() in ("f64", "f32", "f16", "bf16")
    return plan_weights(entry.parameter_count, dtype, is_quantized=not is_dense)


def estimated_bytes(entry: ModelEntry, dtype: str) -> int:
    """Memory a model's weights will take."""
    plan = _plan(entry, dtype)
    if plan.is_dequantized and plan.dtype is not None and entry.parameter_count:
        return entry.parameter_count * int(plan.dtype.size)
    return entry.size_bytes


def _identity(entry: ModelEntry, dtype: str) -> str:
    """Changes with weights, dtype and engine: with all that changes what a model computes."""
    parts = (entry.digest, dtype, importlib.metadata.version("mlx"), importlib.metadata.version("mlx-lm"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _fingerprint(entry: ModelEntry, dtype: str) -> str:
    return "fp_" + _identity(entry, dtype)[:10]


def _load_tokenizer(entry: ModelEntry) -> tuple[Any, frozenset[int]]:
    """Transformers' tokenizer and the ids that end an answer. Needs no MLX; runs on any thread."""
    from mlx_lm.utils import load_config, load_tokenizer

    try:
        config = load_config(entry.path)
        wrapper = load_tokenizer(entry.path, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # whatever the files make transformers raise
        log_unusable("tokenizer", entry)
        raise ModelUnusableError(
            f"Model '{entry.id}' cannot be loaded: its tokenizer files are damaged or of an unknown kind.",
            model=entry.id,
        ) from error
    tokenizer = wrapper._tokenizer
    ends = set(wrapper.eos_token_ids)
    template = str(tokenizer.chat_template or "")
    for text in _TURN_ENDS:
        token_id = tokenizer.convert_tokens_to_ids(text)
        if text == _MESSAGE_END and "<|channel|>" in template:
            continue
        if text in template and token_id is not None and token_id in tokenizer.all_special_ids:
            ends.add(token_id)
    return tokenizer, frozenset(int(end) for end in ends)


def _build(entry: ModelEntry, dtype: str) -> Any:
    """The model with its weights still lazy. On the MLX thread."""
    from mlx_lm.utils import dequantize_model, load_model

    try:
        model, config = load_model(entry.path, lazy=True, strict=True)
    except Exception as error:  # whatever the files make mlx-lm raise
        log_unusable("model", entry)
        raise ModelUnusableError(_reason(entry, error), model=entry.id) from error
    if not _is_batchable(model):
        raise ModelUnusableError(
            f"Model '{entry.id}' cannot be served: the KV cache of architecture "
            f"'{entry.architecture}' cannot be batched.",
            model=entry.id,
        )
    plan = _plan(entry, dtype)
    if plan.dtype is not None:
        model.set_dtype(plan.dtype)  # scales too: weights are then expanded in that dtype, unrounded
    elif "osaurus" in config:
        # Converted from GGUF, whose norms and K-quant scales are float32: kept so, they would widen
        # every activation and the KV cache.
        model.set_dtype(getattr(mx, config["dtype"]))
    if plan.is_dequantized:
        model = dequantize_model(model)
    model.eval()
    return model


def _build_encoder(entry: ModelEntry, dtype: str) -> Any:
    """An embedding model with its weights still lazy. On the MLX thread."""
    try:
        model = load_encoder(entry.path, read_json_object(entry.path / CONFIG_FILE))
    except UnsupportedEncoderError as error:
        log_unusable("model", entry)
        raise ModelUnusableError(f"Model '{entry.id}' cannot be loaded: {error}.", model=entry.id) from error
    except Exception as error:  # whatever the files make MLX raise
        log_unusable("model", entry)
        raise ModelUnusableError(_reason(entry, error), model=entry.id) from error
    plan = _plan(entry, dtype)
    if plan.dtype is not None:
        model.set_dtype(plan.dtype)
    model.eval()
    return model


def _embedder(entry: ModelEntry, model: Any) -> Embedder | None:
    """What makes vectors with a model; None where its hidden states cannot be had."""
    try:
        return Embedder(model, configured_pooling(entry.path) or Pooling.MEAN)
    except ValueError:
        return None


def _is_batchable(model: Any) -> bool:
    """Whether every cache of the model can be merged into a batch, those inside a CacheList included."""
    from mlx_lm.models.cache import CacheList, make_prompt_cache

    def can_merge(cache: Any) -> bool:
        if isinstance(cache, CacheList):
            return all(can_merge(child) for child in cache.caches)
        return hasattr(cache, "merge")

    return all(can_merge(cache) for cache in make_prompt_cache(model))


def log_unusable(part: str, entry: ModelEntry) -> None:
    """One line; the exception being handled, which tells more, at debug level."""
    logger.warning("event=unusable part=%s model=%s", part, entry.id)
    logger.debug("event=unusable part=%s model=%s", part, entry.id, exc_info=True)


def _reason(entry: ModelEntry, error: Exception) -> str:
    """Why a model cannot be loaded, without the exception's own words."""
    text = str(error)
    start = f"Model '{entry.id}' cannot be loaded: "
    if "not supported" in text and isinstance(error, ValueError):
        return f"{start}mlx-lm does not know its architecture, '{entry.architecture}'."
    if "custom module" in text:
        return f"{start}it needs Python code of its own, which is never run."
    return f"{start}its files are damaged or do not belong together."


def _groups(model: Any) -> Iterator[list[mx.array]]:
    """The model's arrays, in groups that load in moderate time; private ones (rope tables) too."""
    group: list[mx.array] = []
    size = 0
    for array in _arrays(model):
        group.append(array)
        size += array.nbytes
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    yield group


def _arrays(model: Any) -> Iterator[mx.array]:
    for module in model.modules():
        yield from _leaves(dict(module))
        yield from _leaves(vars(module))


def _leaves(tree: dict[str, Any]) -> Iterator[mx.array]:
    """The arrays in a tree of dicts and lists; other modules are not entered."""
    for value in tree.values():
        if isinstance(value, mx.array):
            yield value


def _evaluate(entry: ModelEntry, arrays: list[mx.array]) -> None:
    """Read a group of weights. On the MLX thread."""
    try:
        mx.eval(arrays)
    except Exception as error:  # a read error of MLX's, or no memory
        log_unusable("weights", entry)
        raise ModelUnusableError(
            f"Model '{entry.id}' cannot be loaded: its weights cannot be read.", model=entry.id
        ) from error


def _probe(entry: ModelEntry, model: Any) -> int:
    """Run one token: the width of the logits. On the MLX thread."""
    from mlx_lm.models.cache import make_prompt_cache

    try:
        logits = model(mx.array([[0]]), cache=make_prompt_cache(model))[0, -1]
        is_number = not bool(mx.isnan(logits).any().item())
    except Exception as error:  # weights whose shapes do not fit one another show here
        log_unusable("model", entry)
        raise ModelUnusableError(_reason(entry, error), model=entry.id) from error
    if not is_number:
        raise ModelUnusableError(
            f"Model '{entry.id}' cannot be served: its weights give no numbers.", model=entry.id
        )
    mx.clear_cache()
    return int(logits.shape[-1])


def _probe_encoder(entry: ModelEntry, embedder: Embedder) -> None:
    """Run one token. On the MLX thread."""
    try:
        (vector,) = embedder([[0]])
    except Exception as error:  # weights whose shapes do not fit one another show here
        log_unusable("model", entry)
        raise ModelUnusableError(_reason(entry, error), model=entry.id) from error
    if not all(math.isfinite(value) for value in vector):
        raise ModelUnusableError(
            f"Model '{entry.id}' cannot be served: its weights give no numbers.", model=entry.id
        )


def _resident_bytes(model: Any) -> int:
    """Bytes of the weights, tied ones once."""
    return sum(array.nbytes for array in {id(array): array for array in _arrays(model)}.values())
