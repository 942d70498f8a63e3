"""The core tells its engine how much of a prompt is system prompt and tools."""

from __future__ import annotations

from typing import Any

import pytest

from osaurus_grpc.engine.arrivals import Arrival
from osaurus_grpc.engine.types import GenerationRequest
from osaurus_grpc.server.app import Core
from osaurus_grpc.v1 import chat_pb2
from tests.server.cores import chat_request

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_system_prompts_are_stable(core: Core, inference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GenerationRequest] = []
    generate = core.engine.generate

    def watched(request: GenerationRequest, arrival: Arrival | None = None) -> Any:
        asked.append(request)
        return generate(request, arrival)

    monkeypatch.setattr(core.engine, "generate", watched)
    system = chat_pb2.Message(
        role=chat_pb2.ROLE_SYSTEM, content=[chat_pb2.ContentPart(text="You count sheep, one by one.")]
    )
    for text, with_system in (("How many?", True), ("Again, please.", True), ("How many?", False)):
        request = chat_request(text, max_tokens=1)
        if with_system:
            request.messages.insert(0, system)
        await inference.Chat(request)
    first, second, without = asked
    stable = first.stable_prefix_tokens
    assert 8 < stable == second.stable_prefix_tokens < len(first.prompt)
    assert first.prompt[:stable] == second.prompt[:stable]
    assert first.prompt[stable] != second.prompt[stable]
    assert without.stable_prefix_tokens == 0
