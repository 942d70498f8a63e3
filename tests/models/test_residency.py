"""Models in memory, on the real engine: shared loads, leases, keep-alive, eviction, broken folders."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.types import GenerationFinished, GenerationRequest, SamplingParams
from osaurus_grpc.errors import (
    DrainingError,
    InsufficientMemoryError,
    ModelNotFoundError,
    ModelUnusableError,
)
from osaurus_grpc.models.catalog import Catalog, ModelEntry
from osaurus_grpc.models.residency import Lease, LoadedModel, ResidenceState, Residency
from tests.harness.tiny import HIDDEN
from tests.harness.tiny_tokenizer import VOCABULARY


@asynccontextmanager
async def residency(
    *, max_loaded_models: int = 2, keep_alive_seconds: float = -1.0
) -> AsyncIterator[tuple[Engine, Residency]]:
    engine = Engine(max_batch_size=4, max_waiting_requests=8, prefill_chunk_tokens=256)
    await engine.start()
    models = Residency(
        engine, max_loaded_models=max_loaded_models, keep_alive_seconds=keep_alive_seconds, dtype="auto"
    )
    try:
        yield engine, models
    finally:
        await models.close()
        await engine.stop()


@pytest.fixture
def entry(tiny_dir: Path) -> ModelEntry:
    return Catalog(tiny_dir).find("tiny-llama")


def copies(tiny_dir: Path, target: Path, *names: str) -> list[ModelEntry]:
    for name in names:
        shutil.copytree(tiny_dir / "tiny-llama", target / name)
    catalog = Catalog(target)
    return [catalog.find(name) for name in names]


async def generate(engine: Engine, model: LoadedModel) -> None:
    asked = GenerationRequest("r", model.entry.id, (1, 2, 3), 3, SamplingParams(temperature=0.0))
    events = [event async for event in engine.generate(asked)]
    assert isinstance(events[-1], GenerationFinished)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (unloading has no event for a test to wait on)
            await asyncio.sleep(0.01)


async def test_a_load_in_progress_is_shared(entry):
    async with residency() as (engine, models):
        leases = await asyncio.gather(*(models.load(entry) for _ in range(5)))
        assert len({id(lease.model) for lease in leases}) == 1
        assert all(lease.load_seconds > 0 for lease in leases)
        assert models.residence(entry.id).state is ResidenceState.LOADED
        assert models.residence(entry.id).resident_bytes > VOCABULARY * HIDDEN * 4
        async with models.lease(entry) as again:
            assert again.load_seconds == 0.0
            assert again.model is leases[0].model
            await generate(engine, again.model)
        assert again.model.context_length == 2048
        assert again.model.vocab_size == VOCABULARY
        assert again.model.fingerprint.startswith("fp_")
        end = again.model.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert end in again.model.eos_token_ids


async def test_a_load_goes_on_when_its_first_waiter_leaves(entry):
    async with residency() as (_, models):
        first = asyncio.create_task(models.load(entry))
        second = asyncio.create_task(models.load(entry))
        await eventually(lambda: models.residence(entry.id).state is ResidenceState.LOADING)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await second).model.entry is entry


async def test_unloading_waits_for_leases_and_frees(entry):
    async with residency() as (engine, models):
        async with models.lease(entry) as lease:
            unloading = asyncio.create_task(models.unload(entry.id))
            await asyncio.sleep(0.05)
            assert not unloading.done()
            await generate(engine, lease.model)
        assert await unloading is True
        assert models.residence(entry.id).state is ResidenceState.AVAILABLE
        assert await models.unload(entry.id) is False
        await generate(engine, (await models.load(entry)).model)


async def test_keep_alive_of_zero_unloads_after_use_and_a_new_use_stops_the_clock(entry):
    async with residency(keep_alive_seconds=600) as (_, models):
        await models.load(entry)
        assert models.residence(entry.id).expire_time is not None
        async with models.lease(entry, keep_alive_seconds=0):
            assert models.residence(entry.id).expire_time is None
        await eventually(lambda: models.residence(entry.id).state is ResidenceState.AVAILABLE)
        async with models.lease(entry, keep_alive_seconds=-1):
            pass
        assert models.residence(entry.id).expire_time is None
        assert models.residence(entry.id).state is ResidenceState.LOADED


async def test_the_least_recently_used_idle_model_makes_way(tiny_dir, tmp_path):
    first, second, third = copies(tiny_dir, tmp_path, "a", "b", "c")
    async with residency(max_loaded_models=2) as (engine, models):
        await models.load(first)
        await models.load(second)
        await models.load(first)
        lease = await models.load(third)
        await generate(engine, lease.model)
        states = [models.residence(e.id).state for e in (first, second, third)]
        assert states == [ResidenceState.LOADED, ResidenceState.AVAILABLE, ResidenceState.LOADED]
        async with models.lease(first), models.lease(third):
            with pytest.raises(InsufficientMemoryError):
                await models.load(second)
        await models.load(second)


async def test_replaced_files_are_loaded_anew(tiny_dir, tmp_path):
    (entry,) = copies(tiny_dir, tmp_path, "a")
    async with residency() as (_, models):
        before = (await models.load(entry)).model
        weights = tmp_path / "a" / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        changed = Catalog(tmp_path).find("a")
        assert changed.digest != entry.digest
        after = (await models.load(changed)).model
        assert after is not before
        assert after.fingerprint != before.fingerprint


async def test_nothing_is_leased_after_close(entry):
    async with residency() as (_, models):
        await models.load(entry)
        await models.close()
        with pytest.raises(DrainingError):
            await models.load(entry)


async def test_models_asked_for_at_once_do_not_count_as_loaded_before_they_are(tiny_dir, tmp_path):
    """The first gets the only place, whoever else wants it."""
    entries = copies(tiny_dir, tmp_path, "a", "b", "c")
    async with residency(max_loaded_models=1) as (_, models):
        first, *others = await asyncio.gather(*(models.load(e) for e in entries), return_exceptions=True)
        assert isinstance(first, Lease)
        assert all(isinstance(other, Lease | InsufficientMemoryError) for other in others)


async def test_closing_refuses_those_who_wait_for_a_load(entry):
    async with residency() as (_, models):
        waiting = asyncio.create_task(models.load(entry))
        await eventually(lambda: models.residence(entry.id).state is ResidenceState.LOADING)
        await models.close()
        with pytest.raises(DrainingError):
            await waiting


async def test_a_load_that_takes_for_ever_is_an_error_of_the_model(entry, monkeypatch):
    monkeypatch.setattr("osaurus_grpc.models.residency._LOAD_SECONDS", 0.0)
    async with residency() as (_, models):
        with pytest.raises(ModelUnusableError):
            await models.load(entry)


async def test_a_use_before_the_end_of_another_load_renews_the_keep_alive(tiny_dir, tmp_path):
    """Unloading waits for the load; what was used meanwhile stays."""
    first, second = copies(tiny_dir, tmp_path, "a", "b")
    async with residency() as (engine, models):
        kept = await models.load(first)
        hold = threading.Event()
        blocked = asyncio.create_task(engine.call(lambda: hold.wait(60)))
        loading = asyncio.create_task(models.load(second))
        await eventually(lambda: models.residence("b").state is ResidenceState.LOADING)
        await models.load(first, keep_alive_seconds=0)
        await eventually(lambda: bool(models._background))
        await models.load(first, keep_alive_seconds=-1)
        assert not loading.done()
        hold.set()
        await asyncio.gather(blocked, loading)
        await eventually(lambda: not models._background)
        assert models.residence("a").state is ResidenceState.LOADED
        assert (await models.load(first)).model is kept.model


async def test_unloading_waits_for_a_lease_that_came_meanwhile(tiny_dir, tmp_path):
    first, second = copies(tiny_dir, tmp_path, "a", "b")
    async with residency() as (engine, models):
        await models.load(first)
        hold = threading.Event()
        blocked = asyncio.create_task(engine.call(lambda: hold.wait(60)))
        loading = asyncio.create_task(models.load(second))
        await eventually(lambda: models.residence("b").state is ResidenceState.LOADING)
        unloading = asyncio.create_task(models.unload("a"))
        await asyncio.sleep(0)  # it found no lease, and waits for the load
        async with models.lease(first):
            hold.set()
            await asyncio.gather(blocked, loading)
            await asyncio.sleep(0.1)
            assert not unloading.done()
        assert await unloading is True
        assert models.residence("a").state is ResidenceState.AVAILABLE


async def test_an_unload_whose_caller_leaves_is_finished(entry):
    async with residency() as (engine, models):
        await models.load(entry)
        hold = threading.Event()
        blocked = asyncio.create_task(engine.call(hold.wait))
        unloading = asyncio.create_task(models.unload(entry.id))
        await eventually(lambda: models.residence(entry.id).state is ResidenceState.AVAILABLE)
        unloading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unloading
        freed = 0
        free = engine.free

        async def counted() -> None:
            nonlocal freed
            await free()
            freed += 1

        engine.free = counted
        hold.set()
        await blocked
        await eventually(lambda: freed == 1)


def break_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-architecture"}))


def break_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def ask_for_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    (folder / "evil.py").write_text("raise SystemExit('this must never run')")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_config, "does not know its architecture"),
        (break_shapes, "damaged"),
        (break_tokenizer, "tokenizer"),
        (cut_weights, "cannot be"),
        (ask_for_code, "code of its own"),
    ],
)
async def test_a_broken_model_is_refused_and_the_others_go_on(
    tiny_dir, tmp_path, damage: Callable[[Path], Awaitable[None]], says
):
    good, bad = copies(tiny_dir, tmp_path, "good", "bad")
    damage(tmp_path / "bad")
    async with residency() as (engine, models):
        lease = await models.load(good)
        for _ in range(2):  # the second try fails alike, and does not hang on the first
            with pytest.raises(ModelUnusableError) as refused:
                await models.load(bad)
            assert says in refused.value.message
            assert str(tmp_path) not in refused.value.message
        assert models.residence("bad").state is ResidenceState.AVAILABLE
        await generate(engine, lease.model)


# Draft models.


@asynccontextmanager
async def drafting(
    catalog: Path, draft: str, *, max_loaded_models: int = 2
) -> AsyncIterator[tuple[Engine, Residency]]:
    """A residency with a draft model, on an engine that uses it."""
    engine = Engine(max_batch_size=4, max_waiting_requests=8, prefill_chunk_tokens=256)
    await engine.start()
    models = Residency(
        engine,
        max_loaded_models=max_loaded_models,
        keep_alive_seconds=-1.0,
        dtype="auto",
        find_draft=lambda: Catalog(catalog).find(draft),
    )
    try:
        yield engine, models
    finally:
        await models.close()
        await engine.stop()


def another_vocabulary(folder: Path) -> None:
    """One more token in a model's tokenizer."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    first_free = 1 + max(tokenizer["model"]["vocab"].values())
    token = {**tokenizer["added_tokens"][-1], "id": first_free, "content": "<|another|>"}
    tokenizer["added_tokens"].append(token)
    path.write_text(json.dumps(tokenizer))


async def test_a_draft_model_stays_as_long_as_a_model_it_drafts_for(tiny_dir, tmp_path):
    first, second, draft = copies(tiny_dir, tmp_path, "a", "b", "draft")
    async with drafting(tmp_path, "draft", max_loaded_models=1) as (engine, models):
        lease = await models.load(first)
        assert models.residence(draft.id).state is ResidenceState.LOADED, "beside the one that may be loaded"
        await generate(engine, lease.model)
        async with models.lease(draft, keep_alive_seconds=0) as lease:
            await generate(engine, lease.model)
        await models.load(second)
        assert models.residence(first.id).state is ResidenceState.AVAILABLE
        assert models.residence(draft.id).state is ResidenceState.LOADED
        assert await models.unload(second.id)
        assert await models.unload(draft.id)
        assert models.residence(draft.id).state is ResidenceState.AVAILABLE


async def test_a_model_of_another_vocabulary_runs_without_the_draft_model(tiny_dir, tmp_path, caplog):
    first, second, draft = copies(tiny_dir, tmp_path, "a", "b", "draft")
    another_vocabulary(tmp_path / "a")
    async with drafting(tmp_path, "draft") as (engine, models):
        await models.load_draft()
        await generate(engine, (await models.load(first)).model)
        assert models.residence(first.id).draft_id == ""
        assert caplog.text.count("event=draft_unused reason=another_vocabulary model=a draft=draft") == 1
        assert await models.unload(draft.id), "nobody holds it any more"
        await generate(engine, (await models.load(second)).model)
        assert models.residence(second.id).draft_id == "draft"


async def test_a_draft_model_that_went_away_is_done_without(tiny_dir, tmp_path, caplog):
    (first,) = copies(tiny_dir, tmp_path, "a")
    async with drafting(tmp_path, "draft") as (engine, models):
        await generate(engine, (await models.load(first)).model)
        assert "event=draft_unused reason=model_not_found model=a" in caplog.text
        with pytest.raises(ModelNotFoundError):
            await models.load_draft()


async def test_closing_unloads_a_draft_model_too(tiny_dir, tmp_path):
    draft, first = copies(tiny_dir, tmp_path, "draft", "a")
    async with drafting(tmp_path, "draft") as (_, models):
        await models.load(draft)
        await models.load(first)
        await models.close()
        assert models.residence(draft.id).state is ResidenceState.AVAILABLE
