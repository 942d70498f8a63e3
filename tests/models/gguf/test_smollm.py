from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlx_lm.utils import load

from osaurus_grpc.models.platform import mx

TEXT = (
    "The Eiffel Tower is a wrought-iron lattice tower in Paris, France. It is named after the engineer "
    "Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
)


@pytest.mark.smollm
def test_the_real_model_is_converted_without_loss_and_knows_english(smollm_dir: Path):
    folder = smollm_dir / "smollm2-135m-instruct"
    origin = json.loads((folder / "config.json").read_text())["osaurus"]
    assert (origin["format"], origin["quantization"], origin["is_exact"]) == ("gguf", "Q4_1", True)
    assert origin["parameter_count"] == 134_515_008
    model, tokenizer = load(str(folder))
    assert tokenizer.eos_token_ids == {0, 2}
    model.set_dtype(mx.float32)
    tokens = mx.array([tokenizer.encode(TEXT)])
    logits = model(tokens)[:, :-1]
    chosen = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    surprise = (mx.logsumexp(logits, axis=-1) - chosen).mean().item()
    # In nats a token: 1.95 was measured, and 3.11 with the rows of q and k left permuted.
    assert surprise < 2.2
