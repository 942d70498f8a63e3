"""Reasoning through Anthropic's and Ollama's clients: a tiny model whose template opens the thinking."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import anthropic
import ollama
import pytest
from anthropic.types import Message, MessageParam

from tests.conftest import SMOLLM
from tests.harness import tiny
from tests.harness.processes import NO_LIMITS, core_process, rest_process

THINKER = "tiny-thinker"
BUDGET = 4
HI: list[MessageParam] = [{"role": "user", "content": "Hi"}]
# As Qwen's do it: the prompt ends with the opening mark, or with an empty thought.
OPENING = (
    "{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\n' }}"
    "{% else %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
GENERATION = "{{ '<|im_start|>assistant\n' }}"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory, smollm_dir: Path) -> Iterator[str]:
    """Base URL of a shim before a core that serves the model."""
    models = tmp_path_factory.mktemp("models")
    tiny.build(models / THINKER, tokenizer_from=smollm_dir / SMOLLM)
    path = models / THINKER / "tokenizer_config.json"
    config = json.loads(path.read_text())
    assert config["chat_template"].count(GENERATION) == 1
    config["chat_template"] = config["chat_template"].replace(GENERATION, GENERATION + OPENING)
    path.write_text(json.dumps(config))
    with core_process(models, *NO_LIMITS) as core, rest_process(core.address) as rest:
        yield rest.url


@pytest.fixture(scope="module")
def client(thinker: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=thinker, api_key="none", max_retries=0) as made:
        yield made


def kinds(message: Message) -> list[str]:
    return [block.type for block in message.content]


def ask(client: anthropic.Anthropic, **arguments: object) -> Message:
    with client.messages.stream(
        model=THINKER,
        max_tokens=16,
        messages=HI,
        extra_body={"temperature": 0},
        **arguments,  # type: ignore[arg-type]  # of any kind
    ) as stream:
        for _ in stream:
            pass
        return stream.get_final_message()


def test_thinking_within_its_budget(client: anthropic.Anthropic) -> None:
    message = ask(client, thinking={"type": "enabled", "budget_tokens": BUDGET})
    assert kinds(message) == ["thinking", "text"]
    thinking = message.content[0]
    assert thinking.type == "thinking"
    assert thinking.thinking
    assert thinking.signature
    assert message.usage.output_tokens_details is not None
    # The closing mark is not thought.
    assert message.usage.output_tokens_details.thinking_tokens == BUDGET
    whole = client.messages.create(
        model=THINKER,
        max_tokens=16,
        messages=HI,
        thinking={"type": "enabled", "budget_tokens": BUDGET},
        extra_body={"temperature": 0},
    )
    assert [block.to_dict() for block in whole.content] == [block.to_dict() for block in message.content]
    assert whole.usage.output_tokens_details == message.usage.output_tokens_details


def test_no_thinking_unless_it_is_asked_for(client: anthropic.Anthropic) -> None:
    assert kinds(ask(client)) == ["text"]
    assert kinds(ask(client, thinking={"type": "disabled"})) == ["text"]


def test_adaptive_thinking_is_the_templates_choice(client: anthropic.Anthropic) -> None:
    assert kinds(ask(client, thinking={"type": "adaptive"}))[0] == "thinking"


def test_ollamas_thinking(thinker: str) -> None:
    with ollama.Client(host=thinker) as client:
        assert "thinking" in (client.show(THINKER).capabilities or [])
        options = {"temperature": 0, "num_predict": 8}
        chat = client.chat(THINKER, [{"role": "user", "content": "Hi"}], think=True, options=options)
        assert chat.message.thinking
        plain = client.chat(THINKER, [{"role": "user", "content": "Hi"}], think=False, options=options)
        assert plain.message.thinking is None
        assert plain.message.content
        made = client.generate(THINKER, "Hi", think=True, options=options)
        assert made.thinking == chat.message.thinking
        lines = list(client.generate(THINKER, "Hi", think=True, options=options, stream=True))
        assert "".join(line.thinking or "" for line in lines) == made.thinking
