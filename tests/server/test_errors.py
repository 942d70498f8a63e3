"""Every error row: the code, the reason and the details that a client gets."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from osaurus_grpc.chat.control_tokens import Shield
from osaurus_grpc.engine.arrivals import Arrival
from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.types import EngineEvent, GenerationRequest, TokensGenerated
from osaurus_grpc.errors import EngineError
from osaurus_grpc.models import residency
from osaurus_grpc.server.app import Core
from osaurus_grpc.v1 import (
    chat_pb2,
    completion_pb2,
    error_reason_pb2,
    inference_service_pb2,
    model_service_pb2,
)
from osaurus_grpc.v1.model_service_pb2_grpc import ModelServiceStub
from tests.conftest import ENDLESS_TOKENS
from tests.server.cores import (
    TINY,
    RichError,
    chat_request,
    eventually,
    failure,
    inference_stub,
    running_core,
    stream_request,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

Change = Callable[[chat_pb2.ChatRequest], object]
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def require_reason(error: RichError, code: grpc.StatusCode, reason: str) -> None:
    """Each status carries an ErrorInfo of ours with a reason of the contract."""
    assert error.code == code
    assert error.info.domain == "osaurus.ai"
    assert error.info.reason == reason
    assert f"ERROR_REASON_{reason}" in error_reason_pb2.ErrorReason.keys()  # noqa: SIM118 - not a dict


def _answered_call(request: chat_pb2.ChatRequest, call_id: str) -> None:
    call = chat_pb2.ToolCall(id="call_1", function=chat_pb2.FunctionCall(name="clock"))
    request.messages.add(role=chat_pb2.ROLE_ASSISTANT, tool_calls=[call])
    request.messages.add(
        role=chat_pb2.ROLE_TOOL, tool_call_id=call_id, content=[chat_pb2.ContentPart(text="noon")]
    )


def _tool(request: chat_pb2.ChatRequest, name: str = "clock", parameters: str = "") -> None:
    request.tools.add(function=chat_pb2.FunctionTool(name=name, parameters_json=parameters))


BAD_FIELDS: list[tuple[str, Change]] = [
    ("messages", lambda r: r.ClearField("messages")),
    ("messages[0].content", lambda r: r.messages[0].ClearField("content")),
    ("messages[0].content[0]", lambda r: r.messages[0].content[0].ClearField("text")),
    ("messages[0].role", lambda r: r.messages[0].ClearField("role")),
    ("messages[0].role", lambda r: setattr(r.messages[0], "role", 99)),
    ("messages[0].name", lambda r: setattr(r.messages[0], "name", "x" * 257)),
    ("messages[0].tool_calls", lambda r: r.messages[0].tool_calls.add(
        id="1", function=chat_pb2.FunctionCall(name="clock"))),
    ("messages[1].tool_calls[0].function.name", lambda r: r.messages.add(
        role=chat_pb2.ROLE_ASSISTANT, tool_calls=[chat_pb2.ToolCall(id="1")])),
    ("messages[1].content", lambda r: r.messages.add(role=chat_pb2.ROLE_ASSISTANT)),
    ("model", lambda r: setattr(r, "model", "x" * 513)),
    ("sampling.temperature", lambda r: setattr(r.sampling, "temperature", 2.5)),
    ("sampling.temperature", lambda r: setattr(r.sampling, "temperature", float("nan"))),
    ("sampling.temperature", lambda r: setattr(r.sampling, "temperature", float("inf"))),
    ("sampling.top_p", lambda r: setattr(r.sampling, "top_p", 0)),
    ("sampling.top_p", lambda r: setattr(r.sampling, "top_p", 1.5)),
    ("sampling.top_k", lambda r: setattr(r.sampling, "top_k", -1)),
    ("sampling.min_p", lambda r: setattr(r.sampling, "min_p", -0.1)),
    ("sampling.repetition_penalty", lambda r: setattr(r.sampling, "repetition_penalty", 0)),
    ("sampling.repetition_context", lambda r: setattr(r.sampling, "repetition_context", -2)),
    ("sampling.presence_penalty", lambda r: setattr(r.sampling, "presence_penalty", 2.1)),
    ("sampling.frequency_penalty", lambda r: setattr(r.sampling, "frequency_penalty", -2.1)),
    ("sampling.logit_bias", lambda r: r.sampling.logit_bias.update({-1: 0.0})),
    ("sampling.logit_bias", lambda r: r.sampling.logit_bias.update({2**31 - 1: 1.0})),
    ("sampling.logit_bias", lambda r: r.sampling.logit_bias.update({1: 101.0})),
    ("sampling.logit_bias", lambda r: r.sampling.logit_bias.update({1: float("nan")})),
    ("sampling.max_tokens", lambda r: setattr(r.sampling, "max_tokens", 0)),
    ("sampling.top_logprobs", lambda r: setattr(r.sampling, "top_logprobs", 21)),
    ("sampling.stop", lambda r: r.sampling.stop.extend(str(i) for i in range(65))),
    ("sampling.stop[0]", lambda r: r.sampling.stop.append("")),
    ("sampling.stop[0]", lambda r: r.sampling.stop.append("x" * 1025)),
    ("choice_count", lambda r: setattr(r, "choice_count", 0)),
    ("choice_count", lambda r: setattr(r, "choice_count", 17)),
    ("max_context_tokens", lambda r: setattr(r, "max_context_tokens", 0)),
    ("keep_alive", lambda r: r.keep_alive.CopyFrom(Duration(seconds=1, nanos=-1))),
    ("keep_alive", lambda r: r.keep_alive.CopyFrom(Duration(seconds=2**62))),
    ("context_token_ids[1]", lambda r: r.context_token_ids.extend([0, 2**31 - 1])),
    ("context_token_ids[0]", lambda r: r.context_token_ids.append(-1)),
    ("context_token_ids", lambda r: (
        r.context_token_ids.append(1), setattr(r, "session_id", "x"))),
    ("max_reasoning_tokens", lambda r: setattr(r, "max_reasoning_tokens", 0)),
    ("session_id", lambda r: setattr(r, "session_id", "x" * 257)),
    ("chat_template_kwargs_json", lambda r: setattr(r, "chat_template_kwargs_json", "[1]")),
    ("chat_template_kwargs_json", lambda r: setattr(r, "chat_template_kwargs_json", '{"a": "\\ud83d"}')),
    ("chat_template_kwargs_json", lambda r: setattr(r, "chat_template_kwargs_json", "[" * 60_000)),
    ("reasoning_effort", lambda r: setattr(r, "reasoning_effort", "x" * 257)),
    ("tools[0].function.name", lambda r: _tool(r, name="no spaces")),
    ("tools[0].function.parameters_json", lambda r: _tool(r, parameters="{")),
    ("tools[0].function.parameters_json", lambda r: _tool(r, parameters='{"type": "array"}')),
    ("tools[0].function.parameters_json", lambda r: _tool(r, parameters='{"type": ["string", "null"]}')),
    ("tools[0].function.parameters_json", lambda r: _tool(r, parameters='{"title": "\\ud83d"}')),
    ("tools[1].function.name", lambda r: (_tool(r), _tool(r))),
    ("messages[2].tool_call_id", lambda r: _answered_call(r, "call_2")),
    ("tool_choice", lambda r: setattr(r.tool_choice, "mode", chat_pb2.TOOL_CHOICE_MODE_REQUIRED)),
    ("tool_choice.mode", lambda r: setattr(r.tool_choice, "mode", 77)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "change"), BAD_FIELDS, ids=lambda value: value if isinstance(value, str) else ""
)
async def test_a_bad_field_is_named(inference: Any, field: str, change: Change) -> None:
    request = chat_request()
    change(request)

    for call in (inference.Chat(request), inference.ChatStream(stream_request(request))):
        error = await failure(call)
        require_reason(error, INVALID, "INVALID_FIELD")
        assert error.fields == [field]
        assert field.removeprefix("sampling.") in error.message


async def test_all_bad_fields_are_named_together(inference: Any) -> None:
    error = await failure(inference.Chat(chat_request(temperature=-1, top_p=2, max_tokens=0)))

    assert error.fields == ["sampling.temperature", "sampling.top_p", "sampling.max_tokens"]


UNSUPPORTED: list[tuple[str, str, Change]] = [
    ("vision", "messages[0].content[1].image", lambda r: r.messages[0].content.add(
        image=chat_pb2.ImageContent(data=b"x", mime_type="image/png"))),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "field", "change"), UNSUPPORTED)
async def test_what_cannot_be_honoured_is_refused(
    inference: Any, capability: str, field: str, change: Change
) -> None:
    request = chat_request()
    change(request)

    error = await failure(inference.Chat(request))

    require_reason(error, grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED_CAPABILITY")
    assert error.info.metadata["capability"] == capability
    assert error.fields == [field]


async def test_an_unknown_model(inference: Any, core: Core) -> None:
    asked = "no-such-model"
    models = ModelServiceStub(grpc.aio.insecure_channel(core.address))
    calls = [
        inference.Chat(chat_request(model=asked)),
        inference.ChatStream(stream_request(chat_request(model=asked))),
        inference.GetModel(inference_service_pb2.GetModelRequest(model=asked)),
        inference.CountTokens(inference_service_pb2.CountTokensRequest(model=asked, text="x")),
        models.LoadModel(model_service_pb2.LoadModelRequest(model=asked)),
        models.UnloadModel(model_service_pb2.UnloadModelRequest(model=asked)),
    ]
    for call in calls:
        error = await failure(call)
        require_reason(error, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert error.message == f"Model not found: {asked}"
        assert error.resource is not None
        assert error.resource.resource_name == asked
        assert error.info.metadata["model"] == asked


async def test_a_long_name_comes_back_cut_and_breaks_no_trailer_limit(inference: Any) -> None:
    error = await failure(inference.Chat(chat_request(model="模" * 512)))

    require_reason(error, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_many_violations_break_no_trailer_limit(inference: Any) -> None:
    request = chat_request()
    for _ in range(1000):
        request.messages.add()

    error = await failure(inference.Chat(request))

    require_reason(error, INVALID, "INVALID_FIELD")
    assert error.fields[0] == "messages[1].role"


async def test_a_prompt_over_the_context(inference: Any) -> None:
    error = await failure(inference.ChatStream(stream_request(chat_request("word " * 20_000))))

    require_reason(error, INVALID, "CONTEXT_LENGTH_EXCEEDED")
    assert int(error.info.metadata["prompt_tokens"]) > int(error.info.metadata["limit"]) > 0
    assert error.fields == ["messages"]


async def test_a_prompt_longer_than_any_that_fits_is_not_tokenized(
    inference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenize(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Shield, "encode", tokenize)
    monkeypatch.setattr("osaurus_grpc.chat.raw.encode", tokenize)
    text = "word " * 2_000_000
    complete = completion_pb2.CompleteRequest(model=TINY, text=text)
    for call, field in (
        (inference.Chat(chat_request(text)), "messages"),
        (inference.Complete(complete), "prompt"),
    ):
        error = await failure(call)

        require_reason(error, INVALID, "CONTEXT_LENGTH_EXCEEDED")
        assert error.fields == [field]
        assert "at least" in error.message
        assert int(error.info.metadata["prompt_tokens"]) > int(error.info.metadata["limit"]) > 0


async def test_a_prompt_that_leaves_no_room(inference: Any) -> None:
    request = chat_request()
    counted = await inference.CountTokens(inference_service_pb2.CountTokensRequest(chat=request))
    request.max_context_tokens = counted.token_count

    error = await failure(inference.Chat(request))

    require_reason(error, INVALID, "CONTEXT_LENGTH_EXCEEDED")
    assert error.info.metadata["limit"] == error.info.metadata["prompt_tokens"] == str(counted.token_count)


@pytest.mark.parametrize("token", ["nonsense", "AA==", "Ag==", "€", "AeKC"])
async def test_a_page_token_that_is_none(inference: Any, token: str) -> None:
    error = await failure(inference.ListModels(inference_service_pb2.ListModelsRequest(page_token=token)))

    require_reason(error, INVALID, "INVALID_FIELD")
    assert error.fields == ["page_token"]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x0a\x02\xff\xfe", id="not UTF-8"),
        pytest.param(chat_request().SerializeToString()[:-1], id="cut off"),
        pytest.param(b"\x0b" * 1_000, id="nested groups"),
        pytest.param(bytes(100), id="zeros"),
    ],
)
@pytest.mark.parametrize("method", ["Chat", "ChatStream", "GetModel"])
async def test_bytes_that_are_no_message(
    core: Core, caplog: pytest.LogCaptureFixture, method: str, data: bytes
) -> None:
    path = f"/osaurus.v1.InferenceService/{method}"
    async with grpc.aio.insecure_channel(core.address) as channel:
        kind = channel.unary_stream if method == "ChatStream" else channel.unary_unary
        error = await failure(kind(path)(data))

    require_reason(error, INVALID, "INVALID_FIELD")
    assert "Traceback" not in caplog.text


async def test_a_negative_page_size(inference: Any) -> None:
    error = await failure(inference.ListModels(inference_service_pb2.ListModelsRequest(page_size=-1)))

    require_reason(error, INVALID, "INVALID_FIELD")
    assert error.fields == ["page_size"]


async def test_count_tokens_without_input(inference: Any) -> None:
    error = await failure(inference.CountTokens(inference_service_pb2.CountTokensRequest(model=TINY)))

    require_reason(error, INVALID, "INVALID_FIELD")
    assert error.fields == ["input"]


async def test_later_calls_are_not_implemented(core: Core) -> None:
    async with grpc.aio.insecure_channel(core.address) as channel:
        models = ModelServiceStub(channel)
        calls = [
            models.PullModel(model_service_pb2.PullModelRequest()),
            models.CreateModel(model_service_pb2.CreateModelRequest()),
            models.DeleteModel(model_service_pb2.DeleteModelRequest(model=TINY)),
        ]
        for call in calls:
            error = await failure(call)
            require_reason(error, grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")
            assert "not implemented" in error.message


@pytest.mark.parametrize(
    "path",
    [
        "/osaurus.v1.InferenceService/Dream",
        "/osaurus.v2.InferenceService/Chat",
        "/grpc.health.v1.Health/Dream",
        "/x",
    ],
)
@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_an_unknown_method_has_a_rich_error_too(core: Core, path: str, kind: str) -> None:
    async with grpc.aio.insecure_channel(core.address) as channel:
        argument = b"" if kind.startswith("unary") else iter([b""])
        error = await failure(getattr(channel, kind)(path)(argument))

    require_reason(error, grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")


async def test_an_unknown_method_tells_strangers_nothing(tiny_dir: Path) -> None:
    async with (
        running_core(tiny_dir, api_keys=("key",)) as core,
        grpc.aio.insecure_channel(core.address) as channel,
    ):
        error = await failure(channel.unary_unary("/osaurus.v1.InferenceService/Dream")(b""))

    require_reason(error, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")


async def test_a_corrupt_model_is_unusable_and_the_server_goes_on(tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dir / TINY, tmp_path / TINY)
    shutil.copytree(tiny_dir / TINY, tmp_path / "damaged")
    for weights in (tmp_path / "damaged").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    async with running_core(tmp_path) as core, inference_stub(core.address) as inference:
        for _ in range(2):
            error = await failure(inference.Chat(chat_request(model="damaged")))
            # A folder that is visibly cut off may as well not be listed.
            assert error.code in {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND}
            assert error.info.reason in {"MODEL_UNUSABLE", "MODEL_NOT_FOUND"}
            assert str(tmp_path) not in error.message
        response = await inference.Chat(chat_request(model=TINY))
        assert response.usage.completion_tokens == 8


async def test_a_model_without_a_template_cannot_chat(tiny_dir: Path, tmp_path: Path) -> None:
    import json

    shutil.copytree(tiny_dir / TINY, tmp_path / "plain")
    for template in (tmp_path / "plain").glob("*.jinja"):
        template.unlink()
    configuration = tmp_path / "plain" / "tokenizer_config.json"
    values = json.loads(configuration.read_text())
    values.pop("chat_template", None)
    configuration.write_text(json.dumps(values))
    async with running_core(tmp_path) as core, inference_stub(core.address) as inference:
        error = await failure(inference.Chat(chat_request(model="plain")))

    require_reason(error, grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED_CAPABILITY")
    assert error.info.metadata["capability"] == "chat"


async def test_the_engines_queue_is_bounded(endless_dir: Path) -> None:
    async with (
        running_core(endless_dir, max_batch_size=1, max_waiting_requests=0) as core,
        inference_stub(core.address) as inference,
    ):
        running = inference.ChatStream(
            stream_request(chat_request(max_tokens=ENDLESS_TOKENS, ignore_eos=True))
        )
        await running.read()

        error = await failure(inference.Chat(chat_request()))

        require_reason(error, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert error.retry_seconds is not None
        assert error.retry_seconds > 0
        running.cancel()


async def test_no_room_for_another_model(endless_dir: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(endless_dir / TINY)
    async with running_core(tmp_path, max_loaded_models=1) as core, inference_stub(core.address) as inference:
        running = inference.ChatStream(
            stream_request(chat_request(model="a", max_tokens=ENDLESS_TOKENS, ignore_eos=True))
        )
        await running.read()

        error = await failure(inference.Chat(chat_request(model="b")))

        require_reason(error, grpc.StatusCode.RESOURCE_EXHAUSTED, "INSUFFICIENT_MEMORY")
        running.cancel()
        await eventually(lambda: len(core.calls) == 0)
        assert (await inference.Chat(chat_request(model="b"))).model == "b"


async def test_a_model_in_use_is_not_unloaded(endless_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_UNLOAD_WAIT_SECONDS", 0.05)
    async with (
        running_core(endless_dir) as core,
        inference_stub(core.address) as inference,
        grpc.aio.insecure_channel(core.address) as channel,
    ):
        running = inference.ChatStream(
            stream_request(chat_request(max_tokens=ENDLESS_TOKENS, ignore_eos=True))
        )
        await running.read()

        error = await failure(
            ModelServiceStub(channel).UnloadModel(model_service_pb2.UnloadModelRequest(model=TINY))
        )

        require_reason(error, grpc.StatusCode.ABORTED, "MODEL_BUSY")
        assert error.resource is not None
        assert error.resource.resource_name == TINY
        running.cancel()


async def test_an_engine_that_fails_in_mid_stream(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No request can make the device fail; everything before and after the failure is real.
    generate = Engine.generate

    async def break_off(
        self: Engine, request: GenerationRequest, arrival: Arrival | None = None
    ) -> AsyncIterator[EngineEvent]:
        async with aclosing(generate(self, request, arrival)) as events:
            async for event in events:
                yield event
                if isinstance(event, TokensGenerated):
                    raise EngineError

    monkeypatch.setattr(Engine, "generate", break_off)
    async with running_core(tiny_dir) as core, inference_stub(core.address) as inference:
        stream = inference.ChatStream(stream_request(chat_request()))
        assert (await stream.read()).WhichOneof("event") == "started"
        assert (await stream.read()).WhichOneof("event") == "content"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stream.read()
        require_reason(RichError(raised.value), grpc.StatusCode.INTERNAL, "ENGINE_FAILED")

        monkeypatch.undo()
        assert (await inference.Chat(chat_request())).usage.completion_tokens == 8
        assert core.engine.stats().running == 0


async def test_what_is_unexpected_does_not_leak(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The one thing here that no real input brings about: a defect of our own.
    secret = "what the person wrote"

    def explode(*_: object, **__: object) -> None:
        raise ValueError(secret)

    monkeypatch.setattr(Engine, "generate", explode)
    async with running_core(tiny_dir) as core, inference_stub(core.address) as inference:
        call = inference.Chat(chat_request(), metadata=(("x-request-id", "defect-1"),))
        error = await failure(call)

    require_reason(error, grpc.StatusCode.INTERNAL, "ENGINE_FAILED")
    assert secret not in error.message
    assert "request_id=defect-1" in caplog.text
    assert "ValueError" in caplog.text
    assert secret not in caplog.text


async def test_a_message_without_a_part_among_others(inference: Any) -> None:
    request = chat_request()
    request.messages.add(role=chat_pb2.ROLE_ASSISTANT).content.add(text="")
    request.messages.add(role=chat_pb2.ROLE_USER)

    error = await failure(inference.Chat(request))

    assert error.fields == ["messages[2].content"]


async def test_a_message_may_be_empty_text(inference: Any) -> None:
    request = chat_request()
    for role in (chat_pb2.ROLE_SYSTEM, chat_pb2.ROLE_USER, chat_pb2.ROLE_ASSISTANT, chat_pb2.ROLE_USER):
        request.messages.add(role=role).content.add(text="")

    assert (await inference.Chat(request)).choices
