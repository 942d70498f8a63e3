"""What stubs of earlier releases wrote is understood, and what a newer release adds is not lost."""

from __future__ import annotations

import base64
import json

import pytest
from google.protobuf import json_format, symbol_database
from google.protobuf.message_factory import GetMessageClass

from osaurus_grpc.v1 import chat_pb2, model_pb2, sampling_pb2
from tests.interop.golden_messages import GOLDEN, descriptors, filled

CASES = [
    pytest.param(name, record, id=f"{path.stem}-{name}")
    for path in sorted(GOLDEN.glob("*.json"))
    for name, record in json.loads(path.read_text()).items()
]


def test_there_are_goldens():
    assert len(CASES) > 50


@pytest.mark.parametrize(("name", "record"), CASES)
def test_old_messages_are_understood(name, record):
    kind = GetMessageClass(symbol_database.Default().pool.FindMessageTypeByName(name))
    message = kind.FromString(base64.b64decode(record["bytes"]))
    assert json_format.MessageToDict(message, preserving_proto_field_name=True) == record["value"]
    assert message.SerializeToString(deterministic=True) == base64.b64decode(record["bytes"])


@pytest.mark.parametrize("descriptor", list(descriptors()), ids=lambda descriptor: descriptor.name)
def test_fields_of_a_newer_release_survive(descriptor):
    kind = GetMessageClass(descriptor)
    # Field 12345 of wire type 2 with the three bytes "new".
    unknown = b"\xca\x83\x06\x03new"
    sent = filled(descriptor).SerializeToString() + unknown
    assert unknown in kind.FromString(sent).SerializeToString()


def test_enum_values_of_a_newer_release_survive():
    newer = chat_pb2.ChoiceFinished(choice_index=1, finish_reason=99)  # type: ignore[arg-type]  # newer
    passed_on = chat_pb2.ChoiceFinished.FromString(newer.SerializeToString())
    assert passed_on.finish_reason == 99
    assert chat_pb2.ChoiceFinished.FromString(passed_on.SerializeToString()) == newer
    model = model_pb2.Model(capabilities=[model_pb2.CAPABILITY_CHAT, 77])  # type: ignore[list-item]  # newer
    assert list(model_pb2.Model.FromString(model.SerializeToString()).capabilities) == [1, 77]
    assert 99 not in sampling_pb2.FinishReason.values()


def test_an_event_of_a_newer_release_has_no_known_kind():
    newer = chat_pb2.ChatStreamResponse.FromString(b"\xca\x83\x06\x03new")
    assert newer.WhichOneof("event") is None
