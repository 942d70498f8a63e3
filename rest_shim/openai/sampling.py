"""The sampling fields that OpenAI's requests share, and their conversion."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, StringConstraints

from osaurus_grpc.v1 import sampling_pb2
from rest_shim.bodies import Body, Integer
from rest_shim.errors import Refusal

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024

# Keeps the most probable token only, which is what top_p 0 means; the core takes values above 0.
SMALLEST_TOP_P = 1e-6

_TOKEN_ID = re.compile(r"[0-9]{1,10}", re.ASCII)


def _stops(value: object) -> object:
    if isinstance(value, str):
        if not 1 <= len(value) <= MAX_STOP_CHARACTERS:
            # Said here, since the list's item would be named otherwise.
            raise ValueError(f"must have 1 to {MAX_STOP_CHARACTERS} characters")
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of strings")
    return value


StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenCount = Annotated[Integer, Field(ge=1, le=MAX_INT32)]
TokenId = Annotated[Integer, Field(ge=0, le=MAX_INT32)]
_Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS)]


class SamplingFields(Body):
    """How tokens are chosen: OpenAI's fields and those that local servers share."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    # -1 is vLLM's way to say "off".
    top_k: Annotated[Integer, Field(ge=-1, le=MAX_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,10}$"}}
    )
    seed: Annotated[Integer, Field(ge=-MAX_INT64 - 1, le=MAX_INT64)] | None = None
    stop: Annotated[_Stops, BeforeValidator(_stops, json_schema_input_type=StopText | _Stops)] = Field(
        default_factory=list
    )


def sampling_params(
    body: SamplingFields, *, max_tokens: int | None, top_logprobs: int | None
) -> sampling_pb2.SamplingParams:
    """The core's settings; what is None stays unset there.

    Raises:
        Refusal: A key of logit_bias is no token id.
    """
    return sampling_pb2.SamplingParams(
        temperature=body.temperature,
        top_p=None if body.top_p is None else max(body.top_p, SMALLEST_TOP_P),
        top_k=None if body.top_k is None else max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias={_token_id(key): value for key, value in body.logit_bias.items()},
        seed=body.seed,
        max_tokens=max_tokens,
        stop=body.stop,
        top_logprobs=top_logprobs,
    )


def _token_id(key: str) -> int:
    if not _TOKEN_ID.fullmatch(key) or int(key) > MAX_INT32:
        raise Refusal(400, "Invalid 'logit_bias': keys must be token ids of the model.", param="logit_bias")
    return int(key)
