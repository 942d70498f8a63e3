"""Ollama's /embed and its older /embeddings; pure functions."""

from __future__ import annotations

from osaurus_grpc.v1 import embedding_pb2
from rest_shim.ollama import convert, schema


def embed_request(body: schema.EmbedBody) -> embedding_pb2.EmbedRequest:
    """The core's request for the vectors of a list of texts."""
    return embedding_pb2.EmbedRequest(
        model=body.model,
        inputs=body.input,
        dimensions=body.dimensions or None,
        truncate=body.truncate,
        keep_alive=convert.keep_alive(body),
    )


def legacy_request(body: schema.EmbeddingsBody) -> embedding_pb2.EmbedRequest:
    """The core's request for the vector of one text, not scaled to length 1."""
    return embedding_pb2.EmbedRequest(
        model=body.model,
        inputs=[body.prompt],
        truncate=True,
        normalize=False,
        keep_alive=convert.keep_alive(body),
    )


def embed_json(response: embedding_pb2.EmbedResponse, model: str) -> dict[str, object]:
    """The vectors; model is the name as the client said it."""
    timings = response.timings
    return {
        "model": model,
        "embeddings": [list(vector.values) for vector in response.embeddings],
        "total_duration": max(1, timings.total_duration.ToNanoseconds()),
        "load_duration": max(1, timings.load_duration.ToNanoseconds()),
        "prompt_eval_count": max(1, response.usage.prompt_tokens),
    }


def nothing_json(model: str) -> dict[str, object]:
    """The answer where there is nothing to embed."""
    return {"model": model, "embeddings": []}


def legacy_json(response: embedding_pb2.EmbedResponse) -> dict[str, object]:
    """The one vector."""
    return {"embedding": list(response.embeddings[0].values)}
