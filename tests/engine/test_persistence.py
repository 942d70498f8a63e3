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
from osaurus_grpc.engine.prefix_files import PrefixFiles, tail_hash
from osaurus_grpc.engine.token_chain import Chain
from osaurus_grpc.engine.types import GenerationRequest, PrefillStarted, TokensGenerated

from .conftest import (
    VOCAB,
    answer,
    collect,
    request,
    running_engine,
    sharpened,
    tiny_model,
    token_ids,
    until,
)

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


PLAIN = ("llama", "deepseek_v32")
OTHERS = ("gemma3", "gpt_oss", "mamba2", "qwen3_next", "falcon_h1", "lfm2")


@pytest.mark.parametrize("kind", [*PLAIN, *OTHERS])
async def test_a_beginning_is_warm_after_a_restart_and_changes_no_token(tmp_path, kind):
    """Another prompt that begins alike, and the next turn of the same chat."""
    system, tail = words(300), (1, 2)
    branch = request(prompt=(*system, 3, 4, 5), max_tokens=8)
    async with disk_engine(tmp_path, kind=kind, wrap=sharpened) as engine:
        found, said = await ask(engine, request(prompt=(*system, *tail), max_tokens=8))
        assert found == 0
    turn = request(prompt=(*system, *tail, *said, 6, 7, 8), max_tokens=8)
    async with running_engine(kind=kind, wrap=sharpened) as plain:
        expected = [await answer(plain, one) for one in (branch, turn)]
    async with disk_engine(tmp_path, kind=kind, wrap=sharpened) as engine:
        assert engine.stats().kv_disk_bytes > 0
        found, texts = zip(*[await ask(engine, one) for one in (branch, turn)], strict=True)
        assert list(texts) == expected
        # Plain caches in whole runs; others where the prompt cache kept an end, the answer's among them.
        assert found[0] == 256 if kind in PLAIN else found == (288, 302 + 7)
        assert engine.stats().cache_hits == 2


@pytest.mark.parametrize(("kind", "bits"), [("llama", 4), ("gemma3", 8), ("falcon_h1", 4)])
async def test_quantized_caches_are_kept_as_they_are(tmp_path, kind, bits):
    """The same values come back that the store had, bit for bit."""
    options: dict[str, Any] = {"kind": kind, "wrap": sharpened, "prompt_cache_bits": bits}
    first = request(prompt=words(300), max_tokens=1)
    tail = words(30, seed=5)
    # After the last whole run, or where the first prompt ended.
    branch = request(prompt=words(256 if kind == "llama" else 300) + tail, max_tokens=20)
    async with running_engine(prompt_cache_bytes=PLENTY, prefill_chunk_tokens=512, **options) as engine:
        await ask(engine, first)
        warm = await ask(engine, branch)
        assert warm[0] == len(branch.prompt) - len(tail)
    async with disk_engine(tmp_path, **options) as engine:
        await ask(engine, first)
    async with disk_engine(tmp_path, **options) as engine:
        assert await ask(engine, branch) == warm


@pytest.mark.parametrize("kind", ["mamba2", "qwen3_next"])
async def test_a_damaged_end_is_dropped_and_an_earlier_one_does(tmp_path, kind):
    async with disk_engine(tmp_path, kind=kind) as engine:
        _, said = await ask(engine, request(prompt=words(300), max_tokens=3))
    # At the prompt's last block, and where the answer ended, all but its last token.
    tails = (), (*words(300)[288:], *said[:2])
    at_block, at_end = (next(tmp_path.glob(f"*/*-{tail_hash(tail).hex()}*")) for tail in tails)
    async with running_engine(kind=kind) as plain:
        for damaged, found in ((at_end, 288), (at_block, 0)):
            damaged.write_bytes(damaged.read_bytes()[:-3])
            turn = request(prompt=(*words(300), *said, *words(12, seed=found)), max_tokens=8)
            async with disk_engine(tmp_path, kind=kind) as engine:
                assert await ask(engine, turn) == (found, await answer(plain, turn))
            assert not damaged.exists()


async def test_an_end_without_its_runs_is_passed_over_for_an_earlier_one(tmp_path):
    """The first run is there, the second is not: of three ends, the first does."""
    prompt = words(600)
    async with disk_engine(tmp_path, kind="qwen3_next") as engine:
        for length in (400, 600):
            await ask(engine, request(prompt=prompt[:length], max_tokens=1))
    (second,) = (path for path in tmp_path.glob("*/*") if path.stem == Chain(prompt).names[31].hex())
    second.unlink()
    async with running_engine(kind="qwen3_next") as plain, disk_engine(tmp_path, kind="qwen3_next") as engine:
        turn = request(prompt=(*prompt, 5, 6), max_tokens=4)
        assert await ask(engine, turn) == (400, await answer(plain, turn))


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
            assert [cached for cached, _ in found] == [1024 * restart, 1040 * restart]
            if not restart:
                expected = found
            assert [text for _, text in found] == [text for _, text in expected]
    assert len(list(tmp_path.iterdir())) == 2


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
        await until(lambda: engine.stats().kv_disk_failing)
    assert caplog.text.count("event=prefix_files_stopped") == 1


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
