"""Images that a request names by a URL, fetched and put into it. Off unless a setting allows it.

A URL in a request makes the server connect to wherever its sender likes: to services that trust this
machine or its network, for one (server-side request forgery). So only public addresses are connected
to. The check is made on the address of every connection, when its socket is made: whatever a name
resolved to before, and wherever a redirect leads, nothing is sent to another address.

The core never fetches anything.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

import aiohttp
from pydantic import BaseModel
from yarl import URL

from rest_shim.bodies import Body
from rest_shim.errors import Refusal
from rest_shim.image_files import UNKNOWN_TYPE, media_type
from rest_shim.settings import Settings

MAX_IMAGES: Final = 8
MAX_IMAGE_BYTES: Final = 20 * 2**20
MAX_REDIRECTS: Final = 3
FETCH_SECONDS: Final = 15.0
_PARALLEL: Final = 8
_CHUNK_BYTES: Final = 2**16
_HEADERS: Final = {"User-Agent": "osaurus", "Accept": "image/png, image/jpeg, image/webp, image/gif",
                   "Accept-Encoding": "identity"}  # fmt: skip
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
# Python's is_global differs from release to release; these are none of the Internet's in any: protocol
# assignments (RFC 6890; clouds answer questions about a machine there), 6to4 relays (RFC 7526), what
# Azure answers such questions at, and of IPv6 all but global unicast (RFC 4291), less protocol
# assignments with Teredo, 6to4 and documentation (RFC 9637).
_NOT_PUBLIC: Final = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",
        "192.88.99.0/24",
        "168.63.129.16/32",
        "::/3",
        "4000::/2",
        "8000::/1",
        "2001::/23",
        "2002::/16",
        "3fff::/20",
    )
)

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
AnyBody = TypeVar("AnyBody", bound=BaseModel)


class ImageReference(Body):
    """Base of a body's part that may name an image by its URL."""

    @property
    def remote_url(self) -> str:
        """The URL, or "" where the image is in the body."""
        raise NotImplementedError

    @property
    def url_path(self) -> str:
        """Where the URL is in this part, as the end of a JSON path."""
        raise NotImplementedError

    def holding(self, kind: str, encoded: str) -> ImageReference:
        """The same part with the image in it.

        Args:
            kind: Its media type.
            encoded: The file in base64.
        """
        raise NotImplementedError


def is_remote(url: str) -> bool:
    """Whether a URL is one that could be fetched."""
    return url[:8].lower().startswith(("http://", "https://"))


def is_public(address: Address) -> bool:
    """Whether an address is that of a machine on the Internet, by way of no translation or tunnel."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if _is_within(address, _NOT_PUBLIC):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _is_within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


class _RefusedAddressError(OSError):
    """An address that is not connected to."""


class _FetchError(Exception):
    """An image could not be had; the text says why, and nothing of what was found."""


@dataclass(frozen=True, slots=True)
class _Found:
    path: str
    url: str


class RemoteImages:
    """Fetches what requests name.

    Args:
        settings: Whether that is allowed, the networks that are besides public addresses, and how much a
            request may hold.
    """

    def __init__(self, settings: Settings) -> None:
        self._is_allowed = settings.allow_image_urls
        self._networks: Sequence[Network] = [
            ipaddress.ip_network(text) for text in settings.image_url_networks
        ]
        self._most_bytes = settings.max_body_bytes
        self._places = asyncio.Semaphore(_PARALLEL)

    async def inlined(self, body: AnyBody) -> AnyBody:
        """The body with the images that it names by URL in it; unchanged where that is not allowed.

        Raises:
            Refusal: An image cannot be fetched, or there are too many; its param names the URL's place.
        """
        if not self._is_allowed:
            return body
        found = list(_references(body, ""))
        if not found:
            return body
        if len(found) > MAX_IMAGES:
            text = f"A request may name at most {MAX_IMAGES} images by URL."
            raise Refusal(400, text, param=found[MAX_IMAGES].path)
        async with self._session() as session:
            fetched = await self._fetch_all(session, found)
        if sum(map(len, fetched.values())) > self._most_bytes:
            raise Refusal(400, "The images are too large together.", param=found[-1].path)
        files = await asyncio.to_thread(
            lambda: {
                url: (media_type(data), base64.b64encode(data).decode()) for url, data in fetched.items()
            }
        )
        changed: AnyBody = _replaced(body, files)
        return changed

    def _session(self) -> aiohttp.ClientSession:
        # Neither proxies nor cookies nor passwords of this machine's user go into it.
        connector = aiohttp.TCPConnector(
            socket_factory=self._socket, use_dns_cache=False, force_close=True, limit=_PARALLEL
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            headers=_HEADERS,
            timeout=aiohttp.ClientTimeout(total=FETCH_SECONDS),
        )

    def _socket(self, info: tuple[Any, ...]) -> socket.socket:
        """The socket for one connection, if its address may be connected to."""
        family, kind, protocol, _, where = info
        address = ipaddress.ip_address(str(where[0]).partition("%")[0])
        if not is_public(address) and not _is_within(address, self._networks):
            raise _RefusedAddressError
        return socket.socket(family, kind, protocol)

    async def _fetch_all(self, session: aiohttp.ClientSession, found: Sequence[_Found]) -> dict[str, bytes]:
        paths = {reference.url: reference.path for reference in reversed(found)}

        async def one(url: str) -> bytes:
            try:
                async with self._places, asyncio.timeout(FETCH_SECONDS):
                    return await _fetch(session, url)
            except _FetchError as error:
                raise Refusal(400, f"The image cannot be fetched: {error}.", param=paths[url]) from error
            except TimeoutError as error:
                text = f"The image cannot be fetched: it took longer than {FETCH_SECONDS:g} seconds."
                raise Refusal(400, text, param=paths[url]) from error
            except (aiohttp.ClientError, OSError, ValueError) as error:
                # One text for all: which private names and ports exist is nobody's business.
                text = "The image cannot be fetched: its server has no public address that answers."
                raise Refusal(400, text, param=paths[url]) from error

        tasks = {url: asyncio.create_task(one(url)) for url in paths}
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return {url: task.result() for url, task in tasks.items()}


async def _fetch(session: aiohttp.ClientSession, text: str) -> bytes:
    """The file at a URL, redirects followed one by one."""
    url = URL(text)
    for _ in range(1 + MAX_REDIRECTS):
        if url.scheme not in {"http", "https"} or not url.host:
            raise _FetchError("only http and https URLs are fetched")
        if url.user is not None or url.password is not None:
            raise _FetchError("its URL holds a user's name")
        async with session.get(url, allow_redirects=False) as response:
            if response.status in _REDIRECTS and "Location" in response.headers:
                url = url.join(URL(response.headers["Location"]))
                continue
            if response.status != 200:
                raise _FetchError(f"its server answers with status {response.status}")
            return await _read(response)
    raise _FetchError(f"there are more than {MAX_REDIRECTS} redirects")


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body, given up as soon as it is known to be too large or no image."""
    if (response.content_length or 0) > MAX_IMAGE_BYTES:
        raise _FetchError(f"it is larger than {MAX_IMAGE_BYTES} bytes")
    data = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        data += chunk
        if len(data) > MAX_IMAGE_BYTES:
            raise _FetchError(f"it is larger than {MAX_IMAGE_BYTES} bytes")
        if len(data) >= 12 and media_type(bytes(data[:12])) == UNKNOWN_TYPE:
            break
    if media_type(bytes(data[:12])) == UNKNOWN_TYPE:
        raise _FetchError("it is no PNG, JPEG, WebP or GIF file")
    return bytes(data)


def _references(value: object, path: str) -> Iterator[_Found]:
    """The remote images in a body, in order, with their JSON paths."""
    if isinstance(value, ImageReference):
        if value.remote_url:
            yield _Found(f"{path}{value.url_path}", value.remote_url)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _references(getattr(value, name), f"{path}.{name}" if path else name)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _references(item, f"{path}[{index}]")


def _replaced(value: Any, files: dict[str, tuple[str, str]]) -> Any:
    """A body with its remote images in it; what has none is the same object."""
    if isinstance(value, ImageReference):
        return value.holding(*files[value.remote_url]) if value.remote_url else value
    if isinstance(value, BaseModel):
        changed = {}
        for name in type(value).model_fields:
            old = getattr(value, name)
            new = _replaced(old, files)
            if new is not old:
                changed[name] = new
        return value.model_copy(update=changed) if changed else value
    if isinstance(value, list | tuple):
        items = [_replaced(item, files) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value
