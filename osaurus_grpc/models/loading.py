"""Bringing one model into memory: tokenizer, weights, a trial run, and its place in the engine."""

from __future__ import annotations

from osaurus_grpc.models.platform import WeightPlan, mx, plan_weights  # isort: skip  # loads the BLAS

import asyncio
import hashlib
import importlib.metadata
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from osaurus_grpc.errors import ModelUnusableError
from osaurus_grpc.models import cpu_kernels, facts, short_weights
from osaurus_grpc.models.catalog import ModelEntry
from osaurus_grpc.models.embedding import Embedder, Pooling, configured_pooling
from osaurus_grpc.models.encoder import ENCODER_TYPES, UnsupportedEncoderError, load_encoder
from osaurus_grpc.models.facts import Capability
from osaurus_grpc.models.inspection import CONFIG_FILE, read_json_object
from osaurus_grpc.models.short_weights import NONE_QUANTIZED, QuantizedModules
from osaurus_grpc.models.vision import families
from osaurus_grpc.models.vision.families import Family
from osaurus_grpc.models.vision.reader import ImageReader

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Weights are read in groups of this size, so that running streams of other models go on in between.
_GROUP_BYTES = 128 * 2**20
_UNKNOWN_CONTEXT_LENGTH = 32_768
# Special tokens by which chat templates end a turn; a model whose configuration forgets to name its
# own would talk on to itself.
_TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|endoftext|>"),
    *("<|call|>", "<|return|>", "<end_of_utterance>"),
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

    async def require_draft(self, model_id: str) -> None:
        """Raise ModelUnusableError where a model in service cannot draft for any other."""
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
        images: Reads images for it; None where it takes none.
        draft_id: The model that drafts for it; "" where none does.
    """

    entry: ModelEntry
    tokenizer: Any
    eos_token_ids: frozenset[int]
    context_length: int
    vocab_size: int
    resident_bytes: int
    load_seconds: float
    fingerprint: str
    images: ImageReader | None = None
    draft_id: str = ""


async def load_model(
    host: MlxHost, entry: ModelEntry, dtype: str, draft: LoadedModel | None = None
) -> LoadedModel:
    """Load a model and take it into service.

    Args:
        host: The engine.
        entry: The model.
        dtype: As Settings.dtype.
        draft: A loaded model that drafts for it where they have one vocabulary.

    Raises:
        ModelUnusableError: Its files are damaged, or its architecture is not known.
    """
    started = time.monotonic()
    await host.call(cpu_kernels.install)
    images = await asyncio.to_thread(_load_images, entry) if takes_images(entry) else None
    tokenizer, eos_token_ids = await asyncio.to_thread(_load_tokenizer, entry, images)
    draft_id = await asyncio.to_thread(_draft_id, entry, tokenizer, draft)
    is_encoder = not is_generating(entry)
    build = _build_encoder if is_encoder else _build
    model, quantized = await host.call(lambda: build(entry, dtype))
    for group in _groups(model):
        await host.call(partial(_evaluate, entry, group))
    short_bytes = 0 if is_encoder else await _hold_short(host, model, quantized)
    embedder = _embedder(entry, model) if images is None else None
    context_length = entry.context_length or _UNKNOWN_CONTEXT_LENGTH
    if is_encoder and embedder is not None:
        await host.call(lambda: _probe_encoder(entry, embedder))
        vocab_size, context_length = model.config.vocab_size, model.config.context_length
    else:
        vocab_size = await host.call(lambda: _probe(entry, model))
        identity = _identity(entry, dtype)
        ends = tuple(sorted(eos_token_ids))
        await host.attach(entry.id, model, ends, vocab_size, identity=identity, draft_id=draft_id)
    if embedder is not None:
        host.attach_embedder(entry.id, embedder)
    return LoadedModel(
        entry=entry,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        context_length=context_length,
        vocab_size=vocab_size,
        resident_bytes=_resident_bytes(model) + short_bytes,
        load_seconds=time.monotonic() - started,
        fingerprint=_fingerprint(entry, dtype),
        images=images,
        draft_id=draft_id,
    )


async def _hold_short(host: MlxHost, model: Any, quantized: QuantizedModules) -> int:
    """Keep what the weights were made of, where that speeds decoding up; returns the bytes it takes."""
    held = await host.call(lambda: short_weights.begin(model, quantized))
    if held is None:
        return 0
    for path, weight in short_weights.matrices(model):
        await host.call(partial(held.add, weight, quantized.get(path)))
    return held.nbytes


def is_generating(entry: ModelEntry) -> bool:
    """Whether a model generates text, rather than making embedding vectors only."""
    return entry.architecture not in ENCODER_TYPES


def takes_images(entry: ModelEntry) -> bool:
    """Whether a model takes images, as it is loaded here."""
    return Capability.VISION in entry.capabilities


def _family(entry: ModelEntry) -> Family:
    return families.FAMILIES[entry.architecture]


def drafted_models(draft: ModelEntry, entries: Iterable[ModelEntry]) -> list[ModelEntry]:
    """The models for which one may draft: others, of the same vocabulary.

    Reads the tokenizers; raises ModelUnusableError where one cannot be read.
    """

    def tokenizer(entry: ModelEntry) -> Any:
        return _load_tokenizer(entry, _load_images(entry) if takes_images(entry) else None)[0]

    own = tokenizer(draft)
    others = (entry for entry in entries if entry.id != draft.id and is_generating(entry))
    return [entry for entry in others if _have_one_vocabulary(own, tokenizer(entry))]


def _have_one_vocabulary(one: Any, other: Any) -> bool:
    """A draft model guesses token ids: they must mean the same in both models."""
    return bool(one.get_vocab() == other.get_vocab())


def _draft_id(entry: ModelEntry, tokenizer: Any, draft: LoadedModel | None) -> str:
    """Which model drafts for one that is being loaded; "" where none can."""
    if draft is None:
        return ""
    if not _have_one_vocabulary(tokenizer, draft.tokenizer):
        logger.warning(
            "event=draft_unused reason=another_vocabulary model=%s draft=%s", entry.id, draft.entry.id
        )
        return ""
    return draft.entry.id


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
    packages = ("mlx", "mlx-lm", *(("mlx-vlm",) if takes_images(entry) else ()))
    parts = (entry.digest, dtype, *map(importlib.metadata.version, packages))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _fingerprint(entry: ModelEntry, dtype: str) -> str:
    return "fp_" + _identity(entry, dtype)[:10]


def _load_images(entry: ModelEntry) -> ImageReader:
    """What reads images for a model. Needs no MLX; runs on any thread."""
    try:
        return ImageReader.load(entry.path, _family(entry))
    except Exception as error:  # whatever the files make mlx-vlm and transformers raise
        log_unusable("processor", entry)
        if isinstance(error, ImportError):
            raise ModelUnusableError(_reason(entry, error), model=entry.id) from error
        raise ModelUnusableError(
            f"Model '{entry.id}' cannot be loaded: its tokenizer or the settings of its image processor are "
            "damaged or of an unknown kind.",
            model=entry.id,
        ) from error


def _load_tokenizer(entry: ModelEntry, images: ImageReader | None) -> tuple[Any, frozenset[int]]:
    """Transformers' tokenizer and the ids that end an answer. Needs no MLX; runs on any thread.

    Args:
        entry: The model.
        images: Where it takes images, what reads them, with a tokenizer that knows their tokens.
    """
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
    if images is not None:
        images.tokenizer.chat_template = images.tokenizer.chat_template or facts.chat_template(entry.path)
        tokenizer = images.tokenizer
    ends = set(wrapper.eos_token_ids)
    template = str(tokenizer.chat_template or "")
    for text in _TURN_ENDS:
        token_id = tokenizer.convert_tokens_to_ids(text)
        if text == _MESSAGE_END and "<|channel|>" in template:
            continue
        if text in template and token_id is not None and token_id in tokenizer.all_special_ids:
            ends.add(token_id)
    return tokenizer, frozenset(int(end) for end in ends)


def _build(entry: ModelEntry, dtype: str) -> tuple[Any, QuantizedModules]:
    """The model with its weights still lazy, and what was expanded of them. On the MLX thread."""
    from mlx_lm.utils import dequantize_model, load_model

    try:
        if takes_images(entry):
            model, config = _load_image_model(entry)
        else:
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
    quantized = NONE_QUANTIZED
    if plan.is_dequantized:
        quantized = short_weights.quantized_modules(model)
        model = dequantize_model(model)
    model.eval()
    return model, quantized


def _load_image_model(entry: ModelEntry) -> tuple[Any, Mapping[str, Any]]:
    """A model of mlx-vlm and its configuration; raises whatever its files make mlx-vlm raise."""
    from mlx_vlm.utils import load_model

    from osaurus_grpc.models.vision.image_model import ImageModel

    config = read_json_object(entry.path / CONFIG_FILE)
    if "model_file" in config:
        raise ValueError("it brings a custom module")  # which mlx-vlm would import
    return ImageModel(load_model(entry.path, lazy=True), _family(entry)), config


def _build_encoder(entry: ModelEntry, dtype: str) -> tuple[Any, QuantizedModules]:
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
    return model, NONE_QUANTIZED


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
    if families.is_missing_for(entry.architecture):
        return f"{start}it takes images, for which mlx-vlm is needed: {families.INSTALL_HINT}"
    if takes_images(entry) and isinstance(error, ImportError):
        return f"{start}the mlx-vlm that is installed is another one than is needed: {families.INSTALL_HINT}"
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
