"""Anthropic's routes through Anthropic's own SDK, before a core that does what the test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import anthropic
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from osaurus_grpc.v1 import chat_pb2, inference_service_pb2, sampling_pb2
from rest_shim.settings import Settings

from ..scripted_core import MODEL, ScriptedCore, abort, completed, content, finished, model, started

HI: list[anthropic.types.MessageParam] = [{"role": "user", "content": "Hi"}]
WEATHER: anthropic.types.ToolParam = {
    "name": "get_weather", "description": "w", "input_schema": {"type": "object"},
}  # fmt: skip
PATHS = ("/v1/messages", "/messages", "/api/messages", "/v1/api/messages", "/anthropic/v1/messages")


@pytest.fixture
async def client(shim: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=shim, api_key="k", max_retries=0) as made:
        yield made


def refuses(core: ScriptedCore, code: grpc.StatusCode, reason: str, *details: Duration) -> None:
    async def chat(
        _request: chat_pb2.ChatRequest, context: grpc.aio.ServicerContext
    ) -> chat_pb2.ChatResponse:
        await abort(context, code, reason, "no", *details)
        raise AssertionError

    core.chat_script = chat


class TestMessages:
    async def test_an_answer(self, client: anthropic.AsyncAnthropic, core: ScriptedCore) -> None:
        message = await client.messages.create(model=MODEL, max_tokens=5, messages=HI, system="Be nice.")
        block = message.content[0]
        assert block.type == "text"
        assert block.text.startswith("I'm doing well")
        assert (message.stop_reason, message.usage.input_tokens) == ("end_turn", 25)
        assert message._request_id == core.metadata["x-request-id"]
        assert core.metadata["authorization"] == "Bearer k"
        asked = core.requests[-1]
        assert isinstance(asked, chat_pb2.ChatRequest)
        assert [turn.role for turn in asked.messages] == [chat_pb2.ROLE_SYSTEM, chat_pb2.ROLE_USER]

    async def test_a_bearer_token(self, shim: str, core: ScriptedCore) -> None:
        async with anthropic.AsyncAnthropic(base_url=f"{shim}/anthropic", auth_token="t") as client:
            await client.messages.create(model=MODEL, max_tokens=5, messages=HI)
        assert core.metadata["authorization"] == "Bearer t"

    @pytest.mark.parametrize("path", PATHS)
    async def test_every_prefix_without_the_version_header(
        self, http: aiohttp.ClientSession, path: str
    ) -> None:
        body = {"model": MODEL, "max_tokens": 5, "messages": HI}
        async with http.post(path, json=body, headers={"anthropic-beta": "new-2027-01-01"}) as response:
            assert (await response.json())["type"] == "message"
            assert response.headers["request-id"] == response.headers["x-request-id"]
        async with http.post(path, json={}) as response:
            assert response.status == 400
            body = await response.json()
        assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
        assert body["request_id"] == response.headers["request-id"]

    async def test_threads_are_refused_in_the_way_that_lets_the_sdk_go_on(
        self, client: anthropic.AsyncAnthropic, core: ScriptedCore
    ) -> None:
        thread = client.beta.messages.thread(model=MODEL, max_tokens=5)
        with pytest.raises(anthropic.BadRequestError, match="Threads are not kept") as caught:
            await thread.send({"role": "user", "content": "Hi"})
        assert caught.value.body["error"]["details"]["error_code"] == "thread_unsupported_request"
        assert not core.requests
        thread = client.beta.messages.thread(
            model=MODEL, max_tokens=5, unsupported_request_behavior="continue_unthreaded"
        )
        for text in ("Hi", "And you?"):
            assert (await thread.send({"role": "user", "content": text})).role == "assistant"
        assert [turn.content[0].text for turn in core.requests[-1].messages][::2] == ["Hi", "And you?"]

    async def test_the_betas_of_the_sdk(self, client: anthropic.AsyncAnthropic) -> None:
        message = await client.beta.messages.create(
            model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "Hi"}], betas=["x-2027-01-01"]
        )
        assert message.role == "assistant"

    async def test_a_tool_call(self, client: anthropic.AsyncAnthropic, core: ScriptedCore) -> None:
        core.events = (
            started(),
            content("Let me see."),
            chat_pb2.ChatStreamResponse(
                tool_call=chat_pb2.ToolCallDelta(call_index=0, id="call_1", name="get_weather")
            ),
            *(
                chat_pb2.ChatStreamResponse(
                    tool_call=chat_pb2.ToolCallDelta(call_index=0, arguments_json=part)
                )
                for part in ('{"city":', '"Paris"}')
            ),
            finished(sampling_pb2.FINISH_REASON_TOOL_CALLS),
            completed(),
        )
        async with client.messages.stream(
            model=MODEL, max_tokens=5, messages=HI, tools=[WEATHER], tool_choice={"type": "any"}
        ) as stream:
            kinds = [event.type async for event in stream]
            message = await stream.get_final_message()
        assert "input_json" in kinds
        assert message.stop_reason == "tool_use"
        call = message.content[1]
        assert call.type == "tool_use"
        assert (call.id, call.name, call.input) == ("toolu_1", "get_weather", {"city": "Paris"})


class TestStreams:
    async def test_texts(self, client: anthropic.AsyncAnthropic) -> None:
        async with client.messages.stream(model=MODEL, max_tokens=5, messages=HI) as stream:
            texts = [text async for text in stream.text_stream]
            message = await stream.get_final_message()
            assert stream.response.headers["content-type"] == "text/event-stream"
        assert texts == ["I'm", " doing"]
        assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 15)

    async def test_a_failure_in_mid_stream_is_raised(
        self, client: anthropic.AsyncAnthropic, core: ScriptedCore
    ) -> None:
        async def dies(
            _request: chat_pb2.ChatStreamRequest, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            yield started()
            yield content("I'm")
            await abort(context, grpc.StatusCode.INTERNAL, "ENGINE_FAILED", "It failed.")

        core.stream_script = dies
        seen: list[str] = []

        async def read() -> None:
            async with client.messages.stream(model=MODEL, max_tokens=5, messages=HI) as stream:
                async for text in stream.text_stream:
                    seen.append(text)

        with pytest.raises(anthropic.APIStatusError) as caught:
            await read()
        assert seen == ["I'm"]
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"] == {"type": "api_error", "message": "It failed."}

    async def test_a_failure_before_the_first_event_has_its_status(
        self, client: anthropic.AsyncAnthropic, core: ScriptedCore
    ) -> None:
        async def refuse(
            request: chat_pb2.ChatStreamRequest, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            await core.refuse_model(request.chat.model, context)
            yield started()

        core.stream_script = refuse
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(model="claude", max_tokens=5, messages=HI, stream=True)


class TestSilence:
    @pytest.fixture
    def settings(self, core: ScriptedCore) -> Settings:
        return Settings(core=core.address, port=0, keep_alive_interval_seconds=0.05, drain_seconds=5.0)

    async def test_pings_while_nothing_else_is_sent(
        self, client: anthropic.AsyncAnthropic, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        pinged = asyncio.Event()

        async def waits(
            _request: chat_pb2.ChatStreamRequest, _context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            await pinged.wait()
            for event in core.events:
                yield event

        core.stream_script = waits
        body = {"model": MODEL, "max_tokens": 5, "messages": HI, "stream": True}
        async with http.post("/v1/messages", json=body) as response:
            lines = [await response.content.readline() for _ in range(6)]
            assert lines == [b"event: ping\n", b'data: {"type":"ping"}\n', b"\n"] * 2
            pinged.set()
            assert b"message_stop" in await response.read()
        # The SDK skips them.
        async with client.messages.stream(model=MODEL, max_tokens=5, messages=HI) as stream:
            assert (await stream.get_final_message()).stop_reason == "end_turn"


class TestErrors:
    @pytest.mark.parametrize(
        ("code", "reason", "raised", "kind"),
        [
            (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", anthropic.BadRequestError,
             "invalid_request_error"),
            (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", anthropic.BadRequestError,
             "invalid_request_error"),
            (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", anthropic.AuthenticationError,
             "authentication_error"),
            (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", anthropic.NotFoundError, "not_found_error"),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", anthropic.RateLimitError, "rate_limit_error"),
            (grpc.StatusCode.INTERNAL, "ENGINE_FAILED", anthropic.InternalServerError, "api_error"),
            (grpc.StatusCode.UNAVAILABLE, "DRAINING", anthropic.InternalServerError, "overloaded_error"),
            (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", anthropic.InternalServerError,
             "timeout_error"),
        ],
    )  # fmt: skip
    async def test_statuses_become_the_sdks_exceptions(
        self,
        client: anthropic.AsyncAnthropic,
        core: ScriptedCore,
        code: grpc.StatusCode,
        reason: str,
        raised: type[anthropic.APIStatusError],
        kind: str,
    ) -> None:
        refuses(core, code, reason)
        with pytest.raises(raised) as caught:
            await client.messages.create(model=MODEL, max_tokens=5, messages=HI)
        assert isinstance(caught.value.body, dict)
        # By these words, coding agents know that they have to shorten the conversation.
        is_long = reason == "CONTEXT_LENGTH_EXCEEDED"
        text = "prompt is too long: ? tokens > ? maximum" if is_long else "no"
        assert caught.value.body["error"] == {"type": kind, "message": text}
        assert caught.value.request_id == caught.value.body["request_id"]

    async def test_the_sdk_tries_again_after_the_time_it_is_told(self, shim: str, core: ScriptedCore) -> None:
        wait = Duration()
        wait.FromNanoseconds(1)
        refuses(
            core,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "RATE_LIMITED",
            error_details_pb2.RetryInfo(retry_delay=wait),
        )
        async with anthropic.AsyncAnthropic(base_url=shim, api_key="k", max_retries=1) as client:
            with pytest.raises(anthropic.RateLimitError) as caught:
                await client.messages.create(model=MODEL, max_tokens=5, messages=HI)
        assert caught.value.response.headers["retry-after"] == "1"
        assert len(core.requests) == 2

    async def test_unknown_paths_of_anthropics_clients(self, client: anthropic.AsyncAnthropic) -> None:
        with pytest.raises(anthropic.NotFoundError) as caught:
            await client.messages.batches.list()
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["type"] == "not_found_error"

    async def test_wrong_methods(self, http: aiohttp.ClientSession) -> None:
        async with http.get("/v1/messages") as response:
            assert (response.status, response.headers["Allow"]) == (405, "OPTIONS, POST")
            assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_counting_tokens(client: anthropic.AsyncAnthropic, core: ScriptedCore) -> None:
    counted = await client.messages.count_tokens(model=MODEL, messages=HI, tools=[WEATHER], system="x")
    assert counted.input_tokens == 42
    asked = core.requests[-1]
    assert isinstance(asked, inference_service_pb2.CountTokensRequest)
    assert asked.chat.model == MODEL
    assert len(asked.chat.messages) == 2
    assert len(asked.chat.tools) == 1


class TestModels:
    async def test_the_sdk_pages_through_all(
        self, client: anthropic.AsyncAnthropic, core: ScriptedCore
    ) -> None:
        core.models = [model(f"m{index}") for index in range(5)]
        ids = [entry.id async for entry in client.models.list(limit=2)]
        assert ids == ["m0", "m1", "m2", "m3", "m4"]

    async def test_one_model(self, client: anthropic.AsyncAnthropic) -> None:
        found = await client.models.retrieve(MODEL)
        assert (found.id, found.type, found.lifecycle) == (MODEL, "model", "active")
        assert found.created_at.year == 2024
        with pytest.raises(anthropic.NotFoundError) as caught:
            await client.models.retrieve("claude")
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"] == {
            "type": "not_found_error", "message": "Model not found: claude",
        }  # fmt: skip

    @pytest.mark.parametrize("path", ["/v1/models//", "/v1/models/%20", "/anthropic/v1/models//"])
    async def test_a_path_without_a_models_name(
        self, http: aiohttp.ClientSession, core: ScriptedCore, path: str
    ) -> None:
        async with http.get(path, headers={"anthropic-version": "2023-06-01"}) as response:
            assert response.status == 404
            assert (await response.json())["error"] == {
                "type": "not_found_error", "message": "The path names no model.",
            }  # fmt: skip
        assert not core.requests

    async def test_openais_clients_see_their_own(self, http: aiohttp.ClientSession) -> None:
        async with http.get("/v1/models") as response:
            assert (await response.json())["object"] == "list"
        async with http.get("/v1/models/nope") as response:
            assert (await response.json())["error"]["code"] == "model_not_found"
        async with http.get("/anthropic/v1/models") as response:
            assert (await response.json())["has_more"] is False
        async with http.head("/v1/models", headers={"anthropic-version": "2023-06-01"}) as response:
            assert response.status == 200
