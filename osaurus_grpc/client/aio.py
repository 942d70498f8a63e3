"""The asyncio client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from osaurus_grpc.client import channel, request
from osaurus_grpc.client.channel import ANSWER_SECONDS, LOAD_SECONDS, PULL_SECONDS, QUERY_SECONDS
from osaurus_grpc.client.events import Event, Reply, TextDelta, event_from_proto, reply_from_proto
from osaurus_grpc.client.failures import TransportError, error_from_call
from osaurus_grpc.client.request import ChatOptions, Conversation
from osaurus_grpc.server.fold import ChatFold
from osaurus_grpc.v1 import (
    chat_pb2,
    inference_service_pb2,
    inference_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
)

T = TypeVar("T")


class AsyncStream:
    """An answer as it is generated. Iterate over its events, or over `text`; leaving it cancels.

    Use it as an async context manager: what is generated for nobody costs everybody.
    """

    def __init__(self, responses: AsyncGenerator[chat_pb2.ChatStreamResponse, None]) -> None:
        self._responses = responses
        self._fold = ChatFold(wants_logprobs=True)
        self._is_complete = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop the generation, if it has not ended."""
        await self._responses.aclose()

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for response in self._responses:
            self._fold.feed(response)
            self._is_complete = response.HasField("completed")
            if (event := event_from_proto(response)) is not None:
                yield event

    @property
    async def text(self) -> AsyncIterator[str]:
        """The text of the first answer, piece by piece."""
        async for event in self:
            if isinstance(event, TextDelta) and event.choice == 0 and event.text:
                yield event.text

    async def reply(self) -> Reply:
        """The whole answer; reads the rest of the stream first."""
        async for _ in self:
            pass
        if not self._is_complete:
            raise TransportError("The answer was left before it was complete.")
        return reply_from_proto(self._fold.response())


class AsyncOsaurus:
    """A connection to a core, for asyncio. Use it as an async context manager, or close() it.

    Must be made in the event loop that uses it. Nothing is sent before the first call. Calls raise the
    exceptions of osaurus_grpc.errors.

    Args:
        address: "HOST:PORT"; "" finds the running server, see channel.find().
        api_key: Bearer key; "" takes OSAURUS_API_KEY.
        tls: Encrypt, and check the server's certificate.
        root_certificates: PEM certificates to check it against; implies tls.
    """

    def __init__(
        self,
        address: str = "",
        api_key: str = "",
        *,
        tls: bool = False,
        root_certificates: bytes | None = None,
    ) -> None:
        target = channel.find(address, api_key, tls=tls, root_certificates=root_certificates)
        self.address = target.address
        self._metadata = target.metadata
        if target.credentials is None:
            self._channel = grpc.aio.insecure_channel(target.address, options=channel.CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(
                target.address, target.credentials, options=channel.CHANNEL_OPTIONS
            )
        self._inference = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls still running are cancelled."""
        await self._channel.close()

    async def _answer(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self.address) from error

    async def is_serving(self, service: str = "", timeout: float = QUERY_SECONDS) -> bool:
        """Whether the core, or one of its services by full name, reports SERVING.

        False also where nothing answers.
        """
        asked = health_pb2.HealthCheckRequest(service=service)
        try:
            answer = await self._health.Check(asked, timeout=timeout)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def chat(
        self, conversation: Conversation, *, timeout: float = ANSWER_SECONDS, **options: Unpack[ChatOptions]
    ) -> Reply:
        """Answer a conversation.

        Args:
            conversation: A text, or messages in OpenAI's form.
            timeout: Seconds until it is given up.
            options: See ChatOptions.
        """
        asked = request.chat_request(conversation, options)
        return reply_from_proto(
            await self._answer(self._inference.Chat(asked, timeout=timeout, metadata=self._metadata))
        )

    def stream(
        self, conversation: Conversation, *, timeout: float = ANSWER_SECONDS, **options: Unpack[ChatOptions]
    ) -> AsyncStream:
        """Answer a conversation as it is generated; arguments as for chat()."""
        return AsyncStream(self.chat_stream(request.chat_request(conversation, options), timeout))

    async def chat_stream(
        self, asked: chat_pb2.ChatRequest, timeout: float = ANSWER_SECONDS
    ) -> AsyncGenerator[chat_pb2.ChatStreamResponse, None]:
        """The contract's own events of a request: started, deltas, choice_finished, completed.

        Closing the generator (or cancelling the task that reads it) stops the generation. Use
        contextlib.aclosing around a loop that may be left early. Events of an unknown kind, from a
        newer server, are skipped.

        Raises:
            OsaurusError: Of the kind the server raised, before the first event or after it.
            TransportError: The connection broke, or the stream ended without its last event.
        """
        is_complete = False
        call = self._inference.ChatStream(
            chat_pb2.ChatStreamRequest(chat=asked), timeout=timeout, metadata=self._metadata
        )
        try:
            async for event in call:
                if event.WhichOneof("event") is None:
                    continue
                is_complete = event.HasField("completed")
                yield event
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self.address) from error
        finally:
            # Leaving the loop does not end the call by itself.
            call.cancel()
        if not is_complete:
            raise TransportError(f"The server at {self.address} ended the answer before it was complete.")

    async def embed(
        self,
        inputs: str | Sequence[str],
        *,
        model: str = "",
        dimensions: int | None = None,
        truncate: bool = False,
        timeout: float = ANSWER_SECONDS,
    ) -> list[list[float]]:
        """Vectors of texts, of length 1, in their order.

        Args:
            inputs: A text or several.
            model: Any of a model's names.
            dimensions: Cut the vectors to so many; None keeps all.
            truncate: Cut a text that is too long, in place of refusing it.
            timeout: Seconds until it is given up.
        """
        asked = request.embed_request(inputs, model, dimensions, truncate)
        answer = await self._answer(self._inference.Embed(asked, timeout=timeout, metadata=self._metadata))
        return [list(each.values) for each in answer.embeddings]

    async def count_tokens(
        self, conversation: Conversation, *, timeout: float = LOAD_SECONDS, **options: Unpack[ChatOptions]
    ) -> int:
        """Prompt tokens of a conversation, with its template and tools."""
        asked = inference_service_pb2.CountTokensRequest(chat=request.chat_request(conversation, options))
        answer = await self._answer(
            self._inference.CountTokens(asked, timeout=timeout, metadata=self._metadata)
        )
        return answer.token_count

    async def list_models(self, timeout: float = QUERY_SECONDS) -> list[model_pb2.Model]:
        """All installed models, in the order of their ids."""
        found: list[model_pb2.Model] = []
        token = ""
        while True:
            asked = inference_service_pb2.ListModelsRequest(page_token=token)
            page = await self._answer(
                self._inference.ListModels(asked, timeout=timeout, metadata=self._metadata)
            )
            found.extend(page.models)
            token = page.next_page_token
            if not token:
                return found

    async def get_model(self, model: str = "", timeout: float = QUERY_SECONDS) -> model_pb2.Model:
        """One model by any of its names; "" is the default model. ModelNotFoundError."""
        asked = inference_service_pb2.GetModelRequest(model=model)
        answer = await self._answer(self._inference.GetModel(asked, timeout=timeout, metadata=self._metadata))
        return answer.model

    async def load_model(
        self, model: str, keep_alive_seconds: float | None = None, timeout: float = LOAD_SECONDS
    ) -> model_service_pb2.LoadModelResponse:
        """Load a model; None keeps it as long as the server's default says, negative for ever."""
        asked = model_service_pb2.LoadModelRequest(model=model)
        if keep_alive_seconds is not None:
            asked.keep_alive.CopyFrom(request.duration(keep_alive_seconds))
        return await self._answer(self._models.LoadModel(asked, timeout=timeout, metadata=self._metadata))

    async def unload_model(self, model: str, timeout: float = LOAD_SECONDS) -> bool:
        """Unload a model once the requests that use it have ended; False where it was not loaded."""
        asked = model_service_pb2.UnloadModelRequest(model=model)
        answer = await self._answer(self._models.UnloadModel(asked, timeout=timeout, metadata=self._metadata))
        return answer.was_loaded

    async def pull(
        self, model: str, timeout: float = PULL_SECONDS
    ) -> AsyncGenerator[model_service_pb2.PullModelResponse, None]:
        """Fetch a model; gives its progress, the last time with the installed model."""
        asked = model_service_pb2.PullModelRequest(model=model)
        call = self._models.PullModel(asked, timeout=timeout, metadata=self._metadata)
        try:
            async for progress in call:
                yield progress
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self.address) from error
        finally:
            call.cancel()
