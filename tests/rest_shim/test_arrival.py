"""Bodies on their way in: what is unfolded, and what is too much, alone or together."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import pytest

from osaurus_grpc.v1 import chat_pb2
from rest_shim import arrival
from rest_shim.arrival import SMALL_BYTES
from rest_shim.settings import Settings

from .raw import exchange
from .scripted_core import MODEL, ScriptedCore, answer

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
PLAIN = json.dumps(CHAT).encode()
PATHS = ("/v1/chat/completions", "/api/chat", "/v1/messages")
LIMIT = 3 * SMALL_BYTES


def raw_deflate(data: bytes) -> bytes:
    """Without the header that the standard asks for, as some clients send it."""
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


def large(size: int = 2 * SMALL_BYTES) -> dict[str, Any]:
    """A request of about so many bytes."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "x" * size}]}


@pytest.fixture
def settings(core: ScriptedCore) -> Settings:
    return Settings(
        core=core.address, port=0, max_body_bytes=LIMIT, max_held_body_bytes=LIMIT - SMALL_BYTES // 2
    )


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("gzip", gzip.compress(PLAIN)),
        ("GZip", gzip.compress(PLAIN)),
        ("x-gzip", gzip.compress(PLAIN)),
        ("gzip, identity", gzip.compress(PLAIN)),
        ("gzip", gzip.compress(PLAIN[:20]) + gzip.compress(PLAIN[20:])),
        ("deflate", zlib.compress(PLAIN)),
        ("deflate", raw_deflate(PLAIN)),
        ("identity", PLAIN),
        ("", PLAIN),
    ],
)
async def test_what_is_unfolded(
    http: aiohttp.ClientSession, core: ScriptedCore, encoding: str, data: bytes
) -> None:
    async with http.post(PATHS[0], data=data, headers={"Content-Encoding": encoding}) as response:
        assert response.status == 200
    assert core.requests[-1].messages[0].content[0].text == "Hello"  # type: ignore[attr-defined]  # a ChatRequest


async def test_an_unfolded_body_is_as_large_as_others(http: aiohttp.ClientSession) -> None:
    data = gzip.compress(json.dumps(large()).encode())
    async with http.post(PATHS[0], data=data, headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("encoding", ["br", "zstd", "nonsense", "gzip, gzip", "gzip;q=1"])
async def test_an_encoding_that_is_not_known(
    http: aiohttp.ClientSession, core: ScriptedCore, path: str, encoding: str
) -> None:
    async with http.post(path, data=PLAIN, headers={"Content-Encoding": encoding}) as response:
        assert response.status == 415
        assert response.headers["Accept-Encoding"] == "gzip, deflate"
        assert "Content-Encoding" in str(await response.json())
    assert not core.requests


@pytest.mark.parametrize(
    "data",
    [
        PLAIN,
        gzip.compress(PLAIN)[:-1],
        gzip.compress(PLAIN)[:-12],
        gzip.compress(PLAIN) + b"more",
        gzip.compress(PLAIN)[:-8] + bytes(8),
    ],
    ids=["plain", "without its last byte", "breaks off", "goes on", "another checksum"],
)
async def test_what_is_not_encoded_as_it_says(
    http: aiohttp.ClientSession, core: ScriptedCore, data: bytes
) -> None:
    async with http.post(PATHS[0], data=data, headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 400
        assert "not encoded as its headers say" in (await response.json())["error"]["message"]
    assert not core.requests


async def test_no_more_is_unfolded_than_is_taken(
    http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfolded = 0

    class Counting:
        def __init__(self, bits: int) -> None:
            self._stream = zlib.decompressobj(bits)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

        def decompress(self, data: bytes, most: int) -> bytes:
            nonlocal unfolded
            piece = self._stream.decompress(data, most)
            unfolded += len(piece)
            return piece

    bomb = gzip.compress(bytes(64 * LIMIT))
    monkeypatch.setattr(arrival, "_inflater", lambda *_: lambda: Counting(16 + zlib.MAX_WBITS))
    async with http.post(PATHS[0], data=bomb, headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 413
    assert LIMIT < unfolded <= 2 * LIMIT


async def test_a_client_is_not_asked_for_what_is_too_large(shim: str) -> None:
    head = f"POST {PATHS[0]} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nConnection: close\r\n"
    refused = await exchange(shim, f"{head}Content-Length: {LIMIT + 1}\r\n\r\n".encode())
    assert refused.startswith(b"HTTP/1.1 413")
    taken = await exchange(shim, f"{head}Content-Length: {len(PLAIN)}\r\n\r\n".encode(), PLAIN)
    assert taken.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


class TestTogether:
    """Two of large() are more than is held at once."""

    @pytest.fixture
    def may_end(self, core: ScriptedCore) -> asyncio.Event:
        """Holds streams after their first event until it is set."""
        event = asyncio.Event()

        async def script(
            _request: chat_pb2.ChatStreamRequest, _context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            first, *rest = answer("Hello")
            yield first
            await event.wait()
            for one in rest:
                yield one

        core.stream_script = script
        return event

    async def test_what_has_no_room_is_refused_until_another_is_answered(
        self, http: aiohttp.ClientSession, may_end: asyncio.Event
    ) -> None:
        async with http.post(PATHS[0], json={**large(), "stream": True}) as first:
            assert first.status == 200
            for path in PATHS:
                async with http.post(path, json=large()) as response:
                    assert response.status == 503
                    assert int(response.headers["Retry-After"]) >= 1
                    assert "large requests" in str(await response.json())
            async with http.post(PATHS[0], json=CHAT) as response:
                assert response.status == 200
            async with http.get("/metrics") as response:
                assert "osaurus_http_body_bytes 5" in await response.text()
            may_end.set()
            assert (await first.text()).endswith("data: [DONE]\n\n")
        async with http.post(PATHS[0], json=large()) as response:
            assert response.status == 200
        async with http.get("/metrics") as response:
            assert "osaurus_http_body_bytes 0.0" in await response.text()

    @pytest.mark.usefixtures("may_end")
    async def test_one_that_is_refused_or_left_holds_nothing(self, http: aiohttp.ClientSession) -> None:
        async with http.post(PATHS[0], json={**large(), "temperature": 9}) as response:
            assert response.status == 400
        async with http.post(PATHS[0], json=large(LIMIT)) as response:
            assert response.status == 413
        async with http.post(PATHS[0], json={**large(), "stream": True}) as response:
            assert response.status == 200
        # It was left in mid-stream; the server learns of that in its own time.
        async with asyncio.timeout(20):
            while True:
                async with http.get("/metrics") as response:
                    if "osaurus_http_body_bytes 0.0" in await response.text():
                        return

    async def test_one_alone_may_be_larger(self, http: aiohttp.ClientSession) -> None:
        async with http.post(PATHS[0], json=large(LIMIT - 1000)) as response:
            assert response.status == 200


class TestWithoutABound:
    @pytest.fixture
    def settings(self, core: ScriptedCore) -> Settings:
        return Settings(core=core.address, port=0, max_held_body_bytes=0)

    async def test_many_are_held(self, http: aiohttp.ClientSession) -> None:
        async def ask() -> int:
            async with http.post(PATHS[0], json=large()) as response:
                return response.status

        assert await asyncio.gather(*(ask() for _ in range(8))) == [200] * 8
