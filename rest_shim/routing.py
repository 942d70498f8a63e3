"""Which paths there are, under which prefixes, and in which dialect each speaks.

Every route answers bare and under /v1, /api and /v1/api, with and without a trailing slash. Where two
dialects have a route of the same method and path, one of them says which requests are its own.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from aiohttp import web

from rest_shim.arrival import continue_if_welcome
from rest_shim.errors import Refusal, not_implemented_refusal

PREFIXES = ("/v1/api", "/api", "/v1")
ANTHROPIC_PREFIX = "/anthropic/v1"
# Anthropic's clients send it with every request, and nobody else does.
ANTHROPIC_HEADER = "anthropic-version"

# A path's last placeholder that may hold slashes.
_REST = ":.+}"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Claim = Callable[[web.Request], Awaitable[bool]]


class Dialect(Enum):
    """Whose error shape a route uses."""

    OPENAI = auto()
    OLLAMA = auto()
    ANTHROPIC = auto()


# Which dialect a request speaks, once that is known, where two share its path.
SPOKEN = web.RequestKey("dialect", Dialect)


@dataclass(frozen=True, slots=True)
class Route:
    """One route, without a prefix.

    Attributes:
        method: HTTP method; a GET route answers HEAD too.
        path: Path pattern as aiohttp writes them.
        handler: What answers.
        dialect: How its errors look.
        claims: Where another dialect has the same method and path: whether a request is this one's.
    """

    method: str
    path: str
    handler: Handler
    dialect: Dialect
    claims: Claim | None = None


class RouteTable:
    """All routes, and what may be known of a request without a handler for it."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._static: dict[str, list[Route]] = {}
        self._dynamic: list[tuple[re.Pattern[str], Route]] = []
        for route in self.routes:
            if "{" in route.path:
                self._dynamic.append((_expression(route.path), route))
            else:
                self._static.setdefault(route.path, []).append(route)

    def register(self, router: web.UrlDispatcher) -> None:
        """Add every route under every prefix."""
        shared: dict[tuple[str, str], list[Route]] = {}
        for route in self.routes:
            shared.setdefault((route.method, route.path), []).append(route)
        for (method, pattern), routes in shared.items():
            handler = _dispatch(routes)
            is_anthropic = any(route.dialect is Dialect.ANTHROPIC for route in routes)
            for prefix in ("", *PREFIXES, *((ANTHROPIC_PREFIX,) if is_anthropic else ())):
                for path in _spellings(prefix, pattern):
                    if method == "GET":
                        router.add_get(path, handler, allow_head=True, expect_handler=continue_if_welcome)
                    else:
                        router.add_route(method, path, handler, expect_handler=continue_if_welcome)

    def find(self, path: str) -> list[Route]:
        """The routes of a request's path, one a method; empty where there are none."""
        bare = strip_prefix(path)
        if bare in self._static:
            return self._static[bare]
        return [route for expression, route in self._dynamic if expression.fullmatch(bare)]

    def pattern(self, path: str) -> str:
        """The route's path as a metrics label: bounded, whatever clients ask for."""
        found = self.find(path)
        return found[0].path.replace(_REST, "}") if found else "unmatched"

    def dialect(self, request: web.BaseRequest) -> Dialect:
        """Whose error shape an answer to this request has."""
        spoken: Dialect | None = request.get(SPOKEN)
        if spoken is not None:
            return spoken
        found = self.find(request.path)
        if found and all(route.claims is None for route in found):
            return found[0].dialect
        if is_anthropic(request):
            return Dialect.ANTHROPIC
        return Dialect.OLLAMA if request.path.startswith("/api/") else Dialect.OPENAI

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


def is_anthropic(request: web.BaseRequest) -> bool:
    """Whether a client of Anthropic's API sent a request."""
    return ANTHROPIC_HEADER in request.headers or request.path.startswith(f"{ANTHROPIC_PREFIX}/")


def model_in_path(request: web.Request) -> str:
    """The model that a path ends in; it may be "org/name".

    Raises:
        Refusal: There is none. To the core, no name is the default model's.
    """
    name = request.match_info["id"].rstrip("/")
    if not name.strip():
        raise Refusal(404, "The path names no model.", code="model_not_found", param="model")
    return name


def later(method: str, path: str, dialect: Dialect, what: str) -> Route:
    """A route whose work is not in this release: 501 instead of 404, so that nobody hunts a typo."""

    async def refuse(_request: web.Request) -> web.StreamResponse:
        raise not_implemented_refusal(what)

    return Route(method, path, refuse, dialect)


def _dispatch(routes: Sequence[Route]) -> Handler:
    """One handler for all routes of a method and path: the first that claims a request answers it."""
    if len(routes) == 1:
        return routes[0].handler
    *claiming, default = sorted(routes, key=lambda route: route.claims is None)

    async def handle(request: web.Request) -> web.StreamResponse:
        for route in claiming:
            if route.claims is not None and await route.claims(request):
                request[SPOKEN] = route.dialect
                return await route.handler(request)
        request[SPOKEN] = default.dialect
        return await default.handler(request)

    return handle


def _expression(path: str) -> re.Pattern[str]:
    """What a path with {name} or {name:.+} in it matches."""
    pieces = re.split(r"(\{[^}]+\})", path)
    return re.compile("".join(_piece(piece) for piece in pieces), re.DOTALL)


def _piece(piece: str) -> str:
    if not piece.startswith("{"):
        return re.escape(piece)
    return ".+" if piece.endswith(_REST) else "[^/]+"


def _spellings(prefix: str, path: str) -> tuple[str, ...]:
    if path == "/":
        return (f"{prefix}/", prefix) if prefix else ("/",)
    if path.endswith(_REST):
        # It takes a trailing slash in.
        return (prefix + path,)
    return (prefix + path, f"{prefix}{path}/")
