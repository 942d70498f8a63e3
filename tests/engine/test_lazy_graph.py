"""What a step leaves unevaluated stays bounded, however long an answer gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.models import smollm3
from mlx_lm.models.cache import BatchKVCache

from osaurus_grpc.engine.batch import Batch
from osaurus_grpc.engine.decoding import STATE_EVALUATION_STEPS
from osaurus_grpc.engine.sampling import RowSampler
from osaurus_grpc.models.platform import mx

from .conftest import GREEDY, VOCAB, tiny_model


def without_positions() -> Any:
    """A model with a layer that never reads its cache's offset, so that nothing evaluates it."""
    model = smollm3.Model(
        smollm3.ModelArgs(
            model_type="smollm3", hidden_size=16, num_hidden_layers=2, intermediate_size=16,
            num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5, vocab_size=VOCAB,
            no_rope_layers=[1, 0],
        )
    )  # fmt: skip
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def unevaluated(caches: Sequence[Any], path: Path) -> int:
    """Operations that evaluating the caches would run now."""
    arrays: list[mx.array] = []

    def collect(value: Any) -> None:
        if isinstance(value, mx.array):
            arrays.append(value)
        elif isinstance(value, list | tuple):
            for one in value:
                collect(one)

    for cache in caches:
        collect(cache.state)
    mx.export_to_dot(str(path), *arrays)
    return path.read_text().count("shape=rectangle")


@pytest.mark.parametrize("make", [without_positions, lambda: tiny_model("mamba2")])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_lazy_graph_of_the_caches_is_bounded(make, rows, tmp_path):
    batch = Batch(make(), (), 4)
    try:
        for i in range(rows):
            sampler = RowSampler(GREEDY, [1, 2, i], (), top_logprobs=None, seed=0, vocab_size=VOCAB)
            batch.insert([1, 2, i], 1000, sampler)
        counts = []
        for _ in range(3 * STATE_EVALUATION_STEPS):
            batch.step(64)
            counts.append(unevaluated(batch._decoding.caches, tmp_path / "graph.dot"))
        assert batch.decoding == rows
        # One operation a step for each cache at most, and the step in flight.
        assert max(counts) <= 2 * STATE_EVALUATION_STEPS + 100
        assert max(counts[-STATE_EVALUATION_STEPS:]) <= max(counts[: 2 * STATE_EVALUATION_STEPS]) + 8
    finally:
        batch.close()


def test_the_count_sees_what_is_not_evaluated(tmp_path):
    """The test above would be worth nothing if it counted nothing."""
    model = without_positions()
    caches = [BatchKVCache([0, 0]) for _ in model.layers]  # mlx-lm's own, with positions on the device
    counts = []
    for _ in range(20):
        mx.eval(model(mx.array([[1], [2]]), cache=caches))
        counts.append(unevaluated(caches, tmp_path / "graph.dot"))
    assert counts[-1] >= counts[0] + 15
