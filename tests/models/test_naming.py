from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.errors import InvalidRequestError
from osaurus_grpc.models import naming

PARTS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,12}", fullmatch=True).map(str.strip)
REPO_IDS = st.one_of(PARTS, st.tuples(PARTS, PARTS).map("/".join))
NO_RULES: dict[str, str] = {}


def listed(*repo_ids: str) -> dict[str, str]:
    """Listed id to repository id, as match() takes it."""
    return {model_id: repo_id for repo_id, model_id in naming.assign_ids(repo_ids).items()}


def resolve(name: str, models: dict[str, str], **rules: object) -> str | None:
    return naming.resolve(name, models, **({"aliases": {}, "default": "", "fallback": ""} | rules))  # type: ignore[arg-type]  # **


@given(st.sets(REPO_IDS, max_size=12))
def test_ids_are_unique_lower_case_and_without_spaces(repo_ids: set[str]) -> None:
    ids = naming.assign_ids(repo_ids)
    assert set(ids) == repo_ids
    assert len(set(ids.values())) == len(repo_ids)
    assert all(model_id == model_id.lower() and " " not in model_id for model_id in ids.values())


@given(st.sets(REPO_IDS, max_size=12))
def test_ids_do_not_depend_on_the_order(repo_ids: set[str]) -> None:
    assert naming.assign_ids(sorted(repo_ids)) == naming.assign_ids(sorted(repo_ids, reverse=True))


@given(st.sets(REPO_IDS, min_size=1, max_size=8), st.data())
def test_every_model_is_found_by_its_id_in_any_case_and_with_latest(
    repo_ids: set[str], data: st.DataObject
) -> None:
    models = listed(*repo_ids)
    model_id = data.draw(st.sampled_from(sorted(models)))
    for name in (model_id, model_id.upper(), model_id.title(), f"{model_id}:latest", f" {model_id} "):
        assert naming.match(name, models) == model_id


@given(PARTS, PARTS, st.sets(REPO_IDS, max_size=6))
def test_a_full_repository_id_finds_its_model(org: str, name: str, others: set[str]) -> None:
    wanted = f"{org}/{name}"
    folded = naming.normalized(wanted)
    models = listed(wanted, *(each for each in others if naming.normalized(each) != folded))
    assert models[naming.match(wanted.swapcase(), models) or ""] == wanted


@given(st.text(max_size=40))
def test_matching_never_fails_on_strange_names(name: str) -> None:
    models = listed("org/Model-4bit", "other/Model-8bit")
    assert naming.match(name, models) in {None, *models}


@given(st.text(max_size=200))
def test_a_checked_name_stays_below_the_models_directory(name: str) -> None:
    try:
        naming.check_repo_id(name)
    except InvalidRequestError:
        return
    path = PurePosixPath(name)
    assert not path.is_absolute()
    assert 1 <= len(path.parts) <= 2
    assert all(
        part not in {".", ".."} and not part.startswith(".") and len(part) <= 96 for part in path.parts
    )


@given(st.text(max_size=200))
def test_a_safe_part_is_safe_or_empty(text: str) -> None:
    part = naming.safe_part(text)
    assert part == "" or naming.check_repo_id(part) == part


def test_models_with_one_basename_are_both_qualified() -> None:
    assert naming.assign_ids(["a/Same", "b/same", "a/Other"]) == {
        "a/Same": "a--same",
        "b/same": "b--same",
        "a/Other": "other",
    }


def test_a_folder_that_looks_like_a_qualified_id_keeps_it() -> None:
    ids = naming.assign_ids(["a/same", "b/same", "a--same"])
    assert ids["a--same"] == "a--same"
    assert ids["a/same"] == "a--same--2"


@pytest.mark.parametrize(
    ("model_id", "base"),
    [
        ("llama-3.2-3b-instruct-4bit", "llama-3.2-3b-instruct"),
        ("qwen3-4b-mlx-4bit", "qwen3-4b"),
        ("qwen3-8b-4bit-dwq-053125", "qwen3-8b"),
        ("qwen3-0.6b-bf16", "qwen3-0.6b"),
        ("gpt-oss-20b-mxfp4-q8", "gpt-oss-20b"),
        ("model-4-bit", "model"),
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("qwen3-4b-instruct-2507", "qwen3-4b-instruct-2507"),
        ("4bit", "4bit"),
    ],
)
def test_quantization_suffixes(model_id: str, base: str) -> None:
    assert naming.without_quantization(model_id) == base


def test_the_name_without_quantization_finds_a_model_only_where_it_is_the_only_one() -> None:
    models = listed("org/Model-4bit", "org/Single-8bit", "org/Model-8bit", "org/Exact", "org/Exact-4bit")
    assert naming.match("single", models) == "single-8bit"
    assert naming.match("model", models) is None
    assert naming.match("Exact", models) == "exact"


def test_spaces_stand_for_hyphens() -> None:
    models = listed("org/My Model")
    assert list(models) == ["my-model"]
    assert naming.match("my model", models) == naming.match("Org/My  Model", models) == "my-model"


def test_default_means_the_configured_or_the_only_model() -> None:
    models = listed("org/a", "org/b")
    assert resolve("", models) is None
    assert resolve("default", models, default="org/B") == "b"
    assert resolve("", models, default="gone") is None
    assert resolve("Default:latest", listed("org/a")) == "a"


def test_a_name_may_stand_in_ollamas_library() -> None:
    models = listed("org/a", "library/b")
    aliases = {"fast": "a"}
    assert resolve("library/a", models) == resolve("Library/A:latest", models) == "a"
    assert resolve("library/b", models) == "b"
    assert resolve("library/fast", models, aliases=aliases) == "a"
    assert resolve("library/", models, default="a") is None
    assert resolve("library/c", models) is None


def test_ollamas_library_may_be_named_in_full() -> None:
    models = listed("org/a")
    assert resolve("registry.ollama.ai/library/a:latest", models) == "a"
    assert resolve(" Registry.Ollama.AI/library/fast", models, aliases={"fast": "a"}) == "a"
    assert resolve("registry.ollama.ai/library/", models, default="a") is None
    assert resolve("registry.ollama.ai/org/b", models) is None
    assert resolve("other.example/library/a", models) is None


def test_aliases_and_fallback() -> None:
    models = listed("org/a", "org/b")
    aliases = {"GPT-4o mini": "fast", "fast": "org/a", "x": "y", "y": "x", "b": "a"}
    assert resolve("gpt-4o-mini", models, aliases=aliases) == "a"
    assert resolve("x", models, aliases=aliases) is None, "a circle of aliases ends"
    assert resolve("b", models, aliases=aliases) == "b", "a model's own name wins"
    assert resolve("unknown", models, fallback="b") == "b"
    assert resolve("unknown", models, fallback="also unknown") is None
    assert resolve("", models, default="fast", aliases=aliases) == "a"


@pytest.mark.parametrize(
    "name",
    ["..", "../x", "a/../b", "/abs", "a/b/c", "a\\b", "a\0b", "", "a/", ".hidden", "a/.git", "CON",
     "org/nul.txt", "com1", "a:b", "a.", "x" * 97, "a/" + "x" * 97, "~x", "-rf", "_x", "a\nb"],
)  # fmt: skip
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        naming.check_repo_id(name)
    assert caught.value.field == "model"


@pytest.mark.parametrize("name", ["org/Name-1.5_b+c", "Modèle 日本", "a", "x" * 96, "console", "com10"])
def test_ordinary_names_pass(name: str) -> None:
    assert naming.check_repo_id(name) == name
