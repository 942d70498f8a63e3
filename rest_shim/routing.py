"""Which paths there are, under which prefixes, and in which dialect each speaks.

Every route answers bare and under /v1, /api and /v1/api, with and without a trailing slash.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from aiohttp import web

from rest_shim.errors import not_implemented_refusal

PREFIXES = ("/v1/api", "/api", "/v1")
ANTHROPIC_PREFIX = "/anthropic/v1"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Dialect(Enum):
    """Whose error shape a route uses."""

    OPENAI = auto()
    OLLAMA = auto()
    ANTHROPIC = auto()


# Set by a handler whose path two dialects share, once it knows which one the request speaks.
SPOKEN = web.RequestKey("dialect", Dialect)


@dataclass(frozen=True, slots=True)
class Route:
    """One route, without a prefix.

    Attributes:
        method: HTTP method; a GET route answers HEAD too.
        path: Path pattern as aiohttp writes them.
        handler: What answers.
        dialect: How its errors look.
    """

    method: str
    path: str
    handler: Handler
    dialect: Dialect


class RouteTable:
    """All routes, and what may be known of a request without a handler for it."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = tuple(routes)
        self._static: dict[str, list[Route]] = {}
        self._dynamic: list[tuple[str, Route]] = []
        for route in self._routes:
            if "{" in route.path:
                self._dynamic.append((route.path.partition("{")[0], route))
            else:
                self._static.setdefault(route.path, []).append(route)

    def register(self, router: web.UrlDispatcher) -> None:
        """Add every route under every prefix."""
        for route in self._routes:
            extra = (ANTHROPIC_PREFIX,) if route.dialect is Dialect.ANTHROPIC else ()
            for prefix in ("", *PREFIXES, *extra):
                for path in _spellings(prefix, route.path):
                    if route.method == "GET":
                        router.add_get(path, route.handler, allow_head=True)
                    else:
                        router.add_route(route.method, path, route.handler)

    def find(self, path: str) -> list[Route]:
        """The routes of a request's path, one a method; empty where there are none."""
        bare = strip_prefix(path)
        if bare in self._static:
            return self._static[bare]
        return [route for head, route in self._dynamic if bare.startswith(head)]

    def pattern(self, path: str) -> str:
        """The route's path as a metrics label: bounded, whatever clients ask for."""
        found = self.find(path)
        return found[0].path.replace(":.+}", "}") if found else "unmatched"

    def dialect(self, path: str) -> Dialect:
        """Whose error shape an answer on this path has."""
        found = self.find(path)
        if found:
            return found[0].dialect
        if path.startswith(f"{ANTHROPIC_PREFIX}/"):
            return Dialect.ANTHROPIC
        return Dialect.OLLAMA if path.startswith("/api/") else Dialect.OPENAI

    def methods(self, path: str) -> set[str]:
        """The methods of a path."""
        found = {route.method for route in self.find(path)}
        return found | {"HEAD"} if "GET" in found else found


def strip_prefix(path: str) -> str:
    """A path without its one prefix and trailing slash; "/" at least."""
    for prefix in (ANTHROPIC_PREFIX, *PREFIXES):
        if path == prefix or path.startswith(f"{prefix}/"):
            path = path[len(prefix) :]
            break
    return path.rstrip("/") or "/"


def later(method: str, path: str, dialect: Dialect, what: str) -> Route:
    """A route whose work is not in this release: 501 instead of 404, so that nobody hunts a typo."""

    async def refuse(_request: web.Request) -> web.StreamResponse:
        raise not_implemented_refusal(what)

    return Route(method, path, refuse, dialect)


def _spellings(prefix: str, path: str) -> tuple[str, ...]:
    if path == "/":
        return (f"{prefix}/", prefix) if prefix else ("/",)
    if "{" in path:
        return (prefix + path,)
    return (prefix + path, f"{prefix}{path}/")
