"""Speculative decoding as callers see it: the same answers, counted guesses, and refusals at the start."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest

from osaurus_grpc.server.app import Core, StartError
from osaurus_grpc.v1 import model_service_pb2, model_service_pb2_grpc
from tests.models.test_residency import another_vocabulary, copies

from .cores import chat_request, inference_stub, running_core

pytestmark = pytest.mark.asyncio(loop_scope="session")

REPETITIVE = "Repeat after me: one two three four, one two three four, one two three four."


def counter(exposition: bytes, name: str) -> float:
    found = re.search(rf"^{name}_total (\S+)$", exposition.decode(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


async def test_answers_stay_the_same_and_guesses_are_counted(tiny_dir: Path, tmp_path: Path) -> None:
    copies(tiny_dir, tmp_path, "tiny-llama", "twin", "other")
    another_vocabulary(tmp_path / "other")
    request = chat_request(REPETITIVE, max_tokens=60, ignore_eos=True)
    async with running_core(tmp_path) as core, inference_stub(core.address) as inference:
        expected = await inference.Chat(request)
        assert counter(core.telemetry.exposition(), "osaurus_drafted_tokens") == 0
    async with (
        running_core(tmp_path, draft_model="twin", prompt_lookup_tokens=4) as core,
        inference_stub(core.address) as inference,
    ):
        for _ in range(2):
            answer = await inference.Chat(request)
            assert answer.choices[0].message == expected.choices[0].message
            assert answer.usage.completion_tokens == 60
        text = core.telemetry.exposition()
        drafted = counter(text, "osaurus_drafted_tokens")
        assert 0 < counter(text, "osaurus_accepted_tokens") <= drafted
        assert await drafts_of(core, "tiny-llama", "other") == ["twin", ""]


async def drafts_of(core: Core, *names: str) -> list[str]:
    """What models say drafts for them, once they are loaded."""
    async with grpc.aio.insecure_channel(core.address) as channel:
        models: model_service_pb2_grpc.ModelServiceAsyncStub
        models = model_service_pb2_grpc.ModelServiceStub(channel)
        requests = [model_service_pb2.LoadModelRequest(model=name) for name in names]
        return [(await models.LoadModel(request)).model.draft_model for request in requests]


@pytest.mark.parametrize(
    ("draft", "why"),
    [("broken", "its tokenizer files are damaged"), ("nowhere", "cannot draft with the model nowhere")],
)
async def test_a_draft_model_that_cannot_draft_keeps_the_core_from_starting(
    tiny_dir: Path, tmp_path: Path, draft: str, why: str
) -> None:
    copies(tiny_dir, tmp_path, "tiny-llama", "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(StartError, match=why):
        async with running_core(tmp_path, draft_model=draft):
            pass
