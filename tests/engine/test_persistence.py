"""KV caches on the disk: found after a restart, never wrong, never in the way."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from osaurus_grpc.engine import persistence
from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.prefix_disk import PrefixDisk
from osaurus_grpc.engine.prefix_files import PrefixFiles
from osaurus_grpc.engine.types import GenerationRequest, PrefillStarted, TokensGenerated

from .conftest import VOCAB, answer, collect, request, running_engine, tiny_model, token_ids, until

PLENTY = 64 * 2**20


def words(count: int, seed: int = 0) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(generator.randrange(VOCAB) for _ in range(count))


SYSTEM = words(1040)


def disk_engine(
    directory: Path, *, identity: str = "weights", disk_bytes: int = PLENTY, **more: Any
) -> AbstractAsyncContextManager[Engine]:
    """An engine that keeps its beginnings in a directory."""
    disk = PrefixDisk(PrefixFiles(directory, disk_bytes))
    return running_engine(
        **{
            "prompt_cache_bytes": PLENTY,
            "prefix_disk": disk,
            "identity": identity,
            "prefill_chunk_tokens": 512,
        }
        | more
    )


async def ask(engine: Engine, asked: GenerationRequest) -> tuple[int, list[int]]:
    """Tokens that were found, and the answer."""
    events = await collect(engine, asked)
    assert isinstance(events[0], PrefillStarted)
    return events[0].cached_tokens, token_ids(events)


def asked(*tail: int, seed: int = 0) -> GenerationRequest:
    return request(prompt=(*words(1040, seed), *tail), max_tokens=8)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
async def test_a_beginning_is_warm_after_a_restart_and_changes_no_token(tmp_path, kind):
    async with disk_engine(tmp_path, kind=kind) as engine:
        assert (await ask(engine, asked(1, 2)))[0] == 0
    async with running_engine(kind=kind) as plain:
        expected = await answer(plain, asked(3, 4, 5))
    async with disk_engine(tmp_path, kind=kind) as engine:
        assert engine.stats().kv_disk_bytes > 0
        # Whole runs of 256 tokens; a window's layers must have the one that ends there.
        assert await ask(engine, asked(3, 4, 5)) == (1024, expected)
        assert await answer(engine, request()) == await answer(engine, request())


async def test_quantized_caches_are_kept_as_they_are(tmp_path, monkeypatch):
    """The same values come back that the store had, bit for bit."""
    from osaurus_grpc.engine.worker import Worker

    made = Worker.attach.__globals__["prompt_cache_of"]
    monkeypatch.setitem(
        Worker.attach.__globals__, "prompt_cache_of", lambda model, size, **more: made(model, size, bits=8)
    )
    branch = request(prompt=(*SYSTEM[:1024], 3, 4, 5), max_tokens=20)
    async with disk_engine(tmp_path) as engine:
        await ask(engine, asked(1, 2))
        warm = await ask(engine, branch)
        assert warm[0] == 1024
    async with disk_engine(tmp_path) as engine:
        assert await ask(engine, branch) == warm


@pytest.mark.parametrize(
    "change", [{"identity": "other weights"}, {"kind": "gemma3"}, {"prompt_cache_bytes": 0}, {"identity": ""}]
)
async def test_another_models_files_are_not_used(tmp_path, change):
    async with disk_engine(tmp_path) as engine:
        await ask(engine, asked(1, 2))
    async with disk_engine(tmp_path, **change) as engine:
        found, text = await ask(engine, asked(3))
    async with running_engine(kind=change.get("kind", "llama")) as plain:
        assert (found, text) == (0, await answer(plain, asked(3)))


async def test_two_models_share_the_directory(tmp_path):
    for restart in range(2):
        async with disk_engine(tmp_path) as engine:
            other = await engine.call(lambda: tiny_model("gemma3"))
            await engine.attach("other", other, (), VOCAB, identity="others")
            both = [asked(7), replace(asked(7), model_id="other")]
            found = await asyncio.gather(*(ask(engine, one) for one in both))
            assert [cached for cached, _ in found] == [1024 * restart] * 2
            if not restart:
                expected = found
            assert [text for _, text in found] == [text for _, text in expected]
    assert len(list(tmp_path.iterdir())) == 2


async def test_recurrent_models_are_served_and_not_persisted(tmp_path):
    for _ in range(2):
        async with disk_engine(tmp_path, kind="mamba2") as engine:
            assert (await ask(engine, asked(1)))[0] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damaged", [0, 2])
async def test_a_damaged_run_ends_what_is_found_and_is_written_anew(tmp_path, damaged):
    async with disk_engine(tmp_path) as engine:
        await ask(engine, asked(1, 2))
    files = sorted(tmp_path.glob("*/*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    assert len(files) == 4
    content = bytearray(files[damaged].read_bytes())
    content[-5] ^= 4
    files[damaged].write_bytes(content)
    async with running_engine() as plain:
        expected = await answer(plain, asked(3))
    async with disk_engine(tmp_path) as engine:
        assert await ask(engine, asked(3)) == (256 * damaged, expected)
    async with disk_engine(tmp_path) as engine:
        assert await ask(engine, asked(3)) == (1024, expected)


async def test_many_at_once_read_a_beginning_once_and_keep_their_own(tmp_path, monkeypatch):
    """Chats with one system prompt and histories of their own, all back after a restart."""
    chats = [request(prompt=(*SYSTEM, *words(600, seed)), max_tokens=4) for seed in range(1, 5)]
    async with disk_engine(tmp_path) as engine:
        for one in chats:
            await ask(engine, one)
    reads: list[object] = []
    read = PrefixFiles.read
    monkeypatch.setattr(
        PrefixFiles, "read", lambda self, key, *args: (reads.append(key), read(self, key, *args))[1]
    )
    async with disk_engine(tmp_path) as engine:
        found = await asyncio.gather(*(ask(engine, one) for one in chats))
    # The fifth run of each chat is the first that differs; its sixth is the last whole one.
    assert [cached for cached, _ in found] == [1536] * 4
    assert len(reads) == len(set(reads)) == 4 + 4 * 2


async def test_others_run_while_one_waits_for_the_disk_and_it_does_not_wait_for_ever(tmp_path, monkeypatch):
    async with disk_engine(tmp_path) as engine:
        await ask(engine, asked(1, 2))
    held = threading.Event()
    read = PrefixFiles.read

    def slow(self: PrefixFiles, *args: Any) -> Any:
        held.wait(60)
        return read(self, *args)

    monkeypatch.setattr(PrefixFiles, "read", slow)
    monkeypatch.setattr(persistence, "_RESTORE_SECONDS", 0.5)
    try:
        async with disk_engine(tmp_path) as engine:
            waiting = asyncio.create_task(ask(engine, asked(3)))
            await until(lambda: engine.stats().waiting == 1)
            assert len(await answer(engine, request(max_tokens=20))) == 20
            found, text = await waiting
            held.set()
            assert found == 0
            assert text == await answer(engine, asked(3))
    finally:
        held.set()


async def test_cancelling_who_waits_for_the_disk_leaves_nothing(tmp_path, monkeypatch):
    async with disk_engine(tmp_path) as engine:
        await ask(engine, asked(1, 2))
    held, asked_for = threading.Event(), threading.Event()
    read = PrefixFiles.read

    def slow(self: PrefixFiles, *args: Any) -> Any:
        asked_for.set()
        held.wait(60)
        return read(self, *args)

    monkeypatch.setattr(PrefixFiles, "read", slow)
    try:
        async with disk_engine(tmp_path) as engine:
            waiting = asyncio.create_task(ask(engine, asked(3)))
            assert await asyncio.to_thread(asked_for.wait, 30)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await engine.call(lambda: None)
            held.set()
            assert len(await answer(engine, request(max_tokens=5))) == 5
            assert (engine.stats().running, engine.stats().waiting) == (0, 0)
            assert (await ask(engine, asked(3)))[0] == 1024
    finally:
        held.set()


async def test_stopping_and_unloading_end_who_waits_for_the_disk(tmp_path, monkeypatch):
    from osaurus_grpc.errors import DrainingError

    async with disk_engine(tmp_path) as engine:
        await ask(engine, asked(1, 2))
    held, asked_for = threading.Event(), threading.Event()
    read = PrefixFiles.read

    def slow(self: PrefixFiles, *args: Any) -> Any:
        asked_for.set()
        held.wait(60)
        return read(self, *args)

    monkeypatch.setattr(PrefixFiles, "read", slow)
    try:
        async with disk_engine(tmp_path) as engine:
            waiting = asyncio.create_task(ask(engine, asked(3)))
            assert await asyncio.to_thread(asked_for.wait, 30)
            await engine.detach("tiny")
            with pytest.raises(DrainingError):
                await waiting
            held.set()
    finally:
        held.set()


async def test_a_disk_that_fails_stops_writing_and_answers_go_on(tmp_path, monkeypatch, caplog):
    def full(self: PrefixFiles, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PrefixFiles, "_replace", full)
    async with disk_engine(tmp_path) as engine:
        for seed in range(3):
            assert len((await ask(engine, asked(1, seed=seed)))[1]) == 8
    assert caplog.text.count("event=prefix_files_stopped") == 1


async def test_reuse_from_the_disk_never_changes_greedy_text(tmp_path):
    """Conversations over a few restarts with edits and branches; the disk holds only some of them."""
    generator = random.Random(8)
    async with running_engine() as plain:
        history = [words(300 * i, seed=i) for i in range(1, 4)]
        hits = 0
        for _ in range(3):
            async with disk_engine(tmp_path, disk_bytes=6 * 150_000) as engine:
                for _ in range(3):
                    base = generator.choice(history)
                    cut = generator.randrange(200, len(base))
                    prompt = (*base[:cut], *words(generator.randrange(1, 300), generator.randrange(99)))
                    history.append(prompt)
                    one = request(prompt=prompt, max_tokens=6)
                    found, text = await ask(engine, one)
                    hits += found > 0
                    assert text == await answer(plain, one)
        assert hits


async def test_streams_go_on_while_a_long_beginning_is_restored(tmp_path):
    async with disk_engine(tmp_path) as engine:
        await ask(engine, asked(1, 2))
    async with disk_engine(tmp_path) as engine:
        seen = 0
        stream = engine.generate(request(max_tokens=2000))
        restored = None
        async for event in stream:
            seen += isinstance(event, TokensGenerated)
            if seen == 3 and restored is None:
                restored = asyncio.create_task(ask(engine, asked(5)))
            if restored is not None and restored.done():
                break
        await stream.aclose()
        assert restored is not None
        assert (await restored)[0] == 1024
