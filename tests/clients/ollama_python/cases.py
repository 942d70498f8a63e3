"""Ollama's Python client: every call that a model's own server answers."""

from __future__ import annotations

import json
import os

import ollama
import pytest

CHAT, TINY, EMBEDDING = (os.environ[f"{name}_MODEL"] for name in ("CHAT", "TINY", "EMBEDDING"))
HOST = os.environ["SERVER_URL"]
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0, "num_predict": 24}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
}


@pytest.fixture(scope="module")
def client():
    with ollama.Client(host=HOST, timeout=120) as made:
        yield made


def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Its name.
    """
    return f"11 degrees in {city}"


def test_chat(client):
    answer = client.chat(CHAT, CAPITAL, options=GREEDY)
    assert "Paris" in answer.message.content
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.eval_count > 0
    assert answer["message"]["role"] == "assistant"


def test_chat_stream(client):
    lines = list(client.chat(CHAT, CAPITAL, options=GREEDY, stream=True))
    assert "Paris" in "".join(line.message.content for line in lines)
    assert [line.done for line in lines[-2:]] == [False, True]


def test_every_option(client):
    options = ollama.Options(
        num_ctx=1024, num_batch=64, num_gpu=0, main_gpu=0, low_vram=False, f16_kv=True, logits_all=False,
        vocab_only=False, use_mmap=True, use_mlock=False, embedding_only=False, num_thread=2, numa=False,
        num_keep=4, seed=42, num_predict=4, top_k=20, top_p=0.9, tfs_z=1.0, typical_p=1.0, repeat_last_n=64,
        temperature=0.8, repeat_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, mirostat=0,
        mirostat_tau=5.0, mirostat_eta=0.1, penalize_newline=True, stop=["\n\n"],
    )  # fmt: skip
    assert client.chat(TINY, CAPITAL, options=options).done


def test_generate(client):
    answer = client.generate(CHAT, "What is the capital of France?", options=GREEDY)
    assert "Paris" in answer.response
    assert answer.context
    lines = list(client.generate(CHAT, "And of Norway?", context=answer.context, options=GREEDY, stream=True))
    assert lines[-1].done
    assert lines[-1].prompt_eval_count > len(answer.context)
    raw = client.generate(TINY, "one two", raw=True, options={"num_predict": 3})
    assert raw.context is None
    assert client.generate(TINY, "x", system="Be brief.", options={"num_predict": 2}).done_reason == "length"


def test_format(client):
    answer = client.chat(CHAT, CAPITAL, format=SCHEMA, options={"temperature": 0, "num_predict": 64})
    found = json.loads(answer.message.content)
    assert found["city"] in {"Paris", "Oslo"}
    assert isinstance(found["warm"], bool)
    generated = client.generate(CHAT, "Paris?", format=SCHEMA, options={"temperature": 0, "num_predict": 64})
    assert set(json.loads(generated.response)) == {"city", "warm"}
    free = client.chat(CHAT, CAPITAL, format="json", options={"temperature": 0, "num_predict": 24})
    assert free.message.content.lstrip().startswith("{")


def test_tools_and_their_results(client):
    # Ollama cannot be told to call a tool; what the model says to it is its own affair.
    answer = client.chat(CHAT, CAPITAL, tools=[get_weather], options={"temperature": 0, "num_predict": 64})
    assert answer.message.content or answer.message.tool_calls
    for call in answer.message.tool_calls or []:
        assert isinstance(call.function.arguments, dict)
    called = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    history = [
        *CAPITAL,
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "tool_name": "get_weather", "content": get_weather("Paris")},
    ]
    last = client.chat(CHAT, history, tools=[get_weather], options={"temperature": 0, "num_predict": 16})
    assert last.message.content or last.message.tool_calls


def test_think(client):
    assert client.chat(TINY, CAPITAL, think=False, options={"num_predict": 2}).message.thinking is None
    with pytest.raises(ollama.ResponseError, match="does not support thinking"):
        client.chat(TINY, CAPITAL, think=True)


def test_embed(client):
    texts = ["a cat", "a kitten", "the stock market"]
    vectors = client.embed(EMBEDDING, texts).embeddings
    assert [len(vector) for vector in vectors] == [384] * 3

    def likeness(first, second):
        return sum(a * b for a, b in zip(first, second, strict=True))

    assert likeness(vectors[0], vectors[0]) == pytest.approx(1, abs=1e-4)
    assert likeness(vectors[0], vectors[1]) > likeness(vectors[0], vectors[2]) + 0.2
    assert len(client.embeddings(EMBEDDING, "a cat").embedding) == 384
    assert len(client.embed(EMBEDDING, "a cat", dimensions=64).embeddings[0]) == 64


def test_names(client):
    listed = {entry.model.removesuffix(":latest") for entry in client.list().models}
    assert {CHAT, TINY, EMBEDDING} <= listed
    shown = client.show(CHAT)
    assert shown.modelinfo["general.architecture"] == "llama"
    assert "completion" in shown.capabilities
    assert "embedding" in client.show(EMBEDDING).capabilities
    with pytest.raises(ollama.ResponseError) as unknown:
        client.show("nope")
    assert unknown.value.status_code == 404


def test_copy_and_delete(client):
    assert client.copy(TINY, "copied-python").status == "success"
    try:
        assert client.chat("copied-python", CAPITAL, options={"num_predict": 1}).model == "copied-python"
        assert "copied-python" in {entry.model.removesuffix(":latest") for entry in client.list().models}
    finally:
        assert client.delete("copied-python").status == "success"
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.delete("copied-python")


def test_keep_alive_and_ps(client):
    assert client.generate(TINY, "", keep_alive="10m").done_reason == "load"
    running = {entry.model.removesuffix(":latest"): entry for entry in client.ps().models}
    assert running[TINY].size > 0
    assert running[TINY].context_length == 2048
    assert client.chat(TINY, [], keep_alive=0).done_reason == "unload"
    assert TINY not in {entry.model.removesuffix(":latest") for entry in client.ps().models}


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("pull", lambda client: client.pull("smollm2")),
        ("push", lambda client: client.push("smollm2")),
        ("create", lambda client: client.create("new", from_=TINY, system="Be brief.")),
    ],
)
def test_what_is_not_served_is_said_clearly(client, what, call):
    with pytest.raises(ollama.ResponseError) as caught:
        call(client)
    assert caught.value.status_code == 501
    assert caught.value.error


def test_a_stream_that_is_left_ends(client):
    stream = client.chat(TINY, CAPITAL, stream=True, options={"num_predict": 200})
    next(stream)
    stream.close()
    assert client.chat(TINY, CAPITAL, options={"num_predict": 1}).done


async def test_the_asynchronous_client():
    import asyncio

    async with ollama.AsyncClient(host=HOST) as client:
        calls = [client.chat(TINY, CAPITAL, options={"temperature": 0, "num_predict": 6}) for _ in range(12)]
        texts = {answer.message.content for answer in await asyncio.gather(*calls)}
        assert len(texts) == 1
        stream = await client.generate(TINY, "one", stream=True, options={"num_predict": 3})
        assert [line async for line in stream][-1].done
