"""A turn's tokens carried over into the next, by several kinds of tokenizers and templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from osaurus_grpc.chat.template import apply_template
from osaurus_grpc.chat.transcript import Transcript, encode_after
from osaurus_grpc.chat.types import Message, Role
from tests.chat import tokenizers as kinds

LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
# As Qwen3's: earlier answers come back without their reasoning, which is part of their text here.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text: str) -> Message:
    return Message(Role.USER, text)


def assistant(text: str) -> Message:
    return Message(Role.ASSISTANT, text)


def in_letters(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text in as many tokens as it has letters, as no tokenizer would cut it."""
    return [token_id for letter in text for token_id in encode(tokenizer, letter)]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def text_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))


def turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: Sequence[int]
) -> Transcript:
    rendering = apply_template(tokenizer, messages)
    return Transcript.of(rendering, rendering.encode(), answer)


def test_without_an_earlier_turn_everything_is_tokenized(tokenizer: Any) -> None:
    rendering = apply_template(tokenizer, [user("Hi")])

    assert encode_after(None, rendering, tokenizer) == rendering.encode()


def test_an_answers_own_tokens_stay(tokenizer: Any) -> None:
    answer = in_letters(tokenizer, "Hello there")
    first = turn(tokenizer, [user("Hi")], answer)
    rendering = apply_template(tokenizer, [user("Hi"), assistant("Hello there"), user("Bye")])

    token_ids = encode_after(first, rendering, tokenizer)

    known = [*first.prompt, *first.answer]
    assert token_ids[: len(known)] == known
    assert text_of(tokenizer, token_ids) == rendering.text
    assert token_ids != rendering.encode()


def test_an_answer_cut_by_a_stop_text_keeps_the_tokens_before_it(tokenizer: Any) -> None:
    answer = [*in_letters(tokenizer, "One."), *encode(tokenizer, " Two STOP"), *encode(tokenizer, " it")]
    first = turn(tokenizer, [user("Count")], answer)
    rendering = apply_template(tokenizer, [user("Count"), assistant("One. Two"), user("On")])

    token_ids = encode_after(first, rendering, tokenizer)

    known = [*first.prompt, *in_letters(tokenizer, "One."), *encode(tokenizer, " Two")]
    assert token_ids[: len(known)] == known
    assert text_of(tokenizer, token_ids) == rendering.text


@pytest.mark.parametrize("said", ["Help me", "Goodbye", "", "Hello there and more"])
def test_an_edited_answer_is_tokenized_anew(tokenizer: Any, said: str) -> None:
    first = turn(tokenizer, [user("Hi")], in_letters(tokenizer, "Hello there"))
    rendering = apply_template(tokenizer, [user("Hi"), assistant(said), user("Bye")])

    token_ids = encode_after(first, rendering, tokenizer)

    assert text_of(tokenizer, token_ids) == rendering.text
    if said in ("Help me", "Goodbye"):
        assert token_ids == rendering.encode()


def test_another_conversation_is_tokenized_anew(tokenizer: Any) -> None:
    first = turn(tokenizer, [user("Hi")], encode(tokenizer, "Hello"))
    rendering = apply_template(tokenizer, [user("Ho"), assistant("Hello"), user("Bye")])

    assert encode_after(first, rendering, tokenizer) == rendering.encode()


def test_a_word_begun_for_the_model_is_not_cut_in_two(tokenizer: Any) -> None:
    first = turn(tokenizer, [user("Hi"), assistant("Hel")], encode(tokenizer, "lo"))
    other = apply_template(tokenizer, [user("Hi"), assistant("Helpful"), user("Bye")])
    same = apply_template(tokenizer, [user("Hi"), assistant("Hello"), user("Bye")])

    assert encode_after(first, other, tokenizer) == other.encode()
    token_ids = encode_after(first, same, tokenizer)
    assert token_ids[: len(first.prompt) + 1] == [*first.prompt, *first.answer]
    assert text_of(tokenizer, token_ids) == same.text


def test_reasoning_that_a_template_forgets(tokenizer: Any) -> None:
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.chat_template = FORGETFUL
    first = turn(tokenizer, [user("Hi")], encode(tokenizer, "<think>Hm</think>Hello"))
    rendering = apply_template(tokenizer, [user("Hi"), assistant("<think>Hm</think>Hello"), user("Bye")])

    token_ids = encode_after(first, rendering, tokenizer)

    assert token_ids[: len(first.prompt)] == list(first.prompt)
    assert text_of(tokenizer, token_ids) == rendering.text
    assert "Hm" not in rendering.text


def test_half_a_character_at_the_end_is_left_out(tokenizer: Any) -> None:
    whole = encode(tokenizer, "Fine 🦖")
    assert len(encode(tokenizer, "🦖")) > 1
    first = turn(tokenizer, [user("Hi")], whole[:-1])
    rendering = apply_template(tokenizer, [user("Hi"), assistant("Fine "), user("Bye")])

    token_ids = encode_after(first, rendering, tokenizer)

    assert text_of(tokenizer, token_ids) == rendering.text


def test_control_tokens_in_messages_stay_text_from_turn_to_turn(tokenizer: Any) -> None:
    messages = [user("What is <|im_end|>?")]
    first = turn(tokenizer, messages, in_letters(tokenizer, "A mark."))
    # The first of the characters that serve as marks, so that another one has to be chosen now.
    messages = [*messages, assistant("A mark."), user("And <|im_start|>system? " + chr(0x20000))]
    rendering = apply_template(tokenizer, messages)

    token_ids = encode_after(first, rendering, tokenizer)

    known = [*first.prompt, *first.answer]
    assert token_ids[: len(known)] == known
    assert text_of(tokenizer, token_ids) == rendering.plain_text
    ends = token_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert ends == rendering.encode().count(tokenizer.convert_tokens_to_ids("<|im_end|>"))


def test_sentence_piece_keeps_its_spaces() -> None:
    tokenizer = kinds.byte_fallback()
    tokenizer.chat_template = LLAMA_2
    # "▁h" "e": the space is the template's own.
    answer = [tokenizer.convert_tokens_to_ids(piece) for piece in ("▁", "h", "e")]
    first = turn(tokenizer, [user("wo")], answer)
    rendering = apply_template(tokenizer, [user("wo"), assistant("he"), user("he")])

    token_ids = encode_after(first, rendering, tokenizer)

    assert token_ids[: len(first.prompt) + 3] == [*first.prompt, *answer]
    # What follows is as it was tokenized in one go.
    whole = rendering.encode()
    end = whole.index(tokenizer.convert_tokens_to_ids("</s>"))
    assert token_ids[token_ids.index(2) :] == whole[end:]


words = st.lists(st.sampled_from([*"ab \n🦖é𠀀", "<|im_end|>", "<|im_start|>"]), max_size=12).map("".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
@given(said=words, answer=words, edited=st.none() | words, following=words)
def test_the_tokens_always_stand_for_the_text(
    tokenizer: Any, said: str, answer: str, edited: str | None, following: str
) -> None:
    """Whatever was said and edited, the tokens are those of the rendered text, control tokens included."""
    # Names of control tokens are spelled out, as a model writes them that means the text.
    first = turn(tokenizer, [user(said)], in_letters(tokenizer, answer))
    text = answer if edited is None else edited
    rendering = apply_template(tokenizer, [user(said), assistant(text), user(following)])

    token_ids = encode_after(first, rendering, tokenizer)

    assert text_of(tokenizer, token_ids) == rendering.plain_text
    specials = set(tokenizer.all_special_ids)
    controls = [t for t in token_ids if t in specials]
    assert controls == [t for t in rendering.encode() if t in specials]
