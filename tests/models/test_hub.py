from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from osaurus_grpc.errors import (
    DiskFullError,
    ModelBusyError,
    SourceInvalidError,
    SourceUnavailableError,
)
from osaurus_grpc.models.catalog import Catalog
from osaurus_grpc.models.embedding import Pooling, configured_pooling
from osaurus_grpc.models.sources import FetchCancelledError, FetchProgress, fetch
from tests.models.conftest import Recorder, child_fetch_output, fetch_quietly, leftovers, start_child_fetch
from tests.models.folders import file_bytes, tensors, write_model
from tests.models.hub_server import Hub

REPO = "org/Tiny-4bit"
BIG_ROWS = 100_000  # 3.2 MB


@pytest.fixture
def repository(hub: Hub, tmp_path: Path) -> dict[str, bytes]:
    """A repository with a 3 MB weights file and much that is not wanted."""
    source = write_model(tmp_path / "source", weights=tensors(BIG_ROWS))
    wanted = file_bytes(source) | {"LICENSE": b"terms", "chat_template.jinja": b"{{ messages }}"}
    unwanted = {
        "README.md": b"#",
        "modeling_tiny.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "model.pt": b"pickle",
        "training_args.pkl": b"pickle",
        "consolidated.safetensors": b"the same again",
        "onnx/model.onnx": b"",
        "original/tokenizer.json": b"{}",
        ".gitattributes": b"",
    }
    hub.repositories[REPO] = wanted | unwanted
    return wanted


def test_a_model_is_fetched_whole_and_nothing_else(
    hub: Hub, repository: dict[str, bytes], models_dir: Path, recorder: Recorder
) -> None:
    path = fetch(REPO, models_dir, report=recorder)
    assert path == models_dir / "org" / "Tiny-4bit"
    assert file_bytes(path) == repository
    assert [entry.repo_id for entry in Catalog(models_dir).entries()] == [REPO]
    assert leftovers(models_dir) == []
    size = len(repository["model.safetensors"])
    of_weights = [each for each in recorder.reports if each.file == "model.safetensors"]
    assert of_weights[-1] == FetchProgress("downloading", "model.safetensors", size, size)
    done = [each.completed_bytes for each in of_weights]
    assert done == sorted(done)


def test_how_an_embedding_model_pools_comes_along(
    hub: Hub, repository: dict[str, bytes], models_dir: Path, recorder: Recorder
) -> None:
    hub.repositories[REPO] = repository | {
        "1_Pooling/config.json": b'{"pooling_mode_lasttoken": true}', "2_Dense/config.json": b"{}"
    }  # fmt: skip
    path = fetch(REPO, models_dir, report=recorder)
    assert configured_pooling(path) is Pooling.LAST
    assert not (path / "2_Dense").exists()


def test_an_installed_model_is_not_fetched_again(
    hub: Hub, repository: dict[str, bytes], models_dir: Path
) -> None:
    first = fetch_quietly(REPO, models_dir)
    asked = len(hub.requests)
    assert fetch_quietly(REPO, models_dir) == first
    assert len(hub.requests) == asked


def test_shards_come_together(hub: Hub, models_dir: Path, tmp_path: Path) -> None:
    hub.repositories[REPO] = file_bytes(write_model(tmp_path / "source", shards=2))
    path = fetch_quietly(REPO, models_dir)
    assert len(list(path.glob("model-*.safetensors"))) == 2


def test_a_missing_shard_is_refused(hub: Hub, models_dir: Path, tmp_path: Path) -> None:
    hub.repositories[REPO] = file_bytes(write_model(tmp_path / "source", shards=2))
    del hub.repositories[REPO]["model-00001-of-00002.safetensors"]
    with pytest.raises(SourceInvalidError, match="1 of its 2 weights files are missing"):
        fetch_quietly(REPO, models_dir)
    assert leftovers(models_dir) == []
    assert Catalog(models_dir).entries() == ()


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(
    hub: Hub, repository: dict[str, bytes], models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch_quietly(REPO, models_dir)
    for request in hub.requests:
        sent = request.headers.get("authorization")
        assert sent == (None if request.path.startswith("/cdn/") else "Bearer hf_secret"), request.path
    assert any(request.path.startswith("/cdn/") for request in hub.requests)


def test_requests_tell_nothing_about_this_machine(
    hub: Hub, repository: dict[str, bytes], models_dir: Path
) -> None:
    fetch_quietly(REPO, models_dir)
    agents = {request.headers["user-agent"] for request in hub.requests}
    assert len(agents) == 1
    assert "python" not in agents.pop().lower()


def test_a_broken_connection_is_resumed(hub: Hub, repository: dict[str, bytes], models_dir: Path) -> None:
    hub.faults.cut_after = [1_000_000, 500_000, 0]
    path = fetch_quietly(REPO, models_dir)
    assert file_bytes(path) == repository
    ranges = [request.range for request in hub.file_requests("model.safetensors")]
    assert ranges[0] == ""
    starts = [int(each.removeprefix("bytes=").removesuffix("-")) for each in ranges[1:]]
    assert starts == sorted(starts)
    assert 0 < starts[0] <= 1_000_000


def test_a_server_without_ranges_is_read_from_the_start_again(
    hub: Hub, repository: dict[str, bytes], models_dir: Path
) -> None:
    hub.faults.cut_after = [1_000_000]
    hub.faults.ignore_ranges = True
    assert file_bytes(fetch_quietly(REPO, models_dir)) == repository


def test_a_server_that_always_breaks_off_and_starts_over_is_given_up(
    hub: Hub, repository: dict[str, bytes], models_dir: Path
) -> None:
    hub.faults.cut_after = [100_000, 200_000] * 50
    hub.faults.ignore_ranges = True
    with pytest.raises(SourceUnavailableError, match="broke off"):
        fetch_quietly(REPO, models_dir)


def test_transient_refusals_are_retried(hub: Hub, repository: dict[str, bytes], models_dir: Path) -> None:
    hub.faults.statuses = [503, 429, 500]
    assert file_bytes(fetch_quietly(REPO, models_dir)) == repository


def test_giving_up_keeps_what_was_downloaded_for_the_next_fetch(
    hub: Hub, repository: dict[str, bytes], models_dir: Path
) -> None:
    hub.faults.cut_after = [1_000_000] + [0] * 5
    with pytest.raises(SourceUnavailableError, match=r"model\.safetensors broke off.*run it again"):
        fetch_quietly(REPO, models_dir)
    assert Catalog(models_dir).entries() == ()
    assert not (models_dir / "org").exists()

    hub.requests.clear()
    assert file_bytes(fetch_quietly(REPO, models_dir)) == repository
    (request,) = hub.file_requests("model.safetensors")
    assert int(request.range.removeprefix("bytes=").removesuffix("-")) > 0
    assert hub.file_requests("tokenizer.json") == [], "whole files are not asked for again"
    assert leftovers(models_dir) == []


def test_a_permanent_refusal_of_a_file_is_no_retry(
    hub: Hub, repository: dict[str, bytes], models_dir: Path
) -> None:
    hub.faults.statuses = [410] * 20
    with pytest.raises(SourceUnavailableError, match="HTTP status 410"):
        fetch_quietly(REPO, models_dir)


def test_wrong_bytes_are_refused(hub: Hub, repository: dict[str, bytes], models_dir: Path) -> None:
    hub.faults.corrupt = {"model.safetensors"}
    with pytest.raises(SourceInvalidError, match="arrived damaged twice"):
        fetch_quietly(REPO, models_dir)
    assert leftovers(models_dir) == []


def test_a_part_damaged_by_a_crash_is_replaced(
    hub: Hub, repository: dict[str, bytes], models_dir: Path
) -> None:
    hub.faults.cut_after = [1_000_000] + [0] * 5
    with pytest.raises(SourceUnavailableError):
        fetch_quietly(REPO, models_dir)
    parts = (models_dir / ".staging").glob("*/download/*.part")
    part = max(parts, key=lambda path: path.stat().st_size)
    assert part.stat().st_size > 100_000
    part.write_bytes(b"\0" * part.stat().st_size)
    assert file_bytes(fetch_quietly(REPO, models_dir)) == repository


def test_a_killed_fetch_leaves_nothing_listed_and_the_next_one_goes_on(
    hub: Hub, repository: dict[str, bytes], models_dir: Path
) -> None:
    hub.faults.stall_after = 2_000_000
    with start_child_fetch(REPO, models_dir) as child:
        wait_for_part(models_dir, 1_000_000)
        child.kill()
    assert Catalog(models_dir).entries() == ()
    hub.faults.stall_after = -1
    hub.requests.clear()
    assert file_bytes(fetch_quietly(REPO, models_dir)) == repository
    (request,) = hub.file_requests("model.safetensors")
    assert int(request.range.removeprefix("bytes=").removesuffix("-")) >= 1_000_000
    assert leftovers(models_dir) == []


def wait_for_part(models_dir: Path, size: int) -> None:
    """Wait until a download has so many bytes on disk."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        parts = (models_dir / ".staging").glob("*/download/*.part")
        if any(part.stat().st_size >= size for part in parts):
            return
        time.sleep(0.02)
    pytest.fail("the download made no progress")


def test_cancelling_stops_at_once_and_the_next_fetch_goes_on(
    hub: Hub, repository: dict[str, bytes], models_dir: Path
) -> None:
    cancelled = threading.Event()

    def report(progress: FetchProgress) -> None:
        if progress.file == "model.safetensors":
            cancelled.set()

    with pytest.raises(FetchCancelledError):
        fetch(REPO, models_dir, report=report, cancelled=cancelled)
    assert Catalog(models_dir).entries() == ()
    assert file_bytes(fetch_quietly(REPO, models_dir)) == repository


def test_two_fetches_of_one_model_do_the_work_once(
    hub: Hub, repository: dict[str, bytes], models_dir: Path
) -> None:
    hub.faults.stall_after = 1_000_000
    paths: list[Path] = []
    waiting = threading.Event()

    def report(progress: FetchProgress) -> None:
        if progress.status.startswith("waiting"):
            waiting.set()

    first = threading.Thread(target=lambda: paths.append(fetch_quietly(REPO, models_dir)))
    first.start()
    assert hub.stalled.wait(60)
    second = threading.Thread(target=lambda: paths.append(fetch(REPO, models_dir, report=report)))
    second.start()
    assert waiting.wait(60)
    hub.released.set()
    first.join()
    second.join()
    assert paths == [models_dir / "org" / "Tiny-4bit"] * 2
    assert len(hub.file_requests("model.safetensors")) == 1


def test_a_fetch_in_another_process_is_busy(hub: Hub, repository: dict[str, bytes], models_dir: Path) -> None:
    hub.faults.stall_after = 1_000_000
    with start_child_fetch(REPO, models_dir) as child:
        assert hub.stalled.wait(60)
        with pytest.raises(ModelBusyError, match="being fetched by another process") as caught:
            fetch(REPO, models_dir, report=lambda progress: None, busy_wait_seconds=0.0)
        hub.released.set()
        child.communicate(timeout=60)
    assert caught.value.model == REPO
    assert [entry.repo_id for entry in Catalog(models_dir).entries()] == [REPO]


def test_a_full_disk_is_named_and_leaves_nothing(
    hub: Hub, repository: dict[str, bytes], models_dir: Path
) -> None:
    # The system refuses the write itself, as it does on a full disk.
    output = child_fetch_output(REPO, models_dir, file_limit=1_000_000)
    assert output.startswith("DiskFullError The disk with the models directory is full")
    assert leftovers(models_dir) == []
    assert fetch_quietly(REPO, models_dir).exists()


def test_too_little_room_is_noticed_before_downloading(
    hub: Hub, repository: dict[str, bytes], models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A nearly full disk cannot be had here; only what the system says of it is replaced.
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("osaurus_grpc.models.sources.disk.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError, match=r"needs 3\.2 MB .* 1\.0 MB are free"):
        fetch_quietly(REPO, models_dir)
    assert hub.file_requests("model.safetensors") == []
    assert leftovers(models_dir) == []


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "pickles only"),
        ({"model-q4.gguf": b""}, "GGUF files"),
        ({"README.md": b""}, "no weights"),
        ({"model.safetensors": b"x"}, "no config.json"),
    ],
)
def test_repositories_without_a_usable_model_are_refused(
    hub: Hub, models_dir: Path, files: dict[str, bytes], text: str
) -> None:
    hub.repositories[REPO] = files
    with pytest.raises(SourceInvalidError, match=text):
        fetch_quietly(REPO, models_dir)
    assert all(request.path.startswith("/api/") for request in hub.requests)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("config.json", b"{", "config.json is not valid JSON"),
        ("tokenizer.json", b"{}", "tokenizer does not load"),
        ("model.safetensors", b"not weights", "no safetensors file"),
    ],
)
def test_unusable_content_is_refused_before_it_is_installed(
    hub: Hub, repository: dict[str, bytes], models_dir: Path, name: str, content: bytes, text: str
) -> None:
    hub.repositories[REPO][name] = content
    with pytest.raises(SourceInvalidError, match=text):
        fetch_quietly(REPO, models_dir)
    assert Catalog(models_dir).entries() == ()
    assert leftovers(models_dir) == []


def test_an_unknown_repository_is_named(hub: Hub, models_dir: Path) -> None:
    with pytest.raises(SourceUnavailableError, match=r"no model repository org/unknown.*log in"):
        fetch_quietly("org/unknown", models_dir)


def test_a_gated_repository_says_what_to_do(hub: Hub, models_dir: Path) -> None:
    hub.gated.add("org/gated")
    with pytest.raises(SourceUnavailableError, match="accept its terms"):
        fetch_quietly("org/gated", models_dir)


def test_a_hub_that_is_not_there(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailableError, match="could not be reached"):
        fetch_quietly(REPO, models_dir)
    assert leftovers(models_dir) == []


def test_file_names_that_leave_the_folder_are_left_out(
    hub: Hub, repository: dict[str, bytes], models_dir: Path
) -> None:
    hub.repositories[REPO] |= {"../../tokenizer.json": b"evil", "model/../../model.safetensors": b"evil"}
    assert file_bytes(fetch_quietly(REPO, models_dir)) == repository


def test_two_files_with_one_content_are_both_there(hub: Hub, models_dir: Path, tmp_path: Path) -> None:
    files = file_bytes(write_model(tmp_path / "source", weights={"w.weight": np.ones(4, np.float32)}))
    files["LICENSE"] = files["NOTICE"] = b"the same"
    hub.repositories[REPO] = files
    assert file_bytes(fetch_quietly(REPO, models_dir)) == files
