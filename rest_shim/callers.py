"""Who asks: the request's id and the key it brings. The shim judges no key, the core does."""

from __future__ import annotations

import re
import uuid

from aiohttp import web

from rest_shim.backend import Caller
from rest_shim.errors import Refusal

REQUEST_ID_HEADER = "x-request-id"
# Where Anthropic's clients look for it.
ANTHROPIC_REQUEST_ID_HEADER = "request-id"

_REQUEST_ID = web.RequestKey("request_id", str)
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}", re.ASCII)
# What a gRPC metadata value may hold; all of a call's metadata together has 8 KiB.
_METADATA_VALUE = re.compile(r"[\x20-\x7e]{1,6144}", re.ASCII)


def request_id_of(request: web.BaseRequest) -> str:
    """The client's x-request-id where it is sane, else a new one; the same for a request's life."""
    known = request.get(_REQUEST_ID)
    if known is None:
        offered = request.headers.get(REQUEST_ID_HEADER, "")
        known = offered if _SANE_REQUEST_ID.fullmatch(offered) else f"req_{uuid.uuid4().hex}"
        request[_REQUEST_ID] = known
    return known


def caller_of(request: web.Request) -> Caller:
    """The caller, with the key from Authorization or from Anthropic's x-api-key.

    Raises:
        Refusal: The key cannot be a key.
    """
    authorization = request.headers.get("Authorization", "")
    key = request.headers.get("x-api-key", "")
    if not authorization and key:
        authorization = f"Bearer {key}"
    if authorization and not _METADATA_VALUE.fullmatch(authorization):
        raise Refusal(
            401,
            "The API key is too long, or holds characters that no key has.",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return Caller(request_id_of(request), authorization)
