"""Ollama's /embed and its older /embeddings; pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from osaurus_grpc.v1 import embedding_pb2
from rest_shim.ollama import convert, schema

# What one request to the core takes.
TEXTS_AT_ONCE: Final = 2_048

_INPUT = re.compile(r"input\[(\d+)\]")


def embed_requests(body: schema.EmbedBody, width: int) -> list[embedding_pb2.EmbedRequest]:
    """The core's requests for the vectors of a list of texts.

    Args:
        body: The request; there is no bound on its texts in Ollama, and clients send a whole
            collection at once.
        width: Numbers in the model's vectors, or 0 where it is not known. Ollama gives the whole vector
            where more are asked for.
    """
    dimensions = min(body.dimensions, width) if width else body.dimensions
    return [
        embedding_pb2.EmbedRequest(
            model=body.model,
            inputs=body.input[start : start + TEXTS_AT_ONCE],
            dimensions=dimensions if dimensions > 0 else None,
            truncate=body.truncate,
            keep_alive=convert.keep_alive(body),
        )
        for start in range(0, len(body.input), TEXTS_AT_ONCE)
    ]


def json_path(turn: int, field: str) -> str:
    """A field of one of embed_requests() as the path in the JSON; turn is that one's index."""
    first = turn * TEXTS_AT_ONCE
    return _INPUT.sub(lambda found: f"input[{first + int(found[1])}]", convert.json_path(field))


def legacy_request(body: schema.EmbeddingsBody) -> embedding_pb2.EmbedRequest:
    """The core's request for the vector of one text, not scaled to length 1."""
    return embedding_pb2.EmbedRequest(
        model=body.model,
        inputs=[body.prompt],
        truncate=True,
        normalize=False,
        keep_alive=convert.keep_alive(body),
    )


def embed_json(responses: Sequence[embedding_pb2.EmbedResponse], model: str) -> dict[str, object]:
    """The vectors; model is the name as the client said it."""
    timings = [response.timings for response in responses]
    return {
        "model": model,
        "embeddings": [list(vector.values) for response in responses for vector in response.embeddings],
        "total_duration": max(1, sum(part.total_duration.ToNanoseconds() for part in timings)),
        "load_duration": max(1, sum(part.load_duration.ToNanoseconds() for part in timings)),
        "prompt_eval_count": max(1, sum(response.usage.prompt_tokens for response in responses)),
    }


def nothing_json(model: str) -> dict[str, object]:
    """The answer where there is nothing to embed."""
    return {"model": model, "embeddings": []}


def legacy_json(response: embedding_pb2.EmbedResponse) -> dict[str, object]:
    """The one vector."""
    return {"embedding": list(response.embeddings[0].values)}
