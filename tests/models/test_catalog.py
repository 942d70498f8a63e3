from __future__ import annotations

import os
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from osaurus_grpc.errors import ModelNotFoundError
from osaurus_grpc.models.catalog import Capability, Catalog, ModelEntry
from tests.models.folders import CHAT_TEMPLATE, CONFIG, tensors, write_json, write_model


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


def ids(models_dir: Path) -> list[str]:
    return [entry.id for entry in Catalog(models_dir).entries()]


def only(models_dir: Path) -> ModelEntry:
    (entry,) = Catalog(models_dir).entries()
    return entry


def write_cached(cache: Path, repo_id: str, revision: str = "a" * 40, current: bool = True) -> Path:
    """A repository as the hub client caches it: links into blobs."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    source = write_model(cache.parent / "source" / revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    if current:
        (repository / "refs" / "main").write_text(revision)
    for file in source.iterdir():
        blob = repository / "blobs" / f"{revision[0]}-{file.name}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_no_models_directory_is_an_empty_listing(tmp_path: Path) -> None:
    assert Catalog(tmp_path / "missing", hub_cache_dir=tmp_path / "too").entries() == ()


def test_both_layouts_are_found_and_nothing_deeper(models_dir: Path) -> None:
    write_model(models_dir / "Plain Name")
    write_model(models_dir / "org" / "Model-4bit")
    write_model(models_dir / "org" / "deep" / "er")
    write_model(models_dir / "org" / "Model-4bit" / "inside")
    entries = Catalog(models_dir).entries()
    assert [(entry.id, entry.repo_id) for entry in entries] == [
        ("model-4bit", "org/Model-4bit"),
        ("plain-name", "Plain Name"),
    ]
    assert all(entry.is_managed for entry in entries)


def test_hidden_and_staging_folders_are_skipped(models_dir: Path) -> None:
    write_model(models_dir / ".staging" / "half")
    write_model(models_dir / ".hidden")
    write_model(models_dir / "org" / ".hidden")
    assert ids(models_dir) == []


def test_linked_folders_are_followed_and_circles_survived(models_dir: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "elsewhere")
    (models_dir / "linked").symlink_to(tmp_path / "elsewhere")
    (models_dir / "circle").symlink_to(models_dir / "circle")
    (models_dir / "up").symlink_to(models_dir)
    (models_dir / "gone").symlink_to(tmp_path / "nowhere")
    found = Catalog(models_dir).entries()
    assert [entry.repo_id for entry in found] == ["linked", "up/linked"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folders_are_skipped(models_dir: Path) -> None:
    write_model(models_dir / "good")
    locked = write_model(models_dir / "locked")
    locked.chmod(0)
    try:
        assert ids(models_dir) == ["good"]
    finally:
        locked.chmod(0o755)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder_is_not_listed(models_dir: Path, missing: str) -> None:
    folder = write_model(models_dir / "model")
    (folder / missing).unlink()
    assert ids(models_dir) == []


@pytest.mark.parametrize(
    "config", ["", "{", "[]", '"x"', "{}", '{"model_type": 7}', "[" * 100_000, "\xff\xfe"]
)
def test_an_unusable_config_is_not_listed(models_dir: Path, config: str) -> None:
    write_model(models_dir / "good")
    folder = write_model(models_dir / "bad")
    (folder / "config.json").write_text(config, encoding="latin-1")
    assert ids(models_dir) == ["good"]


def test_missing_shards_are_noticed_by_index_and_by_name(models_dir: Path) -> None:
    indexed = write_model(models_dir / "indexed", shards=2)
    assert ids(models_dir) == ["indexed"]
    (indexed / "model-00002-of-00002.safetensors").rename(models_dir / "away")
    assert ids(models_dir) == []
    (indexed / "model.safetensors.index.json").unlink()
    assert ids(models_dir) == [], "the other shard's name says that there are two"
    (models_dir / "away").rename(indexed / "model-00002-of-00002.safetensors")
    assert ids(models_dir) == ["indexed"]


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_cut_off_weights_are_not_listed(models_dir: Path, keep: int) -> None:
    weights = write_model(models_dir / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert ids(models_dir) == []


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"null",
        b'{"x": 1}',
        b'{"x": {"dtype": "F32", "shape": "no", "data_offsets": [0, 0]}}',
        b"\xff{}",
    ],
)
def test_a_damaged_header_is_not_listed(models_dir: Path, header: bytes) -> None:
    weights = write_model(models_dir / "model") / "model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    assert ids(models_dir) == []


def test_pickles_are_no_weights(models_dir: Path) -> None:
    folder = write_model(models_dir / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert ids(models_dir) == []


def test_facts_of_a_plain_model(models_dir: Path) -> None:
    folder = write_model(models_dir / "org" / "Tiny")
    entry = only(models_dir)
    assert entry.path == folder
    assert (entry.architecture, entry.quantization, entry.parameter_count) == ("llama", "f32", 4 * 8 + 8)
    assert (entry.context_length, entry.embedding_length) == (64, 8)
    assert entry.size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert entry.capabilities == {Capability.CHAT, Capability.COMPLETION, Capability.TOOLS}
    newest = max(file.stat().st_mtime for file in folder.iterdir())
    assert abs(entry.modify_time - datetime.fromtimestamp(newest, UTC)).total_seconds() < 1


def test_facts_of_a_quantized_model(models_dir: Path) -> None:
    rows, columns, group = 16, 128, 64
    weights = {
        "a.weight": np.zeros((rows, columns * 4 // 32), dtype=np.uint32),
        "a.scales": np.zeros((rows, columns // group), dtype=np.float16),
        "a.biases": np.zeros((rows, columns // group), dtype=np.float16),
        "b.weight": np.zeros((rows, columns * 8 // 32), dtype=np.uint32),
        "b.scales": np.zeros((rows, columns // 32), dtype=np.float16),
        "b.biases": np.zeros((rows, columns // 32), dtype=np.float16),
        "norm.weight": np.zeros(columns, dtype=np.float16),
    }
    scheme = {"bits": 4, "group_size": group, "b": {"bits": 8, "group_size": 32}}
    write_model(models_dir / "model", config=CONFIG | {"quantization": scheme}, weights=weights)
    entry = only(models_dir)
    assert entry.parameter_count == 2 * rows * columns + columns
    assert entry.quantization == "4bit"


def test_the_name_of_a_converted_gguf_s_quantization_is_taken_over(models_dir: Path) -> None:
    config = CONFIG | {"quantization": {"bits": 4, "group_size": 32}, "osaurus": {"quantization": "Q4_K"}}
    write_model(models_dir / "model", config=config)
    assert only(models_dir).quantization == "Q4_K"


def test_lengths_are_found_in_a_nested_text_configuration(models_dir: Path) -> None:
    text = {"max_position_embeddings": 4096, "hidden_size": 16}
    write_model(models_dir / "model", config={"model_type": "gemma3", "text_config": text})
    assert (only(models_dir).context_length, only(models_dir).embedding_length) == (4096, 16)


@pytest.mark.parametrize(
    ("model_type", "template", "expected"),
    [
        ("llama", None, {Capability.COMPLETION}),
        ("llama", CHAT_TEMPLATE, {Capability.COMPLETION, Capability.CHAT, Capability.TOOLS}),
        (
            "qwen3",
            "<think>\n",
            {Capability.COMPLETION, Capability.CHAT, Capability.TOOLS, Capability.REASONING},
        ),
        ("bert", None, {Capability.EMBEDDING}),
        ("modernbert", CHAT_TEMPLATE, {Capability.EMBEDDING}),
    ],
)
def test_capabilities(models_dir: Path, model_type: str, template: str, expected: set[Capability]) -> None:
    write_model(models_dir / "model", config=CONFIG | {"model_type": model_type}, template=template)
    assert only(models_dir).capabilities == expected


def test_chat_templates_are_found_wherever_they_lie(models_dir: Path) -> None:
    folder = write_model(models_dir / "model", template=None)
    catalog = Catalog(models_dir)

    def template() -> str:
        return catalog.chat_template(catalog.find("model"))

    assert template() == ""
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": named})
    assert template() == "one"
    write_json(folder / "chat_template.json", {"chat_template": "three"})
    assert template() == "three"
    (folder / "chat_template.jinja").write_text("four")
    assert template() == "four"
    assert Capability.CHAT in catalog.find("model").capabilities


def test_the_digest_is_stable_and_follows_the_weights(models_dir: Path) -> None:
    folder = write_model(models_dir / "model")
    # Well before the write below, whatever the clock's resolution.
    os.utime(folder / "model.safetensors", (10**9, 10**9))
    catalog = Catalog(models_dir)
    first = catalog.find("model").digest
    assert len(first) == 64
    assert set(first) <= set("0123456789abcdef")
    assert only(models_dir).digest == first, "a new process sees the same digest"

    weights = folder / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    second = catalog.find("model").digest
    assert second != first, "one bit of a weight, same size"

    write_json(folder / "config.json", CONFIG | {"rope_theta": 5})
    assert catalog.find("model").digest != second


def test_new_changed_and_removed_models_are_seen_at_once(models_dir: Path) -> None:
    catalog = Catalog(models_dir)
    assert catalog.entries() == ()
    folder = write_model(models_dir / "one")
    assert [entry.id for entry in catalog.entries()] == ["one"]
    write_model(folder, weights=tensors(rows=9))
    assert catalog.find("one").parameter_count == 9 * 8 + 8
    (folder / "config.json").unlink()
    assert catalog.entries() == ()


def test_an_unchanged_listing_reads_no_file_again(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(models_dir / "one")
    catalog = Catalog(models_dir)
    first = catalog.entries()

    def fail(*arguments: object) -> None:
        pytest.fail("the folder was read again")

    monkeypatch.setattr("osaurus_grpc.models.catalog.inspect", fail)
    assert catalog.entries() is first


def test_listing_survives_models_that_come_and_go(models_dir: Path) -> None:
    write_model(models_dir / "stays")
    catalog, stop = Catalog(models_dir), threading.Event()

    def churn() -> None:
        while not stop.is_set():
            folder = write_model(models_dir / "org" / "flickers")
            for file in list(folder.iterdir()):
                file.unlink()
            folder.rmdir()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(200):
            assert "stays" in [entry.id for entry in catalog.entries()]
    finally:
        stop.set()
        thread.join()
    assert [entry.id for entry in catalog.entries()] == ["stays"]


def test_the_hub_cache_is_listed_read_only_at_its_current_revision(models_dir: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    write_cached(cache, "org/Cached", "a" * 40, current=False)
    current = write_cached(cache, "org/Cached", "b" * 40)
    write_cached(cache, "org/NoRef", "c" * 40, current=False)
    half = write_cached(cache, "org/Half", "d" * 40)
    (half / "model.safetensors").unlink()
    (entry,) = Catalog(models_dir, hub_cache_dir=cache).entries()
    assert (entry.id, entry.repo_id, entry.path) == ("cached", "org/Cached", current)
    assert not entry.is_managed


def test_a_cached_model_is_seen_when_its_download_completes(models_dir: Path, tmp_path: Path) -> None:
    snapshot = write_cached(tmp_path / "hub", "org/Cached")
    link = snapshot / "model.safetensors"
    target = link.readlink()
    link.unlink()
    catalog = Catalog(models_dir, hub_cache_dir=tmp_path / "hub")
    assert catalog.entries() == ()
    link.symlink_to(target)
    assert [entry.id for entry in catalog.entries()] == ["cached"]


def test_the_models_directory_wins_over_the_cache(models_dir: Path, tmp_path: Path) -> None:
    write_cached(tmp_path / "hub", "org/Model")
    write_model(models_dir / "org" / "model")
    (entry,) = Catalog(models_dir, hub_cache_dir=tmp_path / "hub").entries()
    assert entry.is_managed


def test_a_damaged_folder_does_not_hide_the_cached_model(models_dir: Path, tmp_path: Path) -> None:
    write_cached(tmp_path / "hub", "org/Model")
    (write_model(models_dir / "org" / "Model") / "tokenizer.json").unlink()
    (entry,) = Catalog(models_dir, hub_cache_dir=tmp_path / "hub").entries()
    assert not entry.is_managed


def test_one_basename_in_two_places_is_qualified(models_dir: Path, tmp_path: Path) -> None:
    write_cached(tmp_path / "hub", "other/Model")
    write_model(models_dir / "org" / "Model")
    catalog = Catalog(models_dir, hub_cache_dir=tmp_path / "hub")
    assert [entry.id for entry in catalog.entries()] == ["org--model", "other--model"]
    assert catalog.find("Other/Model").id == "other--model"
    with pytest.raises(ModelNotFoundError, match="Model not found: model"):
        catalog.find("model")


def test_finding_by_default_alias_and_fallback(models_dir: Path) -> None:
    write_model(models_dir / "one")
    catalog = Catalog(models_dir)
    assert catalog.find("").id == catalog.find("default").id == "one"
    write_model(models_dir / "two-4bit")
    assert catalog.default() is None
    with pytest.raises(ModelNotFoundError, match="Model not found: default"):
        catalog.find("")
    write_model(models_dir / "encoder", config={**CONFIG, "model_type": "bert"})
    shutil.rmtree(models_dir / "two-4bit")
    assert catalog.find("").id == "one", "an embedding model is nobody's default beside one that talks"
    write_model(models_dir / "two-4bit")
    configured = Catalog(models_dir, default_model="TWO", aliases={"gpt": "one"}, fallback_model="gpt")
    assert configured.find("default").id == "two-4bit"
    assert configured.find("GPT:latest").id == configured.find("unknown").id == "one"
    with pytest.raises(ModelNotFoundError, match="Model not found: gone"):
        Catalog(models_dir, default_model="gone").find("")
