"""grpc.health.v1, from grpcio-health-checking, with its Watch mended.

The package keeps one condition for each watched service and deletes it when any of its watchers
leaves, after which the others are never told anything again.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2


class HealthService(health.aio.HealthServicer):  # type: ignore[misc]  # the package has no types
    """Health by service name, with any number of watchers."""

    def __init__(self) -> None:
        super().__init__()
        self._watching: Counter[str] = Counter()

    async def Watch(  # noqa: N802 - the contract's name
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """Send the service's status now and whenever it changes."""
        name = request.service
        condition = self._server_watchers[name]
        self._watching[name] += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watching[name] -= 1
            if self._watching[name]:
                self._server_watchers[name] = condition
            else:
                del self._watching[name]
