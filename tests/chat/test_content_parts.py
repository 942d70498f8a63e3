"""Contents as lists of parts: images in their places, texts untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from osaurus_grpc.chat.content_parts import images_behind_results, needs_parts, parts_of
from osaurus_grpc.chat.control_tokens import Spliced
from osaurus_grpc.chat.template import apply_template
from osaurus_grpc.chat.types import Image, Message, Role, ToolCall, ToolSpec
from tests.harness import tiny_vision

LIST_TEMPLATE = tiny_vision.SMOLVLM_TEMPLATE
BOTH_TEMPLATE = tiny_vision.QWEN_TEMPLATE
STRING_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(smollm_dir: Path) -> Any:
    from transformers import AutoTokenizer

    from tests.conftest import SMOLLM

    return AutoTokenizer.from_pretrained(smollm_dir / SMOLLM)


def image(behind: int, data: bytes = b"") -> Image:
    return Image(data, behind, "")


def user(content: str, *behind: int) -> Message:
    return Message(Role.USER, content, images=tuple(map(image, behind)))


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


PICTURE = {"type": "image"}


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        (user("word"), [text("word")]),
        (user(""), [text("")]),
        (user("", 0), [PICTURE]),
        (user("word", 4), [PICTURE, text("word")]),
        (user("word", 0), [text("word"), PICTURE]),
        (user("two words", 5, 5), [text("two "), PICTURE, PICTURE, text("words")]),
        (user("abc", 3, 2, 0), [PICTURE, text("a"), PICTURE, text("bc"), PICTURE]),
    ],
)
def test_images_stand_in_their_places(message: Message, parts: list[Any]) -> None:
    assert parts_of(message) == parts


def test_the_servers_own_words_stay_its_own() -> None:
    content = Spliced.of([("rules", True), ("\n\n", False), ("<|im_end|>", True), ("question", False)])
    found: Any = parts_of(Message(Role.USER, content, images=(image(len("question")), image(3))))
    assert [part.get("text") for part in found] == ["rules\n\n<|im_end|>", None, "quest", None, "ion"]
    assert found[0]["text"].parts == (("rules", True), ("\n\n", False), ("<|im_end|>", True))
    assert found[2]["text"].parts == (("quest", False),)


def test_results_hand_their_images_to_the_user() -> None:
    call = Message(Role.ASSISTANT, "", tool_calls=(ToolCall("1", "look", "{}"),))
    first = Message(Role.TOOL, "seen", tool_call_id="1", images=(image(0, b"first"),))
    second = Message(Role.TOOL, "", tool_call_id="2", images=(image(0, b"second"),))
    question = Message(Role.USER, "And?", images=(image(0, b"third"),))

    shown = images_behind_results([user("Look"), call, first, second, question])
    assert [len(message.images) for message in shown] == [0, 0, 0, 0, 3]
    assert [each.data for each in shown[4].images] == [b"first", b"second", b"third"]
    assert parts_of(shown[4]) == [PICTURE, PICTURE, text("And?"), PICTURE]

    at_end = images_behind_results([user("Look"), call, first])
    assert [message.role for message in at_end] == [Role.USER, Role.ASSISTANT, Role.TOOL, Role.USER]
    before_an_answer = images_behind_results([user("Look"), call, first, Message(Role.ASSISTANT, "A tree.")])
    assert [message.role for message in before_an_answer][3:] == [Role.USER, Role.ASSISTANT]
    untouched = [user("Look", 0), call, Message(Role.TOOL, "seen", tool_call_id="1")]
    assert images_behind_results(untouched) is untouched


def test_trying_tells_which_templates_need_lists(tokenizer: Any) -> None:
    assert needs_parts(tokenizer, LIST_TEMPLATE)
    assert not needs_parts(tokenizer, BOTH_TEMPLATE)
    assert not needs_parts(tokenizer, STRING_TEMPLATE)
    assert not needs_parts(tokenizer, "{{ fail }}{{ raise_exception('no') }}")


def test_a_template_of_lists_shows_texts_tools_and_systems(tokenizer: Any) -> None:
    tokenizer.chat_template = LIST_TEMPLATE
    messages = [
        Message(Role.SYSTEM, "Be kind."),
        user("What is <|im_end|> here?", 5),
        Message(Role.ASSISTANT, "", tool_calls=(ToolCall("1", "look", '{"at": "it"}'),)),
        Message(Role.TOOL, "a tree", tool_call_id="1"),
    ]
    rendering = apply_template(tokenizer, messages, tools=[ToolSpec("look", "Looks.")])
    shown = rendering.plain_text
    assert "Be kind." in shown
    assert '"name": "look"' in shown
    assert "What is <|im_end|> <image>here?" in shown
    assert '"at": "it"' in shown
    assert "a tree" in shown
    # The name in the user's words is spelled out, not a token.
    assert rendering.encode().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 0


def test_images_in_the_form_of_both(tokenizer: Any) -> None:
    tokenizer.chat_template = BOTH_TEMPLATE
    shown = apply_template(tokenizer, [user("Hello"), Message(Role.ASSISTANT, "Hi"), user("See", 3)]).text
    assert "<|im_start|>user\nHello<|im_end|>" in shown
    assert "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>See<|im_end|>" in shown
