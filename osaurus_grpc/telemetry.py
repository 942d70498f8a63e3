"""The core's metrics, in prometheus_client's terms.

No label's value comes from a client: methods are those of the contract, models are listed ids, codes
are gRPC's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from osaurus_grpc.engine.engine import EngineStats

NO_MODEL: Final = ""
# Powers of two and their halves, from a cached prompt on a GPU to a long one on a laptop's CPU.
_FIRST_TOKEN_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_EXPOSURE_END_SECONDS: Final = 5.0
_CALL_SECONDS: Final = (*_FIRST_TOKEN_SECONDS, 300.0, 600.0)

_ENGINE_GAUGES: Final = (
    ("osaurus_sequences_running", "Sequences that have a place in the batch.", "running"),
    ("osaurus_sequences_waiting", "Sequences that wait for a place in the batch.", "waiting"),
    ("osaurus_kv_running_bytes", "What KV caches of running sequences are counted as.", "kv_running_bytes"),
    ("osaurus_kv_kept_bytes", "KV caches kept for requests that begin alike.", "kv_kept_bytes"),
    ("osaurus_kv_budget_bytes", "What all KV caches together may take.", "kv_budget_bytes"),
    ("osaurus_kv_disk_bytes", "KV caches in files.", "kv_disk_bytes"),
    ("osaurus_kv_disk_failing", "1 while KV caches cannot be written to files.", "kv_disk_failing"),
    ("osaurus_kv_preemptions", "Times a sequence gave its place back for want of memory.", "preemptions"),
)
_ENGINE_COUNTERS: Final = (
    ("osaurus_prompt_cache_lookups", "Prompts looked for in kept KV caches.", "cache_lookups"),
    ("osaurus_prompt_cache_hits", "Prompts of which a beginning was kept.", "cache_hits"),
    ("osaurus_prompt_cache_reused_tokens", "Prompt tokens not computed.", "cache_tokens_reused"),
    ("osaurus_prompt_cache_evictions", "Parts of kept KV caches dropped for room.", "cache_evictions"),
    ("osaurus_drafted_tokens", "Tokens guessed ahead by speculative decoding.", "drafted_tokens"),
    ("osaurus_accepted_tokens", "Guessed tokens that became part of an answer.", "accepted_tokens"),
)


class _EngineCounters(Collector):
    """Counters that the engine keeps itself, read anew at each collection."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[CounterMetricFamily]:
        stats = self._stats()
        for name, text, field in _ENGINE_COUNTERS:
            yield CounterMetricFamily(name, text, value=getattr(stats, field))


class Telemetry:
    """Counters, gauges and histograms of one core, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "osaurus_requests", "Calls that ended.", ("method", "model", "code"), registry=self.registry
        )
        self._call_seconds = Histogram(
            "osaurus_request_duration_seconds",
            "From a call's arrival to its end.",
            ("method", "model"),
            buckets=_CALL_SECONDS,
            registry=self.registry,
        )
        self._first_token_seconds = Histogram(
            "osaurus_time_to_first_token_seconds",
            "From a call's arrival to its first generated token.",
            ("model",),
            buckets=_FIRST_TOKEN_SECONDS,
            registry=self.registry,
        )
        self._prompt_tokens = Counter(
            "osaurus_prompt_tokens", "Tokens of rendered prompts.", ("model",), registry=self.registry
        )
        self._completion_tokens = Counter(
            "osaurus_completion_tokens", "Tokens generated.", ("model",), registry=self.registry
        )

    def watch_engine(self, stats: Callable[[], EngineStats]) -> None:
        """Report the engine's load, read anew at each collection. Call once."""
        for name, text, field in _ENGINE_GAUGES:
            Gauge(name, text, registry=self.registry).set_function(_reader(stats, field))
        self.registry.register(_EngineCounters(stats))

    def call_ended(self, *, method: str, model: str, code: str, seconds: float) -> None:
        """Count a call.

        Args:
            method: Its name in the contract, for example "ChatStream".
            model: The listed id of the model it used, or NO_MODEL.
            code: The name of its gRPC status code.
            seconds: From its arrival.
        """
        self._calls.labels(method, model, code).inc()
        self._call_seconds.labels(method, model).observe(seconds)

    def first_token(self, *, model: str, seconds: float) -> None:
        """Record the time from a call's arrival to its first token."""
        self._first_token_seconds.labels(model).observe(seconds)

    def tokens(self, *, model: str, prompt: int, completion: int) -> None:
        """Count a request's tokens, also those of an answer that was broken off."""
        self._prompt_tokens.labels(model).inc(prompt)
        self._completion_tokens.labels(model).inc(completion)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def expose(self, port: int) -> Callable[[], None]:
        """Serve the metrics over HTTP on a loopback port, in a thread; returns what ends that.

        Raises:
            OSError: The port cannot be bound.
        """
        server, thread = start_http_server(port, addr="127.0.0.1", registry=self.registry)

        def end() -> None:
            server.shutdown()
            server.server_close()
            thread.join(_EXPOSURE_END_SECONDS)

        return end


def _reader(stats: Callable[[], EngineStats], field: str) -> Callable[[], float]:
    return lambda: float(getattr(stats(), field))
