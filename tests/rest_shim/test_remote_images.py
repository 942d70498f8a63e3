"""Fetching images by URL: what is refused, and that nothing refused is ever connected to."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from rest_shim import remote_images
from rest_shim.anthropic.schema import MessagesBody
from rest_shim.errors import Refusal
from rest_shim.openai.schema import ChatBody
from rest_shim.remote_images import MAX_IMAGE_BYTES, MAX_IMAGES, RemoteImages, is_public
from rest_shim.responses.schema import ResponseBody
from rest_shim.settings import Settings, read

# The smallest file that is an image by its first bytes: what is in it is the core's business.
GIF = b"GIF89a" + bytes(20)
HERE, NEXT_DOOR = "127.0.0.1", "127.0.0.2"


class Host:
    """An HTTP server that counts what reaches it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.headers: dict[str, str] = {}
        self.port = 0
        self.targets: dict[str, str] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        self.headers = dict(request.headers)
        if request.path in self.targets:
            raise web.HTTPFound(self.targets[request.path])
        match request.path:
            case "/image" | "/other":
                return web.Response(body=GIF, content_type="text/html")
            case "/page":
                return web.Response(text="<html>" + "x" * 100, content_type="image/png")
            case "/short":
                return web.Response(body=b"GIF", content_type="image/gif")
            case "/announced":
                return web.Response(headers={"Content-Length": str(MAX_IMAGE_BYTES + 1)})
            case "/endless":
                return await self._stream(request, GIF + bytes(2**20), 0.0)
            case "/slow":
                return await self._stream(request, GIF, 0.05)
            case "/packed":
                return web.Response(body=GIF, headers={"Content-Encoding": "gzip"})
            case _:
                raise web.HTTPNotFound

    @staticmethod
    async def _stream(request: web.Request, chunk: bytes, pause: float) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(chunk)
                await asyncio.sleep(pause)
        except ConnectionError:
            return response

    def url(self, path: str, host: str = HERE) -> str:
        return f"http://{host}:{self.port}{path}"


@pytest_asyncio.fixture
async def host() -> AsyncIterator[Host]:
    """Reached at two addresses of this machine, one of which the settings allow."""
    served = Host()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", served.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    first = web.TCPSite(runner, HERE, 0)
    await first.start()
    served.port = runner.addresses[0][1]
    await web.TCPSite(runner, NEXT_DOOR, served.port).start()
    yield served
    await runner.cleanup()


def fetcher(*networks: str, **fields: Any) -> RemoteImages:
    return RemoteImages(Settings(allow_image_urls=True, image_url_networks=networks, **fields))


def chat(*urls: str) -> ChatBody:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    text = {"type": "text", "text": "See:"}
    return ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": [text, *parts]}]})


async def refusal(images: RemoteImages, *urls: str) -> Refusal:
    with pytest.raises(Refusal) as refused:
        await images.inlined(chat(*urls))
    assert refused.value.status == 400
    return refused.value


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.1", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.0.1", "169.254.169.254", "172.16.0.1",
        "168.63.129.16", "192.0.0.8", "192.88.99.1", "192.0.2.1", "192.168.1.1", "198.18.0.1",
        "224.0.0.1", "239.1.1.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
        "64:ff9b:1::1", "2001:db8::1", "2001::1", "2002:7f00:1::", "fc00::1", "fd12::1", "fe80::1", "ff02::1",
        "::127.0.0.1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700::1111", "::ffff:1.1.1.1"])
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


async def test_nothing_is_fetched_unless_it_is_allowed(host: Host) -> None:
    body = chat(host.url("/image"))
    assert await RemoteImages(Settings(image_url_networks=("127.0.0.0/8",))).inlined(body) is body
    assert host.asked == []


async def test_an_image_takes_its_urls_place(host: Host) -> None:
    images = fetcher("127.0.0.1/32")
    url = host.url("/image")
    found = await images.inlined(chat(url, "data:image/png;base64,QUJD", url))

    content = found.messages[0].content
    assert content is not None
    assert content[1].image_url.url == content[3].image_url.url  # type: ignore[union-attr]  # image parts
    assert content[1].image_url.url.startswith("data:image/gif;base64,R0lGODlh")  # type: ignore[union-attr]
    assert content[2].image_url.url == "data:image/png;base64,QUJD"  # type: ignore[union-attr]
    assert host.asked == ["/image"]
    assert not {"Cookie", "Authorization", "Referer"} & set(host.headers)


async def test_each_dialect_names_its_own_place(host: Host) -> None:
    images = fetcher("127.0.0.1/32")
    good, bad = host.url("/image"), host.url("/missing")
    source = {"type": "url", "url": good}
    anthropic = MessagesBody.model_validate(
        {
            "model": "m",
            "max_tokens": 1,
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": source}]},
                {"role": "user", "content": [{"type": "image", "source": {**source, "url": bad}}]},
            ],
        }
    )
    with pytest.raises(Refusal) as refused:
        await images.inlined(anthropic)
    assert refused.value.param == "messages[1].content[0].source.url"
    part = {"type": "input_image", "image_url": good}
    response = ResponseBody.model_validate(
        {"model": "m", "input": [{"role": "user", "content": [part, {**part, "image_url": bad}]}]}
    )
    with pytest.raises(Refusal) as refused:
        await images.inlined(response)
    assert refused.value.param == "input[0].content[1].image_url"
    assert (await refusal(images, good, bad)).param == "messages[0].content[2].image_url.url"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/image",
        "http://localhost:{port}/image",
        "http://[::1]:{port}/image",
        "http://[::ffff:127.0.0.1]:{port}/image",
        "http://127.1:{port}/image",
        "http://2130706433:{port}/image",
        "http://0x7f000001:{port}/image",
        "http://0:{port}/image",
        "http://169.254.169.254/latest/meta-data",
    ],
)
async def test_this_machine_and_its_network_are_refused(host: Host, url: str) -> None:
    refused = await refusal(fetcher(), url.format(port=host.port))
    assert "no public address" in refused.message
    assert host.asked == []


async def test_an_allowed_network_is_not_its_neighbours(host: Host) -> None:
    refused = await refusal(fetcher("127.0.0.1/32"), host.url("/image", NEXT_DOOR))
    assert "no public address" in refused.message
    assert host.asked == []


async def test_a_redirect_is_checked_like_the_first_url(host: Host) -> None:
    images = fetcher("127.0.0.1/32")
    host.targets = {
        "/in": "/image",
        "/out": host.url("/image", NEXT_DOOR),
        "/file": "file:///etc/passwd",
        "/user": f"http://me:secret@{HERE}:{host.port}/image",
        "/loop": "/loop",
    }
    await images.inlined(chat(host.url("/in")))
    assert host.asked == ["/in", "/image"]
    for path, reason in (
        ("/out", "no public address"),
        ("/file", "only http and https"),
        ("/user", "a user's name"),
        ("/loop", "more than 3 redirects"),
    ):
        host.asked.clear()
        assert reason in (await refusal(images, host.url(path))).message
        assert set(host.asked) == {path}


async def test_a_name_that_changes_its_address_is_refused(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a name resolved to before says nothing: the connection's own address is what is checked."""
    answers: dict[str, list[str]] = {"rebound.example": [NEXT_DOOR], "mixed.example": [NEXT_DOOR, HERE]}
    real = socket.getaddrinfo

    def getaddrinfo(name: str, port: int, *rest: Any, **more: Any) -> Any:
        if name not in answers:
            return real(name, port, *rest, **more)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers[name]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    images = fetcher("127.0.0.1/32")
    refused = await refusal(images, host.url("/image", "rebound.example"))
    assert "no public address" in refused.message
    assert host.asked == []
    await images.inlined(chat(host.url("/image", "mixed.example")))
    assert host.asked == ["/image"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/page", "no PNG, JPEG, WebP or GIF"),
        ("/short", "no PNG, JPEG, WebP or GIF"),
        ("/announced", "larger than"),
        ("/endless", "larger than"),
        ("/missing", "status 404"),
    ],
)
async def test_what_is_no_image_or_too_large_is_refused(host: Host, path: str, reason: str) -> None:
    assert reason in (await refusal(fetcher("127.0.0.1/32"), host.url(path))).message


async def test_a_slow_server_is_given_up(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_images, "FETCH_SECONDS", 0.2)
    assert "took longer" in (await refusal(fetcher("127.0.0.1/32"), host.url("/slow"))).message


async def test_images_are_counted_and_bounded_together(host: Host) -> None:
    urls = [host.url("/image") for _ in range(MAX_IMAGES + 1)]
    refused = await refusal(fetcher("127.0.0.1/32"), *urls)
    assert refused.param == f"messages[0].content[{MAX_IMAGES + 1}].image_url.url"
    assert host.asked == []
    small = fetcher("127.0.0.1/32", max_body_bytes=len(GIF))
    assert "together" in (await refusal(small, host.url("/image"), host.url("/other"))).message


def test_the_settings_are_read() -> None:
    assert not read([]).allow_image_urls
    settings = read(
        ["--allow-image-urls", "--image-url-network", "10.0.0.0/8", "--image-url-network", "fd00::/8"]
    )
    assert settings.allow_image_urls
    assert settings.image_url_networks == ("10.0.0.0/8", "fd00::/8")
    with pytest.raises(SystemExit):
        read(["--image-url-network", "10.0.0.1/8"])
