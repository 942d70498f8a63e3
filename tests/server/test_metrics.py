"""The core's metrics over HTTP, and two cores on one models directory."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc

from osaurus_grpc.v1 import chat_pb2, inference_service_pb2_grpc, sampling_pb2
from tests.harness.processes import START_SECONDS, core_process, wait_for_serving


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to connections meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def test_metrics_count_what_was_asked(tiny_dir: Path) -> None:
    port = free_port()
    with core_process(tiny_dir, "--metrics-port", str(port)) as core:
        wait_for_serving(core)
        with grpc.insecure_channel(core.address) as channel:
            stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
            message = chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text="Hi")])
            answer = stub.Chat(
                chat_pb2.ChatRequest(
                    model="tiny-llama",
                    messages=[message],
                    sampling=sampling_pb2.SamplingParams(max_tokens=5, ignore_eos=True),
                ),
                timeout=60,
            )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
            text = response.read().decode()
    assert 'osaurus_completion_tokens_total{model="tiny-llama"} 5.0' in text
    assert f'osaurus_prompt_tokens_total{{model="tiny-llama"}} {float(answer.usage.prompt_tokens)}' in text
    assert 'osaurus_requests_total{code="OK",method="Chat",model="tiny-llama"} 1.0' in text
    assert "osaurus_sequences_running 0.0" in text


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "osaurus_grpc", "--grpc-port", "0", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)


def test_a_taken_metrics_port_is_named(tiny_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = start("--models-dir", str(tiny_dir), "--metrics-port", port, "--share-models-dir")
    assert ended.returncode == 1
    assert "--metrics-port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_second_core_on_the_same_models_is_refused(tmp_path: Path) -> None:
    with core_process(tmp_path) as first:
        wait_for_serving(first)
        refused = start("--models-dir", str(tmp_path))
        assert refused.returncode == 1
        assert "--share-models-dir" in refused.stderr
        assert "Traceback" not in refused.stderr
        with core_process(tmp_path) as second:
            wait_for_serving(second)
    missing = start("--models-dir", str(tmp_path / "none"))
    assert missing.returncode == 1
    assert "does not exist" in missing.stderr
