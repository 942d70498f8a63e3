"""InferenceService: decode, do, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from osaurus_grpc.errors import FeatureNotImplementedError, InvalidRequestError
from osaurus_grpc.models.residency import Residency
from osaurus_grpc.server import calls
from osaurus_grpc.server.convert import ChatFold
from osaurus_grpc.server.generation import Generation, keep_alive_seconds, render_prompt
from osaurus_grpc.server.listing import Listing
from osaurus_grpc.server.validation import chat_violations, require_supported, require_valid
from osaurus_grpc.v1 import chat_pb2, completion_pb2, embedding_pb2, inference_service_pb2
from osaurus_grpc.v1.inference_service_pb2_grpc import InferenceServiceServicer

if TYPE_CHECKING:
    from osaurus_grpc.server.interceptors import Context


class InferenceService(InferenceServiceServicer):
    """Answers from models.

    Args:
        listing: Finds and describes models.
        residency: Loads them.
        generation: Answers chat requests.
    """

    def __init__(self, *, listing: Listing, residency: Residency, generation: Generation) -> None:
        self._listing = listing
        self._residency = residency
        self._generation = generation

    async def ListModels(  # noqa: N802 - the contract's name, as below
        self, request: inference_service_pb2.ListModelsRequest, context: Context
    ) -> inference_service_pb2.ListModelsResponse:
        """Lists the installed models."""
        return await self._listing.page(request.page_size, request.page_token)

    async def GetModel(  # noqa: N802
        self, request: inference_service_pb2.GetModelRequest, context: Context
    ) -> inference_service_pb2.GetModelResponse:
        """Describes one model."""
        entry = await self._listing.find(request.model)
        calls.current().model = entry.id
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
            require_supported(chat)
        entry = await self._listing.find(request.model if chat is None else chat.model)
        calls.current().model = entry.id
        keep_alive = None if chat is None else keep_alive_seconds(chat)
        async with self._residency.lease(entry, keep_alive) as lease:
            if chat is not None:
                count = len(await render_prompt(chat, lease.model))
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
        """Not in this release."""
        raise FeatureNotImplementedError("Complete is not implemented in this release; use Chat.")

    def CompleteStream(  # noqa: N802
        self, request: completion_pb2.CompleteStreamRequest, context: Context
    ) -> AsyncGenerator[completion_pb2.CompleteStreamResponse, None]:
        """Not in this release."""
        raise FeatureNotImplementedError("CompleteStream is not implemented in this release; use ChatStream.")

    async def Embed(  # noqa: N802
        self, request: embedding_pb2.EmbedRequest, context: Context
    ) -> embedding_pb2.EmbedResponse:
        """Not in this release."""
        raise FeatureNotImplementedError("Embed is not implemented in this release.")
