"""Clients that leave, stall or come all at once: nothing of theirs stays in the shim or in the core.

The core takes few requests here, so that a queue is full soon; an ordinary request is answered after each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import select
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ENDLESS_TOKENS, TINY
from tests.harness.processes import NO_LIMITS, core_process, rest_process

SECONDS = 60
HELLO = [{"role": "user", "content": "Hello"}]
SHORT = {"model": TINY, "messages": HELLO, "max_tokens": 1, "options": {"num_predict": 1}}
ENDLESS = {"model": TINY, "messages": HELLO, "max_tokens": ENDLESS_TOKENS, "ignore_eos": True, "stream": True}
# A call that goes on for longer than anybody listens.
CITY = {"type": "string", "minLength": 4_000}
WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": CITY}, "required": ["city"]},
}
CALLING = {
    **ENDLESS,
    "tools": [{"type": "function", "function": WEATHER}],
    "tool_choice": "required",
}
READING = {**ENDLESS, "messages": [{"role": "user", "content": "word " * 1_800}]}
CLIENTS = 120


@pytest.fixture(scope="module")
def server(endless_dir: Path) -> Iterator[str]:
    flags = (*NO_LIMITS, "--max-batch-size", "2", "--max-waiting-requests", "8")
    with core_process(endless_dir, *flags) as core, rest_process(core.address) as rest:
        yield rest.url


@pytest.fixture
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=SECONDS) as made:
        yield made


def request(path: str, body: object) -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def connect(server: str) -> socket.socket:
    host, port = server.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


def reset(connection: socket.socket) -> None:
    """Break a connection off without a goodbye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def begun(connections: list[socket.socket]) -> socket.socket:
    """One whose answer has begun; which of them the batch takes first is chance."""
    ready = select.select(connections, [], [], SECONDS)[0]
    assert ready, "none of them begins"
    found: socket.socket = ready[0]
    return found


@contextlib.contextmanager
def occupied(server: str) -> Iterator[None]:
    """Both places of the batch, and some of the queue's, are taken by answers that go on for long."""
    data = request("/v1/chat/completions", ENDLESS)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(6)]
        for connection in connections:
            connection.sendall(data)
        assert begun(connections).recv(1), "it ended at once"
        yield


def unload(client: httpx.Client) -> None:
    """Waits until no request holds the model, so that whatever is left behind shows."""
    answer = client.post("/api/generate", json={"model": TINY, "keep_alive": 0})
    assert answer.json()["done_reason"] == "unload"


# What is sent, how many bytes of it (None: all), and how many bytes of the answer are read.
STAGES: dict[str, tuple[object, int | None, int]] = {
    "connected": (ENDLESS, 0, 0),
    "in the head": (ENDLESS, 20, 0),
    "in the body": (ENDLESS, 160, 0),
    "prefill": (READING, None, 0),
    "asked": (ENDLESS, None, 0),
    "begun": (ENDLESS, None, 1),
    "decoding": (ENDLESS, None, 6_000),
    "calling": (CALLING, None, 2_000),
}


def leave(server: str, body: object, sent: int | None, received: int) -> None:
    """Some say goodbye, some do not; more come than there are places, so that some leave the queue."""
    data = request("/v1/chat/completions", body)
    connections = [connect(server) for _ in range(6)]
    for connection in connections:
        connection.sendall(data if sent is None else data[:sent])
    read = 0
    reader = begun(connections) if received else connections[0]
    while read < received:
        more = len(reader.recv(4096))
        assert more, "it ended before the client left"
        read += more
    for index, connection in enumerate(connections):
        connection.close() if index % 2 else reset(connection)


def test_clients_that_leave(server: str, client: httpx.Client) -> None:
    for stage, (body, sent, received) in STAGES.items():
        leave(server, body, sent, received)
        assert client.post("/v1/chat/completions", json=SHORT).status_code == 200, stage
    unload(client)
    assert client.post("/v1/chat/completions", json=SHORT).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
async def test_more_clients_than_the_queue_has_places_for(server: str, path: str) -> None:
    """Everyone is answered; who is refused is told so in the dialect's shape, and when to come again."""
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=server, timeout=SECONDS, limits=limits) as client:
        with occupied(server):
            asked = [asyncio.ensure_future(client.post(path, json=SHORT)) for _ in range(CLIENTS)]
            # Whoever waits is answered once the places are free, so the first answers are refusals.
            await asyncio.wait(asked, timeout=SECONDS, return_when=asyncio.FIRST_COMPLETED)
        answers = await asyncio.gather(*asked)
        counts = Counter(answer.status_code for answer in answers)
        assert set(counts) == {200, 429}, counts
        for refused in (answer for answer in answers if answer.status_code == 429):
            assert int(refused.headers["retry-after"]) >= 1
            error = refused.json()["error"]
            text = error if path == "/api/chat" else error["message"]
            assert "waiting" in text
            assert path == "/api/chat" or error["type"] == "rate_limit_error"
        assert (await client.post(path, json=SHORT)).status_code == 200


def test_pipelined_requests_are_answered_in_their_order(server: str) -> None:
    """What is wrong with one of them does not end the others."""
    version = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(request("/api/chat", SHORT) + request("/nothing", {}) + version * 40 + last)
        received = b""
        while data := connection.recv(65536):
            received += data
    statuses = re.findall(rb"HTTP/1\.1 (\d+) ", received)
    assert statuses == [b"200", b"404", *[b"200"] * 41]
    assert received.index(b'"done":true') < received.index(b"not_found") < received.index(b'"version"')
