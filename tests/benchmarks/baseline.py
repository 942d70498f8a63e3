"""mlx-lm by itself, in a process of its own: what serving is measured against.

Reads one line a measurement from stdin, {"prompts": [[ids]], "tokens": n, "samplers": [{...}]}, and
answers it with one line, {"seconds": s, "first_token_seconds": [s], "tokens": n}: one prompt runs
through stream_generate, several through BatchGenerator. A sampler holds make_sampler's arguments.
Same BLAS, dtype and BLAS threads as the product.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx, plan_weights  # isort: skip  # first: it loads the BLAS

import json
import sys
import time
from pathlib import Path
from typing import Any

from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import dequantize_model, load_model


def load(path: Path) -> Any:
    model, _ = load_model(path, lazy=True)
    plan = plan_weights(1, "auto")
    if plan.dtype is not None:
        model.set_dtype(plan.dtype)
    if plan.is_dequantized:
        model = dequantize_model(model)
    mx.eval(model.parameters())
    return model


def one(model: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    """What stream_generate does, its detokenizer left out in mlx-lm's favour."""
    started = time.perf_counter()
    first = 0.0
    count = 0
    for _ in generate_step(mx.array(prompt), model, max_tokens=tokens):
        count += 1
        first = first or time.perf_counter() - started
    return {"seconds": time.perf_counter() - started, "first_token_seconds": [first], "tokens": count}


def several(
    model: Any, prompts: list[list[int]], tokens: int, samplers: list[dict[str, Any]]
) -> dict[str, Any]:
    """BatchGenerator with all prompts inserted at once, nothing stopping early."""
    started = time.perf_counter()
    generator = BatchGenerator(model, max_tokens=tokens, stop_tokens=None)
    firsts: dict[int, float] = {}
    count, left = 0, set(generator.insert(prompts, samplers=[_sampler(settings) for settings in samplers]))
    while left:
        for response in generator.next_generated():
            count += 1
            firsts.setdefault(response.uid, time.perf_counter() - started)
            if response.finish_reason is not None:
                left.discard(response.uid)
    seconds = time.perf_counter() - started
    generator.close()
    return {"seconds": seconds, "first_token_seconds": list(firsts.values()), "tokens": count}


_SAMPLERS: dict[str, Any] = {}


def _sampler(settings: dict[str, Any]) -> Any:
    """One object for equal settings: rows that share it are sampled together."""
    return _SAMPLERS.setdefault(json.dumps(settings, sort_keys=True), make_sampler(**settings))


def main() -> None:
    model = load(Path(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts, tokens = asked["prompts"], asked["tokens"]
        if len(prompts) == 1:
            result = one(model, prompts[0], tokens)
        else:
            result = several(model, prompts, tokens, asked["samplers"])
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
