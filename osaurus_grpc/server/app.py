"""The core process: build everything, bind, serve, drain.

Start: bind, health NOT_SERVING, start the engine, load the model that is asked for, health SERVING.
End: health NOT_SERVING, refuse new calls, wait for the old ones, end those that are left, close the
port, and the models and the MLX thread last.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from osaurus_grpc.chat.grammar import Grammars
from osaurus_grpc.engine.engine import Engine
from osaurus_grpc.engine.prefix_disk import PrefixDisk
from osaurus_grpc.engine.prefix_files import PrefixDirectoryError, PrefixFiles
from osaurus_grpc.errors import EngineError, OsaurusError
from osaurus_grpc.models import platform
from osaurus_grpc.models.catalog import Catalog
from osaurus_grpc.models.residency import Residency
from osaurus_grpc.server.admission import Admission
from osaurus_grpc.server.calls import CallsInProgress
from osaurus_grpc.server.embedding import Embedding
from osaurus_grpc.server.generation import Generation
from osaurus_grpc.server.health import HealthService
from osaurus_grpc.server.inference import InferenceService
from osaurus_grpc.server.interceptors import CallInterceptor, Keys
from osaurus_grpc.server.listing import Listing
from osaurus_grpc.server.models import ModelService
from osaurus_grpc.server.records import RecordService, RecordStore
from osaurus_grpc.server.reflection import add_reflection
from osaurus_grpc.server.sessions import Sessions
from osaurus_grpc.server.start import (
    METRICS_HOST,
    StartError,
    address_of,
    bind_failure,
    models_dir_of,
    require_listening,
)
from osaurus_grpc.settings import Settings
from osaurus_grpc.telemetry import Telemetry
from osaurus_grpc.v1 import inference_service_pb2, model_service_pb2, record_service_pb2
from osaurus_grpc.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from osaurus_grpc.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from osaurus_grpc.v1.record_service_pb2_grpc import add_RecordServiceServicer_to_server

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024

_SERVICES: Final = (
    inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    record_service_pb2.DESCRIPTOR.services_by_name["RecordService"].full_name,
)
# "" is the server as a whole.
_HEALTH_NAMES: Final = ("", *_SERVICES)

_OPTIONS: Final = (
    # By default a second server binds the same port, and each gets half of the calls.
    ("grpc.so_reuseport", 0),
    # A long prefill is silent, and by default a client that pings meanwhile is cut off.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # Images are larger than the default of 4 MiB.
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
# For calls whose work is done, or was ended, to send their status.
_GOODBYE_SECONDS: Final = 1.0

logger = logging.getLogger(__name__)


class Core:
    """One core: the gRPC server and everything behind it.

    Args:
        settings: What it was told.

    Raises:
        StartError: The directory for KV caches cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.telemetry = Telemetry()
        self.calls = CallsInProgress()
        self.grammars = Grammars()
        self.engine = Engine(
            max_batch_size=settings.max_batch_size,
            max_waiting_requests=settings.max_waiting_requests,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
            max_pause_steps=settings.max_pause_steps,
            prompt_cache_bytes=_prompt_cache_bytes(settings),
            prompt_cache_bits=settings.prompt_cache_bits,
            kv_cache_bytes=settings.kv_cache_bytes,
            prefix_disk=_prefix_disk(settings),
            prompt_lookup_tokens=settings.prompt_lookup_tokens,
            draft_tokens=settings.draft_tokens,
        )
        self.telemetry.watch_engine(self.engine.stats)
        self._catalog = Catalog(
            settings.models_dir,
            hub_cache_dir=settings.hub_cache_dir,
            default_model=settings.default_model,
            aliases=dict(settings.aliases),
            fallback_model=settings.fallback_model,
        )
        self.residency = Residency(
            self.engine,
            max_loaded_models=settings.max_loaded_models,
            keep_alive_seconds=settings.keep_alive_seconds,
            dtype=settings.dtype,
            find_draft=partial(self._catalog.find, settings.draft_model) if settings.draft_model else None,
        )
        self._health = HealthService()
        self._server = self._build_server()
        self.port = 0
        self._end_metrics: Callable[[], None] = lambda: None

    def _build_server(self) -> grpc.aio.Server:
        settings = self._settings
        listing = Listing(self._catalog, self.residency)
        admission = Admission(
            max_concurrent_requests=settings.max_concurrent_requests,
            requests_per_minute=settings.requests_per_minute,
        )
        generation = Generation(
            listing=listing,
            residency=self.residency,
            engine=self.engine,
            admission=admission,
            sessions=Sessions(max_sessions=settings.max_sessions, idle_seconds=settings.session_idle_seconds),
            grammars=self.grammars,
            telemetry=self.telemetry,
            max_output_tokens=settings.max_output_tokens,
        )
        embedding = Embedding(
            listing=listing,
            residency=self.residency,
            engine=self.engine,
            admission=admission,
            telemetry=self.telemetry,
        )
        interceptor = CallInterceptor(
            keys=Keys(settings.api_keys),
            calls=self.calls,
            telemetry=self.telemetry,
            send_timeout_seconds=settings.send_timeout_seconds,
        )
        server = grpc.aio.server(interceptors=(interceptor,), options=_OPTIONS)
        add_InferenceServiceServicer_to_server(
            InferenceService(
                listing=listing, residency=self.residency, generation=generation, embedding=embedding
            ),
            server,
        )
        add_ModelServiceServicer_to_server(ModelService(listing=listing, residency=self.residency), server)
        records = RecordStore(max_records=settings.max_records, max_bytes=settings.max_record_bytes)
        add_RecordServiceServicer_to_server(
            RecordService(records, default_seconds=settings.record_ttl_seconds), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        add_reflection(server, (*_SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name))
        return server

    @property
    def address(self) -> str:
        """Where it listens, as HOST:PORT."""
        return address_of(self._settings.host, self.port)

    async def bind(self) -> None:
        """Listen and start the engine; health says NOT_SERVING until prepare() is done.

        Leaves nothing to close where it raises.

        Raises:
            StartError: The address cannot be bound, or must not be without a key; a key is empty; the
                engine's self-test failed.
        """
        settings = self._settings
        require_listening(settings)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self.port = self._server.add_insecure_port(address_of(settings.host, settings.grpc_port))
        except RuntimeError as error:
            message = f"cannot listen on {address_of(settings.host, settings.grpc_port)}: it was just taken"
            raise StartError(message) from error
        if settings.metrics_port:
            try:
                self._end_metrics = self.telemetry.expose(settings.metrics_port)
            except OSError as error:
                address = address_of(METRICS_HOST, settings.metrics_port)
                raise StartError(bind_failure(address, error, "--metrics-port")) from error
        try:
            await self.engine.start()
        except RuntimeError as error:
            raise StartError(f"the engine cannot start: {error}") from error
        await self._server.start()

    async def prepare(self) -> None:
        """Load the model that is asked for, and report that the core serves.

        Raises:
            StartError: The model is unknown or cannot be loaded, or the draft model is unknown or cannot
                be loaded or cannot draft.
        """
        draft = self._settings.draft_model
        if draft:
            try:
                await self.residency.load_draft()
            except OsaurusError as error:
                raise StartError(f"cannot draft with the model {draft}: {error.message}") from error
        name = self._settings.preload_model
        if name:
            try:
                entry = await asyncio.to_thread(self._catalog.find, name)
                await self.residency.load(entry)
            except OsaurusError as error:
                raise StartError(f"cannot load the model {name}: {error.message}") from error
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for name in _HEALTH_NAMES:
            await self._health.set(name, status)

    async def drain(self, seconds: float) -> None:
        """Report NOT_SERVING, refuse new calls, and give the old ones so long to end.

        The port stays open meanwhile, so that refused callers get a status with RetryInfo in place
        of a broken connection. Calls that are left end with the status that refused ones get.
        """
        logger.info("event=draining calls=%d seconds=%g", len(self.calls), seconds)
        await self._health.enter_graceful_shutdown()
        await self.calls.drain(seconds)
        if self.calls:
            logger.warning("event=expelling calls=%d", len(self.calls))
            await self.calls.expel(_GOODBYE_SECONDS)

    async def close(self) -> None:
        """Close the port, free the models, end the MLX thread."""
        await self._server.stop(_GOODBYE_SECONDS)
        with contextlib.suppress(EngineError):  # nothing can be freed on a dead MLX thread
            await self.residency.close()
        self.grammars.close()
        await self.engine.stop()
        self._end_metrics()


def _prompt_cache_bytes(settings: Settings) -> int:
    if settings.prompt_cache_bytes >= 0:
        return settings.prompt_cache_bytes
    return platform.memory_bytes() // 10


def _prefix_disk(settings: Settings) -> PrefixDisk | None:
    """Where KV caches are kept beyond the end of the process."""
    directory, max_bytes = settings.prompt_cache_dir, settings.prompt_cache_dir_bytes
    if directory is None:
        return None
    try:
        return PrefixDisk(PrefixFiles(directory, max_bytes))
    except PrefixDirectoryError as error:
        raise StartError(f"cannot keep KV caches in {directory} (--prompt-cache-dir): {error}") from error


async def _stop_signal() -> signal.Signals:
    """Wait for SIGTERM or SIGINT; from then on the next one ends the process at once."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[signal.Signals] = loop.create_future()

    def receive(number: signal.Signals) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        received.set_result(number)

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, receive, each)
    return await received


async def serve(settings: Settings) -> None:
    """Run a core until SIGTERM or SIGINT, and end it in order.

    Raises:
        StartError: It cannot start, or its MLX thread died.
    """
    with models_dir_of(settings):
        await _serve(settings)


async def _serve(settings: Settings) -> None:
    stopped = asyncio.create_task(_stop_signal())
    platform.set_blas_threads(settings.blas_threads)
    core = Core(settings)
    await core.bind()
    try:
        # Whoever starts a core reads its port from this line.
        sys.stdout.write(f"osaurus-core listening on {core.address}\n")
        sys.stdout.flush()
        preparing = asyncio.create_task(core.prepare())
        await asyncio.wait((stopped, preparing), return_when=asyncio.FIRST_COMPLETED)
        if preparing.done():
            await preparing
        else:
            preparing.cancel()
            with contextlib.suppress(asyncio.CancelledError, StartError):
                await preparing
        death = asyncio.create_task(core.engine.death())
        await asyncio.wait((stopped, death), return_when=asyncio.FIRST_COMPLETED)
        death.cancel()
        if not stopped.done():
            # Whoever supervises this process starts it anew; that is what is left to do.
            raise StartError("the MLX thread died; the log has the reason")
        number = await stopped
        logger.info("event=stop_signal signal=%s", number.name)
        await core.drain(settings.drain_seconds)
    finally:
        stopped.cancel()
        await core.close()
    logger.info("event=stopped")
