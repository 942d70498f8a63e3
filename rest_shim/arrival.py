"""Request bodies as bytes: read, unfolded where they are compressed, and bounded, each and all together.

aiohttp's own unfolding is off (app.py): it unfolds what came in at once, so that some hundred kilobytes of
gzip would take hundreds of megabytes, and the event loop for seconds, before anything counts them.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable

from aiohttp import HttpVersion11, web

from rest_shim.errors import Refusal, crowded_refusal

# A body up to this size is read whatever else is held: it is what most requests are.
SMALL_BYTES = 256 * 1024

# How much is unfolded between two looks at everything else that happens.
_PIECE_BYTES = 256 * 1024

_GZIP = 16 + zlib.MAX_WBITS
_WINDOW_BITS = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": zlib.MAX_WBITS}
# What a deflate stream begins with where it has the header that the standard asks for; some send none.
_ZLIB_METHOD = 8

_BODY = web.RequestKey("body", bytes)
_HELD = web.RequestKey("held", int)


class HeldBodies:
    """The large bodies that are in memory, each from its first byte until its request is answered.

    Args:
        max_bytes: Of all of them; 0 is no limit. One alone may always be as large as a body may be.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """How many bytes are held."""
        return self._bytes

    def hold(self, request: web.Request, size: int) -> None:
        """Count a request's body, as far as it is there; called again as it grows.

        Raises:
            Refusal: There is no room beside the others.
        """
        if size <= SMALL_BYTES:
            return
        before = request.get(_HELD, 0)
        others = self._bytes - before
        if self._max_bytes and others and others + size > self._max_bytes:
            raise crowded_refusal()
        request[_HELD] = size
        self._bytes += size - before

    def release(self, request: web.Request) -> None:
        """The request is answered."""
        self._bytes -= request.get(_HELD, 0)
        request[_HELD] = 0


HELD_BODIES = web.AppKey("held_bodies", HeldBodies)


async def continue_if_welcome(request: web.Request) -> None:
    """Answer to "Expect: 100-continue": a client need not send what is too large anyway.

    Raises:
        web.HTTPExpectationFailed: Something else is expected.
    """
    if request.version < HttpVersion11:
        return
    if request.headers.get("Expect", "").lower() != "100-continue":
        raise web.HTTPExpectationFailed
    if not _is_too_large(request):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # It is no part of the answer.
        request.writer.output_size = 0


async def read_bytes(request: web.Request, timeout_seconds: float) -> bytes:
    """The request's body, unfolded; it may be read again.

    Raises:
        Refusal: It did not arrive in time, or not as its headers say, or there are too many like it.
        web.HTTPRequestEntityTooLarge: It is too large.
    """
    known: bytes | None = request.get(_BODY)
    if known is not None:
        return known
    if _is_too_large(request):
        raise web.HTTPRequestEntityTooLarge(request.client_max_size, request.content_length or 0)
    encoding = _encoding(request)
    try:
        async with asyncio.timeout(timeout_seconds):
            data = await _gather(request, request.content.iter_any())
            if encoding:
                data = await _gather(request, _unfolded(data, encoding))
    except TimeoutError:
        raise Refusal(408, "The request body did not arrive in time.", code="request_timeout") from None
    except (web.RequestPayloadError, zlib.error):
        raise Refusal(400, "The request body is not encoded as its headers say.") from None
    request[_BODY] = data
    return data


def _is_too_large(request: web.Request) -> bool:
    return request.content_length is not None and request.content_length > request.client_max_size


def _encoding(request: web.Request) -> str:
    """How the body is compressed; "" where it is not.

    Raises:
        Refusal: In a way that is not known here, or twice.
    """
    text = ",".join(request.headers.getall("Content-Encoding", ())).lower()
    named = [name.strip() for name in text.split(",") if name.strip() not in ("", "identity")]
    if not named:
        return ""
    if len(named) > 1 or named[0] not in _WINDOW_BITS:
        text = "The body's Content-Encoding is not supported; send gzip, deflate or none."
        raise Refusal(415, text, headers={"Accept-Encoding": "gzip, deflate"})
    return named[0]


async def _gather(request: web.Request, pieces: AsyncIterator[bytes]) -> bytes:
    """All pieces of a body, counted as they come."""
    held = request.app[HELD_BODIES]
    body = bytearray()
    async for piece in pieces:
        body += piece
        if len(body) > request.client_max_size:
            raise web.HTTPRequestEntityTooLarge(request.client_max_size, len(body))
        held.hold(request, len(body))
    return bytes(body)


async def _unfolded(data: bytes, encoding: str) -> AsyncIterator[bytes]:
    """A compressed body piece by piece; others get their turn between two of them."""
    begin = _inflater(encoding, data)
    while data:
        stream = begin()
        while not stream.eof:
            piece = stream.decompress(data, _PIECE_BYTES)
            data = stream.unconsumed_tail
            if not piece and not data and not stream.eof:
                raise zlib.error("it breaks off")
            yield piece
            await asyncio.sleep(0)
        # A gzip file may have several members.
        data = stream.unused_data


def _inflater(encoding: str, data: bytes) -> Callable[[], zlib._Decompress]:
    bits = _WINDOW_BITS[encoding]
    if encoding == "deflate" and data[:1] and data[0] & 0xF != _ZLIB_METHOD:
        bits = -bits
    return lambda: zlib.decompressobj(bits)
