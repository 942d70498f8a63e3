"""Logits at chosen positions: the same numbers, whatever the head is."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

from osaurus_grpc.engine.head import OutputHead
from osaurus_grpc.models.platform import mx

from .conftest import VOCAB, tiny_model


def untied() -> Any:
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=VOCAB,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=VOCAB,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    mx.eval(model.parameters())
    return model


def quantized() -> Any:
    model = untied()
    nn.quantize(model, group_size=32, bits=8)
    return model


class Hidden(nn.Module):  # type: ignore[misc]  # MLX's Module has no types
    """A model whose head is where nobody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [untied()]

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.layers[0](inputs, cache=cache)


@pytest.mark.parametrize(
    ("make", "is_found"),
    [
        (tiny_model, True),
        (lambda: tiny_model("gemma3"), True),
        (lambda: tiny_model("mamba2"), True),
        (untied, True),
        (quantized, True),
        (Hidden, False),
    ],
)
def test_narrowed_logits_are_those_of_the_whole_pass(make, is_found):
    model = make()
    ids = mx.array(np.random.default_rng(0).integers(0, VOCAB, (3, 9)))
    caches = [make_prompt_cache(model.layers[0] if make is Hidden else model) for _ in range(2)]
    whole = np.asarray(model(ids, cache=caches[0]))
    head = OutputHead(model)
    some = head.logits(ids, caches[1], [8, 0, 4])
    np.testing.assert_allclose(some, whole[[0, 1, 2], [8, 0, 4]], atol=1e-5)
    assert head.is_found == is_found
    assert head.spares(1)
    assert head.spares(4096) == is_found


def test_the_model_itself_is_unchanged():
    """Another caller gets every position, parameters keep their names, a second head is the same."""
    model = untied()
    ids = mx.zeros((1, 5), dtype=mx.int32)
    before = np.asarray(model(ids))
    names = sorted(name for name, _ in model.named_modules())
    first = OutputHead(model)
    OutputHead(model).logits(ids, make_prompt_cache(model), [4])
    assert first.logits(ids, make_prompt_cache(model), [4]).shape == (1, VOCAB)
    np.testing.assert_array_equal(model(ids), before)
    assert sorted(name for name, _ in model.named_modules()) == names
    assert sum(kind.__name__ == "Linear" for kind in type(model.lm_head).__mro__) == 2
