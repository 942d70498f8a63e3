from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from osaurus_grpc.errors import SourceInvalidError
from osaurus_grpc.models.sources.gguf import convert
from osaurus_grpc.models.sources.gguf.reader import GGUFFile
from tests.models.gguf.files import TinyModel

UINT8, UINT32, STRING, ARRAY, UINT64 = 0, 4, 8, 9, 10
F32 = 0
HUGE = 1 << 60


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(*, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def value(key: bytes, kind: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + data


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def padded(data: bytes, body: bytes = b"") -> bytes:
    return data + b"\0" * (-len(data) % 32) + body


def message(data: bytes, folder: Path) -> str:
    path = folder / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(SourceInvalidError) as caught:
        GGUFFile(path)
    return caught.value.message


def test_reads_metadata_and_tensors(tmp_path):
    model = TinyModel(metadata={"general.name": "Tiny", "x.flag": True, "x.real": 0.5, "x.list": [1, 2]})
    with GGUFFile(model.write(tmp_path / "tiny.gguf")) as file:
        assert file.metadata["general.name"] == "Tiny"
        assert file.metadata["x.flag"] is True
        assert file.metadata["x.real"] == 0.5
        assert file.metadata["x.list"].tolist() == [1, 2]
        assert file.metadata["tokenizer.ggml.tokens"][1] == "<|im_start|>"
        stored = model.stored()
        assert file.tensors.keys() == stored.keys()
        for name, values in stored.items():
            info = file.tensors[name]
            assert info.shape == values.shape
            rows = file.read_rows(info, 0, info.row_count)
            np.testing.assert_array_equal(rows.view("<f4").reshape(values.shape), values)
        info = file.tensors["token_embd.weight"]
        part = file.read_rows(info, 5, 3).view("<f4")
        np.testing.assert_array_equal(part, stored["token_embd.weight"][5:8])


CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "short": (b"GG", "not a GGUF file"),
    "another format": (b"PK\x03\x04" + b"\0" * 64, "not a GGUF file"),
    "magic alone": (b"GGUF", "cut off"),
    "version 1": (header(version=1), "version 1"),
    "version 4": (header(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "too many keys": (header(keys=HUGE), "claims"),
    "too many tensors": (header(tensors=HUGE), "claims"),
    "keys that are not there": (header(keys=9), "cut off"),
    "tensors that are not there": (header(tensors=9), "cut off"),
    "a huge text": (header(keys=1) + struct.pack("<Q", HUGE), "cut off"),
    "a huge array of bytes": (
        header(keys=1) + value(b"a", ARRAY, struct.pack("<IQ", UINT8, HUGE)),
        "cut off",
    ),
    "a huge array of texts": (
        header(keys=1) + value(b"a", ARRAY, struct.pack("<IQ", STRING, HUGE)),
        "cut off",
    ),
    "an array of arrays": (
        header(keys=1) + value(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1)),
        "array of arrays",
    ),
    "an unknown value type": (header(keys=1) + value(b"a", 99, b""), "unknown type 99"),
    "a key twice": (header(keys=2) + value(b"a", UINT8, b"1") * 2, "'a' appears twice"),
    "text that is not UTF-8": (header(keys=1) + value(b"a", STRING, text(b"\xff\xfe")), "not UTF-8"),
    "a long key": (header(keys=1) + value(b"k" * 5000, UINT8, b"1"), "longer than"),
    "no dimensions": (header(tensors=1) + tensor(b"t", (), F32, 0), "0 dimensions"),
    "many dimensions": (header(tensors=1) + tensor(b"t", (1,) * 5, F32, 0), "5 dimensions"),
    "an empty dimension": (header(tensors=1) + tensor(b"t", (4, 0), F32, 0), "shape"),
    "a huge tensor": (header(tensors=1) + padded(tensor(b"t", (HUGE, HUGE), F32, 0)), "cut off"),
    "an unknown tensor type": (
        header(tensors=1) + tensor(b"t", (4,), 99, 0),
        "Tensor t is stored as the unknown type 99, which cannot be converted",
    ),
    "half a block": (header(tensors=1) + tensor(b"t", (48,), 2, 0), "which Q4_0 cannot hold"),
    "a tensor past the end": (
        padded(header(tensors=1) + tensor(b"t", (4,), F32, 1024), b"\0" * 64),
        "cut off",
    ),
    "a tensor that is cut": (padded(header(tensors=1) + tensor(b"t", (64,), F32, 0), b"\0" * 255), "cut off"),
    "a misaligned tensor": (padded(header(tensors=1) + tensor(b"t", (4,), F32, 4), b"\0" * 64), "misplaced"),
    "an offset that overflows": (
        padded(header(tensors=1) + tensor(b"t", (4,), F32, (1 << 64) - 32), b"\0" * 64),
        "cut off",
    ),
    "tensors upon each other": (
        padded(header(tensors=2) + tensor(b"t", (64,), F32, 0) + tensor(b"u", (64,), F32, 32), b"\0" * 512),
        "tensor u is misplaced",
    ),
    "a tensor twice": (
        padded(header(tensors=2) + tensor(b"t", (4,), F32, 0) + tensor(b"t", (4,), F32, 32), b"\0" * 512),
        "tensor t appears twice",
    ),
    "an odd alignment": (
        header(keys=1) + value(b"general.alignment", UINT32, struct.pack("<I", 24)),
        "alignment",
    ),
    "no alignment": (
        header(keys=1) + value(b"general.alignment", UINT32, struct.pack("<I", 0)),
        "alignment",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_file_is_refused_and_says_why(case, tmp_path):
    data, expected = CORRUPT[case]
    assert expected in message(data, tmp_path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SourceInvalidError, match="cannot be opened"):
        GGUFFile(tmp_path / "none.gguf")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(SourceInvalidError, match="cannot be opened"):
        GGUFFile(tmp_path)


def outcome(source: Path, target: Path) -> str:
    """Converts; "" on success. Anything but a SourceInvalidError fails the test."""
    target.mkdir()
    try:
        convert(source, target)
    except SourceInvalidError as error:
        return error.message
    return ""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return TinyModel(tied=True).write(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


def header_bytes(whole: bytes, folder: Path) -> int:
    path = folder / "whole.gguf"
    path.write_bytes(whole)
    with GGUFFile(path) as file:
        return min(tensor.offset for tensor in file.tensors.values())


def test_a_file_cut_anywhere_is_refused(whole, tmp_path):
    data_start = header_bytes(whole, tmp_path)
    lengths = [*range(0, data_start, 97), *np.linspace(data_start, len(whole) - 1, 40).astype(int)]
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    for number, length in enumerate(sorted(lengths, reverse=True)):
        os.truncate(path, length)
        found = outcome(path, tmp_path / str(number))
        assert str(tmp_path) not in found
        assert "cut off" in found or (length < 4 and "not a GGUF file" in found), length


def test_a_file_that_shrinks_while_it_is_read_is_refused(whole, tmp_path):
    path = tmp_path / "shrinking.gguf"
    path.write_bytes(whole)
    (tmp_path / "model").mkdir()

    def shrink(_: object) -> None:
        os.truncate(path, len(whole) // 2)

    with pytest.raises(SourceInvalidError, match="cut off"):
        convert(path, tmp_path / "model", report=shrink)


def damage(
    whole: bytes, end: int, change: Callable[[random.Random, bytearray, int], None], seed: int
) -> bytes:
    source = random.Random(seed)
    data = bytearray(whole)
    for _ in range(source.randint(1, 4)):
        change(source, data, source.randrange(end))
    return bytes(data)


def flip(source: random.Random, data: bytearray, at: int) -> None:
    data[at] ^= 1 << source.randrange(8)


def overwrite(source: random.Random, data: bytearray, at: int) -> None:
    word = source.choice([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000])
    data[at : at + 4] = struct.pack("<I", word)


@pytest.mark.parametrize("change", [flip, overwrite])
def test_a_damaged_header_never_raises_anything_else(change, whole, tmp_path):
    end = header_bytes(whole, tmp_path)
    refused = 0
    for seed in range(120):
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damage(whole, end, change, seed))
        refused += bool(outcome(path, tmp_path / str(seed)))
    assert refused > 30
