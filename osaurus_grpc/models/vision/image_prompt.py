"""A prompt in which images stand for some of the tokens."""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from osaurus_grpc.models.vision.image_model import EmbeddedImage, ImageModel


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class TokenizedImage:
    """One image as a model takes it.

    Attributes:
        token_ids: What stands in the prompt for it: marks, and a token for each piece of it.
        names: The same, with another number below 0 for each piece, which tells this image and this
            piece from all others: what a KV cache is found by.
        arrays: What the model's vision part needs, by the names of mlx-vlm.
        grid: Rows and columns of its pieces, where these have positions of their own; else None.
    """

    token_ids: tuple[int, ...]
    names: tuple[int, ...]
    arrays: Mapping[str, npt.NDArray[Any]]
    grid: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def piece_names(data: bytes, token_ids: Sequence[int], image_token_id: int) -> tuple[int, ...]:
    """Token ids with the pieces of an image named by its content.

    31 bits each: that two images agree in one piece is unlikely, in the pieces of a block out of reach.

    Args:
        data: What tells the image apart.
        token_ids: Of the image, marks included.
        image_token_id: The id of every piece.
    """
    # SHAKE gives as many bytes as there are pieces.
    stream = hashlib.shake_256(data).digest(4 * len(token_ids))
    numbers = (np.frombuffer(stream, dtype="<i4") | np.int32(-(2**31))).tolist()
    return tuple(
        number if token_id == image_token_id else token_id
        for token_id, number in zip(token_ids, numbers, strict=True)
    )


class ImagePrompt:
    """A prompt's tokens, and what the model reads in place of those that are images.

    Made on any thread; inputs() is called on the MLX thread.

    Args:
        parts: The prompt in order: runs of token ids, and images.
        image_token_id: The id of every piece of an image.

    Attributes:
        token_ids: The prompt, the pieces of images as the token that stands for them.
        names: The prompt, the pieces of images as numbers below 0 that name them.
        position_delta: What is added to a token's place behind the prompt to give its position.
    """

    def __init__(self, parts: Sequence[Sequence[int] | TokenizedImage], image_token_id: int) -> None:
        self._image_token_id = image_token_id
        token_ids: list[int] = []
        names: list[int] = []
        self._images: list[tuple[int, TokenizedImage]] = []
        for part in parts:
            if isinstance(part, TokenizedImage):
                self._images.append((len(token_ids), part))
                token_ids.extend(part.token_ids)
                names.extend(part.names)
            else:
                token_ids.extend(part)
                names.extend(part)
        self.token_ids = tuple(token_ids)
        self.names = tuple(names)
        self._positions = self._grid_positions() if any(i.grid for _, i in self._images) else None
        self.position_delta = (
            int(self._positions.max()) + 1 - len(token_ids) if self._positions is not None else 0
        )
        # The image embedded last: a chunk of the prompt may end in the middle of it.
        self._embedded: tuple[int, EmbeddedImage] | None = None

    def _grid_positions(self) -> npt.NDArray[np.int32]:
        """Positions in time, row and column, shape (3, tokens).

        Those of text are equal and go on from the largest before; an image stands at one time, its
        pieces in rows and columns that count from there (M-RoPE, arXiv:2409.12191).
        """
        runs: list[npt.NDArray[np.int32]] = []
        place = following = 0

        def text(count: int) -> None:
            nonlocal following
            runs.append(np.broadcast_to(np.arange(following, following + count, dtype=np.int32), (3, count)))
            following += count

        for start, image in self._images:
            text(start - place)
            place = start + len(image.token_ids)
            if image.grid is None:
                text(len(image.token_ids))
                continue
            rows, columns = np.indices(image.grid, dtype=np.int32).reshape(2, -1)
            runs.append(np.stack([np.zeros_like(rows), rows, columns]) + np.int32(following))
            following += max(image.grid)
        text(len(self.token_ids) - place)
        return np.concatenate(runs, axis=1)

    def inputs(
        self, model: ImageModel, start: int, names: Sequence[int]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """A part of the prompt for a call of the model. Lazy, but for images.

        Args:
            model: The model.
            start: Where the part begins.
            names: Its names; behind the prompt, tokens that were generated before.

        Returns:
            Token ids of shape (1, tokens), and what else to call the model with.
        """
        stop = start + len(names)
        token_ids = [*self.token_ids[start:stop], *names[max(0, len(self.token_ids) - start) :]]
        ids = mx.array([token_ids])
        inputs: dict[str, mx.array] = {}
        if any(self._overlaps(index, start, stop) for index in range(len(self._images))):
            inputs |= self._embeddings(model, ids, start, stop)
        if self._positions is not None:
            behind = np.arange(len(self.token_ids), stop, dtype=np.int32) + np.int32(self.position_delta)
            known = self._positions[:, start:stop]
            positions = np.concatenate([known, np.broadcast_to(behind, (3, behind.size))], axis=1)
            inputs["position_ids"] = mx.array(positions[:, -len(names) :])[:, None]
        return ids, inputs

    def _overlaps(self, index: int, start: int, stop: int) -> bool:
        begin, image = self._images[index]
        return begin < stop and start < begin + len(image.token_ids)

    def _embeddings(self, model: ImageModel, ids: mx.array, start: int, stop: int) -> dict[str, mx.array]:
        """The embeddings of the tokens with the images put in, and what goes with them."""
        text = model.embed_text(ids)
        runs: list[mx.array] = []
        deepstack: list[mx.array] = []
        place = start
        for index, (begin, image) in enumerate(self._images):
            if not self._overlaps(index, start, stop):
                continue
            end = min(begin + len(image.token_ids), stop)
            runs.append(text[:, place - start : max(begin, place) - start])
            embedded = self._embedded_image(model, index)
            first, last = max(begin, place) - begin, end - begin
            runs.append(embedded.embeddings[:, first:last])
            if embedded.deepstack is not None:
                before, within = (_pieces(image.names[a:b]) for a, b in ((0, first), (first, last)))
                deepstack.append(embedded.deepstack[:, before : before + within])
            place = end
        runs.append(text[:, place - start :])
        inputs = {"input_embeddings": mx.concatenate([run.astype(text.dtype) for run in runs], axis=1)}
        if deepstack:
            names = np.array([*self.names[start:stop], *[0] * (stop - start)])[: stop - start]
            inputs["visual_pos_masks"] = mx.array(names < 0)[None]
            inputs["deepstack_visual_embeds"] = mx.concatenate(deepstack, axis=1).astype(text.dtype)
        return inputs

    def _embedded_image(self, model: ImageModel, index: int) -> EmbeddedImage:
        if self._embedded is None or self._embedded[0] != index:
            image = self._images[index][1]
            self._embedded = index, model.embed_image(image.token_ids, image.arrays)
        return self._embedded[1]


def _pieces(names: Sequence[int]) -> int:
    return sum(name < 0 for name in names)
