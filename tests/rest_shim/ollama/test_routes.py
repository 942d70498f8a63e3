"""Ollama's routes before a core that does what the test tells it to."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import aiohttp
import grpc
import ollama
import pytest
from google.rpc import error_details_pb2

from osaurus_grpc.v1 import chat_pb2, completion_pb2, embedding_pb2, model_service_pb2
from rest_shim.ollama import names
from rest_shim.ollama.embeddings import TEXTS_AT_ONCE
from rest_shim.ollama.library import OLLAMA_VERSION

from ..scripted_core import MODEL, ScriptedCore, abort, timings, usage


@pytest.fixture
async def client(shim: str) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(host=shim) as made:
        yield made


def embeds(core: ScriptedCore) -> None:
    async def embed(
        request: embedding_pb2.EmbedRequest, _context: grpc.aio.ServicerContext
    ) -> embedding_pb2.EmbedResponse:
        vectors = [
            embedding_pb2.Embedding(index=index, values=[1.0, 0.5]) for index in range(len(request.inputs))
        ]
        return embedding_pb2.EmbedResponse(
            model=request.model, embeddings=vectors, usage=usage(), timings=timings()
        )

    core.embed_script = embed


class TestEmbeddings:
    async def test_texts(self, client: ollama.AsyncClient, core: ScriptedCore) -> None:
        embeds(core)
        made = await client.embed(MODEL, ["a", "b"], dimensions=2, keep_alive="5m")
        assert made.embeddings == [[1.0, 0.5], [1.0, 0.5]]
        assert made.prompt_eval_count == 25
        asked = core.requests[-1]
        assert isinstance(asked, embedding_pb2.EmbedRequest)
        assert (asked.dimensions, asked.truncate, asked.keep_alive.seconds) == (2, True, 300)
        assert not asked.HasField("normalize")
        await client.embed(MODEL, "a", truncate=False)
        asked = core.requests[-1]
        assert isinstance(asked, embedding_pb2.EmbedRequest)
        assert (list(asked.inputs), asked.truncate) == (["a"], False)

    async def test_more_dimensions_than_there_are(
        self, client: ollama.AsyncClient, core: ScriptedCore
    ) -> None:
        embeds(core)
        for dimensions, asked_for in ((2, 2), (5000, 3072), (0, 0), (-1, 0)):
            await client.embed(MODEL, "a", dimensions=dimensions)
            asked = core.requests[-1]
            assert isinstance(asked, embedding_pb2.EmbedRequest)
            assert asked.dimensions == asked_for
        core.models[0].embedding_length = 0  # not known
        await client.embed(MODEL, "a", dimensions=5000)
        asked = core.requests[-1]
        assert isinstance(asked, embedding_pb2.EmbedRequest)
        assert asked.dimensions == 5000

    async def test_a_whole_collection(self, http: aiohttp.ClientSession, core: ScriptedCore) -> None:
        """More texts than one request to the core takes."""
        embeds(core)
        texts = [f"text {index}" for index in range(TEXTS_AT_ONCE + 3)]
        async with http.post("/api/embed", json={"model": MODEL, "input": texts}) as response:
            made = await response.json()
        assert len(made["embeddings"]) == len(texts)
        assert made["prompt_eval_count"] == 2 * usage().prompt_tokens
        assert made["total_duration"] == 2 * timings().total_duration.ToNanoseconds()
        asked = [list(part.inputs) for part in core.requests if isinstance(part, embedding_pb2.EmbedRequest)]
        assert asked == [texts[:TEXTS_AT_ONCE], texts[TEXTS_AT_ONCE:]]

    async def test_where_in_a_collection_a_text_is_wrong(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        async def embed(
            request: embedding_pb2.EmbedRequest, context: grpc.aio.ServicerContext
        ) -> embedding_pb2.EmbedResponse:
            if "" in request.inputs:
                field = f"inputs[{list(request.inputs).index('')}]"
                violation = error_details_pb2.BadRequest.FieldViolation(field=field)
                wrong = error_details_pb2.BadRequest(field_violations=[violation])
                message = f"{field} must not be empty."
                await abort(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", message, wrong)
            return embedding_pb2.EmbedResponse(usage=usage(), timings=timings())

        core.embed_script = embed
        texts = ["a"] * (TEXTS_AT_ONCE + 1) + [""]
        async with http.post("/api/embed", json={"model": MODEL, "input": texts}) as response:
            assert response.status == 400
            assert f"'input[{TEXTS_AT_ONCE + 1}]'" in (await response.json())["error"]

    async def test_the_older_call(self, client: ollama.AsyncClient, core: ScriptedCore) -> None:
        embeds(core)
        made = await client.embeddings(MODEL, "a")
        assert made.embedding == [1.0, 0.5]
        asked = core.requests[-1]
        assert isinstance(asked, embedding_pb2.EmbedRequest)
        assert (asked.HasField("normalize"), asked.normalize) == (True, False)

    async def test_whose_call_it_is(self, http: aiohttp.ClientSession, core: ScriptedCore) -> None:
        embeds(core)
        async with http.post("/api/embeddings", json={"model": MODEL, "prompt": "a"}) as response:
            assert list(await response.json()) == ["embedding"]
        async with http.post("/api/embeddings", json={"model": MODEL, "input": "a"}) as response:
            assert (await response.json())["object"] == "list"
        for path in ("/v1/embeddings", "/embeddings"):
            async with http.post(path, json={"model": MODEL, "prompt": "a"}) as response:
                assert response.status == 400
                assert set((await response.json())["error"]) == {"message", "type", "param", "code"}
        async with http.post("/api/embeddings", json={"model": 1, "prompt": "a"}) as response:
            assert isinstance((await response.json())["error"], str)
        async with http.post("/api/embeddings", data=b"{") as response:
            assert response.status == 400


class TestNames:
    async def test_an_alias_comes_and_goes(
        self, client: ollama.AsyncClient, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        assert (await client.copy(MODEL, "gpt-4o")).status == "success"
        asked = core.requests[-1]
        assert isinstance(asked, model_service_pb2.CopyModelRequest)
        assert (asked.source, asked.destination) == (MODEL, "gpt-4o")
        assert (await client.delete(MODEL)).status == "success"
        async with http.delete("/api/delete", json={"name": MODEL}) as response:
            assert (response.status, await response.read()) == (200, b"")

    async def test_a_foreign_page_changes_no_names(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        headers = {"Origin": "https://example.com"}
        copy = {"source": MODEL, "destination": "x"}
        async with http.post("/api/copy", json=copy, headers=headers) as response:
            assert response.status == 403
        async with http.delete("/api/delete", json={"model": MODEL}, headers=headers) as response:
            assert response.status == 403
        assert not core.requests

    @pytest.mark.parametrize(
        ("name", "is_invalid"),
        [("a b", True), ("bad name!!", True), ("a/b/c/d", True), ("x" * 81, True), ("-a", True),
         ("nope", False), ("nope:1b", False), ("org/nope", False), ("host:5000/org/nope:tag", False),
         ("", False)],
    )  # fmt: skip
    def test_which_names_are_invalid(self, name: str, is_invalid: bool) -> None:
        assert (names.unknown(name).message == "invalid model name") is is_invalid


class TestGenerate:
    async def test_a_model_that_fills_no_gaps(self, client: ollama.AsyncClient, core: ScriptedCore) -> None:
        async def refuse(
            _request: completion_pb2.CompleteRequest, context: grpc.aio.ServicerContext
        ) -> completion_pb2.CompleteResponse:
            violation = error_details_pb2.BadRequest.FieldViolation(field="suffix")
            details = error_details_pb2.BadRequest(field_violations=[violation])
            code = grpc.StatusCode.FAILED_PRECONDITION
            await abort(context, code, "UNSUPPORTED_CAPABILITY", "No.", details)
            raise AssertionError

        core.complete_script = refuse
        with pytest.raises(ollama.ResponseError) as caught:
            await client.generate(MODEL, "def f", suffix="end")
        assert (caught.value.status_code, caught.value.error) == (400, f"{MODEL} does not support insert")

    async def test_a_chat_of_the_core(self, client: ollama.AsyncClient, core: ScriptedCore) -> None:
        lines = [line async for line in await client.generate(MODEL, "Hi", stream=True)]
        assert [line.response for line in lines] == ["I'm", " doing", ""]
        asked = core.requests[-1]
        assert isinstance(asked, chat_pb2.ChatStreamRequest)
        assert asked.chat.include_token_ids

    async def test_a_continuation_that_fails_in_mid_stream(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        async def dies(
            _request: completion_pb2.CompleteStreamRequest, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[completion_pb2.CompleteStreamResponse]:
            yield completion_pb2.CompleteStreamResponse(started=chat_pb2.ChatStarted(id="x"))
            yield completion_pb2.CompleteStreamResponse(content=chat_pb2.ContentDelta(text="a"))
            await abort(context, grpc.StatusCode.INTERNAL, "ENGINE_FAILED", "The engine failed.")

        core.complete_stream_script = dies
        body = {"model": MODEL, "prompt": "x", "raw": True}
        async with http.post("/api/generate", json=body) as response:
            assert response.headers["Content-Type"] == "application/x-ndjson"
            lines = (await response.text()).splitlines()
        assert '"response":"a"' in lines[0]
        assert lines[1:] == ['{"error":"The engine failed."}']

    async def test_a_foreign_page_does_not_load(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        body = {"model": MODEL}
        async with http.post("/api/generate", json=body, headers={"Origin": "https://x.example"}) as response:
            assert response.status == 403
        assert not core.requests


async def test_versions(http: aiohttp.ClientSession) -> None:
    async with http.get("/api/version") as response:
        assert await response.json() == {"version": OLLAMA_VERSION}
        assert re.fullmatch(r"osaurus/\d+\.\d+\.\d+", response.headers["Server"])
    assert tuple(map(int, OLLAMA_VERSION.split("."))) >= (0, 6, 5)


@pytest.mark.parametrize("path", ["/api/version", "/api/tags", "/api/ps", "/"])
async def test_head(http: aiohttp.ClientSession, path: str) -> None:
    async with http.head(path) as response:
        assert (response.status, await response.read()) == (200, b"")


async def test_blobs_are_to_come(http: aiohttp.ClientSession) -> None:
    async with http.head("/api/blobs/sha256:00") as response:
        assert response.status == 501
