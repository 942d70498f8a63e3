"""Without any stub: `buf curl` finds services and calls them through reflection."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

BUF = shutil.which("buf")
pytestmark = pytest.mark.skipif(BUF is None, reason="buf is not installed (extra dev)")
# buf curl's exit status is 8 times the gRPC code.
INVALID_ARGUMENT, NOT_FOUND = 8 * 3, 8 * 5


def curl(address: str, method: str, data: dict[str, Any] | None = None, *flags: str):
    body = ["--data", json.dumps(data)] if data is not None else []
    command = [BUF, "curl", "--http2-prior-knowledge", "--protocol", "grpc", *flags, *body]
    return subprocess.run(
        [*command, f"http://{address}{method}"], capture_output=True, text=True, timeout=120, check=False
    )


def chat(**fields: Any) -> dict[str, Any]:
    said = [{"role": "ROLE_USER", "content": [{"text": "Hello"}]}]
    return {"messages": said, "sampling": {"maxTokens": 6, "temperature": 0, "ignoreEos": True}, **fields}


def test_services_are_listed(tiny_core: str):
    listed = curl(tiny_core, "", None, "--list-services").stdout.split()
    assert {
        "osaurus.v1.InferenceService", "osaurus.v1.ModelService", "osaurus.v1.RecordService",
        "grpc.health.v1.Health",
    } <= set(listed)  # fmt: skip


def test_a_unary_call(tiny_core: str):
    answered = curl(tiny_core, "/osaurus.v1.InferenceService/Chat", chat())
    assert answered.returncode == 0, answered.stderr
    reply = json.loads(answered.stdout)
    assert reply["usage"]["completionTokens"] == 6
    assert reply["choices"][0]["finishReason"] == "FINISH_REASON_LENGTH"


def test_a_stream(tiny_core: str):
    streamed = curl(tiny_core, "/osaurus.v1.InferenceService/ChatStream", {"chat": chat()})
    assert streamed.returncode == 0, streamed.stderr
    decoder, text, events = json.JSONDecoder(), streamed.stdout.strip(), []
    while text:
        event, end = decoder.raw_decode(text)
        events.append(next(iter(event)))
        text = text[end:].lstrip()
    assert events[0] == "started"
    assert events[-2:] == ["choiceFinished", "completed"]


def test_errors_have_their_details(tiny_core: str):
    wrong = curl(tiny_core, "/osaurus.v1.InferenceService/Chat", chat(sampling={"temperature": 9}))
    assert wrong.returncode == INVALID_ARGUMENT
    assert "temperature" in wrong.stderr
    unknown = curl(tiny_core, "/osaurus.v1.InferenceService/GetModel", {"model": "omega"})
    assert unknown.returncode == NOT_FOUND
    assert "Model not found: omega" in unknown.stderr


def test_health(tiny_core: str):
    checked = curl(tiny_core, "/grpc.health.v1.Health/Check", {"service": "osaurus.v1.RecordService"})
    assert json.loads(checked.stdout) == {"status": "SERVING"}
