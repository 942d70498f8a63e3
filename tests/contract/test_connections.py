"""What a client's connection does to the real core: a generation whose client left is stopped.

The core takes one request at a time here, so a second one is refused for as long as the first runs.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.conftest import ENDLESS_TOKENS, TINY
from tests.harness.processes import core_process, rest_process

SECONDS = 60
LONG = {
    "model": TINY,
    "messages": [{"role": "user", "content": "Hello"}],
    "temperature": 0,
    "max_tokens": ENDLESS_TOKENS,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def server(endless_dir: Path) -> Iterator[str]:
    flags = ("--max-concurrent-requests", "1", "--requests-per-minute", "0")
    with core_process(endless_dir, *flags) as core, rest_process(core.address) as rest:
        yield rest.url


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=SECONDS) as made:
        yield made


def status_of_a_short_one(client: httpx.Client) -> int:
    return client.post("/v1/chat/completions", json={**LONG, "max_tokens": 1}).status_code


def wait_for(client: httpx.Client, status: int) -> None:
    deadline = time.monotonic() + SECONDS
    while status_of_a_short_one(client) != status:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def begin(server: str, path: str, body: object) -> socket.socket:
    host, port = server.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=SECONDS)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def begin_admitted(server: str, client: httpx.Client, path: str, body: object) -> socket.socket:
    """A connection whose request runs in the core: another one is refused now.

    The two can meet in the core the other way round; then the long request was refused, and is sent again.
    """
    deadline = time.monotonic() + SECONDS
    connection = begin(server, path, body)
    while status_of_a_short_one(client) != 429:
        assert time.monotonic() < deadline
        is_answered = select.select([connection], [], [], 0.02)[0]
        if is_answered and b" 429 " in connection.recv(15, socket.MSG_PEEK):
            connection.close()
            connection = begin(server, path, body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_a_client_that_leaves_frees_its_place(
    server: str, client: httpx.Client, path: str, stream: bool
) -> None:
    body = {**LONG, "options": {"temperature": 0, "num_predict": -1}, "stream": stream}
    assert status_of_a_short_one(client) == 200
    with begin_admitted(server, client, path, body):
        pass
    wait_for(client, 200)


def test_a_refusal_for_load_says_when_to_retry(server: str, client: httpx.Client) -> None:
    with begin(server, "/v1/chat/completions", {**LONG, "stream": True}) as connection:
        assert connection.recv(15).startswith(b"HTTP/1.1 200 OK")
        answer = client.post("/v1/chat/completions", json=LONG)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    wait_for(client, 200)


def test_comments_come_while_the_prompt_is_processed(tiny_dir: Path) -> None:
    """The real core is silent between an answer's start and its first token."""
    flags = ("--max-concurrent-requests", "0", "--requests-per-minute", "0")
    body = {**LONG, "max_tokens": 1, "stream": True}
    with (
        core_process(tiny_dir, *flags) as core,
        rest_process(core.address, "--keep-alive-interval-seconds", "0.001") as rest,
        httpx.Client(base_url=rest.url, timeout=SECONDS) as client,
    ):
        text = client.post("/v1/chat/completions", json=body).text
    assert ": keep-alive\n\n" in text
    assert text.endswith("data: [DONE]\n\n"), text[-500:]


# How each dialect's stream says that it has failed, and what would say that it was whole.
FAILURES = {
    "/v1/chat/completions": (b'data: {"error":{', b"[DONE]"),
    "/v1/completions": (b'data: {"error":{', b"[DONE]"),
    "/v1/responses": (b"event: response.failed\ndata: {", b"response.completed"),
    "/v1/messages": (
        b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"',
        b"message_stop",
    ),
    "/api/chat": (b'\n{"error":"', b'"done":true'),
    "/api/generate": (b'\n{"error":"', b'"done":true'),
}


def test_a_core_that_is_killed_in_mid_stream(endless_dir: Path) -> None:
    """No stream ends as if it were whole, in any dialect, and the shim goes on."""
    flags = ("--max-concurrent-requests", "0", "--requests-per-minute", "0")
    body = {**LONG, "stream": True, "options": {"num_predict": -1}}
    inputs = {"/v1/responses": {"input": "Hello"}}
    with core_process(endless_dir, *flags) as core, rest_process(core.address) as rest, ExitStack() as stack:
        streams = {
            path: stack.enter_context(
                begin(rest.url, path, {**body, **inputs.get(path, {"prompt": "Hello"})})
            )
            for path in FAILURES
        }
        received = {path: stream.recv(1000) for path, stream in streams.items()}
        core.popen.kill()
        for path, stream in streams.items():
            assert received[path].startswith(b"HTTP/1.1 200 OK")
            while more := stream.recv(65536):
                received[path] += more
        with httpx.Client(base_url=rest.url, timeout=SECONDS) as client:
            assert client.get("/").status_code == 200
            assert client.get("/health").status_code == 503
            assert status_of_a_short_one(client) == 503
    for path, (failure, end) in FAILURES.items():
        assert failure in received[path], received[path][-500:]
        assert end not in received[path]
    assert b'"code":"service_unavailable"' in received["/v1/chat/completions"]
