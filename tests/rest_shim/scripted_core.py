"""A core that does what a test tells it to: dies in mid-stream, stays silent, answers a given status.

It implements the contract's other side with the generated stubs; tests about answers use the real core.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from osaurus_grpc.v1 import (
    chat_pb2,
    completion_pb2,
    embedding_pb2,
    inference_service_pb2,
    inference_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    record_service_pb2,
    record_service_pb2_grpc,
    sampling_pb2,
    usage_pb2,
)

ID = "chatcmpl-0123456789abcdef01234567"
MODEL = "llama-3.2-3b-instruct-4bit"
FINGERPRINT = "fp_0123456789"

StreamScript = Callable[
    [chat_pb2.ChatStreamRequest, grpc.aio.ServicerContext], AsyncIterator[chat_pb2.ChatStreamResponse]
]
CompleteScript = Callable[
    [completion_pb2.CompleteRequest, grpc.aio.ServicerContext], Awaitable[completion_pb2.CompleteResponse]
]
CompleteStreamScript = Callable[
    [completion_pb2.CompleteStreamRequest, grpc.aio.ServicerContext],
    AsyncIterator[completion_pb2.CompleteStreamResponse],
]
EmbedScript = Callable[
    [embedding_pb2.EmbedRequest, grpc.aio.ServicerContext], Awaitable[embedding_pb2.EmbedResponse]
]
ChatScript = Callable[[chat_pb2.ChatRequest, grpc.aio.ServicerContext], Awaitable[chat_pb2.ChatResponse]]


def started(model: str = MODEL) -> chat_pb2.ChatStreamResponse:
    return chat_pb2.ChatStreamResponse(
        started=chat_pb2.ChatStarted(id=ID, model=model, prompt_tokens=25, system_fingerprint=FINGERPRINT)
    )


def content(text: str, choice_index: int = 0) -> chat_pb2.ChatStreamResponse:
    return chat_pb2.ChatStreamResponse(
        content=chat_pb2.ContentDelta(choice_index=choice_index, text=text, token_count=1)
    )


def finished(
    reason: sampling_pb2.FinishReason.ValueType = sampling_pb2.FINISH_REASON_STOP, choice_index: int = 0
) -> chat_pb2.ChatStreamResponse:
    return chat_pb2.ChatStreamResponse(
        choice_finished=chat_pb2.ChoiceFinished(choice_index=choice_index, finish_reason=reason)
    )


def usage(prompt: int = 25, completion: int = 15) -> usage_pb2.Usage:
    return usage_pb2.Usage(prompt_tokens=prompt, completion_tokens=completion)


def timings() -> usage_pb2.Timings:
    made = usage_pb2.Timings()
    made.total_duration.FromNanoseconds(1_234_567_890)
    made.prompt_duration.FromNanoseconds(12_345_678)
    made.decode_duration.FromNanoseconds(234_567_890)
    return made


def completed(prompt: int = 25, completion: int = 15) -> chat_pb2.ChatStreamResponse:
    return chat_pb2.ChatStreamResponse(
        completed=chat_pb2.ChatCompleted(usage=usage(prompt, completion), timings=timings())
    )


def answer(*texts: str) -> Iterator[chat_pb2.ChatStreamResponse]:
    """A whole stream."""
    yield started()
    yield from (content(text) for text in texts)
    yield finished()
    yield completed()


def response(text: str, **fields: object) -> chat_pb2.ChatResponse:
    """A whole answer in one message."""
    choice = chat_pb2.ChatChoice(
        index=0,
        message=chat_pb2.Message(
            role=chat_pb2.ROLE_ASSISTANT, content=[chat_pb2.ContentPart(text=text)] if text else []
        ),
        finish_reason=sampling_pb2.FINISH_REASON_STOP,
    )
    return chat_pb2.ChatResponse(
        id=ID, model=MODEL, choices=[choice], usage=usage(), timings=timings(), system_fingerprint=FINGERPRINT
    )


def model(model_id: str = MODEL, *, is_loaded: bool = False) -> model_pb2.Model:
    made = model_pb2.Model(
        id=model_id,
        repo_id=f"mlx-community/{model_id}",
        size_bytes=2_147_483_648,
        digest="ab" * 32,
        architecture="llama",
        parameter_count=3_212_749_888,
        quantization="4bit",
        context_length=131_072,
        embedding_length=3072,
        capabilities=[model_pb2.CAPABILITY_CHAT, model_pb2.CAPABILITY_COMPLETION],
        state=model_pb2.MODEL_STATE_LOADED if is_loaded else model_pb2.MODEL_STATE_AVAILABLE,
    )
    made.modify_time.FromJsonString("2024-03-15T10:30:45Z")
    if is_loaded:
        made.resident_bytes = 1_999_999_999
    return made


async def abort(
    context: grpc.aio.ServicerContext,
    code: grpc.StatusCode,
    reason: str,
    message: str,
    *details: ProtoMessage,
) -> None:
    """End the call as the real core does: a status with google.rpc details."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="osaurus.ai")
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in (info, *details):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    await context.abort(code, message, (("grpc-status-details-bin", status.SerializeToString()),))


def silent(*events: chat_pb2.ChatStreamResponse, gone: asyncio.Event | None = None) -> StreamScript:
    """A stream that sends its events and is then silent until its caller leaves, which sets gone."""

    async def script(
        _request: chat_pb2.ChatStreamRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
        # Not in a finally: a caller that leaves while an event is being sent ends the call, and the
        # generator stays where it is until it is collected.
        if gone is not None:
            context.add_done_callback(lambda _: gone.set())
        for event in events:
            yield event
        await asyncio.Event().wait()

    return script


class ScriptedCore(
    inference_service_pb2_grpc.InferenceServiceServicer,
    model_service_pb2_grpc.ModelServiceServicer,
    record_service_pb2_grpc.RecordServiceServicer,
):
    """The servicers, with what they were asked."""

    def __init__(self) -> None:
        self.address = ""
        self.events: Sequence[chat_pb2.ChatStreamResponse] = tuple(answer("I'm", " doing"))
        self.stream_script: StreamScript | None = None
        self.chat_script: ChatScript | None = None
        self.complete_script: CompleteScript | None = None
        self.complete_stream_script: CompleteStreamScript | None = None
        self.embed_script: EmbedScript | None = None
        self.records: dict[tuple[str, str], record_service_pb2.Record] = {}
        self.models = [model()]
        self.requests: list[ProtoMessage] = []
        self.keys_shown = 0
        self.metadata: dict[str, str] = {}
        self.key = ""
        self.health = health.aio.HealthServicer()

    async def _note(self, request: ProtoMessage, context: grpc.aio.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        if self.key and self.metadata.get("authorization") != f"Bearer {self.key}":
            await abort(
                context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "A valid API key is needed."
            )

    async def ListModels(  # noqa: N802 - the contract's name
        self, request: inference_service_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> inference_service_pb2.ListModelsResponse:
        await self._note(request, context)
        if request.page_size == 1:
            # A key is shown, and that is all; no test's own request is so small.
            self.requests.remove(request)
            self.keys_shown += 1
        start = int(request.page_token or 0)
        page = self.models[start : start + 2]
        more = str(start + 2) if start + 2 < len(self.models) else ""
        return inference_service_pb2.ListModelsResponse(models=page, next_page_token=more)

    async def GetModel(  # noqa: N802 - the contract's name
        self, request: inference_service_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> inference_service_pb2.GetModelResponse:
        await self._note(request, context)
        for known in self.models:
            if request.model in (known.id, known.repo_id):
                return inference_service_pb2.GetModelResponse(model=known)
        await self.refuse_model(request.model, context)
        raise AssertionError

    async def refuse_model(self, name: str, context: grpc.aio.ServicerContext) -> None:
        await abort(context, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", f"Model not found: {name}")

    async def Chat(  # noqa: N802 - the contract's name
        self, request: chat_pb2.ChatRequest, context: grpc.aio.ServicerContext
    ) -> chat_pb2.ChatResponse:
        await self._note(request, context)
        if self.chat_script is not None:
            return await self.chat_script(request, context)
        return response("I'm doing well, thank you! How can I help you today?")

    async def ChatStream(  # noqa: N802 - the contract's name
        self, request: chat_pb2.ChatStreamRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
        await self._note(request, context)
        if self.stream_script is not None:
            async for event in self.stream_script(request, context):
                yield event
            return
        for event in self.events:
            yield event

    async def Complete(  # noqa: N802 - the contract's name
        self, request: completion_pb2.CompleteRequest, context: grpc.aio.ServicerContext
    ) -> completion_pb2.CompleteResponse:
        await self._note(request, context)
        assert self.complete_script is not None
        return await self.complete_script(request, context)

    async def CompleteStream(  # noqa: N802 - the contract's name
        self, request: completion_pb2.CompleteStreamRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[completion_pb2.CompleteStreamResponse]:
        await self._note(request, context)
        assert self.complete_stream_script is not None
        async for event in self.complete_stream_script(request, context):
            yield event

    async def Embed(  # noqa: N802 - the contract's name
        self, request: embedding_pb2.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> embedding_pb2.EmbedResponse:
        await self._note(request, context)
        assert self.embed_script is not None
        return await self.embed_script(request, context)

    async def CountTokens(  # noqa: N802 - the contract's name
        self, request: inference_service_pb2.CountTokensRequest, context: grpc.aio.ServicerContext
    ) -> inference_service_pb2.CountTokensResponse:
        await self._note(request, context)
        return inference_service_pb2.CountTokensResponse(token_count=42, context_length=131_072)

    async def PutRecord(  # noqa: N802 - the contract's name
        self, request: record_service_pb2.PutRecordRequest, context: grpc.aio.ServicerContext
    ) -> record_service_pb2.PutRecordResponse:
        await self._note(request, context)
        return await self._keep(request, context)

    async def _keep(
        self, request: record_service_pb2.PutRecordRequest, _context: grpc.aio.ServicerContext
    ) -> record_service_pb2.PutRecordResponse:
        self.records[request.collection, request.record.id] = request.record
        return record_service_pb2.PutRecordResponse()

    async def GetRecord(  # noqa: N802 - the contract's name
        self, request: record_service_pb2.GetRecordRequest, context: grpc.aio.ServicerContext
    ) -> record_service_pb2.GetRecordResponse:
        await self._note(request, context)
        found = self.records.get((request.collection, request.id))
        if found is None:
            await self.refuse_record(request.id, context)
        return record_service_pb2.GetRecordResponse(record=found)

    async def DeleteRecord(  # noqa: N802 - the contract's name
        self, request: record_service_pb2.DeleteRecordRequest, context: grpc.aio.ServicerContext
    ) -> record_service_pb2.DeleteRecordResponse:
        await self._note(request, context)
        if self.records.pop((request.collection, request.id), None) is None:
            await self.refuse_record(request.id, context)
        return record_service_pb2.DeleteRecordResponse()

    async def refuse_record(self, record_id: str, context: grpc.aio.ServicerContext) -> None:
        await abort(
            context, grpc.StatusCode.NOT_FOUND, "RECORD_NOT_FOUND", f"There is no record {record_id}."
        )

    async def LoadModel(  # noqa: N802 - the contract's name
        self, request: model_service_pb2.LoadModelRequest, context: grpc.aio.ServicerContext
    ) -> model_service_pb2.LoadModelResponse:
        await self._note(request, context)
        if request.model not in {known.id for known in self.models}:
            await self.refuse_model(request.model, context)
        return model_service_pb2.LoadModelResponse(model=self.models[0])

    async def UnloadModel(  # noqa: N802 - the contract's name
        self, request: model_service_pb2.UnloadModelRequest, context: grpc.aio.ServicerContext
    ) -> model_service_pb2.UnloadModelResponse:
        await self._note(request, context)
        return model_service_pb2.UnloadModelResponse(was_loaded=True)

    async def CopyModel(  # noqa: N802 - the contract's name
        self, request: model_service_pb2.CopyModelRequest, context: grpc.aio.ServicerContext
    ) -> model_service_pb2.CopyModelResponse:
        await self._note(request, context)
        if request.source not in {known.id for known in self.models}:
            await self.refuse_model(request.source, context)
        return model_service_pb2.CopyModelResponse(model=model(request.destination))

    async def DeleteModel(  # noqa: N802 - the contract's name
        self, request: model_service_pb2.DeleteModelRequest, context: grpc.aio.ServicerContext
    ) -> model_service_pb2.DeleteModelResponse:
        await self._note(request, context)
        if request.model not in {known.id for known in self.models}:
            await self.refuse_model(request.model, context)
        return model_service_pb2.DeleteModelResponse()

    async def set_serving(self, is_serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self.health.set("", status.SERVING if is_serving else status.NOT_SERVING)

    async def start(self, port: int = 0) -> grpc.aio.Server:
        """Serve on a loopback port; the address is known afterwards."""
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(self, server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self, server)
        record_service_pb2_grpc.add_RecordServiceServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        self.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self.set_serving(True)
        await server.start()
        return server
