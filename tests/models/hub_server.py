"""A local server that speaks as much of the Hugging Face hub's protocol as fetching a model takes.

Model information with checksums, files by revision with ranges, a redirect of large files to another
host name, and the failures that a network has: broken connections, stalls, refusals, wrong bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        cut_after: Bytes of a file's answer after which the connection breaks; each use is taken once.
        stall_after: Bytes after which an answer waits for Hub.released.
        statuses: Answers to give to the next requests for files instead of them.
        ignore_ranges: Always send whole files.
        corrupt: Files to send with their last byte changed.
    """

    cut_after: list[int] = field(default_factory=list)
    stall_after: int = -1
    statuses: list[int] = field(default_factory=list)
    ignore_ranges: bool = False
    corrupt: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Request:
    path: str
    host: str
    headers: Mapping[str, str]

    @property
    def range(self) -> str:
        return self.headers.get("range", "")


class Hub:
    """The server's repositories, faults and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.faults = Faults()
        self.requests: list[Request] = []
        self.stalled = threading.Event()
        self.released = threading.Event()
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def file_requests(self, name: str) -> list[Request]:
        """Requests for one file's content, after redirects."""
        return [
            each for each in self.requests if each.path.endswith(f"/{name}") and not self._redirects(each)
        ]

    def _redirects(self, request: Request) -> bool:
        return request.path.endswith(".safetensors") and "/resolve/" in request.path

    def info(self, repo_id: str) -> dict[str, object]:
        siblings = []
        for name, content in self.repositories[repo_id].items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            sibling: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        return {"id": repo_id, "sha": REVISION, "siblings": siblings, "tags": [], "private": False}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(path, self.headers.get("host", ""), headers)
        self.hub.requests.append(request)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self._information(found[1])
        elif found := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{REVISION}/(.+)", path):
            if path.endswith(".safetensors"):
                self._answer(302, {"Location": f"http://localhost:{self.hub.port}/cdn/{found[1]}/{found[2]}"})
            else:
                self._file(request, found[1], found[2])
        elif found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._file(request, found[1], found[2])
        else:
            self._answer(404, {"X-Error-Code": "EntryNotFound"})

    def _information(self, repo_id: str) -> None:
        if repo_id in self.hub.gated:
            self._answer(403, {"X-Error-Code": "GatedRepo"})
        elif repo_id not in self.hub.repositories:
            # As the hub does for callers without a login.
            self._answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid credentials"})
        else:
            self._answer(
                200, {"Content-Type": "application/json"}, json.dumps(self.hub.info(repo_id)).encode()
            )

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, request: Request, repo_id: str, name: str) -> None:
        faults = self.hub.faults
        if faults.statuses:
            self._answer(faults.statuses.pop(0), {})
            return
        content = self.hub.repositories[repo_id][name]
        if name in faults.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        if request.range and not faults.ignore_ranges:
            start = int(request.range.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if name.endswith(".safetensors"):
            self._send_with_faults(content[start:])
        else:
            self.wfile.write(content[start:])

    def _send_with_faults(self, body: bytes) -> None:
        faults = self.hub.faults
        if faults.cut_after:
            self.wfile.write(body[: faults.cut_after.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        if faults.stall_after >= 0:
            self.wfile.write(body[: faults.stall_after])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.released.wait(60)
            body = body[faults.stall_after :]
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what some tests are about."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
