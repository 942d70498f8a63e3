"""The part of a prompt that other conversations with the same system prompt begin with."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from osaurus_grpc.chat.stable_prefix import StablePrefixes
from osaurus_grpc.chat.template import render
from osaurus_grpc.chat.types import Message, Role, ToolSpec
from osaurus_grpc.errors import InvalidRequestError

SYSTEM = Message(role=Role.SYSTEM, content="You count sheep, and you never stop before a hundred.")
TOOLS = (ToolSpec("count", "Counts sheep."),)


def user(text: str) -> Message:
    return Message(role=Role.USER, content=text)


@pytest.mark.parametrize("tools", [(), TOOLS], ids=["plain", "tools"])
def test_it_is_what_two_conversations_share(tokenizer, tools) -> None:
    rendered: list[Sequence[Message]] = []

    def written(messages: Sequence[Message]) -> list[int]:
        rendered.append(messages)
        return render(tokenizer, messages, tools=tools)

    prefixes = StablePrefixes()
    lengths = []
    prompts = [written([SYSTEM, user("How many?")]), written([SYSTEM, user("Again, please."), user("Now.")])]
    rendered.clear()
    for prompt, question in zip(prompts, ("How many?", "Again, please."), strict=True):
        lengths.append(prefixes.length("m", [SYSTEM, user(question)], tools, None, prompt, written))
    assert len(rendered) == 1, "the second one is remembered"
    assert lengths[0] == lengths[1]
    shared = prompts[0][: lengths[0]]
    assert prompts[1][: lengths[1]] == shared
    assert tokenizer.decode(shared).endswith("<|im_start|>user\n")
    assert SYSTEM.content in tokenizer.decode(shared)


def test_tools_alone_are_stable_and_nothing_is_not(tokenizer) -> None:
    messages = [user("How many?")]

    def length(tools: tuple[ToolSpec, ...]) -> int:
        prompt = render(tokenizer, messages, tools=tools)
        return StablePrefixes().length(
            "m", messages, tools, None, prompt, lambda other: render(tokenizer, other, tools=tools)
        )

    assert length(()) == 0
    assert length(TOOLS) > 20


def test_another_system_prompt_option_or_model_is_another_prefix() -> None:
    prefixes = StablePrefixes()
    other = Message(role=Role.SYSTEM, content="Count goats.")
    asked = 0

    def written(messages: Sequence[Message]) -> list[int]:
        nonlocal asked
        asked += 1
        return [1, 2, 3]

    for model, system, options in (("a", SYSTEM, 1), ("b", SYSTEM, 1), ("a", other, 1), ("a", SYSTEM, 2)):
        assert prefixes.length(model, [system], (), options, [1, 2, 4], written) == 2
    assert asked == 4


def test_the_least_recently_used_is_forgotten() -> None:
    prefixes = StablePrefixes(max_entries=2)
    asked: list[str] = []
    for model in ("a", "b", "a", "c", "a", "b"):

        def written(messages: Sequence[Message], model: str = model) -> list[int]:
            asked.append(model)
            return [1]

        prefixes.length(model, [SYSTEM], (), None, [1, 2], written)
    assert asked == ["a", "b", "c", "b"]


def test_a_template_that_refuses_leaves_nothing_stable() -> None:
    def refuses(messages: Sequence[Message]) -> list[int]:
        raise InvalidRequestError("no", field="messages")

    assert StablePrefixes().length("m", [SYSTEM], (), None, [1, 2], refuses) == 0
