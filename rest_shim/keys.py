"""Keys, before anything else of a request is looked at."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable

from aiohttp import web

from rest_shim.backend import Backend
from rest_shim.callers import caller_of
from rest_shim.errors import CoreError
from rest_shim.routing import strip_prefix

# What says no more than that there is a server; monitors ask for it without a key.
PUBLIC_PATHS = frozenset({"/", "/health"})

# How long a key that was taken is taken without asking anew, and how many are remembered.
_TRUSTED_SECONDS = 60.0
_MAX_KEYS = 1024


class KeyGate:
    """Lets in whom the core lets in, before a body is read and whatever the route.

    The core judges keys, that of every call it gets. It is asked once for each key and the answer is
    remembered for a while, for this only: a stranger must not make the shim read and parse 32 MiB.

    Args:
        backend: The core.
        clock: Seconds.
    """

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._clock = clock
        # Until when each is trusted; hashes, so that no key lies in memory for longer than its request.
        self._trusted: OrderedDict[bytes, float] = OrderedDict()

    async def require(self, request: web.Request) -> None:
        """Return where the request may go on; also where the core is away, since its own call says so.

        Raises:
            CoreError: The core asks for a key, and this is none of its.
            Refusal: What is shown cannot be a key.
        """
        if strip_prefix(request.path) in PUBLIC_PATHS:
            return
        caller = caller_of(request)
        name = hashlib.sha256(caller.authorization.encode()).digest()
        if self._trusted.get(name, float("-inf")) > self._clock():
            return
        try:
            await self._backend.show_key(caller)
        except CoreError as error:
            if error.code == "UNAUTHENTICATED":
                raise
            return
        self._trusted[name] = self._clock() + _TRUSTED_SECONDS
        self._trusted.move_to_end(name)
        if len(self._trusted) > _MAX_KEYS:
            self._trusted.popitem(last=False)
