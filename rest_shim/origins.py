"""What web pages may do: CORS, and the checks against pages that reach for a local server.

A page can make a browser send requests to 127.0.0.1. CORS decides whether it may read the answer;
the Host check stops a page whose own name was rebound to the loopback address; requests that change
the machine are refused from origins that were not listed by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from aiohttp import web

from rest_shim.errors import Refusal
from rest_shim.settings import ANY_ORIGIN, Settings, is_loopback

_METHODS = ("GET", "POST", "OPTIONS")
_HEADERS = ("Content-Type", "Authorization")
_EXPOSED_HEADERS = "x-request-id, request-id, Retry-After"
_PREFLIGHT_SECONDS = "600"

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~\-]{1,128}", re.ASCII)
_MAX_REQUESTED_HEADERS = 64


def cors_headers(request: web.BaseRequest, settings: Settings) -> dict[str, str]:
    """The headers that let a page of an allowed origin read the answer."""
    if ANY_ORIGIN in settings.allowed_origins:
        return {
            "Access-Control-Allow-Origin": ANY_ORIGIN,
            "Access-Control-Expose-Headers": _EXPOSED_HEADERS,
        }
    origin = request.headers.get("Origin", "")
    if origin in settings.allowed_origins:
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": _EXPOSED_HEADERS,
            "Vary": "Origin",
        }
    return {"Vary": "Origin"}


def preflight(request: web.Request, methods: Iterable[str]) -> web.Response:
    """The answer to OPTIONS; methods are those of the path beyond the usual ones."""
    requested = request.headers.get("Access-Control-Request-Headers", "").split(",")[:_MAX_REQUESTED_HEADERS]
    sane = [name.strip() for name in requested if _HEADER_NAME.fullmatch(name.strip())]
    known = {name.lower() for name in _HEADERS}
    return web.Response(
        status=204,
        headers={
            "Access-Control-Allow-Methods": ", ".join(dict.fromkeys((*_METHODS, *sorted(methods)))),
            "Access-Control-Allow-Headers": ", ".join(
                (*_HEADERS, *(name for name in sane if name.lower() not in known))
            ),
            "Access-Control-Max-Age": _PREFLIGHT_SECONDS,
        },
    )


def check_host(request: web.Request, settings: Settings) -> None:
    """Refuse a foreign Host on a loopback bind (DNS rebinding).

    Raises:
        Refusal: The Host header names another machine.
    """
    host = request.headers.get("Host", "")
    if not host or not is_loopback(settings.host):
        return
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if not is_loopback(name):
        raise Refusal(
            403, "This server answers to loopback names only; check the Host header.", code="forbidden"
        )


def refuse_foreign_origin(request: web.Request, settings: Settings) -> None:
    """Refuse a request that changes the machine, where a page of an unlisted origin sends it.

    Raises:
        Refusal: The Origin is neither this server's own nor listed by name.
    """
    origin = request.headers.get("Origin")
    if origin is None or origin in settings.allowed_origins:
        return
    try:
        is_own = urlsplit(origin).netloc.lower() == request.headers.get("Host", "").lower() != ""
    except ValueError:
        is_own = False
    if not is_own:
        raise Refusal(
            403,
            "Pages of this origin may not change which models are loaded; list it with --allowed-origin.",
            code="forbidden",
        )
