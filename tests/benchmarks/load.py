"""Load generators: so many streams at once through HTTP or gRPC, every event timed at the client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass

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
    def events(self) -> int:
        """Content events over all streams."""
        return len(self.gap_seconds) + len(self.first_token_seconds)

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


@dataclass(frozen=True, slots=True)
class Sampler:
    """Sampling settings by the names that all sides share."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


GREEDY = Sampler()
# As requests of several clients would be: what BatchGenerator samples row by row.
MIXED = (
    GREEDY, Sampler(0.7), Sampler(0.8, top_p=0.95), Sampler(0.8, top_k=40),
    Sampler(1.0, min_p=0.05), Sampler(0.6, top_p=0.9, top_k=20), Sampler(1.0), Sampler(0.7, top_p=0.8),
)  # fmt: skip

Ask = Callable[[str, Sampler], Awaitable[_Stream]]


def samplers(count: int, *, mixed: bool) -> list[Sampler]:
    """One a stream."""
    return [MIXED[i % len(MIXED)] if mixed else GREEDY for i in range(count)]


async def _run(ask: Ask, prompts: list[str], settings: list[Sampler]) -> Run:
    started = time.perf_counter()
    streams = await asyncio.gather(
        *(ask(prompt, sampler) for prompt, sampler in zip(prompts, settings, strict=True))
    )
    return Run(
        seconds=time.perf_counter() - started,
        tokens=sum(stream.tokens for stream in streams),
        first_token_seconds=[stream.first for stream in streams],
        gap_seconds=[gap for stream in streams for gap in stream.gaps or ()],
    )


async def over_http(
    base_url: str, model: str, prompts: list[str], tokens: int, settings: list[Sampler]
) -> Run:
    """OpenAI chat streams."""
    async with aiohttp.ClientSession(base_url, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(prompt: str, sampler: Sampler) -> _Stream:
            stream = _Stream(time.perf_counter())
            body = {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": tokens,
                **asdict(sampler),
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

        return await _run(ask, prompts, settings)


def _set(sampler: Sampler) -> dict[str, float]:
    """The settings that are not off."""
    off = Sampler(temperature=-1.0)
    return {name: value for name, value in asdict(sampler).items() if value != getattr(off, name)}


async def over_grpc(
    address: str, model: str, prompts: list[str], tokens: int, settings: list[Sampler]
) -> Run:
    """ChatStream; the model's end of sequence does not end a stream."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)

        async def ask(prompt: str, sampler: Sampler) -> _Stream:
            stream = _Stream(time.perf_counter())
            chat = chat_pb2.ChatRequest(
                model=model,
                messages=[
                    chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=prompt)])
                ],
                sampling=sampling_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True, **_set(sampler)),
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

        return await _run(ask, prompts, settings)
