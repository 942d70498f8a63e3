"""OpenAI's legacy completions by its own Python client against the real core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.conftest import SMOLLM, TINY

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def client(tiny_http: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny_http}/v1", api_key="not-needed", max_retries=0) as made:
        yield made


def test_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=TINY, prompt=PROMPT, temperature=0)
    assert (answer.object, answer.model) == ("text_completion", TINY)
    assert answer.id
    assert answer.system_fingerprint
    (choice,) = answer.choices
    assert (choice.index, choice.logprobs) == (0, None)
    assert choice.finish_reason in {"stop", "length"}
    assert answer.usage is not None
    # 16 tokens are the default, unless the model ends before.
    assert answer.usage.completion_tokens <= 16
    assert choice.finish_reason == "stop" or answer.usage.completion_tokens == 16
    again = client.completions.create(model=TINY, prompt=PROMPT, temperature=0)
    assert again.choices[0].text == choice.text


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    arguments = {"model": TINY, "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**arguments)
    chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_choices_of_many_prompts_are_numbered_through(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "The sky is", "One two three"]
    arguments = {"model": TINY, "temperature": 0, "max_tokens": 4}
    alone = [client.completions.create(**arguments, prompt=prompt).choices[0].text for prompt in prompts]
    together = client.completions.create(**arguments, prompt=prompts, n=2)
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == [text for text in alone for _ in range(2)]
    texts = [""] * 6
    for chunk in client.completions.create(**arguments, prompt=prompts, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [text for text in alone for _ in range(2)]


def test_token_ids_as_prompts(client: openai.OpenAI) -> None:
    arguments = {"model": TINY, "temperature": 0, "max_tokens": 4}
    one = client.completions.create(**arguments, prompt=[5, 6, 7])
    assert one.usage is not None
    assert one.usage.prompt_tokens == 3
    two = client.completions.create(**arguments, prompt=[[5, 6, 7], [8, 9]])
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text == one.choices[0].text
    assert two.usage is not None
    assert two.usage.prompt_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_the_prompt(client: openai.OpenAI, stream: bool) -> None:
    arguments = {"model": TINY, "prompt": PROMPT, "temperature": 0, "max_tokens": 4}
    plain = client.completions.create(**arguments).choices[0].text
    if stream:
        chunks = client.completions.create(**arguments, echo=True, stream=True)
        text = "".join(chunk.choices[0].text for chunk in chunks)
    else:
        text = client.completions.create(**arguments, echo=True).choices[0].text
    assert text == PROMPT + plain


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs(client: openai.OpenAI, top: int) -> None:
    arguments = {"model": TINY, "prompt": PROMPT, "temperature": 0, "max_tokens": 6, "logprobs": top}
    choice = client.completions.create(**arguments).choices[0]
    assert choice.logprobs is not None
    shape = choice.logprobs
    assert shape.tokens is not None
    assert shape.token_logprobs is not None
    assert shape.top_logprobs is not None
    assert shape.text_offset is not None
    assert len(shape.tokens) == len(shape.token_logprobs) == len(shape.top_logprobs) == len(shape.text_offset)
    assert shape.text_offset[0] == 0
    assert shape.text_offset == sorted(shape.text_offset)
    for token, logprob, tops in zip(shape.tokens, shape.token_logprobs, shape.top_logprobs, strict=True):
        assert tops[token] == logprob
        assert 1 <= len(tops) <= top + 1
        # Greedy: nothing is more probable than what was chosen.
        assert max(tops.values()) == logprob
    tokens: list[str] = []
    offsets: list[int] = []
    for chunk in client.completions.create(**arguments, stream=True):
        if chunk.choices[0].logprobs:
            tokens += chunk.choices[0].logprobs.tokens or []
            offsets += chunk.choices[0].logprobs.text_offset or []
    assert (tokens, offsets) == (shape.tokens, shape.text_offset)


@pytest.mark.parametrize("top", [0, 1, 3])
@pytest.mark.parametrize("prompt", [PROMPT, [5, 6, 7, 8, 9, 10]], ids=["text", "tokens"])
def test_the_logprobs_of_a_prompt_that_is_echoed(
    client: openai.OpenAI, prompt: str | list[int], top: int
) -> None:
    """What tools send that measure models by the probabilities of given texts."""
    arguments = {"model": TINY, "prompt": prompt, "temperature": 0, "echo": True, "logprobs": top}
    alone = client.completions.create(**arguments, max_tokens=0)
    (choice,) = alone.choices
    shape = choice.logprobs
    assert alone.usage is not None
    assert (alone.usage.completion_tokens, choice.finish_reason) == (0, "length")
    assert len(shape.tokens) == len(shape.text_offset) == alone.usage.prompt_tokens
    assert "".join(shape.tokens) == choice.text
    assert shape.text_offset == [len("".join(shape.tokens[:place])) for place in range(len(shape.tokens))]
    assert shape.token_logprobs[0] is None
    assert shape.top_logprobs[0] is None
    for token, logprob, tops in zip(
        shape.tokens[1:], shape.token_logprobs[1:], shape.top_logprobs[1:], strict=True
    ):
        assert tops[token] == logprob < 0
        assert max(top, 1) <= len(tops) <= top + 1
    more = client.completions.create(**arguments, max_tokens=4).choices[0]
    assert more.logprobs.tokens[: len(shape.tokens)] == shape.tokens
    assert len(more.logprobs.tokens) == len(shape.tokens) + 4
    assert more.logprobs.token_logprobs[1 : len(shape.tokens)] == pytest.approx(
        shape.token_logprobs[1:], abs=1e-3
    )
    assert more.logprobs.text_offset[len(shape.tokens)] == len(choice.text)


def test_echoed_prompts_are_streamed_with_their_logprobs(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "The sky is", "One two three"]
    arguments = {
        "model": TINY, "prompt": prompts, "temperature": 0, "echo": True, "logprobs": 1, "max_tokens": 3,
        "n": 2,
    }  # fmt: skip
    whole = client.completions.create(**arguments)
    assert [choice.index for choice in whole.choices] == list(range(6))
    tokens: dict[int, list[str]] = {}
    offsets: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    for chunk in client.completions.create(**arguments, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        if choice.logprobs:
            tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
            offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
    for choice in whole.choices:
        assert choice.text.startswith(prompts[choice.index // 2])
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert offsets[choice.index] == choice.logprobs.text_offset


def test_the_token_that_ends_an_echoed_prompts_answer_is_told(client: openai.OpenAI) -> None:
    """Measuring tools ask for one token and leave it out again, whatever it is."""
    end = 2  # <|im_end|>
    choice = client.completions.create(
        model=TINY, prompt=[5, 6, 7], echo=True, logprobs=1, max_tokens=1, logit_bias={str(end): 100},
        temperature=0,
    ).choices[0]  # fmt: skip
    assert choice.finish_reason == "stop"
    assert choice.logprobs.tokens[3:] == ["<|im_end|>"]
    assert choice.logprobs.text_offset[3] == len(choice.text)


def test_a_seed_and_a_stop(client: openai.OpenAI) -> None:
    arguments = {"model": TINY, "prompt": PROMPT, "temperature": 1, "seed": 3, "max_tokens": 12}
    text = client.completions.create(**arguments).choices[0].text
    assert client.completions.create(**arguments).choices[0].text == text
    stop = text[len(text) // 2 :][:4]
    stopped = client.completions.create(**arguments, stop=stop).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [2**31 - 1]}, "prompt"),
        ({"prompt": "word " * 20_000}, "prompt"),
        ({"suffix": " the end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"logprobs": 6, "echo": True}, "logprobs"),
        ({"logit_bias": {"49152000": 1}}, "logit_bias"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_field_that_cannot_be_honoured_is_named(
    client: openai.OpenAI, fields: dict[str, object], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": TINY, "prompt": PROMPT, "stream": stream, **fields})  # type: ignore[call-overload]  # wrong on purpose
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("prompts", "param"),
    [(["one", "word " * 20_000], "prompt[1]"), ([[1], [2], [3, 2**31 - 1]], "prompt[2][1]")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_which_of_several_prompts_is_wrong(
    client: openai.OpenAI, prompts: list[str], param: str, stream: bool
) -> None:
    with pytest.raises(openai.APIError) as caught:
        # Another prompt's answer may have begun to stream.
        list(client.completions.create(model=TINY, prompt=prompts, stream=stream))
    assert caught.value.param == param


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-3.5-turbo-instruct", prompt=PROMPT)


@pytest.mark.smollm
def test_no_template_is_applied(smollm_http: str) -> None:
    with openai.OpenAI(base_url=f"{smollm_http}/v1", api_key="x", max_retries=0) as client:
        answer = client.completions.create(
            model=SMOLLM, prompt="The capital of France is", temperature=0, max_tokens=3
        )
    assert "Paris" in answer.choices[0].text


@pytest.mark.smollm
def test_given_texts_are_as_probable_as_mlx_lm_says(smollm_http: str, smollm_dir: Path) -> None:
    """The requests of lm-evaluation-harness' local-completions, and what it reads of the answers."""
    from osaurus_grpc.models.platform import mx  # isort: skip  # before mlx_lm, since it chooses the BLAS
    from mlx_lm import load

    model, tokenizer, *_ = load(str(smollm_dir / SMOLLM))
    pairs = [("The capital of France is", " Paris"), ("The capital of France is", " the sea"),
             ("Water is made of hydrogen and", " café crème")]  # fmt: skip
    prompts, expected = [], []
    for context, continuation in pairs:
        tokens = tokenizer.encode(context + continuation, add_special_tokens=False)
        start = len(tokenizer.encode(context, add_special_tokens=False))
        logits = model(mx.array([tokens]))[0].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        places = range(start, len(tokens))
        score = sum(logprobs[place - 1, tokens[place]].item() for place in places)
        is_greedy = all(mx.argmax(logprobs[place - 1]).item() == tokens[place] for place in places)
        prompts.append((tokens, start))
        expected.append((score, is_greedy))
    asked = {
        "model": SMOLLM, "prompt": [tokens for tokens, _ in prompts], "temperature": 0, "max_tokens": 1,
        "logprobs": 1, "seed": 1234, "echo": True,
    }  # fmt: skip
    answer = httpx.post(f"{smollm_http}/v1/completions", json=asked, timeout=120).json()
    for choice, (_, start), (score, is_greedy) in zip(answer["choices"], prompts, expected, strict=True):
        # The one token that was asked for is left out again.
        logprobs = choice["logprobs"]["token_logprobs"][start:-1]
        tops = choice["logprobs"]["top_logprobs"][start:-1]
        assert sum(logprobs) == pytest.approx(score, abs=0.05)
        assert all(own == max(top.values()) for own, top in zip(logprobs, tops, strict=True)) == is_greedy
