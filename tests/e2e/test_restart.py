"""A process that dies while the server runs: clients get errors, and then the server works again."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from osaurus_grpc.cli.supervisor import is_healthy
from osaurus_grpc.client import AsyncOsaurus, TransportError
from osaurus_grpc.errors import OsaurusError
from osaurus_grpc.v1 import chat_pb2
from tests.conftest import ENDLESS_TOKENS
from tests.e2e.serving import Served, serving

RECOVERY_SECONDS = 120.0


def endless_question() -> chat_pb2.ChatRequest:
    request = chat_pb2.ChatRequest(model="tiny-llama")
    request.messages.add(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text="Hi")])
    request.sampling.max_tokens = ENDLESS_TOKENS
    request.sampling.ignore_eos = True
    return request


def wait_until_healthy(served: Served) -> None:
    deadline = time.monotonic() + RECOVERY_SECONDS
    while not is_healthy(served.http):
        assert time.monotonic() < deadline, served.err()
        assert served.popen.poll() is None, served.err()
        time.sleep(0.1)


@contextmanager
def post_stream(url: str, max_tokens: int) -> Iterator[http.client.HTTPResponse]:
    """Ask for a stream that goes on to max_tokens; "assistant" is in its first line."""
    parts = urlsplit(url)
    body = {
        "model": "tiny-llama",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": max_tokens,
        "stream": True,
        # The tokens that would end the answer.
        "logit_bias": {"0": -100, "2": -100},
    }
    headers = {"Content-Type": "application/json"}
    with closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        with connection.getresponse() as response:
            assert response.status == 200
            assert b"assistant" in response.readline()
            yield response


async def first_content(served: Served) -> list[chat_pb2.ChatStreamResponse]:
    async with AsyncOsaurus(served.grpc) as client:
        request = endless_question()
        request.sampling.max_tokens = 2
        return [event async for event in client.chat_stream(request)]


def test_a_core_that_is_killed_in_mid_stream_is_started_again(endless_models_dir: Path, home: Path) -> None:
    with serving(home, "--model=tiny-llama", f"--models-dir={endless_models_dir}") as served:
        with post_stream(served.http, max_tokens=ENDLESS_TOKENS) as stream:
            served.child("osaurus_grpc").send_signal(signal.SIGKILL)
            rest = stream.read().decode()
        events = [line.removeprefix("data: ") for line in rest.splitlines() if line.startswith("data: ")]
        assert json.loads(events[-1])["error"]["message"]
        assert "[DONE]" not in rest
        wait_until_healthy(served)
        with post_stream(served.http, max_tokens=4) as stream:
            assert "[DONE]" in stream.read().decode()
        assert "the gRPC core was ended by SIGKILL; starting it again" in served.err()
        # A direct client's next call works too: the address is the same.
        assert asyncio.run(first_content(served))[-1].HasField("completed")
        assert served.signal_and_wait(signal.SIGTERM) == 0


async def ask_and_do(served: Served, kind: str, action: Callable[[], Awaitable[None]]) -> None:
    """Ask for a long answer, and do something when its first event of a kind comes."""
    is_done = False
    async with AsyncOsaurus(served.grpc) as client:
        async for event in client.chat_stream(endless_question()):
            if event.WhichOneof("event") == kind and not is_done:
                is_done = True
                await action()


async def test_a_grpc_client_gets_an_error_when_the_core_is_killed(
    endless_models_dir: Path, home: Path
) -> None:
    with serving(home, "--model=tiny-llama", f"--models-dir={endless_models_dir}") as served:

        async def kill_the_core() -> None:
            served.child("osaurus_grpc").send_signal(signal.SIGKILL)

        with pytest.raises(TransportError):
            await ask_and_do(served, "content", kill_the_core)
        await asyncio.to_thread(wait_until_healthy, served)
        async with AsyncOsaurus(served.grpc) as client:
            assert [model.id for model in await client.list_models(timeout=60)] == ["tiny-llama"]


def test_an_http_server_that_is_killed_is_started_again(endless_models_dir: Path, home: Path) -> None:
    with serving(home, f"--models-dir={endless_models_dir}") as served:
        core = served.child("osaurus_grpc").pid
        served.child("rest_shim").send_signal(signal.SIGKILL)
        deadline = time.monotonic() + RECOVERY_SECONDS
        while "the HTTP server runs again" not in served.err():
            assert time.monotonic() < deadline, served.err()
            time.sleep(0.1)
        wait_until_healthy(served)
        assert served.child("osaurus_grpc").pid == core


def test_an_answer_in_progress_is_finished_before_the_end(endless_models_dir: Path, home: Path) -> None:
    with serving(home, "--model=tiny-llama", f"--models-dir={endless_models_dir}") as served:
        with post_stream(served.http, max_tokens=2_000) as stream:
            served.popen.send_signal(signal.SIGTERM)
            assert "[DONE]" in stream.read().decode()
        assert served.popen.wait(60) == 0


async def test_a_second_ctrl_c_does_not_wait(endless_models_dir: Path, home: Path) -> None:
    with serving(home, "--model=tiny-llama", f"--models-dir={endless_models_dir}") as served:

        async def interrupt_twice() -> None:
            served.popen.send_signal(signal.SIGINT)
            while "stopping" not in served.err():  # noqa: ASYNC110  (another process's output)
                await asyncio.sleep(0.02)
            served.popen.send_signal(signal.SIGINT)

        with pytest.raises(OsaurusError):
            await ask_and_do(served, "started", interrupt_twice)
        assert await asyncio.to_thread(served.popen.wait, 30) == 0
        served.assert_no_child_is_left()
