"""Cores inside the test's own process, for tests that look behind the wire, and requests for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from osaurus_grpc.server.app import Core
from osaurus_grpc.settings import Settings
from osaurus_grpc.v1 import chat_pb2, sampling_pb2, usage_pb2
from osaurus_grpc.v1.inference_service_pb2_grpc import InferenceServiceStub

TINY = "tiny-llama"
# No wait of a test is longer; what is waited for takes milliseconds on an idle machine.
PATIENCE_SECONDS = 120.0


def core_settings(models_dir: Path, **changes: Any) -> Settings:
    """Settings of a core on a free port, limits off."""
    values = {
        "models_dir": models_dir,
        "grpc_port": 0,
        "max_concurrent_requests": 0,
        "requests_per_minute": 0,
        "drain_seconds": 0.0,
    }
    return Settings(**{**values, **changes})


@asynccontextmanager
async def running_core(models_dir: Path, **changes: Any) -> AsyncIterator[Core]:
    """A core that serves, with settings changed as named."""
    core = Core(core_settings(models_dir, **changes))
    await core.bind()
    try:
        await core.prepare()
        yield core
        await core.drain(0.0)
    finally:
        await core.close()


@asynccontextmanager
async def inference_stub(address: str) -> AsyncIterator[Any]:
    """An asyncio stub of InferenceService."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield InferenceServiceStub(channel)


def user(text: str) -> chat_pb2.Message:
    """A user's message."""
    return chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=text)])


def chat_request(text: str = "Hello", *, model: str = TINY, **sampling: Any) -> chat_pb2.ChatRequest:
    """A greedy request of few tokens, sampling settings changed as named."""
    values = {"temperature": 0.0, "max_tokens": 8, **sampling}
    return chat_pb2.ChatRequest(
        model=model, messages=[user(text)], sampling=sampling_pb2.SamplingParams(**values)
    )


def stream_request(chat: chat_pb2.ChatRequest, *, progress: bool = False) -> chat_pb2.ChatStreamRequest:
    """The same request as a stream."""
    options = chat_pb2.StreamOptions(prompt_progress=True) if progress else None
    return chat_pb2.ChatStreamRequest(chat=chat, options=options)


def text_of(response: chat_pb2.ChatResponse, index: int = 0) -> str:
    """The text of an answer."""
    return "".join(part.text for part in response.choices[index].message.content)


def token_counts(usage: usage_pb2.Usage) -> tuple[int, int]:
    """Prompt and completion tokens; how many of the prompt's were cached depends on what ran before."""
    return usage.prompt_tokens, usage.completion_tokens


async def eventually(condition: Callable[[], bool], *, every: float = 0.01) -> None:
    """Wait until something becomes true that no event tells."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(every)


class RichError:
    """A non-OK status with its details, by type."""

    def __init__(self, error: grpc.RpcError) -> None:
        status: status_pb2.Status | None = rpc_status.from_call(error)
        assert status is not None, "a status without details"
        self.code: grpc.StatusCode = error.code()
        self.message: str = status.message
        self._details = status.details

    def _detail(self, kind: type[ProtoMessage]) -> Any:
        for packed in self._details:
            if packed.Is(kind.DESCRIPTOR):
                unpacked = kind()
                packed.Unpack(unpacked)
                return unpacked
        return None

    @property
    def info(self) -> error_details_pb2.ErrorInfo:
        return self._detail(error_details_pb2.ErrorInfo)

    @property
    def retry_seconds(self) -> float | None:
        retry = self._detail(error_details_pb2.RetryInfo)
        return None if retry is None else retry.retry_delay.ToNanoseconds() / 1e9

    @property
    def resource(self) -> error_details_pb2.ResourceInfo | None:
        return self._detail(error_details_pb2.ResourceInfo)

    @property
    def fields(self) -> list[str]:
        bad_request = self._detail(error_details_pb2.BadRequest)
        return [violation.field for violation in bad_request.field_violations] if bad_request else []


async def failure(call: Any) -> RichError:
    """The error that an awaitable call, or a stream, ends with."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return RichError(error)
    raise AssertionError("the call ended OK")
