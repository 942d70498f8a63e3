"""OpenAI's embeddings by its own Python client against the real core."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest

from tests.conftest import TINY

TEXTS = ["a cat", "a dog", "the stock market"]


@pytest.fixture(scope="module")
def client(tiny_http: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny_http}/v1", api_key="not-needed", max_retries=0) as made:
        yield made


def test_vectors(client: openai.OpenAI) -> None:
    # The client asks for base64 by itself.
    answer = client.embeddings.create(model=TINY, input=TEXTS)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert answer.model == TINY
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    for entry in answer.data:
        assert math.isclose(math.hypot(*entry.embedding), 1, rel_tol=1e-3)
    numbers = client.embeddings.create(model=TINY, input=TEXTS, encoding_format="float")
    assert [entry.embedding for entry in numbers.data] == [entry.embedding for entry in answer.data]
    alone = client.embeddings.create(model=TINY, input=TEXTS[1])
    assert alone.data[0].embedding == pytest.approx(answer.data[1].embedding, abs=1e-3)


def test_token_ids(client: openai.OpenAI) -> None:
    one = client.embeddings.create(model=TINY, input=[5, 6, 7])
    two = client.embeddings.create(model=TINY, input=[[5, 6, 7], [8]])
    assert len(one.data) == 1
    assert len(two.data) == 2
    assert two.data[0].embedding == pytest.approx(one.data[0].embedding, abs=1e-3)


def test_dimensions(client: openai.OpenAI) -> None:
    whole = client.embeddings.create(model=TINY, input="a cat").data[0].embedding
    cut = client.embeddings.create(model=TINY, input="a cat", dimensions=8).data[0].embedding
    assert len(cut) == 8
    assert math.isclose(math.hypot(*cut), 1, rel_tol=1e-3)
    scale = cut[0] / whole[0]
    assert cut == pytest.approx([value * scale for value in whole[:8]], abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "word " * 20_000}, "input[0]"),
        ({"input": ["a", "word " * 20_000]}, "input[1]"),
        ({"input": "a" * 30_000_000}, "input[0]"),
        ({"input": [[1], [2**31 - 1]]}, "input[1]"),
        ({"dimensions": 1_000_000}, "dimensions"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(
    client: openai.OpenAI, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(**{"model": TINY, "input": "a", **fields})  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.param == param


def test_an_input_that_is_too_long(client: openai.OpenAI) -> None:
    """Nothing answers an input, so that its error speaks of no answer."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=TINY, input=["a", "word " * 20_000])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input[1]")
    assert "Invalid 'input[1]': has " in caught.value.message
    assert "answer" not in caught.value.message


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="a")
