"""Ollama's /generate: a single prompt, as a conversation of one turn or as it is.

A prompt becomes a conversation for the model's own chat template. With `raw`, or with a template in the
request, it is a text to continue, and with `suffix` a text with a gap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from osaurus_grpc.v1 import chat_pb2, completion_pb2, sampling_pb2, usage_pb2
from rest_shim.errors import Refusal, ollama_body
from rest_shim.ollama import convert, go_template, schema
from rest_shim.wire import dump, ndjson_line

RAW_TEXT: Final = "raw mode does not support template, system, or context"

GenerateEvent = chat_pb2.ChatStreamResponse | completion_pb2.CompleteStreamResponse


def is_completion(body: schema.GenerateBody) -> bool:
    """Whether the prompt is a text to continue, and not a turn of a conversation."""
    return body.raw or bool(body.template) or bool(body.suffix)


def chat_request(body: schema.GenerateBody) -> chat_pb2.ChatRequest:
    """The core's request for an answer to the prompt.

    Raises:
        Refusal: An image is not base64.
    """
    user = schema.Message.model_validate({"role": "user", "content": body.prompt})
    turns = [convert.message_proto(user, "", images=body.images)]
    if body.system:
        text = chat_pb2.ContentPart(text=body.system)
        turns.insert(0, chat_pb2.Message(role=chat_pb2.ROLE_SYSTEM, content=[text]))
    request = chat_pb2.ChatRequest(
        model=body.model,
        messages=turns,
        sampling=convert.sampling(body),
        max_context_tokens=convert.context_limit(body),
        keep_alive=convert.keep_alive(body),
        context_token_ids=body.context,
        include_token_ids=True,
        response_format=convert.response_format(body),
    )
    convert.set_thinking(request, body)
    return request


def complete_request(body: schema.GenerateBody) -> completion_pb2.CompleteRequest:
    """The core's request to continue the prompt.

    Raises:
        Refusal: Fields exclude each other, or the template is not one that is run here.
    """
    _check(body)
    fields = {"System": body.system, "Prompt": body.prompt, "Suffix": body.suffix}
    text = body.prompt
    suffix: str | None = body.suffix or None
    if body.template:
        try:
            text = go_template.render(body.template, fields)
        except go_template.UnsupportedTemplateError:
            message = f"template: this server runs {go_template.SUPPORTED} only; send the prompt as raw"
            raise Refusal(400, message, param="template") from None
        if ".Suffix" in body.template:
            suffix = None
    elif body.system:
        raise Refusal(400, "suffix does not go with system", param="system")
    return completion_pb2.CompleteRequest(
        model=body.model,
        text=text,
        suffix=suffix,
        sampling=convert.sampling(body),
        response_format=convert.response_format(body),
        max_context_tokens=convert.context_limit(body),
        keep_alive=convert.keep_alive(body),
        include_token_ids=not body.raw,
    )


def _check(body: schema.GenerateBody) -> None:
    if body.raw and (body.template or body.system or body.context):
        raise Refusal(400, RAW_TEXT, param="raw")
    if body.context:
        raise Refusal(400, "context does not go with template or suffix", param="context")
    if body.images:
        raise Refusal(400, "images do not go with raw, template or suffix", param="images")


def context(prompt: Sequence[int], answer: Sequence[int]) -> dict[str, object]:
    """What the next request may send as its context; nothing where the core gave no ids."""
    return {"context": [*prompt, *answer]} if prompt else {}


def generate_json(
    response: chat_pb2.ChatResponse | completion_pb2.CompleteResponse, body: schema.GenerateBody, now: int
) -> dict[str, object]:
    """A whole answer; now is in nanoseconds."""
    choice = response.choices[0]
    answer: dict[str, object] = {"model": body.model, "created_at": convert.timestamp(now)}
    if isinstance(choice, completion_pb2.CompletionChoice):
        answer["response"] = choice.text
    else:
        answer["response"] = "".join(part.text for part in choice.message.content)
        if choice.message.reasoning:
            answer["thinking"] = choice.message.reasoning
    answer |= {"done": True, "done_reason": convert.done_reason(choice.finish_reason)}
    if not body.raw:
        answer |= context(response.prompt_token_ids, choice.token_ids)
    answer |= convert.metrics_json(response.usage, response.timings)
    if choice.logprobs.tokens:
        answer["logprobs"] = convert.logprobs_json(choice.logprobs.tokens)
    return answer


def residence_json(model: str, reason: str, now: int) -> dict[str, object]:
    """The answer to a request without a prompt, which only loads or unloads."""
    return {
        "model": model,
        "created_at": convert.timestamp(now),
        "response": "",
        "done": True,
        "done_reason": reason,
    }


class GenerateEncoder:
    """One stream's state: events of a chat or of a continuation in, lines out.

    Args:
        model: The model's name as the client said it; every line repeats it.
        is_raw: Whether the last line is without the context.
        clock: Nanoseconds since the epoch.
    """

    def __init__(self, model: str, *, is_raw: bool, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._is_raw = is_raw
        self._head = f'{{"model":{dump(model)},"created_at":"'
        self._prompt_ids: Sequence[int] = ()
        self._answer_ids: Sequence[int] = ()
        self._finish_reason = sampling_pb2.FINISH_REASON_UNSPECIFIED
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """Whether the stream has ended as its grammar wants."""
        return self._is_complete

    def encode(self, event: GenerateEvent) -> bytes:
        """The lines of one event."""
        match event.WhichOneof("event"):
            case "content":
                return self._content(event.content)
            case "reasoning" if isinstance(event, chat_pb2.ChatStreamResponse):
                return self._line("", f',"thinking":{dump(event.reasoning.text)}')
            case "started":
                self._prompt_ids = event.started.prompt_token_ids
            case "choice_finished":
                self._finish_reason = event.choice_finished.finish_reason
                self._answer_ids = event.choice_finished.token_ids
            case "completed":
                return self._complete(event.completed.usage, event.completed.timings)
            case _:
                # Progress, or what a newer core knows and this shim does not.
                pass
        return b""

    def failure(self, refusal: Refusal) -> bytes:
        """The error line."""
        return ndjson_line(ollama_body(refusal))

    def _content(self, delta: chat_pb2.ContentDelta) -> bytes:
        if delta.logprobs:
            return self._line(delta.text, "", f',"logprobs":{dump(convert.logprobs_json(delta.logprobs))}')
        return self._line(delta.text) if delta.text else b""

    def _complete(self, usage: usage_pb2.Usage, timings: usage_pb2.Timings) -> bytes:
        self._is_complete = True
        ending: dict[str, object] = {"done": True, "done_reason": convert.done_reason(self._finish_reason)}
        if not self._is_raw:
            ending |= context(self._prompt_ids, self._answer_ids)
        ending |= convert.metrics_json(usage, timings)
        now = convert.timestamp(self._clock())
        return f'{self._head}{now}","response":"",{dump(ending)[1:]}\n'.encode("ascii")

    def _line(self, text: str, thinking: str = "", more: str = "") -> bytes:
        now = convert.timestamp(self._clock())
        return f'{self._head}{now}","response":{dump(text)}{thinking},"done":false{more}}}\n'.encode("ascii")
