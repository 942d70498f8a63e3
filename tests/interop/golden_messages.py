"""Golden messages: every message of the contract with every field set, as stubs of a release wrote it.

`python -m tests.interop.golden_messages NAME` writes golden/NAME.json for a new release. Files of
earlier releases are never written again: what old stubs sent must go on being understood.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from osaurus_grpc.v1 import (
    chat_pb2,
    completion_pb2,
    embedding_pb2,
    inference_service_pb2,
    model_pb2,
    model_service_pb2,
    record_service_pb2,
    sampling_pb2,
    usage_pb2,
)

GOLDEN = Path(__file__).parent / "golden"
_FILES = (
    chat_pb2, completion_pb2, embedding_pb2, inference_service_pb2, model_pb2, model_service_pb2,
    record_service_pb2, sampling_pb2, usage_pb2,
)  # fmt: skip
_DEPTH = 4


def descriptors() -> Iterator[Descriptor]:
    """All messages of the contract."""
    for file in _FILES:
        yield from file.DESCRIPTOR.message_types_by_name.values()


def filled(descriptor: Descriptor, depth: int = _DEPTH) -> Message:
    """A message with all its fields set, of oneofs the last member; nested ones down to a depth."""
    message: Message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        _fill(message, field, depth)
    return message


def _fill(message: Message, field: FieldDescriptor, depth: int) -> None:
    target: Any = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        target.update({7: 1.5})  # the one kind of map there is
    elif field.message_type is not None:
        if depth == 0:
            return
        values = filled(field.message_type, depth - 1)
        if field.is_repeated:
            target.extend([values, values])
        else:
            target.CopyFrom(values)
    elif field.is_repeated:
        target.extend([_scalar(field, 1), _scalar(field, 2)])
    else:
        setattr(message, field.name, _scalar(field, 1))


def _scalar(field: FieldDescriptor, variant: int) -> Any:
    if field.enum_type is not None:
        return field.enum_type.values[-variant].number
    number = field.number * 10 + variant
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            text = f"{field.name} {variant} é☃"
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
        case FieldDescriptor.CPPTYPE_BOOL:
            return True
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return number + 0.5
        case FieldDescriptor.CPPTYPE_INT64:
            # Larger than a double holds exactly, except in Duration and Timestamp, which have bounds.
            return number if field.name == "seconds" else 2**53 + number
        case _:
            return number


def written(message: Message) -> dict[str, Any]:
    """A message as a golden file holds it."""
    return {
        "bytes": base64.b64encode(message.SerializeToString(deterministic=True)).decode(),
        "value": json_format.MessageToDict(message, preserving_proto_field_name=True),
    }


def main() -> None:
    path = GOLDEN / f"{sys.argv[1]}.json"
    if path.exists():
        raise SystemExit(f"{path.name} exists; goldens of a release are never written again")
    found = {descriptor.full_name: written(filled(descriptor)) for descriptor in descriptors()}
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
