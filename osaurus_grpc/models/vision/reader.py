"""Turns image files into what a model's prompt has in their place. Uses no device; runs on any thread."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from weakref import WeakSet

import numpy as np

from osaurus_grpc.errors import (
    CapabilityError,
    ContextLengthError,
    InvalidRequestError,
    OverloadedError,
)
from osaurus_grpc.models.inspection import CONFIG_FILE, read_json_object
from osaurus_grpc.models.vision.families import Family
from osaurus_grpc.models.vision.image_prompt import ImagePrompt, TokenizedImage, piece_names
from osaurus_grpc.models.vision.picture import decode

# A conversation sends its images with every turn.
_KEPT_BYTES: Final = 128 * 2**20
# Of all images that were read and are still needed, those of waiting requests included: a large one
# takes some hundred megabytes.
_MOST_BYTES: Final = 4 * 2**30
_RETRY_SECONDS: Final = 5.0
# A photograph takes some hundred megabytes while it is decoded and scaled.
_THREADS: Final = 2
_TEXT_ARRAYS: Final = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image of a request.

    Attributes:
        data: The file.
        field: Where it is in the request.
    """

    data: bytes
    field: str


class ImageReader:
    """One model's way of reading images.

    Args:
        processor: An object of its family's processor class.
        family: Its family.

    Attributes:
        threads: Where to call it, since it takes its time.
    """

    def __init__(self, processor: Any, family: Family) -> None:
        self._processor = processor
        self._family = family
        tokenizer = processor.tokenizer
        self._token = str(processor.image_token)
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(self._token))
        # What the tokenizer puts around every text.
        self._around: list[int] = list(tokenizer("")["input_ids"])
        self._kept: OrderedDict[bytes, TokenizedImage] = OrderedDict()
        self._alive: WeakSet[TokenizedImage] = WeakSet()
        self._lock = threading.Lock()
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="images")

    @classmethod
    def load(cls, folder: Path, family: Family) -> ImageReader:
        """Make the reader of a model folder; raises whatever its files make mlx-vlm raise."""
        # mlx-vlm's own loader would run Python code that comes with a model.
        processor = family.processor_class().from_pretrained(str(folder), trust_remote_code=False)
        # Old conversions of LLaVA leave to the model's configuration what its processor needs to know.
        config = read_json_object(folder / CONFIG_FILE)
        vision = config.get("vision_config")
        known = {**config, **(vision if isinstance(vision, dict) else {})}
        for name in ("patch_size", "vision_feature_select_strategy"):
            if getattr(processor, name, "") is None:
                setattr(processor, name, known.get(name))
        return cls(processor, family)

    @property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer, which knows the tokens of images."""
        return self._processor.tokenizer

    def prompt(
        self,
        context: Sequence[int],
        token_ids: Sequence[int],
        images: Sequence[ImageFile],
        *,
        limit: int | None,
    ) -> ImagePrompt:
        """A rendered conversation with its images.

        Args:
            context: Tokens before it; what looks like an image there is none.
            token_ids: The conversation, in which one token stands for each image.
            images: In their order.
            limit: Tokens of context; None is as many as there are, for a prompt that is only counted.

        Raises:
            OverloadedError: Too many images are waiting for their turn.
            InvalidRequestError: An image cannot be read.
            ContextLengthError: Prompt and images leave no room for one token.
            CapabilityError: The chat template showed more images or fewer.
        """
        places = [place for place, token_id in enumerate(token_ids) if token_id == self.image_token_id]
        if len(places) != len(images):
            raise CapabilityError(
                "The model's chat template does not show images where they are in this conversation.",
                capability="vision",
                field=images[0].field,
            )
        parts: list[Sequence[int] | TokenizedImage] = [context]
        count = len(context) + len(token_ids)
        done = 0
        for place, image in zip(places, images, strict=True):
            read = self._read(image)
            count += len(read.token_ids) - 1
            if limit is not None and count >= limit:
                raise ContextLengthError(
                    limit=limit, prompt_tokens=count, is_estimate=image is not images[-1]
                )
            parts.extend([token_ids[done:place], read if limit is not None else replace(read, arrays={})])
            done = place + 1
        parts.append(token_ids[done:])
        return ImagePrompt(parts, self.image_token_id)

    def _read(self, image: ImageFile) -> TokenizedImage:
        digest = sha256(image.data).digest()
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
                return self._kept[digest]
            if sum(other.nbytes for other in self._alive) >= _MOST_BYTES:
                raise OverloadedError(
                    "Too many images are being processed; try again shortly.",
                    retry_after_seconds=_RETRY_SECONDS,
                )
        picture = decode(image.data, field=image.field)
        try:
            prepared = self._processor(text=[self._token], images=[picture])
            arrays = {name: np.array(value) for name, value in prepared.items()}
            read = self._tokenized(digest, arrays)
        except Exception as error:  # processors raise anything, on extreme proportions for one
            raise InvalidRequestError(
                f"The model cannot take an image of {picture.width} x {picture.height} pixels.",
                field=image.field,
            ) from error
        self._keep(digest, read)
        return read

    def _tokenized(self, digest: bytes, arrays: dict[str, Any]) -> TokenizedImage:
        token_ids = [int(token_id) for token_id in arrays["input_ids"][0]]
        around = self._around
        if around and token_ids[:1] == around[:1]:
            token_ids = token_ids[1:]
        if len(around) > 1 and token_ids[-1:] == around[-1:]:
            token_ids = token_ids[:-1]
        grid = None
        if self._family.has_grid_positions:
            _, rows, columns = arrays["image_grid_thw"][0].tolist()
            merged = self._processor.image_processor.merge_size
            grid = rows // merged, columns // merged
        return TokenizedImage(
            token_ids=tuple(token_ids),
            names=piece_names(digest, token_ids, self.image_token_id),
            arrays={name: array for name, array in arrays.items() if name not in _TEXT_ARRAYS},
            grid=grid,
        )

    def _keep(self, digest: bytes, image: TokenizedImage) -> None:
        with self._lock:
            self._alive.add(image)
            self._kept[digest] = image
            while self._kept and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
