from __future__ import annotations

import base64
import struct

import aiohttp
import grpc
import pytest

from osaurus_grpc.v1 import completion_pb2, embedding_pb2, usage_pb2
from rest_shim.bodies import validate
from rest_shim.errors import Refusal
from rest_shim.openai import embeddings

from ..scripted_core import MODEL, ScriptedCore, abort

PATH = "/v1/embeddings"


def request(**fields: object) -> embedding_pb2.EmbedRequest:
    body = {"model": "m", "input": "Hello", **fields}
    return embeddings.embed_request(validate(embeddings.EmbeddingsBody, body))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Hello", {"inputs": ["Hello"]}),
        (["a", "b"], {"inputs": ["a", "b"]}),
        ([1, 2], {"token_inputs": [completion_pb2.TokenPrompt(token_ids=[1, 2])]}),
        (
            [[1], [2, 3]],
            {
                "token_inputs": [
                    completion_pb2.TokenPrompt(token_ids=[1]),
                    completion_pb2.TokenPrompt(token_ids=[2, 3]),
                ]
            },
        ),
    ],
)
def test_forms_of_inputs(given: object, expected: dict[str, object]) -> None:
    assert request(input=given) == embedding_pb2.EmbedRequest(model="m", **expected)  # type: ignore[arg-type]  # a table


def test_dimensions() -> None:
    assert request(dimensions=64).dimensions == 64
    assert not request(dimensions=None).HasField("dimensions")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [[1]] * 2049}, "input"),
        ({"input": {}}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, object], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        request(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("inputs[3]", "input[3]"),
        ("inputs", "input"),
        ("token_inputs[7].token_ids[1]", "input[7]"),
        ("messages", "input"),
        ("dimensions", "dimensions"),
        ("model", "model"),
    ],
)
def test_field_names_of_the_core(field: str, param: str) -> None:
    assert embeddings.json_path(field) == param


async def embed(
    request: embedding_pb2.EmbedRequest, context: grpc.aio.ServicerContext
) -> embedding_pb2.EmbedResponse:
    if "too long" in request.inputs:
        await abort(context, grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", "It is too long.")
    return embedding_pb2.EmbedResponse(
        model=MODEL,
        embeddings=[
            embedding_pb2.Embedding(index=index, values=[0.5, -0.1, float(index)])
            for index in range(len(request.inputs))
        ],
        usage=usage_pb2.Usage(prompt_tokens=5),
    )


@pytest.mark.parametrize("encoding", ["float", "base64", None])
async def test_the_answer(http: aiohttp.ClientSession, core: ScriptedCore, encoding: str | None) -> None:
    core.embed_script = embed
    asked = {"model": "m", "input": ["a", "b"], "encoding_format": encoding}
    async with http.post(PATH, json=asked) as response:
        body = await response.json()
    vectors = [[0.5, struct.unpack("<f", struct.pack("<f", -0.1))[0], float(index)] for index in (0, 1)]
    if encoding == "base64":
        for entry in body["data"]:
            entry["embedding"] = list(struct.unpack("<3f", base64.b64decode(entry["embedding"])))
    assert body == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(vectors)
        ],
        "model": MODEL,
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }


async def test_an_input_that_is_too_long(http: aiohttp.ClientSession, core: ScriptedCore) -> None:
    core.embed_script = embed
    async with http.post(PATH, json={"model": "m", "input": "too long"}) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
