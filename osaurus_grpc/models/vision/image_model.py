"""A model of mlx-vlm as the engine calls models: token ids in, logits out, on a batch's caches."""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.nn as nn
import numpy.typing as npt
from mlx_lm.models.cache import KVCache

from osaurus_grpc.models.vision.families import Family


@dataclass(frozen=True, slots=True)
class EmbeddedImage:
    """One image as the language part reads it.

    Attributes:
        embeddings: In place of those of its tokens, marks included; shape (1, tokens, width).
        deepstack: What is added behind the first layers at its pieces, shape (layers, pieces, width);
            None where the family adds nothing (DeepStack, arXiv:2406.04334).
    """

    embeddings: mx.array
    deepstack: mx.array | None = None


class ImageModel(nn.Module):
    """The model's language part, and its vision part for prompts with images.

    mlx-vlm keeps the positions of a prompt with images on the module between calls, which serves one
    sequence at a time. Here every call says all positions, so that sequences with and without images
    share a batch and nothing is left behind.

    Args:
        model: An mlx-vlm model of a family that is listed.
        family: Which.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.vlm = model
        self._has_grid_positions = family.has_grid_positions

    @property
    def text_model(self) -> nn.Module:
        """The language part."""
        return self.vlm.language_model

    @property
    def layers(self) -> list[nn.Module]:
        """Those of the language part."""
        return cast("list[nn.Module]", self.vlm.language_model.layers)

    def make_cache(self) -> list[KVCache]:
        """An empty cache a layer."""
        return [KVCache() for _ in self.layers]

    def __call__(
        self,
        inputs: mx.array,
        cache: Sequence[Any] | None = None,
        *,
        input_embeddings: mx.array | None = None,
        position_ids: mx.array | None = None,
        position_deltas: mx.array | None = None,
        visual_pos_masks: mx.array | None = None,
        deepstack_visual_embeds: mx.array | None = None,
    ) -> mx.array:
        """Logits of shape (rows, length, vocab_size). Lazy.

        Args:
            inputs: Token ids, shape (rows, length).
            cache: One a layer.
            input_embeddings: What is read in place of the tokens' own, shape (rows, length, width).
            position_ids: Of shape (3, rows, length), where positions are not those of the caches.
            position_deltas: What is added to those of the caches, shape (rows,).
            visual_pos_masks: Which tokens are pieces of images, shape (rows, length).
            deepstack_visual_embeds: What is added to these behind the first layers, shape (layers,
                pieces, width).
        """
        arguments: dict[str, mx.array] = {}
        if self._has_grid_positions:
            if position_ids is None:
                position_ids = _positions(inputs.shape, cache[0].offset if cache else 0, position_deltas)
            arguments["position_ids"] = position_ids
        if visual_pos_masks is not None and deepstack_visual_embeds is not None:
            arguments["visual_pos_masks"] = visual_pos_masks
            arguments["deepstack_visual_embeds"] = deepstack_visual_embeds
        output = self.vlm.language_model(
            inputs, inputs_embeds=input_embeddings, cache=list(cache) if cache else None, **arguments
        )
        return cast("mx.array", output.logits)

    def embed_text(self, ids: mx.array) -> mx.array:
        """Of token ids of shape (rows, length), shape (rows, length, width). Lazy."""
        return cast("mx.array", self.vlm.get_input_embeddings(ids, None).inputs_embeds)

    def embed_image(self, token_ids: Sequence[int], arrays: Mapping[str, npt.NDArray[Any]]) -> EmbeddedImage:
        """One image with its marks.

        Args:
            token_ids: What stands for it in a prompt.
            arrays: What its family's processor made of it.
        """
        inputs = {name: mx.array(array) for name, array in arrays.items()}
        found = self.vlm.get_input_embeddings(mx.array([list(token_ids)]), **inputs)
        layers = found.deepstack_visual_embeds
        deepstack = mx.stack(list(layers)) if layers is not None and len(layers) else None
        mx.eval(found.inputs_embeds, deepstack if deepstack is not None else [])
        return EmbeddedImage(found.inputs_embeds, deepstack)


def _positions(shape: Sequence[int], offset: int | mx.array, deltas: mx.array | None) -> mx.array:
    """Equal in all three dimensions, as those of text are; shape (3, rows, length)."""
    rows, length = shape
    starts = offset if deltas is None else offset + deltas
    column = starts[:, None] if isinstance(starts, mx.array) and starts.ndim else starts
    places = mx.arange(length)[None] + column
    return mx.broadcast_to(places[None], (3, rows, length))
