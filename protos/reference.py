"""The API reference, protos/REFERENCE.md, made of the comments in the protos."""

from __future__ import annotations

import importlib.resources
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "osaurus" / "v1"
TARGET = ROOT / "REFERENCE.md"

_PACKAGE = "osaurus.v1"
_HEAD = """# API reference of osaurus.v1

Made by `python protos/generate.py` from the comments in `protos/osaurus/v1`; not edited by hand.

"""
# Field numbers of descriptor.proto, by which a comment names the place it belongs to.
_FILE_MESSAGE, _FILE_ENUM, _FILE_SERVICE = 4, 5, 6
_MESSAGE_FIELD, _MESSAGE_NESTED, _MESSAGE_ONEOF = 2, 3, 8
_ENUM_VALUE, _SERVICE_METHOD = 2, 2
_FILE_PACKAGE = 2

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    _Field.TYPE_DOUBLE: "double", _Field.TYPE_FLOAT: "float", _Field.TYPE_INT64: "int64",
    _Field.TYPE_INT32: "int32", _Field.TYPE_BOOL: "bool", _Field.TYPE_STRING: "string",
    _Field.TYPE_BYTES: "bytes",
}  # fmt: skip


def reference() -> str:
    """The page. Raises RuntimeError where protoc refuses the protos."""
    files = _files()
    lines = [_HEAD]
    lines += [f"- [`{file.name.rpartition('/')[2]}`](#{_anchor(file.name)})\n" for file in files]
    for file in files:
        lines += _file(file)
    return "".join(lines)


def _files() -> Sequence[descriptor_pb2.FileDescriptorProto]:
    """Our files with their comments; those with services first."""
    well_known = str(importlib.resources.files("grpc_tools") / "_proto")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "set"
        arguments = ["protoc", f"-I{ROOT}", f"-I{well_known}", "--include_source_info"]
        arguments += [f"--descriptor_set_out={out}", *sorted(str(path) for path in SOURCE.glob("*.proto"))]
        if protoc.main(arguments) != 0:
            raise RuntimeError("protoc failed")
        found = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    return sorted(found, key=lambda file: (not file.service, file.name))


def _anchor(file_name: str) -> str:
    return file_name.rpartition("/")[2].replace(".", "")


class _Comments:
    """The comments of a file by the place they belong to."""

    def __init__(self, file: descriptor_pb2.FileDescriptorProto) -> None:
        self._texts = {
            tuple(place.path): place.leading_comments or place.trailing_comments
            for place in file.source_code_info.location
        }

    def at(self, *path: int) -> str:
        """One paragraph, or "" where there is none."""
        return " ".join(self._texts.get(path, "").split())

    def lines_at(self, *path: int) -> str:
        """The comment as it is written."""
        return "\n".join(line.removeprefix(" ") for line in self._texts.get(path, "").splitlines())


def _file(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    comments = _Comments(file)
    yield f"\n## {file.name.rpartition('/')[2]}\n\n"
    if about := comments.lines_at(_FILE_PACKAGE):
        yield f"{about}\n\n"
    for i, service in enumerate(file.service):
        yield f"### Service {service.name}\n\n{comments.at(_FILE_SERVICE, i)}\n\n"
        yield "| RPC | request | response | |\n|---|---|---|---|\n"
        for j, method in enumerate(service.method):
            stream = "stream of " if method.server_streaming else ""
            text = comments.at(_FILE_SERVICE, i, _SERVICE_METHOD, j)
            yield (
                f"| `{method.name}` | {_linked(method.input_type)} | {stream}{_linked(method.output_type)} "
                f"| {_cell(text)} |\n"
            )
        yield "\n"
    for i, message in enumerate(file.message_type):
        yield from _message(message, comments, (_FILE_MESSAGE, i))
    for i, enum in enumerate(file.enum_type):
        yield from _enum(enum, comments, (_FILE_ENUM, i))


def _message(
    message: descriptor_pb2.DescriptorProto, comments: _Comments, path: tuple[int, ...]
) -> Iterator[str]:
    yield f"### {message.name}\n\n{comments.at(*path)}\n\n"
    if not message.field:
        return
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    yield "| field | type | |\n|---|---|---|\n"
    for i, field in enumerate(message.field):
        text = comments.at(*path, _MESSAGE_FIELD, i)
        yield f"| `{field.name}` = {field.number} | {_type(field, maps, message)} | {_cell(text)} |\n"
    yield "\n"


def _type(
    field: descriptor_pb2.FieldDescriptorProto,
    maps: dict[str, descriptor_pb2.DescriptorProto],
    message: descriptor_pb2.DescriptorProto,
) -> str:
    entry = maps.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = (_plain_type(each) for each in entry.field)
        return f"map of {key} to {value}"
    name = _plain_type(field)
    if field.label == _Field.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name} (one of `{message.oneof_decl[field.oneof_index].name}`)"
    return name


def _plain_type(field: descriptor_pb2.FieldDescriptorProto) -> str:
    return _SCALARS.get(field.type) or _linked(field.type_name)


def _linked(type_name: str) -> str:
    name = type_name.removeprefix(".")
    bare = name.removeprefix(f"{_PACKAGE}.")
    return f"[{bare}](#{bare.lower()})" if bare != name else f"`{name}`"


def _enum(
    enum: descriptor_pb2.EnumDescriptorProto, comments: _Comments, path: tuple[int, ...]
) -> Iterator[str]:
    yield f"### {enum.name}\n\n{comments.at(*path)}\n\n| value | |\n|---|---|\n"
    for i, value in enumerate(enum.value):
        yield f"| `{value.name}` = {value.number} | {_cell(comments.at(*path, _ENUM_VALUE, i))} |\n"
    yield "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
