"""KV memory as a caller sees it: many long requests in little memory, a restart, a refusal."""

from __future__ import annotations

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from osaurus_grpc.v1 import chat_pb2, inference_service_pb2_grpc
from tests.harness.processes import NO_LIMITS, Process, core_process

from .cores import chat_request
from .test_metrics import free_port, start

# A token takes 512 bytes of the tiny model; two rows of a whole context of 2048 fit, not six.
BUDGET = 6 * 2**20
SYSTEM = "You are the keeper of a very long list of names. " * 100


def ask(core: Process, text: str, **sampling: object) -> chat_pb2.ChatResponse:
    with grpc.insecure_channel(core.address) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        response: chat_pb2.ChatResponse = stub.Chat(
            chat_request(SYSTEM + text, ignore_eos=True, **sampling), timeout=600
        )
        return response


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        found = re.search(rf"^{name} (\S+)$", response.read().decode(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def test_sixty_four_long_requests_in_little_memory_and_a_warm_start_after(
    tiny_dir: Path, tmp_path: Path
) -> None:
    port = free_port()
    flags = (*NO_LIMITS, "--prompt-cache-dir", str(tmp_path / "kv"), "--metrics-port", str(port))
    limits = ("--kv-cache-bytes", str(BUDGET), "--max-batch-size", "64")
    with core_process(tiny_dir, *flags, *limits) as core, ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(lambda i: ask(core, f"Name {i}.", max_tokens=24), range(64)))
        assert all(answer.usage.completion_tokens == 24 for answer in answers)
        assert metric(port, "osaurus_kv_budget_bytes") == BUDGET
        assert 0 < metric(port, "osaurus_kv_kept_bytes") <= BUDGET
        assert metric(port, "osaurus_kv_running_bytes") == 0
        assert metric(port, "osaurus_prompt_cache_lookups_total") >= 64
        assert metric(port, "osaurus_prompt_cache_hits_total") > 0
        assert metric(port, "osaurus_prompt_cache_reused_tokens_total") > 0
        assert metric(port, "osaurus_prompt_cache_evictions_total") >= 0
        first = ask(core, "Name 7.", max_tokens=24)
    prompt_tokens = first.usage.prompt_tokens
    assert prompt_tokens > 1000
    with core_process(tiny_dir, *flags) as core:
        assert metric(port, "osaurus_kv_disk_bytes") > 0
        warm = ask(core, "Name 7.", max_tokens=24)
    assert warm.usage.cached_prompt_tokens == (prompt_tokens - 1) // 256 * 256
    assert warm.choices[0].message == first.choices[0].message == answers[7].choices[0].message


def test_a_request_that_can_never_fit_is_refused(tiny_dir: Path) -> None:
    with core_process(tiny_dir, *NO_LIMITS, "--kv-cache-bytes", str(2**21)) as core:
        for text, max_tokens, reason, field in (
            ("Name 7.", 700, "INVALID_FIELD", "sampling.max_tokens"),
            ("word " * 650, 4, "CONTEXT_LENGTH_EXCEEDED", "messages"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                ask(core, text, max_tokens=max_tokens)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            status = rpc_status.from_call(refused.value)
            info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            status.details[0].Unpack(info)
            status.details[1].Unpack(request)
            assert info.reason == reason
            assert [violation.field for violation in request.field_violations] == [field]
            assert "the server has memory for the KV cache of" in status.message


@pytest.mark.parametrize("flag", ["--prompt-cache-dir", "OSAURUS_PROMPT_CACHE_DIR"])
def test_a_directory_that_cannot_be_written_is_named_with_its_flag(
    tiny_dir: Path, tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    arguments = ["--models-dir", str(tiny_dir), "--share-models-dir"]
    if flag.startswith("--"):
        arguments.append(f"{flag}={taken / 'kv'}")
    else:
        monkeypatch.setenv(flag, str(taken / "kv"))
    ended = start(*arguments)
    assert ended.returncode == 1
    assert "--prompt-cache-dir" in ended.stderr
    assert "Traceback" not in ended.stderr
