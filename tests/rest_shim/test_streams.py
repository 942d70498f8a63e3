"""Streams over a real connection: order, silence, failures and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import grpc
import pytest

from osaurus_grpc.v1 import chat_pb2
from rest_shim.app import serving
from rest_shim.settings import Settings

from .scripted_core import MODEL, ScriptedCore, abort, answer, content, silent, started

OPENAI = "/v1/chat/completions"
OLLAMA = "/api/chat"
GENERATE = "/api/generate"
ANTHROPIC = "/v1/messages"
PATHS = [OPENAI, OLLAMA, GENERATE, ANTHROPIC]
# Every dialect ignores what it does not know.
CHAT = {
    "model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, "prompt": "Hello",
    "stream": False,
}  # fmt: skip
STREAM = {**CHAT, "stream": True}
SECONDS = 60


@pytest.fixture
def settings(core: ScriptedCore) -> Settings:
    """Comments after so short a silence that every silent stream has some."""
    return Settings(core=core.address, port=0, keep_alive_interval_seconds=0.05, drain_seconds=5.0)


def post(path: str, body: object, version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def wait(event: asyncio.Event) -> None:
    async with asyncio.timeout(SECONDS):
        await event.wait()


class TestHeaders:
    async def test_sse(self, http: aiohttp.ClientSession) -> None:
        async with http.post(OPENAI, json=STREAM) as response:
            headers = response.headers
            assert headers["Content-Type"] == "text/event-stream"
            assert headers["Cache-Control"] == "no-cache, no-transform"
            assert headers["Connection"] == "keep-alive"
            assert headers["X-Accel-Buffering"] == "no"
            assert headers["Transfer-Encoding"] == "chunked"
            assert headers["x-request-id"]

    async def test_ndjson(self, http: aiohttp.ClientSession) -> None:
        async with http.post(OLLAMA, json=STREAM) as response:
            assert response.headers["Content-Type"] == "application/x-ndjson"
            assert response.headers["Cache-Control"] == "no-cache, no-transform"

    async def test_json(self, http: aiohttp.ClientSession) -> None:
        async with http.post(OPENAI, json=CHAT) as response:
            assert response.headers["Content-Type"] == "application/json"
        # The API reference says that Ollama's chat does not stream unless it is asked to.
        unsaid = {key: value for key, value in CHAT.items() if key != "stream"}
        for body in (unsaid, {**CHAT, "stream": False}, {**CHAT, "stream": None}):
            async with http.post(OLLAMA, json=body) as response:
                assert response.headers["Content-Type"] == "application/json; charset=utf-8"


async def test_each_event_arrives_in_one_chunk(shim: str, core: ScriptedCore) -> None:
    core.events = tuple(answer(*"abcdef"))
    reader, writer = await connect(shim)
    writer.write(post(OPENAI, STREAM))
    await reader.readuntil(b"\r\n\r\n")
    events = 0
    while size := int(await reader.readline(), 16):
        chunk = await reader.readexactly(size + 2)
        if chunk.startswith(b":"):
            continue  # a comment, where the loop was busy with something else
        assert chunk.startswith(b"data: ")
        assert chunk.endswith(b"\n\n\r\n")
        events += chunk.count(b"data: ")
    assert events == 9
    writer.close()


async def test_http_1_0_clients_get_a_plain_stream(shim: str) -> None:
    reader, writer = await connect(shim)
    writer.write(post(OPENAI, STREAM, version="1.0"))
    async with asyncio.timeout(SECONDS):
        data = await reader.read()
    assert b"chunked" not in data
    assert data.endswith(b"data: [DONE]\n\n")
    writer.close()


class TestSilence:
    async def test_comments_during_a_silent_prefill(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        heard = asyncio.Event()

        async def script(
            _request: object, _context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            yield started()
            await wait(heard)
            for event in list(answer("a"))[1:]:
                yield event

        core.stream_script = script
        lines = []
        async with http.post(OPENAI, json=STREAM) as response:
            async for line in response.content:
                lines.append(line)
                if lines.count(b": keep-alive\n") == 2:
                    heard.set()
        # On a busy machine a comment may come before the first event, too.
        assert next(line for line in lines if not line.startswith((b":", b"\n"))).startswith(b'data: {"id"')
        comments = [index for index, line in enumerate(lines) if line == b": keep-alive\n"]
        assert len(comments) >= 2
        assert all(lines[index + 1] == b"\n" for index in comments)
        assert lines[-2:] == [b"data: [DONE]\n", b"\n"]

    async def test_comments_while_a_model_loads(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        heard = asyncio.Event()

        async def script(
            _request: object, _context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            await wait(heard)
            for event in answer("a"):
                yield event

        core.stream_script = script
        async with http.post(OPENAI, json=STREAM) as response:
            assert response.status == 200
            assert await response.content.readline() == b": keep-alive\n"
            heard.set()
            assert (await response.content.read()).endswith(b"data: [DONE]\n\n")

    async def test_a_failure_after_a_comment_is_an_event(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        heard = asyncio.Event()

        async def script(
            _request: object, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            await wait(heard)
            await abort(context, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "Model not found: x")
            yield started()

        core.stream_script = script
        async with http.post(OPENAI, json=STREAM) as response:
            await response.content.readline()
            heard.set()
            rest = await response.content.read()
        event = json.loads(rest.decode().partition("data: ")[2])
        assert event["error"]["code"] == "model_not_found"
        assert b"[DONE]" not in rest

    async def test_ollama_gets_no_comments(self, http: aiohttp.ClientSession, core: ScriptedCore) -> None:
        async def script(
            _request: object, _context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            for event in answer("a", "b"):
                await asyncio.sleep(0.1)
                yield event

        core.stream_script = script
        async with http.post(OLLAMA, json=STREAM) as response:
            lines = [json.loads(line) async for line in response.content]
        assert [line["done"] for line in lines] == [False, False, True]


class TestFailures:
    @pytest.mark.parametrize("path", PATHS)
    async def test_a_core_that_dies_in_mid_stream(self, shim: str, core: ScriptedCore, path: str) -> None:
        # A core of its own, so that it can be stopped.
        dying = ScriptedCore()
        server = await dying.start()
        dying.stream_script = silent(started(), content("a"))
        async with serving(Settings(core=dying.address, port=0)) as urls:
            reader, writer = await connect(urls[0])
            writer.write(post(path, STREAM))
            async with asyncio.timeout(SECONDS):
                data = await reader.readuntil(b'"a"')
                await server.stop(None)
                # Until the server closes: after the error there is no next request.
                data += await reader.read()
            writer.close()
            assert data.startswith(b"HTTP/1.1 200")
            assert b"[DONE]" not in data
            last = data.split(b"\r\n")[-4].decode()
            error = json.loads(last.removeprefix("event: error\n").removeprefix("data: "))["error"]
            if path == OPENAI:
                assert (error["type"], error["code"]) == ("server_error", "service_unavailable")
            elif path == ANTHROPIC:
                assert error["type"] == "overloaded_error"
            else:
                assert isinstance(error, str)
            assert data.endswith(b"0\r\n\r\n")
            # The shim itself lives on.
            async with aiohttp.ClientSession() as session, session.get(f"{urls[0]}/") as response:
                assert response.status == 200

    @pytest.mark.parametrize("path", PATHS)
    async def test_an_error_after_the_first_byte(
        self, http: aiohttp.ClientSession, core: ScriptedCore, path: str
    ) -> None:
        async def script(
            _request: object, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            yield started()
            yield content("a")
            await abort(context, grpc.StatusCode.INTERNAL, "ENGINE_FAILED", "The engine failed.")

        core.stream_script = script
        async with http.post(path, json=STREAM) as response:
            assert response.status == 200
            text = await response.text()
        last = json.loads(text.rstrip().splitlines()[-1].removeprefix("data: "))
        if path == ANTHROPIC:
            assert text.rstrip().splitlines()[-2] == "event: error"
            assert last.pop("request_id") == response.headers["request-id"]
            error = {"type": "api_error", "message": "The engine failed."}
            assert last == {"type": "error", "error": error}
            return
        whole = {
            "message": "The engine failed.",
            "type": "server_error",
            "param": None,
            "code": "internal_server_error",
        }
        assert last == {"error": whole if path == OPENAI else whole["message"]}

    @pytest.mark.parametrize("path", PATHS)
    async def test_a_stream_that_ends_too_early_is_a_failure(
        self, http: aiohttp.ClientSession, core: ScriptedCore, path: str
    ) -> None:
        core.events = (started(), content("a"))
        async with http.post(path, json=STREAM) as response:
            text = await response.text()
        assert "error" in json.loads(text.rstrip().splitlines()[-1].removeprefix("data: "))
        assert "[DONE]" not in text

    async def test_a_shims_own_mistake_is_told_too(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        core.events = (started(), content("a", choice_index=7))
        async with http.post(OPENAI, json=STREAM) as response:
            text = await response.text()
        assert '"code":"internal_server_error"' in text

    async def test_a_deadline(self, core: ScriptedCore) -> None:
        gone = asyncio.Event()
        core.stream_script = silent(gone=gone)
        settings = Settings(core=core.address, port=0, request_timeout_seconds=1.0)
        async with serving(settings) as urls, aiohttp.ClientSession(urls[0]) as session:
            async with session.post(OPENAI, json=STREAM) as response:
                assert response.status == 504
                assert response.headers["x-should-retry"] == "false"
            await wait(gone)
            raw = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            reader, writer = await connect(urls[0])
            writer.write(raw)
            assert (await reader.readline()).startswith(b"HTTP/1.1 408")
            writer.close()


class TestClientsThatLeave:
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("events", [(), (started(),), (started(), content("a"))])
    async def test_a_stream_is_cancelled(
        self, shim: str, core: ScriptedCore, path: str, events: tuple[chat_pb2.ChatStreamResponse, ...]
    ) -> None:
        begun, gone = asyncio.Event(), asyncio.Event()
        inner = silent(*events, gone=gone)

        async def script(
            request: chat_pb2.ChatStreamRequest, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            begun.set()
            async for event in inner(request, context):
                yield event

        core.stream_script = script
        reader, writer = await connect(shim)
        writer.write(post(path, STREAM))
        await wait(begun)
        if len(events) == 2:
            await reader.readuntil(b'"a"')
        writer.transport.abort()
        await wait(gone)

    @pytest.mark.parametrize("path", PATHS)
    async def test_a_whole_answer_is_cancelled(self, shim: str, core: ScriptedCore, path: str) -> None:
        begun, gone = asyncio.Event(), asyncio.Event()

        async def script(_request: object, _context: grpc.aio.ServicerContext) -> chat_pb2.ChatResponse:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                gone.set()
            raise AssertionError

        core.chat_script = script
        _reader, writer = await connect(shim)
        writer.write(post(path, CHAT))
        await wait(begun)
        writer.close()
        await wait(gone)

    async def test_a_client_that_never_reads_does_not_hold_the_others(
        self, shim: str, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        core.events = tuple(answer(*["x" * 1000] * 5000))
        _reader, writer = await connect(shim)
        writer.transport.pause_reading()
        writer.write(post(OPENAI, STREAM))
        async with asyncio.timeout(SECONDS):
            while not core.requests:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.01)
        core.events = tuple(answer("a"))
        async with http.post(OPENAI, json=STREAM) as response:
            assert (await response.text()).endswith("data: [DONE]\n\n")
        writer.transport.abort()

    @pytest.mark.parametrize("path", [OPENAI, OLLAMA])
    async def test_a_client_that_never_reads_is_cut_off(self, core: ScriptedCore, path: str) -> None:
        core.events = tuple(answer(*["x" * 10_000] * 2_000))
        settings = Settings(core=core.address, port=0, request_timeout_seconds=1.0)
        async with serving(settings) as urls, aiohttp.ClientSession(urls[0]) as session:
            _reader, writer = await connect(urls[0])
            writer.transport.pause_reading()
            writer.write(post(path, STREAM))
            async with asyncio.timeout(SECONDS):
                metrics = ""
                while 'status="499"} 1.0' not in metrics:
                    async with session.get("/metrics") as response:
                        metrics = await response.text()
                    await asyncio.sleep(0.05)
            writer.transport.abort()


class TestShutdown:
    async def test_a_running_stream_is_finished_and_new_clients_are_refused(self, core: ScriptedCore) -> None:
        release = asyncio.Event()

        async def script(
            _request: object, _context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            events = list(answer("a", "b"))
            for event in events[:2]:
                yield event
            await wait(release)
            for event in events[2:]:
                yield event

        core.stream_script = script
        context = serving(Settings(core=core.address, port=0, drain_seconds=SECONDS))
        urls = await context.__aenter__()
        reader, writer = await connect(urls[0])
        writer.write(post(OPENAI, STREAM))
        await reader.readuntil(b'"a"')
        leaving = asyncio.create_task(context.__aexit__(None, None, None))
        async with asyncio.timeout(SECONDS):
            while True:
                try:
                    _, probe = await connect(urls[0])
                except ConnectionError:
                    break
                probe.close()
                await asyncio.sleep(0.01)
        release.set()
        async with asyncio.timeout(SECONDS):
            assert b"data: [DONE]" in await reader.read()
            await leaving
        writer.close()

    @pytest.mark.parametrize(
        ("path", "failure"),
        [
            (OPENAI, b'data: {"error":{"message":"The server is shutting down."'),
            (OLLAMA, b'{"error":"The server is shutting down."}'),
            (GENERATE, b'{"error":"The server is shutting down."}'),
            (ANTHROPIC, b'"error":{"type":"overloaded_error","message":"The server is shutting down."}'),
        ],
    )
    async def test_a_stream_that_does_not_end_is_ended_with_an_error(
        self, core: ScriptedCore, path: str, failure: bytes
    ) -> None:
        gone = asyncio.Event()
        core.stream_script = silent(started(), content("begun"), gone=gone)
        async with serving(Settings(core=core.address, port=0, drain_seconds=0.1)) as urls:
            reader, writer = await connect(urls[0])
            writer.write(post(path, STREAM))
            await reader.readuntil(b"begun")
        await wait(gone)
        rest = await reader.read()
        assert failure in rest
        assert b"[DONE]" not in rest
        assert b"message_stop" not in rest
        writer.close()

    async def test_what_has_not_begun_gets_the_status(self, core: ScriptedCore) -> None:
        """An answer in one piece, a stream without its first event, and a connection's second request."""
        began, gone = asyncio.Event(), asyncio.Event()

        async def script(
            _request: object, _context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                gone.set()
            yield started()

        core.stream_script = script
        async with serving(Settings(core=core.address, port=0, drain_seconds=0.1)) as urls:
            reader, writer = await connect(urls[0])
            writer.write(post(OPENAI, STREAM) + post(OPENAI, CHAT))
            await wait(began)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"service_unavailable"' in answer
        assert b"Retry-After: 2" in answer
        assert answer.count(b"HTTP/1.1 ") == 1
        await wait(gone)
        writer.close()
