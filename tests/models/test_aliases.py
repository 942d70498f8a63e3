"""Second names of models, on disk and in the catalog."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from osaurus_grpc.errors import (
    InvalidRequestError,
    ModelExistsError,
    ModelNotFoundError,
    ModelUnusableError,
    OsaurusError,
)
from osaurus_grpc.models.aliases import ALIASES_FILE, AliasFile
from osaurus_grpc.models.catalog import Catalog
from tests.models.folders import write_model


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    write_model(tmp_path / "org" / "Alpha-4bit")
    write_model(tmp_path / "beta")
    return Catalog(tmp_path, aliases={"configured": "beta"})


def test_an_alias_means_its_model_and_is_listed(catalog: Catalog) -> None:
    made = catalog.add_alias("org/Alpha-4bit", "My Copy:latest")

    assert (made.id, made.alias_of) == ("my-copy", "alpha-4bit")
    assert catalog.find("my-copy:latest").id == "alpha-4bit"
    assert [entry.id for entry in catalog.listed()] == ["alpha-4bit", "beta", "my-copy"]
    assert [entry.id for entry in catalog.entries()] == ["alpha-4bit", "beta"]
    assert catalog.find_listed("MY-COPY") == made
    assert catalog.find_listed("alpha").id == "alpha-4bit"
    assert made.digest == catalog.find("alpha-4bit").digest


def test_another_process_sees_it(catalog: Catalog, tmp_path: Path) -> None:
    other = Catalog(tmp_path)
    assert other.listed()
    catalog.add_alias("beta", "b:1")
    catalog.add_alias("b:1", "user/b")

    assert other.find("b:1").id == other.find("user/b").id == "beta"
    assert catalog.remove_alias("B:1")
    with pytest.raises(ModelNotFoundError):
        other.find("b:1")
    assert other.find("user/b").id == "beta"


def test_an_alias_may_change_its_meaning(catalog: Catalog) -> None:
    catalog.add_alias("beta", "x")
    catalog.add_alias("alpha-4bit", "x")

    assert catalog.find("x").id == "alpha-4bit"


def test_an_alias_in_ollamas_library_is_one_without(catalog: Catalog) -> None:
    assert catalog.add_alias("library/alpha", "library/Fast:latest").id == "fast"
    assert catalog.find("fast").id == catalog.find("library/fast").id == "alpha-4bit"
    assert catalog.find_listed("library/fast").id == "fast"
    assert catalog.find("registry.ollama.ai/library/fast:latest").id == "alpha-4bit"
    assert catalog.remove_alias("library/fast")
    assert not catalog.remove_alias("fast")


@pytest.mark.parametrize("name", ["beta", "BETA:latest", "org/alpha-4bit", "configured"])
def test_a_name_that_is_taken(catalog: Catalog, name: str) -> None:
    source = "beta" if name == "org/alpha-4bit" else "alpha-4bit"
    with pytest.raises(ModelExistsError):
        catalog.add_alias(source, name)


def test_a_model_is_no_alias_of_itself(catalog: Catalog) -> None:
    with pytest.raises(ModelExistsError):
        catalog.add_alias("beta", "beta")


@pytest.mark.parametrize(
    "name", ["", "default", "../up", "-x", "x" * 201, ".hidden", "a b\x00", "a/", "a:", "library/"]
)
def test_a_name_that_cannot_be(catalog: Catalog, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        catalog.add_alias("beta", name)

    assert raised.value.field == "destination"
    assert not (tmp_path / ALIASES_FILE).exists()


def test_an_unknown_model_has_no_alias(catalog: Catalog) -> None:
    with pytest.raises(ModelNotFoundError):
        catalog.add_alias("gamma", "g")
    assert not catalog.remove_alias("g")
    assert not catalog.remove_alias("beta")


def test_an_alias_without_its_model_is_not_listed(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add_alias("beta", "x")
    (tmp_path / "beta").rename(tmp_path / ".away")

    assert [entry.id for entry in catalog.listed()] == ["alpha-4bit"]
    with pytest.raises(ModelNotFoundError):
        catalog.find("x")
    (tmp_path / ".away").rename(tmp_path / "beta")
    assert catalog.find("x").id == "beta"


def test_a_models_own_name_hides_an_alias(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add_alias("beta", "gamma")
    write_model(tmp_path / "gamma")

    assert catalog.find("gamma").repo_id == "gamma"
    assert [entry.id for entry in catalog.listed()] == ["alpha-4bit", "beta", "gamma"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"aliases": []}', '{"aliases": null}', "\x00\xff"])
def test_a_damaged_file_is_no_aliases(catalog: Catalog, tmp_path: Path, text: str) -> None:
    (tmp_path / ALIASES_FILE).write_text(text)

    assert [entry.id for entry in catalog.listed()] == ["alpha-4bit", "beta"]
    catalog.add_alias("beta", "x")
    assert json.loads((tmp_path / ALIASES_FILE).read_text()) == {"aliases": {"x": "beta"}}


def test_nothing_is_left_beside_the_file(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add_alias("beta", "x")
    catalog.remove_alias("x")

    assert {path.name for path in tmp_path.iterdir()} == {
        "org",
        "beta",
        ALIASES_FILE,
        f"{ALIASES_FILE}.lock",
    }


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")

    with pytest.raises(ModelUnusableError):
        AliasFile(blocked / "models").add("x", "beta")


def test_the_number_of_aliases_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osaurus_grpc.models.aliases.MAX_ALIASES", 2)
    aliases = AliasFile(tmp_path)
    aliases.add("a", "m")
    aliases.add("b", "m")

    with pytest.raises(OsaurusError):
        aliases.add("c", "m")
    aliases.add("b", "n")
    assert dict(aliases.read()) == {"a": "m", "b": "n"}
