"""A chat request with the session it is part of: its prompt, and what is remembered of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from osaurus_grpc.chat import raw
from osaurus_grpc.chat.stable_prefix import StablePrefixes
from osaurus_grpc.chat.template import Rendering, apply_template, is_continuation
from osaurus_grpc.chat.transcript import Transcript, encode_after
from osaurus_grpc.chat.types import Message
from osaurus_grpc.errors import CapabilityError
from osaurus_grpc.models.residency import LoadedModel
from osaurus_grpc.models.vision.image_prompt import ImagePrompt
from osaurus_grpc.models.vision.reader import ImageFile
from osaurus_grpc.server.convert import message_from_proto, template_arguments, visible_tools
from osaurus_grpc.server.fold import ChatFold
from osaurus_grpc.server.prompts import Prompt, context_limit, require_fit
from osaurus_grpc.server.sessions import History
from osaurus_grpc.v1 import chat_pb2

# Below this, rendering takes about as long as handing it to a thread and back.
_SHORT_PROMPT_CHARACTERS: Final = 4_096


class Conversation:
    """A validated request's conversation, from its prompt to the history it leaves.

    Args:
        request: The request.
        history: What its session remembers; nothing without a session.
        prefixes: Knows the lengths of system messages and tools.
        is_counted: The prompt's tokens are what is asked for: it need not fit the context.
    """

    def __init__(
        self,
        request: chat_pb2.ChatRequest,
        history: History,
        prefixes: StablePrefixes,
        *,
        is_counted: bool = False,
    ) -> None:
        self._request = request
        self._prefixes = prefixes
        self._is_counted = is_counted
        self._messages = history.continued_by(
            [message_from_proto(m, f"messages[{i}]") for i, m in enumerate(request.messages)]
        )
        self._images = [image for message in self._messages for image in message.images]
        self._remembered = history
        self._model: LoadedModel | None = None
        self._rendering: Rendering | None = None
        self._prompt: tuple[int, ...] = ()
        self._fold = ChatFold()

    async def prompt(self, model: LoadedModel) -> Prompt:
        """The conversation, rendered, behind the tokens that the request puts before it.

        A long one is rendered in a thread. What the model read and wrote in the session's last turn
        keeps its tokens.

        Raises:
            InvalidRequestError: The model's template refuses the conversation, or it cannot fit.
            CapabilityError: The model has no chat template, or takes no images.
        """
        is_short = sum(len(message.content) for message in self._messages) < _SHORT_PROMPT_CHARACTERS
        self._model = model
        self._rendering, token_ids, stable_tokens = (
            self._rendered(model) if is_short else await asyncio.to_thread(self._rendered, model)
        )
        context = self._request.context_token_ids
        if context:
            stable_tokens = 0
            token_ids = raw.without_beginning(model.tokenizer, token_ids)
        self._prompt = (*context, *token_ids)
        prompt = Prompt(
            self._prompt, is_continued=is_continuation(self._messages), stable_tokens=stable_tokens
        )
        if not self._images:
            return prompt
        images = await self._with_images(model, token_ids)
        return replace(prompt, token_ids=images.token_ids, images=images)

    async def _with_images(self, model: LoadedModel, token_ids: Sequence[int]) -> ImagePrompt:
        """The rendered tokens with those of the images in their places."""
        reader = model.images
        if reader is None:
            raise CapabilityError(
                f"Model '{model.entry.id}' does not take images.",
                capability="vision",
                field=self._images[0].field,
            )
        request = self._request
        work = partial(
            reader.prompt,
            request.context_token_ids,
            token_ids,
            [ImageFile(image.data, image.field) for image in self._images],
            limit=None if self._is_counted else context_limit(request, model.context_length),
        )
        return await asyncio.get_running_loop().run_in_executor(reader.threads, work)

    def _rendered(self, model: LoadedModel) -> tuple[Rendering, list[int], int]:
        """The conversation as text and as tokens, and how many of these are stable."""
        request = self._request
        tools, arguments = visible_tools(request), template_arguments(request)
        effort = request.reasoning_effort
        enabled = request.reasoning_enabled if request.HasField("reasoning_enabled") else None

        def written(messages: Sequence[Message]) -> Rendering:
            return apply_template(
                model.tokenizer,
                messages,
                tools=tools,
                template_arguments=arguments,
                reasoning_effort=effort,
                reasoning_enabled=enabled,
            )

        rendering = written(self._messages)
        if not self._is_counted:
            require_fit(request, model, rendering.plain_text)
        remembered = self._remembered
        is_same_model = remembered.fingerprint == model.fingerprint
        transcript = remembered.transcript if is_same_model else None
        token_ids = encode_after(transcript, rendering, model.tokenizer)
        stable_tokens = self._prefixes.length(
            model.fingerprint,
            self._messages,
            tools,
            (arguments, effort, enabled),
            token_ids,
            lambda messages: written(messages).encode(),
        )
        return rendering, token_ids, stable_tokens

    def observe(self, event: chat_pb2.ChatStreamResponse) -> bool:
        """Take the next event of the answer; whether it is the last, and the answer complete."""
        self._fold.feed(event)
        return event.WhichOneof("event") == "completed"

    def history(self, answer_tokens: Sequence[int]) -> History:
        """What is to be remembered once the answer is complete: of several answers, the first.

        Args:
            answer_tokens: The first answer's.
        """
        assert self._model is not None
        assert self._rendering is not None
        answer = message_from_proto(self._fold.response().choices[0].message)
        earlier = self._messages
        if is_continuation(earlier):
            answer = replace(answer, content=earlier[-1].content + answer.content)
            earlier = earlier[:-1]
        return History(
            messages=(*earlier, answer),
            transcript=Transcript.of(self._rendering, self._prompt, answer_tokens),
            fingerprint=self._model.fingerprint,
        )
