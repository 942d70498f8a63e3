"""Embedding vectors: what a request may hold, and its conversion both ways."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from osaurus_grpc.v1 import completion_pb2, embedding_pb2
from rest_shim.bodies import Body, Integer
from rest_shim.openai import schema
from rest_shim.openai.prompts import Inputs
from rest_shim.openai.sampling import MAX_INT32

EncodingFormat = Literal["float", "base64"]


class EmbeddingsBody(Body):
    """POST /embeddings."""

    model: schema.ModelName
    input: Inputs
    encoding_format: EncodingFormat = "float"
    dimensions: Annotated[Integer, Field(ge=1, le=MAX_INT32)] | None = None


def embed_request(body: EmbeddingsBody) -> embedding_pb2.EmbedRequest:
    """The core's request; an input that is too long is refused, not cut, as OpenAI's server does."""
    request = embedding_pb2.EmbedRequest(model=body.model, dimensions=body.dimensions)
    for item in body.input:
        if isinstance(item, str):
            request.inputs.append(item)
        else:
            request.token_inputs.append(completion_pb2.TokenPrompt(token_ids=item))
    return request


def json_path(field: str) -> str:
    """A field of the protobuf request as the path in OpenAI's JSON, for an error's `param`."""
    head, bracket, rest = field.removeprefix("embed.").partition("[")
    # "messages" is what an error's general meaning names: an input is too long.
    if head.partition(".")[0] in {"inputs", "token_inputs", "messages"}:
        return f"input{bracket}{rest.partition(']')[0]}]" if bracket else "input"
    return field


def embeddings_json(
    response: embedding_pb2.EmbedResponse, encoding_format: EncodingFormat
) -> dict[str, object]:
    """The vectors, as numbers or as base64 of little-endian float32."""
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": entry.index,
                "embedding": _vector(entry, encoding_format),
            }
            for entry in response.embeddings
        ],
        "model": response.model,
        "usage": {
            "prompt_tokens": response.usage.prompt_tokens,
            "total_tokens": response.usage.prompt_tokens,
        },
    }


def _vector(entry: embedding_pb2.Embedding, encoding_format: EncodingFormat) -> object:
    if encoding_format == "base64":
        return base64.b64encode(np.asarray(entry.values, dtype="<f4").tobytes()).decode("ascii")
    return list(entry.values)
