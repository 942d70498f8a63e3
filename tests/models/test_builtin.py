from __future__ import annotations

import re
from pathlib import Path

import pytest

from osaurus_grpc.models.catalog import Capability, Catalog
from osaurus_grpc.models.naming import basename_id, check_repo_id
from osaurus_grpc.models.sources import builtin
from osaurus_grpc.models.sources.reference import parse
from osaurus_grpc.models.sources.types import HubSource, LocalSource, PackageSource, Wheel


def test_short_names_are_ids_of_what_they_install() -> None:
    assert builtin.names()[0] == builtin.DEFAULT_NAME == "smollm2-135m-instruct"
    assert len(set(builtin.names())) == len(builtin.names())
    for model in builtin.models():
        assert check_repo_id(model.name) == basename_id(model.name) == model.name
        if isinstance(model.source, HubSource):
            assert basename_id(model.source.repo_id) == model.name
        assert model.licence
        assert model.description
        assert model.size_bytes > 0


def test_everything_from_the_package_index_is_pinned() -> None:
    for model in builtin.models():
        if isinstance(model.source, PackageSource):
            digests = [wheel.sha256 for wheel in model.source.wheels]
            if model.source.member:  # of a wheel that is a model folder, its own digest is all there is
                digests.append(model.source.sha256)
            assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests)
            assert len(set(digests)) == len(digests)


def test_names_are_understood(tmp_path: Path) -> None:
    assert parse("SmolLM2-135M-Instruct:latest").name == "smollm2-135m-instruct"
    hub = parse("org/Name-4bit")
    assert (hub.name, hub.source) == ("org/Name-4bit", HubSource("org/Name-4bit"))
    package = parse("pypi:Some_Package==1.0")
    assert (package.name, package.source) == (
        "some-package",
        PackageSource((Wheel("some-package", "1.0"),)),
    )
    local = parse(str(tmp_path / "My File.gguf"))
    assert (local.name, local.source) == ("My File", LocalSource(tmp_path / "My File.gguf"))


def test_a_hub_model_of_the_table_lies_where_its_full_name_would_put_it() -> None:
    assert parse("qwen3-0.6b-4bit").name == parse("mlx-community/Qwen3-0.6B-4bit").name


@pytest.mark.smollm
def test_smollm_is_fetched_from_the_package_index_and_listed(smollm_dir: Path) -> None:
    entry = Catalog(smollm_dir).find("SmolLM2-135M-Instruct:latest")
    assert entry.id == "smollm2-135m-instruct"
    assert (entry.architecture, entry.quantization) == ("llama", "Q4_1")
    assert entry.parameter_count == 134_515_008
    assert (entry.context_length, entry.embedding_length) == (8192, 576)
    assert entry.capabilities == {Capability.CHAT, Capability.COMPLETION, Capability.TOOLS}
    assert "<|im_start|>" in Catalog(smollm_dir).chat_template(entry)
    assert (entry.path / "LICENSE").exists()
    assert not list((smollm_dir / ".staging").glob("[!.]*"))


@pytest.mark.smollm
def test_the_suite_s_tiny_model_is_a_whole_model(tiny_dir: Path) -> None:
    (entry,) = Catalog(tiny_dir).entries()
    assert (entry.id, entry.quantization) == ("tiny-llama", "f32")
    assert Capability.CHAT in entry.capabilities
