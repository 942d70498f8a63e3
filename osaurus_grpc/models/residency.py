"""Models in memory: loading on first use, holding while in use, unloading.

A load in progress is shared by all who wait for it and is not given up when one of them leaves. A
model is held by leases; it is unloaded when its keep-alive ends, when it is asked for, or when
another model needs its place, and never while somebody holds it.

A draft model is a model like others, held by each model that it drafts for as long as that one is in
memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum

from osaurus_grpc.errors import (
    DrainingError,
    InsufficientMemoryError,
    ModelBusyError,
    ModelUnusableError,
    OsaurusError,
)
from osaurus_grpc.models.catalog import ModelEntry
from osaurus_grpc.models.loading import (
    LoadedModel,
    MlxHost,
    estimated_bytes,
    is_generating,
    load_model,
    log_unusable,
)
from osaurus_grpc.models.platform import Device, device, memory_bytes

__all__ = ["Lease", "LoadedModel", "Residence", "ResidenceState", "Residency", "estimated_bytes"]

logger = logging.getLogger(__name__)

_UNLOAD_WAIT_SECONDS = 30.0
_LOAD_SECONDS = 1800.0
# A longer keep-alive is for ever: the date of its end may be one that no calendar has.
_LONGEST_KEEP_ALIVE_SECONDS = 100 * 365 * 86_400.0


@dataclass(frozen=True, slots=True)
class Lease:
    """A model that stays loaded while this is held.

    Attributes:
        model: The model.
        load_seconds: How long this holder waited for it to load; 0.0 where it was loaded.
    """

    model: LoadedModel
    load_seconds: float


class ResidenceState(Enum):
    """Whether a model is in memory."""

    AVAILABLE = "available"
    LOADING = "loading"
    LOADED = "loaded"


@dataclass(frozen=True, slots=True)
class Residence:
    """A model's place in memory.

    Attributes:
        state: Whether it is there.
        resident_bytes: Memory its weights take.
        expire_time: When it is unloaded for lack of use; None where it stays.
        device: "cpu" or "gpu", what holds it; "" where it is not loaded.
        draft_id: The model that drafts for it; "" where none does.
    """

    state: ResidenceState
    resident_bytes: int = 0
    expire_time: datetime | None = None
    device: str = ""
    draft_id: str = ""


@dataclass(slots=True)
class _Slot:
    """One model's bookkeeping."""

    entry: ModelEntry
    loading: asyncio.Task[LoadedModel]
    keep_alive_seconds: float
    leases: int = 0
    last_used: float = field(default_factory=time.monotonic)
    expire_time: datetime | None = None
    timer: asyncio.TimerHandle | None = None
    draft: _Slot | None = None
    is_draft: bool = False

    @property
    def model(self) -> LoadedModel | None:
        """The model, once loaded."""
        if self.loading.done() and not self.loading.cancelled() and self.loading.exception() is None:
            return self.loading.result()
        return None


class Residency:
    """Which models are in memory.

    Args:
        host: The engine.
        max_loaded_models: Models in memory at once.
        keep_alive_seconds: Unload a model unused for so long; negative is never.
        dtype: As Settings.dtype.
        find_draft: Finds the model that drafts for all others of its vocabulary, which does not count as
            one of them; may read the disk. None is no such model.
    """

    def __init__(
        self,
        host: MlxHost,
        *,
        max_loaded_models: int,
        keep_alive_seconds: float,
        dtype: str,
        find_draft: Callable[[], ModelEntry] | None = None,
    ) -> None:
        self._host = host
        self._max_loaded_models = max_loaded_models
        self._keep_alive_seconds = keep_alive_seconds
        self._dtype = dtype
        self._find_draft = find_draft
        self._slots: dict[str, _Slot] = {}
        self._background: set[asyncio.Task[bool]] = set()
        # Loads and unloads follow one another: they share one thread and one memory.
        self._changing = asyncio.Lock()
        self._is_closed = False

    @asynccontextmanager
    async def lease(self, entry: ModelEntry, keep_alive_seconds: float | None = None) -> AsyncIterator[Lease]:
        """Hold a model, loading it first where it is not in memory.

        Args:
            entry: The model.
            keep_alive_seconds: How long it stays after this lease; None is the server's setting,
                negative for ever, 0 unloads it as soon as nobody holds it.

        Raises:
            ModelUnusableError: Its files are damaged, or mlx-lm does not know its architecture.
            InsufficientMemoryError: It does not fit, even with idle models unloaded.
            DrainingError: The server is shutting down.
        """
        slot = await self._current_slot(entry)
        slot.leases += 1
        self._stop_timer(slot)
        asked = time.monotonic()
        waited = not slot.loading.done()
        try:
            model = await self._loaded(slot)
            yield Lease(model, time.monotonic() - asked if waited else 0.0)
        finally:
            slot.leases -= 1
            slot.last_used = time.monotonic()
            slot.keep_alive_seconds = (
                self._keep_alive_seconds if keep_alive_seconds is None else keep_alive_seconds
            )
            if not slot.leases:
                self._start_timer(slot)

    async def load(self, entry: ModelEntry, keep_alive_seconds: float | None = None) -> Lease:
        """Load a model; raises as lease() does."""
        async with self.lease(entry, keep_alive_seconds) as lease:
            return lease

    async def load_draft(self) -> None:
        """Load the model that drafts for others, where there is one, to learn whether it can.

        Raises ModelNotFoundError where it is not there, ModelUnusableError where its KV cache cannot be
        cut back, and as lease() does.
        """
        if self._find_draft is None:
            return
        entry = await asyncio.to_thread(self._find_draft)
        (await self._current_slot(entry)).is_draft = True
        async with self.lease(entry):
            await self._host.require_draft(entry.id)

    async def unload(self, model_id: str) -> bool:
        """Unload a model once nobody holds it; False where it was not in memory.

        Raises ModelBusyError where it is still held after half a minute.
        """
        slot = self._slots.get(model_id)
        if slot is None:
            return False
        deadline = time.monotonic() + _UNLOAD_WAIT_SECONDS
        while slot.leases or not await self._drop(slot):
            if self._slots.get(model_id) is not slot:
                break  # somebody else unloaded it
            if time.monotonic() > deadline:
                raise ModelBusyError(f"Model '{model_id}' is in use.", model=model_id)
            await asyncio.sleep(0.02)
        return True

    def residence(self, model_id: str) -> Residence:
        """A model's place in memory."""
        slot = self._slots.get(model_id)
        if slot is None:
            return Residence(ResidenceState.AVAILABLE)
        if slot.model is None:
            return Residence(ResidenceState.LOADING)
        return Residence(
            ResidenceState.LOADED,
            slot.model.resident_bytes,
            slot.expire_time,
            device="cpu" if device() is Device.CPU else "gpu",
            draft_id=slot.model.draft_id,
        )

    async def close(self) -> None:
        """Refuse new leases and unload everything nobody holds."""
        self._is_closed = True
        loading = [slot.loading for slot in self._slots.values() if not slot.loading.done()]
        for load in loading:
            load.cancel()
        if loading:
            await asyncio.wait(loading)
        for slot in sorted(self._slots.values(), key=lambda slot: slot.is_draft):
            await self._drop(slot)
        if self._background:
            await asyncio.wait(self._background)

    async def _current_slot(self, entry: ModelEntry) -> _Slot:
        """The slot that serves an entry; starts a load where there is none, or an outdated one."""
        slot = self._slots.get(entry.id)
        if slot is not None and slot.entry.digest != entry.digest and not slot.leases:
            await self._drop(slot)  # its files were replaced
            slot = self._slots.get(entry.id)
        if self._is_closed:
            raise DrainingError
        if slot is None:
            loading = asyncio.create_task(self._load(entry), name=f"load {entry.id}")
            slot = self._slots[entry.id] = _Slot(entry, loading, self._keep_alive_seconds)
            loading.add_done_callback(lambda _: self._forget_failed(slot))
        return slot

    @staticmethod
    async def _loaded(slot: _Slot) -> LoadedModel:
        """The slot's model once it is loaded; the load goes on when a waiter leaves."""
        try:
            return await asyncio.shield(slot.loading)
        except asyncio.CancelledError:
            if slot.loading.cancelled():  # by close(), and not this waiter
                raise DrainingError from None
            raise

    def _forget_failed(self, slot: _Slot) -> None:
        """A load that failed leaves no slot, so that the next use tries again."""
        failed = slot.loading.cancelled() or slot.loading.exception() is not None
        if failed:
            self._let_draft_go(slot)
        if failed and self._slots.get(slot.entry.id) is slot:
            del self._slots[slot.entry.id]

    async def _load(self, entry: ModelEntry) -> LoadedModel:
        """Load when no other model is loaded or unloaded, in bounded time; its draft model before."""
        draft = await self._hold_draft(entry)
        async with self._changing:
            try:
                async with asyncio.timeout(_LOAD_SECONDS):
                    return await self._load_alone(entry, draft)
            except TimeoutError as error:
                log_unusable("time", entry)
                raise ModelUnusableError(
                    f"Model '{entry.id}' cannot be loaded: reading it takes too long.", model=entry.id
                ) from error

    async def _hold_draft(self, entry: ModelEntry) -> LoadedModel | None:
        """Load what drafts for a model, to stay until the model is unloaded.

        None where there is no such model, or it cannot be had: answers need no draft.
        """
        if self._find_draft is None or not is_generating(entry):
            return None
        try:
            return await self._held_draft(entry, self._find_draft)
        except DrainingError:
            raise
        except OsaurusError as error:
            logger.warning("event=draft_unused reason=%s model=%s", error.reason.lower(), entry.id)
            self._let_draft_go(self._slots[entry.id])
            return None

    async def _held_draft(self, entry: ModelEntry, find: Callable[[], ModelEntry]) -> LoadedModel | None:
        draft = await asyncio.to_thread(find)
        if draft.id == entry.id:
            return None
        holder, slot = self._slots[entry.id], await self._current_slot(draft)
        holder.draft = slot
        slot.leases += 1
        slot.is_draft = True
        self._stop_timer(slot)
        return await self._loaded(slot)

    def _let_draft_go(self, slot: _Slot) -> None:
        """A model that goes, or never came, holds its draft model no more."""
        draft, slot.draft = slot.draft, None
        if draft is not None:
            draft.leases -= 1
            draft.last_used = time.monotonic()
            if not draft.leases:
                self._start_timer(draft)

    async def _load_alone(self, entry: ModelEntry, draft: LoadedModel | None) -> LoadedModel:
        """Make room, load, take into service. The caller holds the lock."""
        started = time.monotonic()
        await self._make_room(entry)
        model = await load_model(self._host, entry, self._dtype, draft)
        if draft is not None and not model.draft_id:
            self._let_draft_go(self._slots[entry.id])
        seconds = time.monotonic() - started
        logger.info(
            "event=model_loaded model=%s seconds=%.2f bytes=%d", entry.id, seconds, model.resident_bytes
        )
        return model

    async def _make_room(self, entry: ModelEntry) -> None:
        """Unload idle models, the least recently used first, until the new one fits."""
        while True:
            # Those that wait for their load have no memory yet; they find this one in their way.
            others = [s for s in self._slots.values() if s.entry.id != entry.id and s.model is not None]
            needed = estimated_bytes(entry, self._dtype)
            is_draft = entry.id in self._slots and self._slots[entry.id].is_draft
            count = sum(not slot.is_draft for slot in others)
            has_place = count < self._max_loaded_models or is_draft
            if has_place and needed <= memory_bytes():
                return
            idle = [slot for slot in others if not slot.leases]
            if not idle:
                if not has_place:
                    raise InsufficientMemoryError(
                        f"Model '{entry.id}' cannot be loaded: {count} models are in use, "
                        "which is the limit.",
                        retry_after_seconds=5.0,
                    )
                raise InsufficientMemoryError(
                    f"Model '{entry.id}' needs about {needed / 2**30:.1f} GiB of memory and "
                    f"{memory_bytes() / 2**30:.1f} GiB are available."
                )
            await self._release(min(idle, key=lambda slot: slot.last_used))

    async def _drop(self, slot: _Slot) -> bool:
        """Unload a slot that nobody holds; False where that is no longer so.

        Goes on when the caller leaves: half an unload would keep the memory.
        """
        return await asyncio.shield(self._start_drop(slot))

    def _start_drop(self, slot: _Slot, expired: asyncio.TimerHandle | None = None) -> asyncio.Task[bool]:
        """Drop a slot in the background; where a timer expired, only if no use followed."""

        async def drop() -> bool:
            await asyncio.wait([slot.loading])  # it may have been waiting for its draft model
            async with self._changing:
                is_renewed = expired is not None and slot.timer is not expired
                if slot.leases or is_renewed or self._slots.get(slot.entry.id) is not slot:
                    return False
                await self._release(slot)
                return True

        task = asyncio.create_task(drop(), name=f"unload {slot.entry.id}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _release(self, slot: _Slot) -> None:
        """Take a model out of service and free it. The caller holds the lock."""
        self._stop_timer(slot)
        self._slots.pop(slot.entry.id, None)
        await self._host.detach(slot.entry.id)
        await self._host.free()
        self._let_draft_go(slot)
        logger.info("event=model_unloaded model=%s", slot.entry.id)

    def _start_timer(self, slot: _Slot) -> None:
        """Unload the slot when its keep-alive ends."""
        seconds = slot.keep_alive_seconds
        if not 0 <= seconds <= _LONGEST_KEEP_ALIVE_SECONDS or self._is_closed:
            return
        slot.expire_time = datetime.now(UTC) + timedelta(seconds=seconds)
        slot.timer = asyncio.get_running_loop().call_later(seconds, self._expire, slot)

    @staticmethod
    def _stop_timer(slot: _Slot) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
        slot.timer, slot.expire_time = None, None

    def _expire(self, slot: _Slot) -> None:
        self._start_drop(slot, slot.timer)
