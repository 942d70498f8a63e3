"""A real model through gRPC: answers that mean something."""

from __future__ import annotations

import grpc
import pytest

from osaurus_grpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.server.cores import chat_request, stream_request, text_of

pytestmark = pytest.mark.smollm

SMOLLM = "smollm2-135m-instruct"


def test_the_capital_of_france(smollm_core: str) -> None:
    request = chat_request("What is the capital of France?", model=SMOLLM, max_tokens=24)
    with grpc.insecure_channel(smollm_core) as channel:
        stub = InferenceServiceStub(channel)
        response = stub.Chat(request)
        events = list(stub.ChatStream(stream_request(request)))

    assert "Paris" in text_of(response)
    streamed = "".join(event.content.text for event in events if event.WhichOneof("event") == "content")
    assert streamed == text_of(response)


def test_stop_texts_across_tokens(smollm_core: str) -> None:
    request = chat_request(
        "What is the capital of France?", model=SMOLLM, max_tokens=24, stop=["tal of Fra"], top_logprobs=0
    )
    with grpc.insecure_channel(smollm_core) as channel:
        response = InferenceServiceStub(channel).Chat(request)

    text = text_of(response)
    assert text.endswith("capi")
    assert response.choices[0].stop_sequence == "tal of Fra"
    shown = b"".join(token.chosen.token for token in response.choices[0].logprobs.tokens).decode()
    assert shown.startswith(text)
