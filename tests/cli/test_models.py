from __future__ import annotations

from pathlib import Path

import pytest

from osaurus_grpc.cli.main import main
from tests.models.folders import write_model


@pytest.fixture
def models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    monkeypatch.setenv("OSU_MODELS_DIR", str(path))
    monkeypatch.setenv("OSAURUS_NO_HUB_CACHE", "true")
    return path


def test_list_of_nothing_says_how_to_get_something(
    models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "(no models installed)\n"
    assert "osaurus pull" in captured.err


def test_list_works_where_the_directory_does_not_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", f"--models-dir={tmp_path / 'nowhere'}"]) == 0
    assert not (tmp_path / "nowhere").exists()


def test_list_is_a_table(models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(models_dir / "org" / "Alpha-f32")
    write_model(models_dir / "beta")
    assert main(["list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["MODEL", "SIZE", "QUANTIZATION", "CONTEXT", "MODIFIED"]
    assert [row.split()[0] for row in rows] == ["alpha-f32", "beta"]
    assert rows[1].split()[3:5] == ["f32", "64"]
    assert rows[1].index("f32") == head.index("QUANTIZATION")


def test_show_describes_a_model_by_any_of_its_names(
    models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(models_dir / "org" / "Alpha")
    for name in ("alpha", "org/Alpha", "ALPHA:latest"):
        assert main(["show", name]) == 0
        lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
        values = {key.strip(): value.strip() for key, value in lines.items()}
        assert values["model"] == "alpha"
        assert values["repository"] == "org/Alpha"
        assert values["architecture"] == "llama"
        assert values["context"] == "64 tokens"
        assert "chat" in values["capabilities"]
        assert len(values["digest"]) == 64


@pytest.mark.parametrize("command", ["show", "rm"])
def test_an_unknown_model_is_an_error_that_lists_the_known(
    command: str, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(models_dir / "alpha")
    assert main([command, "omega"]) == 1
    assert capsys.readouterr().err == "osaurus: Model not found: omega. Installed: alpha.\n"


def test_rm_removes_the_files(models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(models_dir / "org" / "alpha")
    write_model(models_dir / "beta")
    assert main(["rm", "alpha"]) == 0
    assert capsys.readouterr().out.startswith("Removed alpha (")
    assert not (models_dir / "org").exists()
    assert main(["list"]) == 0
    assert "alpha" not in capsys.readouterr().out


def test_rm_leaves_the_hub_cache_alone(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OSAURUS_NO_HUB_CACHE")
    cache = tmp_path / "hub"
    revision = "0123456789" * 4
    snapshot = write_model(cache / "models--org--cached" / "snapshots" / revision)
    (cache / "models--org--cached" / "blobs").mkdir()
    (cache / "models--org--cached" / "refs").mkdir()
    (cache / "models--org--cached" / "refs" / "main").write_text(revision)
    monkeypatch.setattr("osaurus_grpc.settings.default_hub_cache_dir", lambda: cache)
    assert main(["list"]) == 0
    assert "cached" in capsys.readouterr().out
    assert main(["rm", "cached"]) == 1
    assert "Hugging Face cache" in capsys.readouterr().err
    assert (snapshot / "config.json").exists()


@pytest.mark.parametrize(
    ("command", "status", "out", "err"),
    [
        ("ps", 1, "", "osaurus: no server is running. Start one with `osaurus serve`.\n"),
        ("status", 1, "stopped\n", ""),
        ("stop", 1, "", "osaurus: no server is running.\n"),
    ],
)
def test_commands_about_a_server_where_none_runs(
    command: str, status: int, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command]) == status
    assert capsys.readouterr() == (out, err)


def test_pull_installs_a_folder_and_prints_its_id(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "My Model")
    assert main(["pull", str(source)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "my-model\n"
    assert all(line.startswith("osaurus: ") for line in captured.err.splitlines())
    assert main(["show", "my-model"]) == 0


def test_pull_of_an_installed_model_is_no_error(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "alpha")
    assert main(["pull", str(source)]) == 0
    assert main(["pull", str(source)]) == 0
    assert capsys.readouterr().out == "alpha\nalpha\n"


@pytest.mark.parametrize("name", ["smollm-135m", "smolm2", "SmolLM"])
def test_pull_of_a_wrong_name_suggests_a_right_one(
    models_dir: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["pull", name]) == 1
    captured = capsys.readouterr()
    assert "Did you mean smollm2-135m-instruct" in captured.err
    assert captured.out == ""
    assert list(models_dir.iterdir()) == []


@pytest.mark.parametrize("name", ["../outside", "a/b/c", "", "./missing.gguf"])
def test_pull_of_an_unusable_name_is_one_clear_error(
    name: str, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", name]) == 1
    told = capsys.readouterr().err
    assert told.startswith("osaurus: ")
    assert "this is a bug" not in told


def test_pull_into_a_directory_that_cannot_be_made_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    source = write_model(tmp_path / "alpha")
    assert main(["pull", str(source), f"--models-dir={tmp_path / 'file' / 'models'}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("osaurus: ")
    assert "this is a bug" not in told


def test_help_lists_the_built_in_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "--help"]) == 0
    assert "smollm2-135m-instruct" in capsys.readouterr().out


def test_cp_gives_a_second_name_and_rm_takes_it_away(
    models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(models_dir / "org" / "Alpha")
    assert main(["cp", "alpha", "first"]) == 0
    assert capsys.readouterr().out == "first is now a name of alpha.\n"
    assert main(["list"]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:]] == ["alpha", "first"]

    assert main(["rm", "first"]) == 0
    assert capsys.readouterr().out == "Removed the name first.\n"
    assert (models_dir / "org" / "Alpha" / "config.json").exists()
    assert main(["show", "first"]) == 1


def test_cp_says_what_is_wrong(models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(models_dir / "alpha")
    assert main(["cp", "beta", "x"]) == 1
    assert "Installed: alpha" in capsys.readouterr().err
    assert main(["cp", "alpha", "alpha"]) == 1
    assert "already" in capsys.readouterr().err
