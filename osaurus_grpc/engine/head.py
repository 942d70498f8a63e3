"""Logits at the end of a prompt only.

A model called on many tokens projects every position onto the vocabulary, of which a prompt needs
the last one. mlx-lm therefore leaves the last token to a pass of its own, and a pass reads all
weights. Here the module that projects, the output head, is made to look at the wanted positions.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import mlx.nn as nn

# Where the head cannot be found, a pass over at most this many positions computes all logits rather
# than pay for a second pass.
_CHEAP_POSITIONS = 16


class _Wanted:
    """Which position of each row the head projects; None is all of them."""

    positions: tuple[int, ...] | None = None

    def narrow(self, hidden: mx.array) -> mx.array:
        """Shape (rows, length, width) to (rows, 1, width)."""
        if self.positions is None:
            return hidden
        if len(self.positions) == 1:
            (position,) = self.positions
            return hidden[:, position : position + 1]
        return mx.take_along_axis(hidden, mx.array(self.positions)[:, None, None], axis=1)


class OutputHead:
    """Calls a model for the logits at one position a row.

    Args:
        model: An mlx-lm model. Its head keeps its parameters and gains a subclass of its type that
            narrows its input while, and only while, this object calls the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # A model that takes images has linear layers that are no head, too.
        self._wanted, self.is_found = _install(getattr(model, "text_model", model))

    def spares(self, positions: int) -> bool:
        """Whether logits() on so many positions a row costs about what the positions do."""
        return self.is_found or positions <= _CHEAP_POSITIONS

    def logits(
        self,
        ids: mx.array,
        caches: list[Any],
        positions: Sequence[int],
        inputs: Mapping[str, mx.array] = MappingProxyType({}),
    ) -> mx.array:
        """The logits after one position of each row. Lazy.

        Args:
            ids: Token ids, shape (rows, length).
            caches: One a layer.
            positions: One a row, from 0.
            inputs: What else to call the model with.

        Returns:
            Of the model's dtype, shape (rows, vocab_size).
        """
        self._wanted.positions = tuple(positions) if ids.shape[1] > 1 else None
        try:
            logits = cast("mx.array", self._model(ids, cache=caches, **inputs))
        finally:
            self._wanted.positions = None
        if logits.shape[1] > 1:  # the head is not where it was looked for
            self.is_found = False
            return logits[mx.arange(len(positions)), mx.array(list(positions))]
        return logits[:, 0]


def _install(model: nn.Module) -> tuple[_Wanted, bool]:
    """Find a model's head, once; returns what it is told by, and whether there is one."""
    outer = [
        module
        for name, module in model.named_modules()
        if not any(part.isdigit() for part in name.split("."))  # inside a layer
    ]
    embeddings = [module for module in outer if hasattr(module, "as_linear")]
    widths = {module.weight.shape[0] for module in embeddings}
    heads = [
        module
        for module in outer
        if isinstance(module, nn.Linear | nn.QuantizedLinear) and module.weight.shape[0] in widths
    ]
    # A head of its own goes before the embedding that may serve as one.
    found = [(module, "__call__") for module in heads] or [(module, "as_linear") for module in embeddings]
    wanted = next((type(module).wanted for module, _ in found if hasattr(type(module), "wanted")), _Wanted())
    for module, method in found:
        if not hasattr(type(module), "wanted"):
            module.__class__ = _narrowing(type(module), method, wanted)
    return wanted, bool(found)


def _narrowing(kind: type[nn.Module], method: str, wanted: _Wanted) -> type[nn.Module]:
    """A subclass of a module's type whose method sees the wanted positions only."""
    project = cast("Callable[[nn.Module, mx.array], mx.array]", getattr(kind, method))

    def narrowed(self: nn.Module, hidden: mx.array) -> mx.array:
        return project(self, wanted.narrow(hidden))

    return type(kind.__name__, (kind,), {method: narrowed, "wanted": wanted})
