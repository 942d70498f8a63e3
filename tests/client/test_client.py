"""Both clients against real servers: the same calls, the same answers."""

from __future__ import annotations

import asyncio
import doctest
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

import osaurus_grpc.client
from osaurus_grpc import errors
from osaurus_grpc.cli import runtime
from osaurus_grpc.client import (
    AsyncOsaurus,
    ChoiceFinished,
    Completed,
    FinishReason,
    Osaurus,
    Started,
    TextDelta,
    TransportError,
    channel,
)
from osaurus_grpc.v1 import (
    inference_service_pb2,
    inference_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
)
from tests.harness.processes import core_process

ASKED = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture
def client(endless_core: str) -> Iterator[Osaurus]:
    with Osaurus(endless_core) as made:
        yield made


def test_blocking_calls(client: Osaurus):
    assert client.is_serving()
    assert [model.id for model in client.list_models()] == ["tiny-llama"]
    assert client.get_model("TINY-LLAMA").id == "tiny-llama"
    reply = client.chat("Hello", **ASKED)
    assert reply.finish_reason is FinishReason.LENGTH
    assert reply.usage.completion_tokens == 8
    assert str(reply) == reply.text != ""
    assert client.count_tokens("Hello") == reply.usage.prompt_tokens
    assert len(client.embed(["one", "two"], dimensions=16)[1]) == 16
    assert client.load_model("tiny-llama").model.id == "tiny-llama"


def test_a_stream_is_the_reply_in_pieces(client: Osaurus):
    whole = client.chat("Hello", **ASKED)
    with client.stream("Hello", **ASKED) as stream:
        events = list(stream)
    assert isinstance(events[0], Started)
    assert isinstance(events[-2], ChoiceFinished)
    assert isinstance(events[-1], Completed)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == whole.text
    with client.stream("Hello", **ASKED) as stream:
        assert "".join(stream.text) == whole.text
    with client.stream("Hello", **ASKED) as stream:
        assert stream.reply().text == whole.text


def test_a_streams_reply_has_its_log_probabilities(client: Osaurus):
    with client.stream("Hello", top_logprobs=2, **ASKED) as stream:
        logprobs = stream.reply().logprobs
    assert len(logprobs) == 8
    assert all(len(each.top) == 2 for each in logprobs)


def test_closing_a_stream_ends_the_generation(client: Osaurus):
    with client.stream("Hello", max_tokens=100_000, ignore_eos=True) as stream:
        next(stream.text)
    with pytest.raises(TransportError):
        stream.reply()
    # A model that is in use cannot be unloaded.
    assert client.unload_model("tiny-llama", timeout=20) is True


def test_several_choices(client: Osaurus):
    reply = client.chat("Hello", max_tokens=4, seed=1, temperature=1.0, choice_count=3, ignore_eos=True)
    assert len(reply.choices) == 3
    assert reply.text == reply.choices[0].text


def test_threads_share_a_client(client: Osaurus):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: client.chat("Hello", **ASKED).text, range(8)))
    assert len(set(texts)) == 1


def test_errors_are_the_trees(client: Osaurus):
    with pytest.raises(errors.ModelNotFoundError):
        client.get_model("omega")
    with pytest.raises(errors.InvalidRequestError) as raised, client.stream("x", temperature=9) as stream:
        next(stream.text)
    assert raised.value.field == "sampling.temperature"
    with pytest.raises(errors.RequestDeadlineError):
        client.chat("Hello", max_tokens=1_000_000, ignore_eos=True, timeout=0.5)
    with Osaurus("127.0.0.1:9") as nobody, pytest.raises(TransportError):
        nobody.list_models(timeout=5)


async def test_asyncio_calls(endless_core: str, client: Osaurus):
    async with AsyncOsaurus(endless_core) as other:
        reply = await other.chat("Hello", **ASKED)
        assert reply.text == client.chat("Hello", **ASKED).text
        async with other.stream("Hello", **ASKED) as stream:
            assert "".join([text async for text in stream.text]) == reply.text
        async with other.stream("Hello", **ASKED) as stream:
            assert (await stream.reply()).usage.completion_tokens == 8
        assert await other.count_tokens("Hello") == reply.usage.prompt_tokens
        assert len((await other.embed("one"))[0]) > 16
        async with other.stream("Hello", max_tokens=100_000, ignore_eos=True) as stream:
            async for _ in stream.text:
                break
        assert await other.unload_model("tiny-llama", timeout=20) is True


class _Flaky(inference_service_pb2_grpc.InferenceServiceServicer):
    """Unavailable twice, then well: what no real core can be made to be."""

    def __init__(self) -> None:
        self.calls = 0

    async def ListModels(self, request, context):  # noqa: N802 - the contract's name
        self.calls += 1
        if self.calls < 3:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        return inference_service_pb2.ListModelsResponse()


async def test_an_unavailable_server_is_asked_again():
    server, servicer = grpc.aio.server(), _Flaky()
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with AsyncOsaurus(f"127.0.0.1:{port}") as client:
            assert await client.list_models(timeout=30) == []
        assert servicer.calls == 3
    finally:
        await server.stop(None)


class _Fetching(model_service_pb2_grpc.ModelServiceServicer):
    """Fetches a model as no release does yet, and fails to fetch another."""

    async def PullModel(self, request, context):  # noqa: N802 - the contract's name
        for done in (1, 2):
            yield model_service_pb2.PullModelResponse(
                status="downloading", completed_bytes=done, total_bytes=2
            )
        if request.model == "broken":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the line is cut")
        yield model_service_pb2.PullModelResponse(model=model_pb2.Model(id=request.model))


@asynccontextmanager
async def fetching_server() -> AsyncIterator[str]:
    server = grpc.aio.server()
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(_Fetching(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_a_fetch_reports_its_progress():
    async with fetching_server() as address, AsyncOsaurus(address) as client:
        steps = [step async for step in client.pull("new-model", timeout=30)]
        assert [step.completed_bytes for step in steps] == [1, 2, 0]
        assert steps[-1].model.id == "new-model"
        with pytest.raises(TransportError):
            async for _ in client.pull("broken", timeout=30):
                pass

        def blocking() -> str:
            with Osaurus(address) as other:
                return list(other.pull("new-model", timeout=30))[-1].model.id

        assert await asyncio.to_thread(blocking) == "new-model"


def test_the_running_server_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("OSAURUS_CORE", "OSAURUS_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OSAURUS_RUNTIME_DIR", str(tmp_path))
    assert channel.find().address == channel.DEFAULT_ADDRESS
    import os

    started = datetime.fromtimestamp(time.time(), UTC)
    runtime.record(runtime.RunningServer(os.getpid(), "http://127.0.0.1:1", "127.0.0.1:2", tmp_path, started))
    assert channel.find().address == "127.0.0.1:2"
    monkeypatch.setenv("OSAURUS_CORE", "127.0.0.1:3")
    assert channel.find().address == "127.0.0.1:3"
    assert channel.find("127.0.0.1:4").address == "127.0.0.1:4"


@pytest.mark.parametrize(("said", "key"), [("k1", "k1"), ("[k1, k2]", "k1"), ("", ""), ("a,b", "a,b")])
def test_the_key_is_the_servers(monkeypatch: pytest.MonkeyPatch, said: str, key: str):
    monkeypatch.setenv("OSAURUS_API_KEY", said)
    assert channel.find("127.0.0.1:1").metadata == ((("authorization", f"Bearer {key}"),) if key else ())
    assert channel.find("127.0.0.1:1", "mine").metadata == (("authorization", "Bearer mine"),)


def test_keys_open_the_core(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch):
    with core_process(tiny_dir, env={"OSAURUS_API_KEY": "the-key"}) as core:
        monkeypatch.setenv("OSAURUS_API_KEY", "the-key")
        with Osaurus(core.address) as friend:
            assert friend.list_models()
        with Osaurus(core.address, "wrong") as stranger, pytest.raises(errors.UnauthenticatedError):
            stranger.list_models()


@pytest.mark.smollm
def test_the_docstrings_examples(smollm_core: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OSAURUS_CORE", smollm_core)
    failed, tried = doctest.testmod(osaurus_grpc.client)
    assert tried > 5
    assert not failed


def test_asyncio_and_blocking_offer_the_same():
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(Osaurus) == public(AsyncOsaurus)
    assert asyncio.iscoroutinefunction(AsyncOsaurus.chat)
