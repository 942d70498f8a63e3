"""Ollama's own Python client against the real core and the tiny model: prompts, names, vectors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import ClassVar

import ollama
import pytest

from tests.conftest import TINY

GREEDY = {"temperature": 0, "num_predict": 6}


@pytest.fixture(scope="module")
def client(tiny_http: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=tiny_http) as made:
        yield made


@pytest.fixture
async def aclient(tiny_http: str) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(host=tiny_http) as made:
        yield made


def refused(client: ollama.Client, prompt: str = "Hi", **arguments: object) -> tuple[int, str]:
    with pytest.raises(ollama.ResponseError) as caught:
        list(client.generate(TINY, prompt, stream=True, **arguments))  # type: ignore[call-overload]  # a table
    return caught.value.status_code, caught.value.error


class TestGenerate:
    def test_a_stream_says_the_same(self, client: ollama.Client) -> None:
        whole = client.generate(TINY, "The sky", options=GREEDY)
        lines = list(client.generate(TINY, "The sky", options=GREEDY, stream=True))
        assert "".join(line.response or "" for line in lines) == whole.response
        assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
        assert lines[-1].context == whole.context
        assert (whole.done_reason, whole.eval_count) == ("length", 6)
        assert all(line.context is None for line in lines[:-1])

    async def test_the_asynchronous_client(self, aclient: ollama.AsyncClient) -> None:
        whole = await aclient.generate(TINY, "The sky", options=GREEDY)
        lines = [line async for line in await aclient.generate(TINY, "The sky", options=GREEDY, stream=True)]
        assert "".join(line.response or "" for line in lines) == whole.response

    def test_it_is_a_chat_of_one_turn(self, client: ollama.Client) -> None:
        chat = client.chat(
            TINY, [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "The sky"}],
            options=GREEDY,
        )  # fmt: skip
        made = client.generate(TINY, "The sky", system="Rhyme.", options=GREEDY)
        assert made.response == chat.message.content
        assert made.prompt_eval_count == chat.prompt_eval_count

    def test_the_context_goes_on(self, client: ollama.Client) -> None:
        first = client.generate(TINY, "The sky", options=GREEDY)
        assert first.context
        assert first.prompt_eval_count is not None
        assert first.eval_count is not None
        assert len(first.context) == first.prompt_eval_count + first.eval_count
        second = client.generate(TINY, "The sea", context=first.context, options=GREEDY)
        alone = client.generate(TINY, "The sea", options=GREEDY)
        assert second.prompt_eval_count is not None
        assert alone.prompt_eval_count is not None
        assert second.prompt_eval_count == len(first.context) + alone.prompt_eval_count
        assert second.context is not None
        assert list(second.context[: len(first.context)]) == list(first.context)

    def test_raw_is_the_prompt_alone(self, client: ollama.Client) -> None:
        made = client.generate(TINY, "The sky", raw=True, options=GREEDY)
        assert (made.prompt_eval_count, made.context) == (2, None)
        lines = list(client.generate(TINY, "The sky", raw=True, options=GREEDY, stream=True))
        assert "".join(line.response or "" for line in lines) == made.response

    def test_a_template_makes_the_prompt(self, client: ollama.Client) -> None:
        raw = client.generate(TINY, "S | The sky", raw=True, options=GREEDY)
        made = client.generate(
            TINY, "The sky", system="S", template="{{ .System }} | {{ .Prompt }}", options=GREEDY
        )
        assert made.response == raw.response
        assert made.prompt_eval_count == raw.prompt_eval_count
        assert made.context

    def test_stop_and_logprobs(self, client: ollama.Client) -> None:
        whole = client.generate(TINY, "The sky", options=GREEDY, logprobs=True, top_logprobs=2)
        assert whole.logprobs is not None
        assert len(whole.logprobs) == 6
        assert all(len(entry.top_logprobs or []) == 2 for entry in whole.logprobs)
        assert whole.response is not None
        stop = whole.response.strip()[2:5]
        made = client.generate(TINY, "The sky", options={**GREEDY, "stop": [stop]})
        assert made.response is not None
        assert stop not in made.response
        assert made.done_reason == "stop"

    def test_loading_and_unloading(self, client: ollama.Client) -> None:
        assert client.generate(TINY, keep_alive="10m").done_reason == "load"
        running = client.ps().models
        assert [entry.model for entry in running] == [TINY]
        assert running[0].size_vram in (0, running[0].size)
        assert client.generate(TINY, keep_alive=0).done_reason == "unload"
        assert client.ps().models == []

    @pytest.mark.parametrize("limit", [-1, -2, 0])
    def test_no_limit_is_the_contexts_end(self, client: ollama.Client, limit: int) -> None:
        options = {"num_predict": limit, "num_ctx": 48, "temperature": 0}
        made = client.generate(TINY, "The sky", options=options)
        assert made.done_reason == "length"
        assert made.prompt_eval_count is not None
        assert made.eval_count is not None
        assert made.prompt_eval_count + made.eval_count == 48

    def test_an_answer_of_a_given_form(self, client: ollama.Client) -> None:
        form = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        strict = {**form, "additionalProperties": False}
        options = {"temperature": 0, "num_predict": 60}
        for raw in (False, True):
            made = client.generate(TINY, "Is it?", format=strict, options=options, raw=raw)
            assert isinstance(json.loads(made.response or "")["ok"], bool)
        chat = client.chat(TINY, [{"role": "user", "content": "Is it?"}], format=strict, options=options)
        assert isinstance(json.loads(chat.message.content or "")["ok"], bool)

    def test_errors(self, client: ollama.Client) -> None:
        assert refused(client, suffix="end") == (400, f"{TINY} does not support insert")
        assert refused(client, think=True) == (400, f'"{TINY}" does not support thinking')
        assert refused(client, images=[b"hello"])[0] == 400
        assert refused(client, template="{{ range .Messages }}{{ end }}")[0] == 400
        assert refused(client, prompt="word " * 5000)[0] == 400
        assert refused(client, context=[10**6])[0] == 400
        assert refused(client, options={"temperature": "hot"})[1] == (
            'option "temperature" must be of type float32'
        )


class TestNames:
    def test_an_alias(self, client: ollama.Client) -> None:
        assert client.copy(TINY, "gpt-4o").status == "success"
        try:
            made = client.generate("gpt-4o", "Hi", options=GREEDY)
            assert made.model == "gpt-4o"
            assert client.show("gpt-4o").modelinfo is not None
        finally:
            assert client.delete("gpt-4o").status == "success"
        with pytest.raises(ollama.ResponseError, match="model 'gpt-4o' not found"):
            client.generate("gpt-4o", "Hi")

    async def test_weights_stay(self, aclient: ollama.AsyncClient) -> None:
        with pytest.raises(ollama.ResponseError) as caught:
            await aclient.delete(TINY)
        assert caught.value.status_code == 501
        assert (await aclient.list()).models[0].model == TINY

    def test_what_is_to_come_says_so(self, client: ollama.Client) -> None:
        for call in (client.pull, client.push):
            with pytest.raises(ollama.ResponseError, match="is not implemented in this release") as caught:
                call("nope")
            assert caught.value.status_code == 501
        with pytest.raises(ollama.ResponseError, match="is not implemented in this release"):
            client.create("mario", from_=TINY)


class TestEmbeddings:
    def test_vectors(self, client: ollama.Client) -> None:
        made = client.embed(TINY, ["The sky", "The sea", "The sky"])
        assert len(made.embeddings) == 3
        first, second, third = made.embeddings
        assert sum(value * value for value in first) == pytest.approx(1, abs=1e-3)
        assert first == pytest.approx(third, abs=1e-5)
        assert first != pytest.approx(second, abs=1e-2)
        short = client.embed(TINY, "The sky", dimensions=4).embeddings[0]
        assert len(short) == 4
        assert sum(value * value for value in short) == pytest.approx(1, abs=1e-3)

    async def test_the_older_call(self, aclient: ollama.AsyncClient) -> None:
        old = (await aclient.embeddings(TINY, "The sky")).embedding
        new = (await aclient.embed(TINY, "The sky")).embeddings[0]
        length = sum(value * value for value in old) ** 0.5
        assert [value / length for value in old] == pytest.approx(list(new), abs=1e-4)


class TestTools:
    TOOL: ClassVar[dict[str, object]] = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }

    def test_a_call_and_its_result_go_into_the_prompt(self, client: ollama.Client) -> None:
        call = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
        history = [
            {"role": "user", "content": "Is it warm in Paris?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_name": "get_weather", "content": "11 C"},
        ]
        made = client.chat(TINY, history, tools=[self.TOOL], options=GREEDY)
        alone = client.chat(TINY, history, options=GREEDY)
        assert made.prompt_eval_count is not None
        assert alone.prompt_eval_count is not None
        assert made.prompt_eval_count > alone.prompt_eval_count
