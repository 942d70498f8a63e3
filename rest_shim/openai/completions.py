"""Legacy text completions: what a request may hold, and its conversion both ways.

The core continues one prompt a call; a list of prompts is so many calls, whose choices are numbered
through: choice j of prompt i has index i * n + j.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field

from osaurus_grpc.v1 import completion_pb2, sampling_pb2, usage_pb2
from rest_shim.bodies import Integer
from rest_shim.errors import CoreError, Refusal
from rest_shim.openai import convert, schema
from rest_shim.openai.legacy_logprobs import LegacyLogprobs
from rest_shim.openai.prompts import Prompt, Prompts
from rest_shim.openai.sampling import MAX_INT32, SamplingFields, sampling_params

DEFAULT_MAX_TOKENS = 16
MAX_LOGPROBS = 5
MAX_BEST_OF = 20
MAX_PROMPTS = 256

# How the core names what is continued; where the context is too small, it may name nothing.
_PROMPT_FIELDS = frozenset({"prompt", "text", "tokens", "tokens.token_ids", "messages"})


class CompletionBody(SamplingFields):
    """POST /completions."""

    model: schema.ModelName
    prompt: Prompts
    suffix: str = ""
    # 0 is for the log-probabilities of a prompt that is echoed.
    max_tokens: Annotated[Integer, Field(ge=0, le=MAX_INT32)] = DEFAULT_MAX_TOKENS
    n: Annotated[Integer, Field(ge=1, le=schema.MAX_CHOICES)] = 1
    best_of: Annotated[Integer, Field(ge=0, le=MAX_BEST_OF)] | None = None
    echo: bool = False
    logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream: bool = False
    stream_options: schema.StreamOptions | None = None
    response_format: schema.ResponseFormat | None = None


def complete_requests(body: CompletionBody) -> Sequence[completion_pb2.CompleteRequest]:
    """The core's requests, one a prompt.

    Raises:
        Refusal: Fields contradict each other or ask for what is not done.
    """
    _check(body)
    return [_request(body, prompt) for prompt in body.prompt]


def _check(body: CompletionBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    if body.best_of and body.best_of < body.n:
        raise Refusal(400, "'best_of' must not be less than 'n'.", param="best_of")
    if body.best_of and body.best_of > body.n:
        text = "Choosing the best of more answers than 'n' is not supported; leave 'best_of' out."
        raise Refusal(400, text, param="best_of")
    if body.max_tokens == 0 and not body.echo:
        text = "Invalid 'max_tokens': may be 0 only where 'echo' is true; there would be no answer."
        raise Refusal(400, text, param="max_tokens")
    if len(body.prompt) > MAX_PROMPTS:
        raise Refusal(400, f"Invalid 'prompt': at most {MAX_PROMPTS} prompts a request.", param="prompt")


def _request(body: CompletionBody, prompt: Prompt) -> completion_pb2.CompleteRequest:
    request = completion_pb2.CompleteRequest(
        model=body.model,
        sampling=sampling_params(body, max_tokens=body.max_tokens, top_logprobs=body.logprobs),
        suffix=body.suffix or None,
        echo=body.echo or None,
        choice_count=None if body.n == 1 else body.n,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokens.token_ids.extend(prompt)
    if body.response_format is not None:
        convert.set_response_format(request.response_format, body.response_format)
    return request


def json_path(field: str) -> str:
    """A field of the protobuf request as the path in OpenAI's JSON, for an error's `param`."""
    path = field.removeprefix("completion.")
    if path in {"sampling.top_logprobs", "prompt_logprobs"}:
        return "logprobs"
    if path == "messages" or path.partition(".")[0] in {"text", "tokens"}:
        # "messages" is what an error's general meaning names: the prompt is too long.
        return "prompt"
    return convert.json_path(path)


def placed(error: CoreError, place: int) -> CoreError:
    """An error about one of several prompts, with that prompt's place in the field's path."""
    head, bracket, rest = error.field.partition("[")
    if error.field and head not in _PROMPT_FIELDS:
        return error
    if not error.field and error.reason != "CONTEXT_LENGTH_EXCEEDED":
        return error
    field = f"prompt[{place}]{bracket}{rest}"
    message = error.message
    if error.field and message.startswith(error.field):
        message = field + message.removeprefix(error.field)
    return CoreError(
        error.code, error.reason, message, field=field, retry_after_seconds=error.retry_after_seconds
    )


def _choice_json(
    choice: completion_pb2.CompletionChoice, index: int, prompt: Sequence[sampling_pb2.PromptTokenLogprob]
) -> dict[str, object]:
    logprobs = None
    if choice.HasField("logprobs"):
        legacy = LegacyLogprobs()
        legacy.take(choice.logprobs.tokens, legacy.take_prompt(prompt, choice.text))
        if prompt and choice.HasField("end_logprob"):
            legacy.take([choice.end_logprob], "")
        logprobs = legacy.told()
    return {
        "text": choice.text,
        "index": index,
        "logprobs": logprobs,
        "finish_reason": convert.finish_reason(choice.finish_reason),
    }


def total_usage(parts: Iterable[usage_pb2.Usage]) -> usage_pb2.Usage:
    """What several calls cost together."""
    total = usage_pb2.Usage()
    for part in parts:
        total.prompt_tokens += part.prompt_tokens
        total.completion_tokens += part.completion_tokens
        total.cached_prompt_tokens += part.cached_prompt_tokens
        total.reasoning_tokens += part.reasoning_tokens
    return total


def completion_json(
    responses: Sequence[completion_pb2.CompleteResponse], choice_count: int, created: int
) -> dict[str, object]:
    """A whole completion from the core's answers, one a prompt; created is in Unix seconds."""
    first = responses[0]
    return {
        "id": first.id,
        "object": "text_completion",
        "created": created,
        "model": first.model,
        "choices": [
            _choice_json(choice, place * choice_count + choice.index, response.prompt_logprobs)
            for place, response in enumerate(responses)
            for choice in sorted(response.choices, key=lambda choice: choice.index)
        ],
        "usage": convert.usage_json(total_usage(response.usage for response in responses)),
        "system_fingerprint": first.system_fingerprint,
    }
