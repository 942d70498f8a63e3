from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import aiohttp
import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.v1 import chat_pb2, completion_pb2, sampling_pb2, usage_pb2
from rest_shim.bodies import validate
from rest_shim.errors import Refusal
from rest_shim.openai import completions
from rest_shim.openai.completion_stream import PARALLEL_PROMPTS, CompletionEncoder, PlacedEvent
from rest_shim.openai.legacy_logprobs import LegacyLogprobs
from rest_shim.openai.prompts import MAX_TEXTS

from ..scripted_core import FINGERPRINT, MODEL, ScriptedCore, abort

PATH = "/v1/completions"
Event = completion_pb2.CompleteStreamResponse


def requests(**fields: object) -> list[completion_pb2.CompleteRequest]:
    body = validate(completions.CompletionBody, {"model": "m", "prompt": "Once", **fields})
    return list(completions.complete_requests(body))


def refused(**fields: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        requests(**fields)
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")
    return caught.value


def token(text: bytes, logprob: float) -> sampling_pb2.TokenLogprob:
    return sampling_pb2.TokenLogprob(token=text, token_id=1, logprob=logprob)


def chosen(text: bytes, *others: bytes) -> sampling_pb2.ChosenTokenLogprob:
    top = [token(other, -1.0 - place) for place, other in enumerate(others)]
    return sampling_pb2.ChosenTokenLogprob(chosen=token(text, -0.5), top=top)


def scored(*texts: bytes) -> list[sampling_pb2.PromptTokenLogprob]:
    """Tokens of a prompt."""
    rest = [
        sampling_pb2.PromptTokenLogprob(token=text, logprob=-0.5, top=[token(text, -0.5)]) for text in texts
    ]
    rest[0] = sampling_pb2.PromptTokenLogprob(token=texts[0])
    return rest


def test_a_plain_request_leaves_every_setting_but_the_length_to_the_core() -> None:
    assert requests() == [
        completion_pb2.CompleteRequest(
            model="m", text="Once", sampling=sampling_pb2.SamplingParams(max_tokens=16)
        )
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Once", ["Once"]),
        ("", [""]),
        (["Once"], ["Once"]),
        (["Once", "Twice"], ["Once", "Twice"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([1.0, 2], [[1, 2]]),
        ([0], [[0]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_forms_of_prompts(prompt: object, prompts: list[object]) -> None:
    made = requests(prompt=prompt)
    assert [
        list(one.tokens.token_ids) if one.WhichOneof("prompt") == "tokens" else one.text for one in made
    ] == prompts


def test_other_fields() -> None:
    (made,) = requests(
        max_tokens=7, n=3, best_of=3, echo=True, suffix=" end", stop=["a"], seed=5, temperature=0, top_k=4,
        response_format={"type": "json_object"}, user="u", logit_bias={"5": -100},
    )  # fmt: skip
    assert made == completion_pb2.CompleteRequest(
        model="m",
        text="Once",
        sampling=sampling_pb2.SamplingParams(
            max_tokens=7, stop=["a"], seed=5, temperature=0, top_k=4, logit_bias={5: -100}
        ),
        choice_count=3,
        echo=True,
        suffix=" end",
        response_format=chat_pb2.ResponseFormat(json_object=chat_pb2.JsonObjectFormat()),
    )
    assert requests(logprobs=0)[0].sampling.HasField("top_logprobs")
    assert requests(logprobs=5)[0].sampling.top_logprobs == 5
    assert not requests(logprobs=5)[0].HasField("prompt_logprobs")
    (echoed,) = requests(logprobs=2, echo=True, max_tokens=0)
    assert (echoed.prompt_logprobs, echoed.sampling.top_logprobs) == (2, 2)
    assert echoed.sampling.HasField("max_tokens")
    assert requests(suffix="", echo=None, n=None, best_of=None, max_tokens=None, stop=None) == requests()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": ["a", [1]]}, "prompt[1]"),
        ({"prompt": [[1], [2.5]]}, "prompt[1][0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2**31]}, "prompt[0]"),
        ({"prompt": [1e300]}, "prompt[0]"),
        ({"prompt": [[[1]]]}, "prompt[0][0]"),
        ({"prompt": ["a"] * (MAX_TEXTS + 1)}, "prompt"),
        ({"prompt": ["a"] * (completions.MAX_PROMPTS + 1)}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 21}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"foo": 1}}, "logit_bias"),
        ({"suffix": 1}, "suffix"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, object], param: str) -> None:
    assert refused(**fields).param == param


@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.integers() | st.text(), st.lists, max_leaves=6))  # fmt: skip
def test_any_prompt_gives_requests_or_a_refusal(prompt: object) -> None:
    # Any other exception is a server error.
    with contextlib.suppress(Refusal):
        assert all(one.WhichOneof("prompt") for one in requests(prompt=prompt))


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("text", "prompt"),
        ("tokens.token_ids[3]", "prompt"),
        ("messages", "prompt"),
        ("suffix", "suffix"),
        ("model", "model"),
        ("choice_count", "n"),
        ("completion.sampling.top_p", "top_p"),
        ("sampling.top_logprobs", "logprobs"),
    ],
)
def test_field_names_of_the_core(field: str, param: str) -> None:
    assert completions.json_path(field) == param


class TestLogprobs:
    def test_the_legacy_shape(self) -> None:
        shape = LegacyLogprobs()
        shape.take([chosen(b" a", b" b"), chosen(b"cd", b"cd", b"x")], " acd")
        assert shape.told() == {
            "tokens": [" a", "cd"],
            "token_logprobs": [-0.5, -0.5],
            "top_logprobs": [{" b": -1.0, " a": -0.5}, {"cd": -0.5, "x": -2.0}],
            "text_offset": [0, 2],
        }

    def test_offsets_go_on_and_count_whole_characters(self) -> None:
        shape = LegacyLogprobs()
        shape.take([chosen(b"\xe2\x82"), chosen(b"\xac!")], "\u20ac!")
        first = shape.told()
        assert (first["tokens"], first["text_offset"]) == (["bytes:\\xe2\\x82", "bytes:\\xac\\x21"], [0, 0])
        shape.take([chosen(b"z")], "z")
        assert shape.told()["text_offset"] == [2]

    @pytest.mark.parametrize(
        ("pieces", "offsets"),
        [
            # Names of control tokens are not in the text.
            ([([b"<|im_start|>", b"ass", b"istant", b"<|im_end|>", b"!"], "assistant!")], [0, 0, 3, 9, 9]),
            ([([b"a"], "a"), ([b"<s>", b"b"], "b"), ([b"<s>", b"<s>"], "")], [0, 1, 1, 2, 2]),
            # What may become a stop text is held back, also in the middle of a token.
            ([([b"ax"], "a"), ([b"yb", b"c"], "xybc")], [0, 2, 4]),
            ([([b"ax"], "a"), ([], "x"), ([b"b"], "b")], [0, 2]),
        ],
    )
    def test_offsets_are_places_in_the_text(
        self, pieces: list[tuple[list[bytes], str]], offsets: list[int]
    ) -> None:
        shape = LegacyLogprobs()
        for tokens, text in pieces:
            shape.take([chosen(token) for token in tokens], text)
        assert shape.told()["text_offset"] == offsets

    @pytest.mark.parametrize(
        ("tokens", "text", "offsets"),
        [
            ([b"Once", b" upon"], "Once upon", [0, 4, 9]),
            # A token for the beginning, and a space that the tokenizer puts there, are not in the text.
            ([b"<s>", b" Once", b" upon"], "Once upon", [0, 0, 4, 9]),
            ([b"<s>"], "", [0, 0]),
            ([b"\xe2\x82", b"\xac", b"!"], "\u20ac!", [0, 0, 1, 2]),
        ],
    )
    def test_a_prompt_that_is_echoed(self, tokens: list[bytes], text: str, offsets: list[int]) -> None:
        shape = LegacyLogprobs()
        assert shape.take_prompt(scored(*tokens), text + " a") == " a"
        shape.take([chosen(b" a")], " a")
        told = shape.told()
        assert told["text_offset"] == offsets
        # The first token has nothing before it.
        assert told["token_logprobs"] == [None, *[-0.5] * len(tokens)]
        tops = told["top_logprobs"]
        assert isinstance(tops, list)
        assert tops[0] is None
        assert all(tops[1:])


def answer(
    request: completion_pb2.CompleteRequest, texts: list[str] | None = None
) -> completion_pb2.CompleteResponse:
    count = request.choice_count or 1
    return completion_pb2.CompleteResponse(
        id=f"cmpl-{request.text}",
        model=MODEL,
        choices=[
            completion_pb2.CompletionChoice(
                index=index,
                text=f"{request.text}{index}",
                finish_reason=sampling_pb2.FINISH_REASON_LENGTH,
            )
            # Not in order: nothing says that they must be.
            for index in reversed(range(count))
        ],
        usage=usage_pb2.Usage(prompt_tokens=2, completion_tokens=3, cached_prompt_tokens=1),
        system_fingerprint=FINGERPRINT,
    )


async def complete(
    request: completion_pb2.CompleteRequest, _context: grpc.aio.ServicerContext
) -> completion_pb2.CompleteResponse:
    # The last prompt is the first to be answered.
    await asyncio.sleep(0.05 if request.text == "a" else 0)
    return answer(request)


async def complete_stream(
    request: completion_pb2.CompleteStreamRequest, context: grpc.aio.ServicerContext
) -> AsyncIterator[Event]:
    asked = request.completion
    yield Event(
        started=chat_pb2.ChatStarted(id=f"cmpl-{asked.text}", model=MODEL, system_fingerprint=FINGERPRINT)
    )
    if asked.text == "bad":
        await abort(context, grpc.StatusCode.INTERNAL, "ENGINE_FAILED", "The engine failed.")
    for choice in answer(asked).choices:
        for character in choice.text:
            yield Event(content=chat_pb2.ContentDelta(choice_index=choice.index, text=character))
        yield Event(
            choice_finished=chat_pb2.ChoiceFinished(
                choice_index=choice.index, finish_reason=sampling_pb2.FINISH_REASON_STOP
            )
        )
    if asked.text != "cut":
        yield Event(completed=chat_pb2.ChatCompleted(usage=answer(asked).usage))


async def test_each_prompt_has_n_choices_in_order(http: aiohttp.ClientSession, core: ScriptedCore) -> None:
    core.complete_script = complete
    async with http.post(PATH, json={"model": "m", "prompt": ["a", "b", "c"], "n": 2}) as response:
        body = await response.json()
    assert body.pop("created") > 0
    assert body == {
        "id": "cmpl-a",
        "object": "text_completion",
        "model": MODEL,
        "choices": [
            {"text": text, "index": index, "logprobs": None, "finish_reason": "length"}
            for index, text in enumerate(["a0", "a1", "b0", "b1", "c0", "c1"])
        ],
        "usage": {
            "prompt_tokens": 6,
            "completion_tokens": 9,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        "system_fingerprint": FINGERPRINT,
    }


async def test_only_so_many_prompts_run_at_a_time(http: aiohttp.ClientSession, core: ScriptedCore) -> None:
    running = most = 0

    async def count(
        request: completion_pb2.CompleteRequest, _context: grpc.aio.ServicerContext
    ) -> completion_pb2.CompleteResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return answer(request)

    core.complete_script = count
    async with http.post(PATH, json={"model": "m", "prompt": ["x"] * 20}) as response:
        assert len((await response.json())["choices"]) == 20
    assert most == PARALLEL_PROMPTS


async def test_a_prompt_that_fails_fails_all(http: aiohttp.ClientSession, core: ScriptedCore) -> None:
    async def fail(
        request: completion_pb2.CompleteRequest, context: grpc.aio.ServicerContext
    ) -> completion_pb2.CompleteResponse:
        if request.text == "bad":
            await abort(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                "CONTEXT_LENGTH_EXCEEDED",
                "The prompt is too long.",
            )
        await asyncio.Event().wait()
        raise AssertionError

    core.complete_script = fail
    async with http.post(PATH, json={"model": "m", "prompt": ["good", "bad"]}) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt[1]")


def events_of(data: bytes) -> list[dict[str, object]]:
    frames = data.decode("ascii").split("\n\n")
    assert frames.pop() == ""
    return [json.loads(frame.removeprefix("data: ")) for frame in frames if frame != "data: [DONE]"]


class TestStream:
    def test_the_bytes_of_a_whole_stream(self) -> None:
        encoder = CompletionEncoder(include_usage=False, with_logprobs=False, created=7)
        finish = chat_pb2.ChoiceFinished(finish_reason=sampling_pb2.FINISH_REASON_STOP)
        frames = [
            encoder.encode(PlacedEvent(0, event))
            for event in (
                Event(started=chat_pb2.ChatStarted(id="cmpl-1", model="m", system_fingerprint="fp")),
                Event(prompt_progress=chat_pb2.PromptProgress(processed_tokens=1, total_tokens=2)),
                Event(),
                Event(content=chat_pb2.ContentDelta(text="é")),
                Event(content=chat_pb2.ContentDelta()),
                Event(choice_finished=finish),
                Event(completed=chat_pb2.ChatCompleted()),
            )
        ]
        head = b'data: {"id":"cmpl-1","object":"text_completion","created":7,"model":"m","choices":['
        tail = b'],"system_fingerprint":"fp"}\n\n'
        assert frames == [
            b"", b"", b"",
            head + b'{"text":"\\u00e9","index":0,"logprobs":null,"finish_reason":null}' + tail,
            b"",
            head + b'{"text":"","index":0,"logprobs":null,"finish_reason":"stop"}' + tail,
            b"data: [DONE]\n\n",
        ]  # fmt: skip
        assert encoder.is_complete

    def test_logprobs_go_on_through_the_chunks_of_each_choice(self) -> None:
        encoder = CompletionEncoder(include_usage=False, with_logprobs=True, created=7, choice_count=2)
        deltas = [(0, "ab"), (1, "xyz"), (0, "c"), (1, "!")]
        parts = [
            chat_pb2.ContentDelta(choice_index=index, text=text, logprobs=[chosen(text.encode())])
            for index, text in deltas
        ]
        data = b"".join(encoder.encode(PlacedEvent(0, Event(content=part))) for part in parts)
        # Without a started event there is no head; the choices are whole all the same.
        offsets = [
            json.loads(part.partition(b"]")[0].decode() + "]") for part in data.split(b'"text_offset":')[1:]
        ]
        assert offsets == [[0], [0], [2], [3]]

    def test_a_prompts_logprobs_come_with_its_echo_for_each_choice(self) -> None:
        encoder = CompletionEncoder(include_usage=False, with_logprobs=True, created=7, choice_count=2)
        finish = chat_pb2.ChoiceFinished(
            finish_reason=sampling_pb2.FINISH_REASON_STOP, end_logprob=chosen(b"</s>")
        )
        events = [
            Event(started=chat_pb2.ChatStarted(id="cmpl-1", model="m")),
            Event(prompt_logprobs=completion_pb2.PromptLogprobs(tokens=scored(b"ab", b"c"))),
            *(Event(content=chat_pb2.ContentDelta(choice_index=index, text="abc")) for index in (0, 1)),
            Event(content=chat_pb2.ContentDelta(choice_index=1, text="d", logprobs=[chosen(b"d")])),
            Event(choice_finished=finish),
        ]
        data = b"".join(encoder.encode(PlacedEvent(3, event)) for event in events)
        choices = [chunk["choices"][0] for chunk in events_of(data)]  # type: ignore[index]  # JSON
        assert [(choice["index"], choice["logprobs"]["text_offset"]) for choice in choices] == [
            (6, [0, 2]),
            (7, [0, 2]),
            (7, [3]),
            (6, [3]),
        ]
        assert choices[-1]["logprobs"]["tokens"] == ["</s>"]

    @pytest.mark.parametrize("prompts", [["a"], ["a", "b", "c", "d", "e", "f"]])
    async def test_prompts_are_streamed_side_by_side(
        self, http: aiohttp.ClientSession, core: ScriptedCore, prompts: list[str]
    ) -> None:
        core.complete_stream_script = complete_stream
        asked = {"model": "m", "prompt": prompts, "n": 2, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        async with http.post(PATH, json=asked) as response:
            data = await response.read()
        assert data.endswith(b"data: [DONE]\n\n")
        chunks = events_of(data)
        assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 3 * len(prompts)  # type: ignore[index]  # JSON
        texts: dict[int, str] = {}
        ended: list[int] = []
        for chunk in chunks:
            assert chunk["usage"] is None
            (choice,) = chunk["choices"]  # type: ignore[misc]  # JSON
            assert choice["index"] not in ended
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            if choice["finish_reason"]:
                ended.append(choice["index"])
        assert texts == {
            place * 2 + index: f"{prompt}{index}" for place, prompt in enumerate(prompts) for index in (0, 1)
        }
        assert sorted(ended) == sorted(texts)

    @pytest.mark.parametrize("prompts", [["bad"], ["a", "bad", "c"], ["a", "cut"]])
    async def test_a_failure_ends_the_stream(
        self, http: aiohttp.ClientSession, core: ScriptedCore, prompts: list[str]
    ) -> None:
        core.complete_stream_script = complete_stream
        async with http.post(PATH, json={"model": "m", "prompt": prompts, "stream": True}) as response:
            data = await response.read()
            if response.status == 200:
                assert b"[DONE]" not in data
                body = events_of(data)[-1]
            else:
                body = json.loads(data)
        assert body["error"]["type"] == "server_error"  # type: ignore[index]  # JSON

    async def test_a_client_that_leaves_ends_every_prompt(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        running = 0
        all_gone = asyncio.Event()

        async def script(
            request: completion_pb2.CompleteStreamRequest, _context: grpc.aio.ServicerContext
        ) -> AsyncIterator[Event]:
            nonlocal running
            running += 1
            try:
                yield Event(started=chat_pb2.ChatStarted(id="cmpl-1", model=MODEL))
                yield Event(content=chat_pb2.ContentDelta(text="x"))
                await asyncio.Event().wait()
            finally:
                running -= 1
                if not running:
                    all_gone.set()

        core.complete_stream_script = script
        async with http.post(PATH, json={"model": "m", "prompt": ["a", "b"], "stream": True}) as response:
            await response.content.readuntil(b"\n\n")
            await response.content.readuntil(b"\n\n")
            response.close()
        async with asyncio.timeout(20):
            await all_gone.wait()
