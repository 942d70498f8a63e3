"""Load generators: so many streams at once through HTTP or gRPC, every event timed at the client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
import grpc

from osaurus_grpc.v1 import (
    chat_pb2,
    inference_service_pb2_grpc,
    sampling_pb2,
)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of several streams.

    Attributes:
        seconds: From the first request to the last event.
        tokens: Tokens generated, by the server's usage.
        first_token_seconds: A stream each.
        gap_seconds: Time between neighbouring content events, over all streams.
    """

    seconds: float
    tokens: int
    first_token_seconds: list[float]
    gap_seconds: list[float]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(slots=True)
class _Stream:
    started: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    gaps: list[float] | None = None

    def content(self) -> None:
        now = time.perf_counter()
        if not self.first:
            self.first = now - self.started
            self.gaps = []
        elif self.gaps is not None:
            self.gaps.append(now - self.last)
        self.last = now


Ask = Callable[[str, int], Awaitable[_Stream]]


async def _run(ask: Ask, prompts: list[str], tokens: int) -> Run:
    started = time.perf_counter()
    streams = await asyncio.gather(*(ask(prompt, tokens) for prompt in prompts))
    return Run(
        seconds=time.perf_counter() - started,
        tokens=sum(stream.tokens for stream in streams),
        first_token_seconds=[stream.first for stream in streams],
        gap_seconds=[gap for stream in streams for gap in stream.gaps or ()],
    )


async def over_http(base_url: str, model: str, prompts: list[str], tokens: int) -> Run:
    """OpenAI chat streams, greedy."""
    async with aiohttp.ClientSession(base_url, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(prompt: str, tokens: int) -> _Stream:
            stream = _Stream(time.perf_counter())
            body = {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            async with session.post("/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                        stream.content()
                    if chunk.get("usage"):
                        stream.tokens = chunk["usage"]["completion_tokens"]
            return stream

        return await _run(ask, prompts, tokens)


async def over_grpc(address: str, model: str, prompts: list[str], tokens: int) -> Run:
    """ChatStream, greedy."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)

        async def ask(prompt: str, tokens: int) -> _Stream:
            stream = _Stream(time.perf_counter())
            chat = chat_pb2.ChatRequest(
                model=model,
                messages=[
                    chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=prompt)])
                ],
                sampling=sampling_pb2.SamplingParams(temperature=0.0, max_tokens=tokens),
            )
            call = stub.ChatStream(chat_pb2.ChatStreamRequest(chat=chat), timeout=600)
            try:
                async for event in call:
                    if event.HasField("content"):
                        stream.content()
                    elif event.HasField("completed"):
                        stream.tokens = event.completed.usage.completion_tokens
            finally:
                call.cancel()
            return stream

        return await _run(ask, prompts, tokens)
