"""The `llm` command with its Ollama plugin: it finds the models and asks them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHAT = os.environ["CHAT_MODEL"]
LLM = str(Path(sys.executable).with_name("llm"))


def said(*arguments: str) -> str:
    env = {**os.environ, "OLLAMA_HOST": os.environ["SERVER_URL"]}
    done = subprocess.run(
        [LLM, *arguments], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_models_are_listed():
    assert CHAT in said("ollama", "models")


def test_a_question_is_answered():
    question = "What is the capital of France?"
    model = ("-m", f"ollama/{CHAT}", "-o", "temperature", "0", "-o", "num_predict", "24")
    assert "Paris" in said(*model, question)
    assert "Paris" in said(*model, "--no-stream", question)


def test_a_schema_is_followed():
    assert '"warm"' in said(
        "-m", f"ollama/{CHAT}", "-o", "num_predict", "64", "--schema", "warm bool", "Is it warm in Oslo?"
    )
