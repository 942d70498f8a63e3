"""The main job with a real model: serve it, ask it, by every way in."""

from __future__ import annotations

import signal
from pathlib import Path

import openai
import pytest

from osaurus_grpc.client import AsyncOsaurus
from osaurus_grpc.v1 import chat_pb2
from tests.e2e.serving import run_command, serving

MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"


@pytest.mark.smollm
async def test_the_capital_of_france(smollm_dir: Path, tmp_path: Path, home: Path) -> None:
    models_dir = tmp_path / "models"
    models_dir.mkdir()
    (models_dir / MODEL).symlink_to(smollm_dir / MODEL)
    with serving(home, f"--model={MODEL}", f"--models-dir={models_dir}") as served:
        async with openai.AsyncOpenAI(base_url=f"{served.http}/v1", api_key="unused") as client:
            answer = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=20
            )
        assert "Paris" in (answer.choices[0].message.content or "")

        request = chat_pb2.ChatRequest(model=MODEL)
        request.messages.add(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=QUESTION)])
        request.sampling.temperature = 0
        request.sampling.max_tokens = 20
        async with AsyncOsaurus(served.grpc) as core:
            text = "".join([event.content.text async for event in core.chat_stream(request)])
        assert "Paris" in text

        ran = run_command(
            home, "run", MODEL, QUESTION, "--temperature=0", "--max-tokens=20", f"--models-dir={models_dir}"
        )
        assert "Paris" in ran.stdout
        assert served.signal_and_wait(signal.SIGINT) == 0
        served.assert_no_child_is_left()
