from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from osaurus_grpc.errors import (
    DiskFullError,
    InvalidRequestError,
    ModelBusyError,
    ModelExistsError,
    ModelNotFoundError,
    SourceInvalidError,
    SourceUnavailableError,
)
from osaurus_grpc.models.catalog import Catalog
from osaurus_grpc.models.embedding import Pooling, configured_pooling
from osaurus_grpc.models.sources import remove
from osaurus_grpc.models.sources.progress import Progress
from osaurus_grpc.models.sources.staging import claimed
from tests.models.conftest import child_fetch_output, fetch_quietly, leftovers
from tests.models.folders import file_bytes, tensors, write_model
from tests.models.gguf.files import TinyModel


def test_a_local_folder_is_installed_without_what_is_not_needed(models_dir: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "My Model")
    expected = file_bytes(source)
    (source / "run.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    path = fetch_quietly(source, models_dir)
    assert path == models_dir / "My Model"
    assert file_bytes(path) == expected
    assert [entry.id for entry in Catalog(models_dir).entries()] == ["my-model"]
    assert leftovers(models_dir) == []


def test_how_an_embedding_model_pools_comes_along(models_dir: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "embedder")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    path = fetch_quietly(source, models_dir)
    assert configured_pooling(path) is Pooling.FIRST
    assert [entry.id for entry in Catalog(models_dir).entries()] == ["embedder"]


def test_a_snapshot_of_links_becomes_files(models_dir: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(file)
    path = fetch_quietly(snapshot, models_dir)
    assert file_bytes(path) == file_bytes(source)
    assert not any(file.is_symlink() for file in path.iterdir())


def test_files_are_copied_where_they_cannot_be_linked(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "source")

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    # Two file systems cannot be had here.
    monkeypatch.setattr(os, "link", refuse)
    path = fetch_quietly(source, models_dir)
    assert file_bytes(path) == file_bytes(source)
    assert not (path / "model.safetensors").samefile(source / "model.safetensors")


def test_a_local_gguf_is_converted(models_dir: Path, tmp_path: Path) -> None:
    gguf = (
        TinyModel().write_to(tmp_path)
        if hasattr(TinyModel, "write_to")
        else TinyModel().write(tmp_path / "Tiny.gguf")
    )
    path = fetch_quietly(gguf, models_dir)
    assert path == models_dir / "Tiny"
    assert [entry.architecture for entry in Catalog(models_dir).entries()] == ["llama"]


def test_a_cut_off_gguf_is_refused(models_dir: Path, tmp_path: Path) -> None:
    gguf = TinyModel().write(tmp_path / "tiny.gguf")
    gguf.write_bytes(gguf.read_bytes()[:-50])
    with pytest.raises(SourceInvalidError):
        fetch_quietly(gguf, models_dir)
    assert leftovers(models_dir) == []
    assert Catalog(models_dir).entries() == ()


def test_a_folder_of_pickles_is_refused(models_dir: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(SourceInvalidError, match="pickles only"):
        fetch_quietly(source, models_dir)


@pytest.mark.parametrize("name", ["missing", "missing.gguf", "notes.txt"])
def test_a_path_without_a_model(models_dir: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceUnavailableError, match=name.partition(".")[0]) as caught:
        fetch_quietly(tmp_path / name, models_dir)
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize(
    "name", ["../..", "/", "org/../../x", "a/b/c", "org/.hidden", "", "CON/x", "./..", "./\0"]
)
def test_names_cannot_leave_the_models_directory(models_dir: Path, name: str) -> None:
    with pytest.raises((InvalidRequestError, SourceInvalidError, SourceUnavailableError)):
        fetch_quietly(name, models_dir)
    assert not models_dir.exists() or list(models_dir.glob("[!.]*")) == []


def test_an_unknown_short_name(models_dir: Path) -> None:
    with pytest.raises(SourceUnavailableError, match="short name nothing-such"):
        fetch_quietly("nothing-such", models_dir)


def test_something_else_in_the_way(models_dir: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "taken")
    (models_dir / "taken").mkdir(parents=True)
    (models_dir / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ModelExistsError, match="not a complete model"):
        fetch_quietly(source, models_dir)
    assert (models_dir / "taken" / "notes.txt").read_text() == "mine"


def test_a_models_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidRequestError, match="models directory"):
        fetch_quietly(write_model(tmp_path / "source"), tmp_path / "file")


def test_a_full_disk_during_a_conversion(models_dir: Path, tmp_path: Path) -> None:
    gguf = TinyModel().write(tmp_path / "tiny.gguf")
    output = child_fetch_output(gguf, models_dir, file_limit=gguf.stat().st_size // 2)
    assert output.startswith("DiskFullError")
    assert leftovers(models_dir) == []
    assert fetch_quietly(gguf, models_dir).exists()


def test_a_disk_that_is_full_from_the_start(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("osaurus_grpc.models.sources.folder.os.link", another_disk)
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr("osaurus_grpc.models.sources.disk.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError, match=r"needs [1-9]\d* bytes on the disk .* 0 bytes are free\."):
        fetch_quietly(write_model(tmp_path / "source"), models_dir)
    assert leftovers(models_dir) == []


def test_staging_of_the_dead_is_cleared_by_the_next_fetch(models_dir: Path, tmp_path: Path) -> None:
    staging = models_dir / ".staging"
    (staging / "dead" / "model").mkdir(parents=True)
    (staging / "dead" / "download").mkdir()
    (staging / ".trash-1").mkdir()
    recent = staging / "resumable" / "download"
    recent.mkdir(parents=True)
    (recent / "x.part").write_bytes(b"1")
    old = staging / "old" / "download"
    old.mkdir(parents=True)
    (old / "x.part").write_bytes(b"1")
    os.utime(staging / "old", (0, 0))
    fetch_quietly(write_model(tmp_path / "source"), models_dir)
    assert leftovers(models_dir) == ["resumable"]


def test_staging_in_use_is_not_cleared(models_dir: Path, tmp_path: Path) -> None:
    progress = Progress(lambda report: None)
    with claimed(models_dir, "busy", progress, wait_seconds=0.0) as staging:
        fetch_quietly(write_model(tmp_path / "source"), models_dir)
        assert staging.model.is_dir()
        with (
            pytest.raises(ModelBusyError, match="try again later"),
            claimed(models_dir, "Busy", progress, wait_seconds=0.0),
        ):
            pass
    assert leftovers(models_dir) == []


def test_removing_takes_the_folder_and_its_empty_parent(models_dir: Path) -> None:
    write_model(models_dir / "org" / "one")
    write_model(models_dir / "two")
    catalog = Catalog(models_dir)
    one = catalog.find("one")
    remove(one)
    assert sorted(path.name for path in models_dir.iterdir()) == [".staging", "two"]
    assert leftovers(models_dir) == []
    assert [entry.id for entry in catalog.entries()] == ["two"]
    with pytest.raises(ModelNotFoundError):
        remove(one)


def test_removing_a_linked_folder_keeps_what_it_points_to(models_dir: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    models_dir.mkdir()
    (models_dir / "linked").symlink_to(source)
    remove(Catalog(models_dir).find("linked"))
    assert list(models_dir.iterdir()) == []
    assert (source / "model.safetensors").exists()


def test_models_of_the_hub_cache_are_not_removed(models_dir: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    write_model(models_dir / "one")
    cached = replace(Catalog(models_dir).find("one"), is_managed=False)
    with pytest.raises(InvalidRequestError, match="only read"):
        remove(cached)
    assert (models_dir / "one").exists()


def test_a_removed_model_can_be_fetched_again(models_dir: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", weights=tensors(2))
    fetch_quietly(source, models_dir)
    remove(Catalog(models_dir).find("source"))
    assert (source / "model.safetensors").exists(), "its files were links"
    assert fetch_quietly(source, models_dir).exists()
