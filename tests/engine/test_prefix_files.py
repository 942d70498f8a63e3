"""Files of KV caches: what is read is what was written, or nothing."""

from __future__ import annotations

import logging
import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from osaurus_grpc.engine import prefix_disk, prefix_files
from osaurus_grpc.engine.prefix_disk import PrefixDisk, Restore
from osaurus_grpc.engine.prefix_files import (
    RUN_TOKENS,
    Bytes,
    Content,
    FileKey,
    PrefixDirectoryError,
    PrefixFiles,
    model_key,
    tail_hash,
)

MODEL = model_key("a model", "a layout")
LAYOUT = "float32 (2, 3)"
PLENTY = 2**30


def run(number: int = 1, model: str = MODEL, size: int = 24) -> Content:
    values = np.arange(size, dtype=np.uint8) + np.uint8(number)
    tokens = tuple(range(number, number + RUN_TOKENS))
    return Content(
        FileKey(model, bytes([number]) * 16), tokens, LAYOUT, {"0.0.0": values, "1.0.0": values[:5]}
    )


def read(files: PrefixFiles, one: Content) -> dict[str, Bytes] | None:
    return files.read(one.key, one.tokens, one.layout)


def is_same(found: dict[str, Bytes] | None, one: Content) -> bool:
    if found is None or found.keys() != one.arrays.keys():
        return False
    return all(np.array_equal(found[name], one.arrays[name]) for name in found)


def only_file(directory: Path) -> Path:
    (path,) = directory.glob("*/*.safetensors")
    return path


def test_what_was_written_is_read_by_the_next_process(tmp_path):
    files = PrefixFiles(tmp_path / "kv", PLENTY)
    one, other = run(1), run(1, model_key("another model", "a layout"))
    files.write(one)
    files.write(replace(other, arrays={"0.0.0": np.zeros(3, np.uint8)}))
    again = PrefixFiles(tmp_path / "kv", PLENTY)
    assert len(again) == 2
    assert again.nbytes == files.nbytes == sum(p.stat().st_size for p in tmp_path.glob("kv/*/*"))
    assert is_same(read(again, one), one)
    assert not is_same(read(again, other), one)
    assert read(again, run(2)) is None
    # Anybody's reader can open them.
    from safetensors.numpy import load_file

    assert is_same(load_file(tmp_path / "kv" / MODEL / f"{one.key.name.hex()}.safetensors"), one)


def test_ends_behind_one_block_are_told_apart_and_known_to_the_next_process(tmp_path):
    files = PrefixFiles(tmp_path, PLENTY)
    tails = [tail_hash(tail) for tail in ((), (1,), (1, 2))]
    ends = [
        replace(run(1), key=replace(run(1).key, tail=tail), tokens=(7, i)) for i, tail in enumerate(tails)
    ]
    for one in (run(1), *ends):
        files.write(one)
    again = PrefixFiles(tmp_path, PLENTY)
    assert again.tails(MODEL, run(1).key.name) == files.tails(MODEL, run(1).key.name) == set(tails)
    assert all(is_same(read(again, one), one) for one in (run(1), *ends))
    # One that is of other tokens is dropped, and no longer told of.
    assert read(again, replace(ends[1], tokens=(7, 2))) is None
    assert again.tails(MODEL, run(1).key.name) == {tails[0], tails[2]}
    # A smaller bound leaves none of some.
    smaller = PrefixFiles(tmp_path, again.size(ends[0].key))
    assert len(smaller) == 1
    assert smaller.tails(MODEL, run(1).key.name) <= set(tails)
    assert smaller.tails(MODEL, run(2).key.name) == frozenset()


def test_files_are_private(tmp_path):
    directory = tmp_path / "kv"
    files = PrefixFiles(directory, PLENTY)
    old = os.umask(0)
    try:
        files.write(run())
    finally:
        os.umask(old)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (directory, *directory.rglob("*"))]
    assert modes == [0o700, 0o700, 0o600]


def test_no_damaged_byte_is_ever_served(tmp_path):
    one = run()
    PrefixFiles(tmp_path, PLENTY).write(one)
    sound = only_file(tmp_path).read_bytes()
    path = only_file(tmp_path)
    dropped = 0
    places = range(0, len(sound), 7)  # every part has many more bytes than that
    for place in places:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        files = PrefixFiles(tmp_path, PLENTY)
        found = read(files, one)
        assert found is None or is_same(found, one), place
        if found is None:
            dropped += 1
            assert not path.exists()
            assert not files.has(one.key)
            path.parent.mkdir(exist_ok=True)
    assert dropped > 0.9 * len(places)  # all but some of the header's padding and the names of types


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 400, -1, -24])
def test_no_truncated_file_is_ever_served(tmp_path, length, caplog):
    one = run()
    PrefixFiles(tmp_path, PLENTY).write(one)
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    files = PrefixFiles(tmp_path, PLENTY)
    with caplog.at_level(logging.WARNING):
        assert read(files, one) is None
    assert "event=prefix_file_dropped" in caplog.text
    assert str(tmp_path) not in caplog.text
    assert not path.exists()
    assert (files.nbytes, len(files)) == (0, 0)


@pytest.mark.parametrize("what", ["tokens", "layout", "name"])
def test_a_sound_file_of_something_else_is_not_served(tmp_path, what):
    one = run()
    files = PrefixFiles(tmp_path, PLENTY)
    files.write(one)
    if what == "name":
        path = only_file(tmp_path)
        path.rename(path.with_name(f"{run(2).key.name.hex()}.safetensors"))
        assert read(PrefixFiles(tmp_path, PLENTY), run(2)) is None
    else:
        wrong = one.tokens[::-1] if what == "tokens" else "float16 (2, 3)"
        assert read(files, replace(one, **{what: wrong})) is None
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_the_bound_holds_and_the_least_recently_used_go_first(tmp_path):
    probe = PrefixFiles(tmp_path / "probe", PLENTY)
    probe.write(run())
    files = PrefixFiles(tmp_path / "kv", 3 * probe.nbytes)
    for number in (1, 2, 3):
        files.write(run(number))
    files.touch([run(2).key, run(1).key])
    files.write(run(4))
    assert [files.has(run(n).key) for n in (1, 2, 3, 4)] == [True, True, False, True]
    assert sum(p.stat().st_size for p in tmp_path.glob("kv/*/*")) == files.nbytes <= 3 * probe.nbytes
    # Times of use outlive the process, and a smaller bound takes effect at the start.
    for number, seconds in ((1, 1000), (4, 3000), (2, 2000)):
        os.utime(tmp_path / "kv" / MODEL / f"{run(number).key.name.hex()}.safetensors", (seconds, seconds))
    smaller = PrefixFiles(tmp_path / "kv", 2 * probe.nbytes)
    assert [smaller.has(run(n).key) for n in (1, 2, 4)] == [False, True, True]
    tiny = PrefixFiles(tmp_path / "tiny", 10)
    tiny.write(run())
    assert len(tiny) == 0


def test_what_others_left_is_let_alone_and_what_others_took_is_missing(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / "nonsense.safetensors").write_text("mine")
    (tmp_path / "1-1.part").write_text("new")
    (tmp_path / "1-2.part").write_text("old")
    os.utime(tmp_path / "1-2.part", (1000, 1000))
    files = PrefixFiles(tmp_path, 10_000)
    for number in range(1, 20):
        files.write(run(number))
    assert files.nbytes <= 10_000
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / MODEL / "nonsense.safetensors").exists()
    assert (tmp_path / "1-1.part").exists()
    assert not (tmp_path / "1-2.part").exists()
    (tmp_path / MODEL / f"{run(19).key.name.hex()}.safetensors").unlink()
    assert read(files, run(19)) is None
    assert not files.has(run(19).key)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Make longer writes fail, as a full disk does; CPython ignores the signal that goes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().split()[0] for record in caplog.records]


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path):
    for number in range(1, 4):
        (tmp_path / f"{os.getpid()}-{number}.part").write_text("")
    files = PrefixFiles(tmp_path, PLENTY)
    files.write(run())
    assert is_same(read(files, run()), run())
    assert not files.is_failing


def test_files_that_another_process_drops_meanwhile_are_passed_over(tmp_path, monkeypatch):
    PrefixFiles(tmp_path, PLENTY).write(run())
    glob = Path.glob

    def listed(self: Path, pattern: str) -> list[Path]:
        return [self / pattern.replace("*", "00"), *glob(self, pattern)]

    monkeypatch.setattr(Path, "glob", listed)
    assert len(PrefixFiles(tmp_path, PLENTY)) == 1


def test_a_full_disk_stops_writing_says_so_once_and_reads_on(tmp_path, caplog):
    files = PrefixFiles(tmp_path, PLENTY)
    files.write(run(1))
    with caplog.at_level(logging.INFO), largest_file(100):
        files.write(run(2))
        files.write(run(3))
    files.write(run(4))
    assert events(caplog) == ["event=prefix_files_stopped"]
    assert not files.is_writable
    assert files.is_failing
    assert is_same(read(files, run(1)), run(1))
    assert len(list(tmp_path.rglob("*"))) == 2  # no temporary file, no part of one


def test_writing_is_tried_again_and_resumes_when_there_is_room(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(prefix_files, "_RETRY_SECONDS", 0.0)
    files = PrefixFiles(tmp_path, PLENTY)
    with caplog.at_level(logging.INFO), largest_file(100):
        for number in range(1, 4):
            assert files.is_writable
            files.write(run(number))
    assert events(caplog) == ["event=prefix_files_stopped"]
    assert files.is_failing
    with caplog.at_level(logging.INFO):
        files.write(run(1))
        files.write(run(2))
    assert events(caplog) == ["event=prefix_files_stopped", "event=prefix_files_resumed"]
    assert not files.is_failing
    assert len(files) == 2
    assert is_same(read(files, run(1)), run(1))


def test_a_disk_that_is_full_at_the_start_is_said_to_be_and_its_room_used_later(
    tmp_path, caplog, monkeypatch
):
    """The bound is a share of the room there is: without any, no write is even tried."""
    monkeypatch.setattr(prefix_files, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(prefix_files.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    files = PrefixFiles(tmp_path, -1)
    with caplog.at_level(logging.INFO):
        files.write(run(1))
        files.write(run(2))
        assert events(caplog) == ["event=prefix_files_stopped"]
        assert files.is_failing
        monkeypatch.undo()
        monkeypatch.setattr(prefix_files, "_RETRY_SECONDS", 0.0)
        files.write(run(1))
        files.write(run(2))
    assert events(caplog) == ["event=prefix_files_stopped", "event=prefix_files_resumed"]
    assert len(files) == 2
    assert not files.is_failing


@pytest.mark.parametrize("kind", ["file", "shared", "read-only"])
def test_a_directory_that_cannot_be_used_is_an_error(tmp_path, kind):
    directory = tmp_path / "kv"
    match kind:
        case "file":
            directory.write_text("")
        case "shared":
            directory.mkdir()
            directory.chmod(0o777)
        case "read-only":
            if os.getuid() == 0:
                directory = Path("/proc/kv")  # even root cannot write there
            else:
                directory.mkdir(mode=0o500)
    with pytest.raises(PrefixDirectoryError) as refused:
        PrefixFiles(directory, PLENTY)
    assert str(refused.value)


class Reader:
    """Collects what a restore delivers."""

    def __init__(self) -> None:
        self.found: list[tuple[int, dict[str, Bytes] | None]] = []
        self.done = threading.Event()

    def __call__(self, restore: Restore, position: int, arrays: dict[str, Bytes] | None) -> None:
        self.found.append((position, arrays))
        if arrays is None:
            self.done.set()

    def ask(self, disk: PrefixDisk, runs: list[Content]) -> Restore:
        restore = Restore([(one.key, one.tokens) for one in runs], LAYOUT, self)
        assert disk.restore(restore)
        return restore


@contextmanager
def running(files: PrefixFiles) -> Iterator[PrefixDisk]:
    disk = PrefixDisk(files)
    disk.start()
    try:
        yield disk
    finally:
        disk.stop()


def test_runs_are_restored_in_order_up_to_the_first_that_is_missing(tmp_path):
    runs = [run(number) for number in range(1, 6)]
    with running(PrefixFiles(tmp_path, PLENTY)) as disk:
        disk.save(runs[:3], [one.key for one in runs[:3]])
    with running(PrefixFiles(tmp_path, PLENTY)) as disk:
        reader = Reader()
        reader.ask(disk, runs)
        assert reader.done.wait(30)
    assert [position for position, _ in reader.found] == [0, 1, 2, 3]
    assert all(is_same(found, one) for (_, found), one in zip(reader.found[:3], runs, strict=False))
    assert reader.found[3][1] is None


def test_a_chains_end_goes_before_its_beginning(tmp_path):
    runs = [run(number) for number in range(1, 5)]
    with running(PrefixFiles(tmp_path, PLENTY)) as disk:
        disk.save(runs, [one.key for one in runs])
    files = PrefixFiles(tmp_path, PLENTY)
    bound = files.nbytes // 2
    left = PrefixFiles(tmp_path, bound)
    assert [left.has(one.key) for one in runs] == [True, True, False, False]


def test_a_restore_passes_saves_and_saves_that_wait_are_bounded(tmp_path, monkeypatch):
    files = PrefixFiles(tmp_path, PLENTY)
    files.write(run(1))
    monkeypatch.setattr(prefix_disk, "_WAITING_SAVE_BYTES", 3 * run().nbytes)
    disk = PrefixDisk(files)  # its thread does not run yet, so everything waits
    waiting = [run(number) for number in range(10, 20)]
    disk.save(waiting, [one.key for one in waiting])
    assert not disk.wants(run(30).key)
    order: list[str] = []
    write, read_ = files.write, files.read
    monkeypatch.setattr(files, "write", lambda one: (order.append("write"), write(one)))
    monkeypatch.setattr(files, "read", lambda *args: (order.append("read"), read_(*args))[1])
    reader = Reader()
    reader.ask(disk, [run(1)])
    disk.start()
    assert reader.done.wait(30)
    disk.stop()
    assert order == ["read", "write", "write", "write"]
    assert disk.wants(run(30).key)
    assert [files.has(one.key) for one in waiting] == [True] * 3 + [False] * 7


def test_a_cancelled_restore_reads_no_more(tmp_path):
    files = PrefixFiles(tmp_path, PLENTY)
    runs = [run(number) for number in range(1, 4)]
    for one in runs:
        files.write(one)
    disk = PrefixDisk(files)
    gone, reader = Reader(), Reader()
    gone.ask(disk, runs).is_cancelled = True
    reader.ask(disk, runs)
    disk.start()
    assert reader.done.wait(30)
    disk.stop()
    assert gone.found == []
    assert len(reader.found) == 4
