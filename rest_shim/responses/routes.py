"""The routes of the Responses API."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from osaurus_grpc.v1 import chat_pb2, inference_service_pb2
from rest_shim.backend import Backend, Caller
from rest_shim.bodies import read_body
from rest_shim.callers import caller_of
from rest_shim.errors import CoreError, Refusal, refusal_from_core
from rest_shim.remote_images import RemoteImages
from rest_shim.responses import convert, resource
from rest_shim.responses.conversation import Conversation, conversation, given, references, resolved
from rest_shim.responses.items import Item, listed
from rest_shim.responses.resource import Draft
from rest_shim.responses.schema import PromptBody, ResponseBody
from rest_shim.responses.store import ResponseStore, StoredResponse
from rest_shim.responses.stream import ResponseEncoder
from rest_shim.responses.truncation import fitted
from rest_shim.routing import Dialect, Route, later
from rest_shim.settings import Settings
from rest_shim.wire import event_stream, json_response, relay

DEFAULT_PAGE = 20
MAX_PAGE = 100


@dataclass(frozen=True, slots=True)
class _Turn:
    """One request on its way.

    Attributes:
        body: What was sent.
        talk: Its messages.
        chat: The core's request.
        shown: Its input items as they are stored and listed.
        draft: Its response.
        caller: Whose it is.
    """

    body: ResponseBody
    talk: Conversation
    chat: chat_pb2.ChatRequest
    shown: Sequence[dict[str, object]]
    draft: Draft
    caller: Caller


class ResponsesRoutes:
    """Handlers of the Responses API on one core."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self._backend = backend
        self._settings = settings
        self._images = RemoteImages(settings)
        self._store = ResponseStore(backend)

    def routes(self) -> Sequence[Route]:
        """What there is."""
        openai = Dialect.OPENAI
        return (
            Route("POST", "/responses", self.create, openai),
            Route("POST", "/responses/input_tokens", self.input_tokens, openai),
            later("POST", "/responses/compact", openai, "Compacting a conversation"),
            Route("GET", "/responses/{id}", self.retrieve, openai),
            Route("DELETE", "/responses/{id}", self.delete, openai),
            Route("GET", "/responses/{id}/input_items", self.input_items, openai),
            Route("POST", "/responses/{id}/cancel", self.cancel, openai),
        )

    async def create(self, request: web.Request) -> web.StreamResponse:
        """POST /responses."""
        body = await read_body(request, ResponseBody, self._settings.request_timeout_seconds)
        body = await self._images.inlined(body)
        turn = await self._turn(body, caller_of(request))
        try:
            if body.stream:
                encoder = ResponseEncoder(turn.draft)
                stream = event_stream(request, self._settings)
                return await relay(stream, self._stored_at_end(turn, encoder), encoder, turn.talk.json_path)
            answer = await self._backend.chat(turn.chat, turn.caller)
        except CoreError as error:
            raise refusal_from_core(error, turn.talk.json_path) from error
        return json_response(await self._finished(turn, answer))

    async def input_tokens(self, request: web.Request) -> web.StreamResponse:
        """POST /responses/input_tokens."""
        body = await read_body(request, PromptBody, self._settings.request_timeout_seconds)
        body = await self._images.inlined(body)
        convert.check_prompt(body)
        caller = caller_of(request)
        talk, _ = await self._conversation(body, caller)
        try:
            counted = await self._count(body, talk, caller)
        except CoreError as error:
            raise refusal_from_core(error, talk.json_path) from error
        return json_response({"object": "response.input_tokens", "input_tokens": counted.token_count})

    async def _count(
        self, body: PromptBody, talk: Conversation, caller: Caller
    ) -> inference_service_pb2.CountTokensResponse:
        question = inference_service_pb2.CountTokensRequest(chat=convert.prompt_request(body, talk))
        return await self._backend.count_tokens(question, caller)

    async def _conversation(self, body: PromptBody, caller: Caller) -> tuple[Conversation, Sequence[Item]]:
        """A request's messages, and its own input's items with references resolved."""
        history = await self._store.history(body.previous_response_id, caller)
        known = {item.id: item for item in history}
        unknown = [item_id for item_id in references(body) if item_id not in known]
        if unknown:
            known |= await self._store.items(unknown, caller)
        return conversation(body, history, known), resolved(given(body), known)

    async def _turn(self, body: ResponseBody, caller: Caller) -> _Turn:
        convert.check(body)
        talk, own = await self._conversation(body, caller)
        draft = Draft(body, int(time.time()))
        if body.truncation == "auto":
            try:
                talk = await fitted(
                    talk, body.max_output_tokens, lambda part: self._count(body, part, caller)
                )
            except CoreError as error:
                raise refusal_from_core(error, talk.json_path) from error
        return _Turn(
            body=body,
            talk=talk,
            chat=convert.chat_request(body, talk),
            shown=list(listed(own, draft.ids)),
            draft=draft,
            caller=caller,
        )

    async def _finished(self, turn: _Turn, answer: chat_pb2.ChatResponse) -> dict[str, object]:
        choice = answer.choices[0]
        turn.draft.model = answer.model
        output = resource.output_items(choice, turn.draft.ids)
        status = resource.status_of(choice.finish_reason)
        completed = int(time.time())
        whole = turn.draft.resource(status, output, usage=answer.usage, completed=completed)
        await self._keep(turn, whole)
        return {**whole, "store": turn.draft.is_stored}

    async def _keep(self, turn: _Turn, whole: dict[str, object]) -> None:
        if turn.body.store:
            stored = StoredResponse(resource=whole, input=turn.shown)
            turn.draft.is_stored = await self._store.put(turn.draft.ids.response, stored, turn.caller)

    @asynccontextmanager
    async def _stored_at_end(
        self, turn: _Turn, encoder: ResponseEncoder
    ) -> AsyncIterator[AsyncIterable[chat_pb2.ChatStreamResponse]]:
        """The core's events; before the last one goes on, the response is kept.

        A client may continue a response as soon as it has seen its end.
        """
        request = chat_pb2.ChatStreamRequest(chat=turn.chat)
        async with self._backend.chat_stream(request, turn.caller) as events:

            async def kept() -> AsyncIterator[chat_pb2.ChatStreamResponse]:
                async for event in events:
                    if event.HasField("completed"):
                        await self._keep(turn, encoder.final(event.completed))
                    yield event

            yield kept()

    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        """GET /responses/{id}."""
        if request.query.get("stream", "false") not in {"false", "0", ""}:
            raise Refusal(400, "A stored response cannot be streamed again.", param="stream")
        if "starting_after" in request.query:
            text = "'starting_after' is for streams, and a stored response cannot be streamed again."
            raise Refusal(400, text, param="starting_after")
        stored = await self._store.get(request.match_info["id"], caller_of(request))
        return json_response(stored.resource)

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """DELETE /responses/{id}."""
        response_id = request.match_info["id"]
        await self._store.delete(response_id, caller_of(request))
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """POST /responses/{id}/cancel: a response is stored once it has ended, so that none is running."""
        await self._store.get(request.match_info["id"], caller_of(request))
        text = "Only a response in the background can be cancelled, and this one was not made there."
        raise Refusal(400, text, param="id")

    async def input_items(self, request: web.Request) -> web.StreamResponse:
        """GET /responses/{id}/input_items, newest first unless order=asc."""
        limit, order = _page_size(request), request.query.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise Refusal(400, "Invalid 'order': must be 'asc' or 'desc'.", param="order")
        found = await self._store.input_items(request.match_info["id"], caller_of(request))
        found = found if order == "asc" else found[::-1]
        after = request.query.get("after")
        if after is not None:
            places = [place for place, item in enumerate(found) if item["id"] == after]
            if not places:
                raise Refusal(400, "Invalid 'after': there is no item of that id.", param="after")
            found = found[places[0] + 1 :]
        page = found[:limit]
        return json_response(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(found) > limit,
            }
        )


def _page_size(request: web.Request) -> int:
    text = request.query.get("limit", str(DEFAULT_PAGE))
    if not (text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= MAX_PAGE):
        raise Refusal(400, f"Invalid 'limit': must be a whole number from 1 to {MAX_PAGE}.", param="limit")
    return int(text)
