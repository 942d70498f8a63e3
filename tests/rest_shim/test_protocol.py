"""What a client gets for bytes that are not HTTP, on raw sockets: our errors, none of its own bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket

import pytest

from rest_shim.protocol import MAX_FIELD_BYTES, MAX_LINE_BYTES
from rest_shim.settings import Settings

from .raw import exchange
from .scripted_core import ScriptedCore

# Stands for a key, and for markup that a browser would run.
SECRET = b"SECRETBYTES"
HOST = b"Host: localhost\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST

MALFORMED = {
    "TLS": (400, b"\x16\x03\x01" + SECRET + b"\r\n\r\n"),
    "an unknown method": (400, b"BREW /" + SECRET + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a method that is no word": (400, b"G@T /" + SECRET + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "no version": (400, b"GET " + SECRET + b"\r\n\r\n"),
    "a version that there is not": (400, b"GET /" + SECRET + b" HTTP/9.9\r\n\r\n"),
    "HTTP/2": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "a target that is no path": (400, b"GET ?" + SECRET + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "raw bytes in the path": (400, b"GET /" + SECRET + b"\xff HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a long request line": (
        414, b"GET /" + SECRET * (MAX_LINE_BYTES // len(SECRET) + 1) + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    ),
    "a long header": (
        431, b"GET / HTTP/1.1\r\n" + HOST + b"X: " + SECRET * (MAX_FIELD_BYTES // 11 + 1) + b"\r\n\r\n",
    ),
    "a long header name": (
        431, b"GET / HTTP/1.1\r\n" + HOST + SECRET * (MAX_FIELD_BYTES // len(SECRET) + 1) + b": x\r\n\r\n",
    ),
    "many headers": (431, b"GET / HTTP/1.1\r\n" + HOST + (b"X: " + SECRET + b"\r\n") * 300 + b"\r\n"),
    "a NUL in a header's name": (400, b"GET / HTTP/1.1\r\n" + HOST + SECRET + b"\x00: x\r\n\r\n"),
    "a bare CR in a header": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r" + SECRET + b": x\r\n\r\n"),
    "a folded header": (400, b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n " + SECRET + b"\r\n\r\n"),
    "no host": (400, b"GET /" + SECRET + b" HTTP/1.1\r\n\r\n"),
    "two hosts": (400, b"GET / HTTP/1.1\r\n" + HOST + b"Host: " + SECRET + b"\r\n\r\n"),
    "a negative length": (400, POST + b"Content-Length: -5\r\n\r\n"),
    "two lengths": (400, POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + SECRET),
    "a length and chunks": (400, POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "an unknown transfer encoding": (400, POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
    "a bad chunk": (400, POST + b"Transfer-Encoding: chunked\r\n\r\nZZ" + SECRET + b"\r\n\r\n"),
    "a content encoding": (
        415, POST + b"Content-Encoding: " + SECRET + b"\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
    ),
    "an expectation": (
        417, POST + b"Expect: " + SECRET + b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
    ),
}  # fmt: skip


def parsed(answer: bytes) -> tuple[int, dict[str, str], dict[str, object]]:
    """Status, headers and JSON of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, json.loads(body)


@pytest.mark.parametrize("case", MALFORMED)
async def test_malformed_http_is_refused_in_our_words(
    shim: str, core: ScriptedCore, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    caplog.set_level(logging.DEBUG)
    expected, raw = MALFORMED[case]
    answer = await exchange(shim, raw)
    status, headers, body = parsed(answer)
    assert status == expected
    assert headers["content-type"] == "application/json"
    assert headers["access-control-allow-origin"] == "*"
    assert headers["server"].startswith("osaurus/")
    assert headers["x-request-id"] == headers["request-id"] != ""
    error = body["error"]
    assert isinstance(error, dict)
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    # Neither to the client nor to the log.
    assert SECRET not in answer
    assert SECRET.decode() not in caplog.text
    assert "Traceback" not in caplog.text
    assert not core.requests


async def test_a_chunk_that_goes_wrong_later(shim: str, core: ScriptedCore) -> None:
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    host, port = shim.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head + b'5\r\n{"a":\r\n')
    await writer.drain()
    # The handler waits for the rest of the body when the parser fails.
    await asyncio.sleep(0.05)
    writer.write(b"X" + SECRET + b"\r\n")
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    status, headers, _ = parsed(answer)
    assert (status, headers["access-control-allow-origin"]) == (400, "*")
    assert SECRET not in answer
    assert not core.requests


async def test_a_long_key_is_taken(shim: str) -> None:
    raw = b"GET /v1/models HTTP/1.1\r\n" + HOST + b"Connection: close\r\nAuthorization: Bearer "
    assert (await exchange(shim, raw + b"x" * 4_000 + b"\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_a_key_longer_than_the_core_takes_is_no_key(shim: str) -> None:
    raw = b"GET /v1/models HTTP/1.1\r\n" + HOST + b"Connection: close\r\nAuthorization: Bearer "
    status, headers, body = parsed(await exchange(shim, raw + b"x" * 16_000 + b"\r\n\r\n"))
    assert (status, headers["www-authenticate"]) == (401, "bearer")
    assert "xxx" not in json.dumps(body)


async def test_malformed_requests_are_counted(shim: str) -> None:
    await exchange(shim, MALFORMED["TLS"][1])
    raw = b"GET /metrics HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    metrics = (await exchange(shim, raw)).decode()
    assert 'osaurus_http_requests_total{method="OTHER",route="unmatched",status="400"} 1.0' in metrics


class TestReaders:
    """Clients that do not read what they asked for."""

    @pytest.fixture
    def settings(self, core: ScriptedCore) -> Settings:
        return Settings(core=core.address, port=0, drain_seconds=5.0, send_timeout_seconds=0.2)

    @staticmethod
    def connect(url: str) -> socket.socket:
        """A connection that takes a few KiB at a time."""
        host, port = url.removeprefix("http://").split(":")
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.connect((host, int(port)))
        made.setblocking(False)
        return made

    @staticmethod
    async def write_on(client: socket.socket, data: bytes) -> None:
        """Nothing is read, so that the connection's end shows in writing only."""
        async with asyncio.timeout(120):
            while True:
                await asyncio.get_running_loop().sock_sendall(client, data)
                await asyncio.sleep(0.02)

    @pytest.mark.parametrize("connection", ["keep-alive", "close"])
    async def test_one_that_takes_nothing_is_cut(self, shim: str, connection: str) -> None:
        head = f"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: {connection}\r\n\r\n".encode()
        loop = asyncio.get_running_loop()
        with self.connect(shim) as client:
            # More answers than the buffers of both sides hold.
            with contextlib.suppress(ConnectionError):
                await loop.sock_sendall(client, head * 200)
            with pytest.raises(ConnectionError):
                await self.write_on(client, head)

    async def test_one_that_is_slow_gets_everything(self, shim: str, core: ScriptedCore) -> None:
        head = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n"
        loop = asyncio.get_running_loop()
        with self.connect(shim) as client:
            await loop.sock_sendall(client, (head + b"\r\n") * 7 + head + b"Connection: close\r\n\r\n")
            received = 0
            while data := await loop.sock_recv(client, 65536):
                received += len(data)
                await asyncio.sleep(0.002)
        assert received > 8 * 50_000
