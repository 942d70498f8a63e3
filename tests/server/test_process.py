"""The core as a process: its start, its end, and what it says when it cannot start."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from osaurus_grpc.v1 import chat_pb2, inference_service_pb2
from osaurus_grpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.conftest import ENDLESS_TOKENS
from tests.harness.processes import (
    NO_LIMITS,
    START_SECONDS,
    child_environment,
    core_process,
    wait_for_serving,
)
from tests.server.cores import TINY, RichError, chat_request, stream_request, text_of, token_counts

EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 - what the tests are about
ENDLESS = stream_request(chat_request(max_tokens=ENDLESS_TOKENS, ignore_eos=True))
# A second of work at least.
LONG = stream_request(chat_request(max_tokens=4_000, ignore_eos=True))


@pytest.fixture
def blocking(tiny_core: str) -> Iterator[InferenceServiceStub]:
    with grpc.insecure_channel(tiny_core) as channel:
        yield InferenceServiceStub(channel)


def failed_start(tmp_path: Path, *flags: str) -> str:
    """The one line on stderr of a core that cannot start."""
    done = subprocess.run(
        [sys.executable, "-m", "osaurus_grpc", "--models-dir", str(tmp_path), "--no-hub-cache", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=START_SECONDS,
        env=child_environment(tmp_path),
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_a_blocking_client_gets_answers(blocking: InferenceServiceStub) -> None:
    events = list(blocking.ChatStream(stream_request(chat_request(max_tokens=5))))
    response = blocking.Chat(chat_request(max_tokens=5))

    deltas = [event.content.text for event in events if event.WhichOneof("event") == "content"]
    assert "".join(deltas) == text_of(response)
    assert token_counts(events[-1].completed.usage) == token_counts(response.usage)


def test_a_blocking_client_gets_rich_errors(blocking: InferenceServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        blocking.GetModel(inference_service_pb2.GetModelRequest(model="unknown"))

    error = RichError(raised.value)
    assert error.code == grpc.StatusCode.NOT_FOUND
    assert error.info.reason == "MODEL_NOT_FOUND"


def test_a_message_above_four_mebibytes_arrives(blocking: InferenceServiceStub) -> None:
    request = chat_request()
    request.messages[0].content.add(
        image=chat_pb2.ImageContent(data=bytes(5 * 1024 * 1024), mime_type="image/png")
    )
    with pytest.raises(grpc.RpcError) as raised:
        blocking.Chat(request)

    assert RichError(raised.value).info.reason == "UNSUPPORTED_CAPABILITY"


def test_a_pinging_client_survives_silence(tiny_core: str) -> None:
    options = (
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    )
    with grpc.insecure_channel(tiny_core, options=options) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        # Silent for many pings; a server of default settings cuts the connection at the third.
        threading.Event().wait(2.0)
        assert watch.is_active()
        assert InferenceServiceStub(channel).Chat(chat_request(max_tokens=1)).usage.completion_tokens == 1
        watch.cancel()


def test_a_taken_port(tiny_core: str, tmp_path: Path) -> None:
    port = tiny_core.rpartition(":")[2]

    line = failed_start(tmp_path, "--grpc-port", port)

    assert line == (
        f"osaurus-core: cannot listen on 127.0.0.1:{port}: the port is taken; choose another with --grpc-port"
    )


def test_a_port_another_program_listens_on(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        line = failed_start(tmp_path, "--grpc-port", str(other.getsockname()[1]))

    assert "the port is taken" in line


@pytest.mark.parametrize(
    ("host", "words"),
    [("192.0.2.1", "no such address on this machine"), ("no.such.host.invalid", "unknown host")],
)
def test_a_bad_host(tmp_path: Path, host: str, words: str) -> None:
    line = failed_start(tmp_path, "--host", host, "--grpc-port", "0", "--insecure-expose")

    assert line == f"osaurus-core: cannot listen on {host}:0: {words}"


def test_localhost_by_name(tiny_dir: Path) -> None:
    with core_process(tiny_dir, "--host", "localhost") as process:
        assert process.address.startswith("localhost:")
        port = process.address.rpartition(":")[2]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            models = (
                InferenceServiceStub(channel).ListModels(inference_service_pb2.ListModelsRequest()).models
            )
        assert [model.id for model in models] == [TINY]


def test_no_exposure_without_a_key(tmp_path: Path) -> None:
    line = failed_start(tmp_path, "--host", EVERY_ADDRESS, "--grpc-port", "0")

    assert line.startswith("osaurus-core: refusing to listen on 0.0.0.0")
    assert "--insecure-expose" in line


def test_an_empty_key_is_none(tmp_path: Path) -> None:
    line = failed_start(tmp_path, "--grpc-port", "0", "--api-key", "good", "--api-key", " ")

    assert line == "osaurus-core: an API key is empty; anyone could show that one"


def test_exposure_with_a_key(tiny_dir: Path) -> None:
    with core_process(tiny_dir, "--host", EVERY_ADDRESS, env={"OSAURUS_API_KEY": "key"}) as process:
        port = process.address.rpartition(":")[2]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = InferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError) as raised:
                stub.Chat(chat_request())
            assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
            answer = stub.Chat(chat_request(max_tokens=1), metadata=(("authorization", "Bearer key"),))
            assert answer.usage.completion_tokens == 1
        assert "key" not in process.log().replace("key=", "")


def test_an_unknown_model_to_preload(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "osaurus_grpc", "--models-dir", str(tmp_path), "--no-hub-cache",
         "--grpc-port", "0", "--preload-model", "unknown"],
        capture_output=True, text=True, check=False, timeout=START_SECONDS, env=child_environment(tmp_path),
    )  # fmt: skip

    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-1] == "osaurus-core: cannot load the model unknown: Model not found: unknown"
    assert "Traceback" not in done.stderr


def test_it_serves_once_the_preloaded_model_is_there(tiny_dir: Path) -> None:
    with core_process(tiny_dir, "--preload-model", TINY, until_serving=False) as process:
        wait_for_serving(process)
        with grpc.insecure_channel(process.address) as channel:
            response = InferenceServiceStub(channel).Chat(chat_request(max_tokens=1))
    assert not response.timings.HasField("load_duration")


def begin_stream(
    channel: grpc.Channel, request: chat_pb2.ChatStreamRequest = ENDLESS
) -> Iterator[chat_pb2.ChatStreamResponse]:
    stream = InferenceServiceStub(channel).ChatStream(request)
    assert next(stream).WhichOneof("event") == "started"
    return stream


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_streams_end(endless_dir: Path, number: signal.Signals) -> None:
    with (
        core_process(endless_dir, *NO_LIMITS, "--preload-model", TINY, "--drain-seconds", "240") as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        stream = begin_stream(channel, LONG)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING

        process.popen.send_signal(number)

        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as raised:
            InferenceServiceStub(channel).Chat(chat_request())
        refused = RichError(raised.value)
        assert refused.code == grpc.StatusCode.UNAVAILABLE
        assert refused.info.reason == "DRAINING"
        assert refused.retry_seconds is not None
        events = list(stream)
        assert events[-1].WhichOneof("event") == "completed"
        assert process.wait() == 0
        assert "Traceback" not in process.log()


def test_the_drains_time_is_bounded(endless_dir: Path) -> None:
    flags = (*NO_LIMITS, "--preload-model", TINY, "--drain-seconds", "0.1")
    with core_process(endless_dir, *flags) as process, grpc.insecure_channel(process.address) as channel:
        stream = begin_stream(channel)

        process.popen.terminate()

        with pytest.raises(grpc.RpcError) as raised:
            list(stream)
        assert RichError(raised.value).info.reason == "DRAINING"
        assert process.wait() == 0


def test_a_second_signal_ends_it_at_once(endless_dir: Path) -> None:
    flags = (*NO_LIMITS, "--preload-model", TINY, "--drain-seconds", "600")
    with core_process(endless_dir, *flags) as process, grpc.insecure_channel(process.address) as channel:
        begin_stream(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        process.popen.send_signal(signal.SIGINT)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING

        process.popen.send_signal(signal.SIGINT)

        assert process.wait() == -signal.SIGINT


def test_the_core_dies_and_the_client_hears_of_it(endless_dir: Path) -> None:
    with (
        core_process(endless_dir, *NO_LIMITS, "--preload-model", TINY) as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        stream = begin_stream(channel)
        process.popen.kill()
        with pytest.raises(grpc.RpcError) as raised:
            list(stream)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
