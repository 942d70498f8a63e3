"""InferenceService: decode, do, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from osaurus_grpc.errors import InvalidRequestError
from osaurus_grpc.models.residency import Residency
from osaurus_grpc.server import calls
from osaurus_grpc.server.embedding import Embedding
from osaurus_grpc.server.fold import ChatFold, CompletionFold
from osaurus_grpc.server.generation import Generation, keep_alive_seconds
from osaurus_grpc.server.listing import Listing
from osaurus_grpc.server.validation import (
    chat_violations,
    require_images_taken,
    require_valid,
)
from osaurus_grpc.v1 import chat_pb2, completion_pb2, embedding_pb2, inference_service_pb2
from osaurus_grpc.v1.inference_service_pb2_grpc import InferenceServiceServicer

if TYPE_CHECKING:
    from osaurus_grpc.server.interceptors import Context


class InferenceService(InferenceServiceServicer):
    """Answers from models.

    Args:
        listing: Finds and describes models.
        residency: Loads them.
        generation: Answers chat and completion requests.
        embedding: Answers embedding requests.
    """

    def __init__(
        self, *, listing: Listing, residency: Residency, generation: Generation, embedding: Embedding
    ) -> None:
        self._listing = listing
        self._residency = residency
        self._generation = generation
        self._embedding = embedding

    async def ListModels(  # noqa: N802 - the contract's name, as below
        self, request: inference_service_pb2.ListModelsRequest, context: Context
    ) -> inference_service_pb2.ListModelsResponse:
        """Lists the installed models and their aliases."""
        return await self._listing.page(request.page_size, request.page_token)

    async def GetModel(  # noqa: N802
        self, request: inference_service_pb2.GetModelRequest, context: Context
    ) -> inference_service_pb2.GetModelResponse:
        """Describes one model."""
        entry = await self._listing.find_listed(request.model)
        calls.current().model = entry.alias_of or entry.id
        model = await self._listing.describe(entry, with_template=True)
        return inference_service_pb2.GetModelResponse(model=model)

    async def Chat(  # noqa: N802
        self, request: chat_pb2.ChatRequest, context: Context
    ) -> chat_pb2.ChatResponse:
        """Answers a conversation in one message."""
        fold = ChatFold(wants_logprobs=request.sampling.HasField("top_logprobs"))
        async with aclosing(self._generation.chat(request)) as events:
            async for event in events:
                fold.feed(event)
        return fold.response()

    def ChatStream(  # noqa: N802
        self, request: chat_pb2.ChatStreamRequest, context: Context
    ) -> AsyncGenerator[chat_pb2.ChatStreamResponse, None]:
        """Answers a conversation as it is generated."""
        return self._generation.chat(request.chat, wants_progress=request.options.prompt_progress)

    async def CountTokens(  # noqa: N802
        self, request: inference_service_pb2.CountTokensRequest, context: Context
    ) -> inference_service_pb2.CountTokensResponse:
        """Counts a prompt's tokens, with the model's own tokenizer, which loads the model."""
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequestError("text or chat must be set.", field="input")
        chat = request.chat if kind == "chat" else None
        if chat is not None:
            require_valid(chat_violations(chat))
        entry = await self._listing.find(request.model if chat is None else chat.model)
        if chat is not None:
            require_images_taken(chat, entry)
        calls.current().model = entry.id
        keep_alive = None if chat is None else keep_alive_seconds(chat)
        async with self._residency.lease(entry, keep_alive) as lease:
            if chat is not None:
                count = len((await self._generation.chat_prompt(chat, lease.model)).token_ids)
            else:
                tokenizer = lease.model.tokenizer
                text = request.text
                tokens = await asyncio.to_thread(lambda: tokenizer.encode(text, add_special_tokens=False))
                count = len(tokens)
            calls.current().prompt_tokens = count
            return inference_service_pb2.CountTokensResponse(
                token_count=count, context_length=lease.model.context_length
            )

    async def Complete(  # noqa: N802
        self, request: completion_pb2.CompleteRequest, context: Context
    ) -> completion_pb2.CompleteResponse:
        """Continues a text in one message."""
        fold = CompletionFold(wants_logprobs=request.sampling.HasField("top_logprobs"))
        async with aclosing(self._generation.complete(request)) as events:
            async for event in events:
                fold.feed(event)
        return fold.response()

    def CompleteStream(  # noqa: N802
        self, request: completion_pb2.CompleteStreamRequest, context: Context
    ) -> AsyncGenerator[completion_pb2.CompleteStreamResponse, None]:
        """Continues a text as it is generated."""
        wants_progress = request.options.prompt_progress
        return self._generation.complete(request.completion, wants_progress=wants_progress)

    async def Embed(  # noqa: N802
        self, request: embedding_pb2.EmbedRequest, context: Context
    ) -> embedding_pb2.EmbedResponse:
        """Embeds texts."""
        return await self._embedding.embed(request)
