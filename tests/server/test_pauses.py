"""--max-pause-steps through a core of its own: how a prompt is divided while another stream runs."""

from __future__ import annotations

import itertools
from pathlib import Path

import grpc
import pytest

from osaurus_grpc.v1 import inference_service_pb2_grpc
from tests.conftest import ENDLESS_TOKENS
from tests.harness.processes import NO_LIMITS, core_process
from tests.server.cores import chat_request, stream_request

SMALLEST_CHUNK = 8


def chunks_beside_a_stream(endless_dir: Path, steps: int) -> list[int]:
    """Tokens by which a long prompt advances, step by step, while another stream runs."""
    flags = ("--max-pause-steps", str(steps), "--prompt-cache-bytes", "0")
    with (
        core_process(endless_dir, *NO_LIMITS, *flags) as core,
        grpc.insecure_channel(core.address) as channel,
    ):
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        running = stub.ChatStream(
            stream_request(chat_request("Hi", max_tokens=ENDLESS_TOKENS, ignore_eos=True)), timeout=120
        )
        for _ in itertools.islice(running, 10):
            pass  # what a step takes is known then
        long_one = stream_request(chat_request("word " * 900, max_tokens=1), progress=True)
        progress = [
            event.prompt_progress.processed_tokens
            for event in stub.ChatStream(long_one, timeout=120)
            if event.HasField("prompt_progress")
        ]
        assert running.is_active()  # all the time
        running.cancel()
    assert progress[-1] > 900
    return [after - before for before, after in itertools.pairwise([0, *progress])]


@pytest.mark.parametrize("steps", [1, 1024])
def test_the_setting_bounds_what_is_processed_between_two_tokens(endless_dir: Path, steps: int) -> None:
    chunks = chunks_beside_a_stream(endless_dir, steps)

    assert chunks[0] == SMALLEST_CHUNK  # nothing is known yet of what a chunk takes
    if steps == 1:
        assert max(chunks) == SMALLEST_CHUNK
    else:
        assert max(chunks) >= 8 * SMALLEST_CHUNK
