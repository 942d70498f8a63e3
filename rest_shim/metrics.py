"""The shim's own Prometheus metrics. No label takes a value that a client can choose freely."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from rest_shim.arrival import HeldBodies

CONTENT_TYPE = CONTENT_TYPE_LATEST

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_DURATION_BUCKETS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class HttpMetrics:
    """What was asked over HTTP and how it went; one registry each, so that tests can have many.

    Args:
        bodies: The large bodies in memory.
    """

    def __init__(self, bodies: HeldBodies) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "osaurus_http_requests",
            "HTTP requests answered; 499 is a client that left before its answer was complete.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._durations = Histogram(
            "osaurus_http_request_duration_seconds",
            "From a request's arrival to the last byte of its answer.",
            ("method", "route"),
            buckets=_DURATION_BUCKETS,
            registry=self._registry,
        )
        self._running = Gauge(
            "osaurus_http_requests_in_progress", "HTTP requests being answered.", registry=self._registry
        )
        held = Gauge(
            "osaurus_http_body_bytes",
            "Bytes of large request bodies in memory.",
            registry=self._registry,
        )
        held.set_function(lambda: bodies.nbytes)

    def begin(self) -> None:
        """Count a request in."""
        self._running.inc()

    def end(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request out."""
        method = method if method in _METHODS else "OTHER"
        self._running.dec()
        self._requests.labels(method, route, str(status)).inc()
        self._durations.labels(method, route).observe(seconds)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
