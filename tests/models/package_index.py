"""A local package index (PEP 503) for pip, with wheels made in memory."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def wheel_bytes(package: str, version: str, files: Mapping[str, bytes]) -> bytes:
    """A valid wheel that holds files."""
    stem = f"{package.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    members = dict(files) | {
        f"{stem}.dist-info/METADATA": metadata.encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
    }
    record = []
    for name, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(content)}")
    record.append(f"{stem}.dist-info/RECORD,,")
    members[f"{stem}.dist-info/RECORD"] = "\n".join(record).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


class Index:
    """The index's wheels by file name, and what it was asked.

    Attributes:
        stall_after: Bytes of a wheel after which the answer waits for released; negative for never.
    """

    def __init__(self) -> None:
        self.wheels: dict[str, bytes] = {}
        self.paths: list[str] = []
        self.stall_after = -1
        self.stalled = threading.Event()
        self.released = threading.Event()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/simple"

    def add(self, package: str, version: str, files: Mapping[str, bytes]) -> str:
        """Publish a wheel; returns its sha256."""
        content = wheel_bytes(package, version, files)
        self.wheels[f"{package.replace('-', '_')}-{version}-py3-none-any.whl"] = content
        return hashlib.sha256(content).hexdigest()

    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for path in self.paths if path.startswith("/files/")]


class _Handler(BaseHTTPRequestHandler):
    index: Index

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.index.paths.append(self.path)
        kind, _, name = self.path.strip("/").partition("/")
        if kind == "files" and name in self.index.wheels:
            self._send("application/octet-stream", self.index.wheels[name])
        elif kind == "simple" and (page := self._page(name)):
            self._send("text/html", page.encode())
        else:
            self.send_error(404)

    def _page(self, package: str) -> str:
        prefix = f"{package.replace('-', '_')}-"
        names = [name for name in self.index.wheels if name.startswith(prefix)]
        return "".join(f'<a href="/files/{name}">{name}</a>\n' for name in names)

    def _send(self, content_type: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if content_type == "application/octet-stream" and self.index.stall_after >= 0:
            self.wfile.write(body[: self.index.stall_after])
            self.wfile.flush()
            self.index.stalled.set()
            self.index.released.wait(60)
            body = body[self.index.stall_after :]
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed is what some tests are about."""


@contextmanager
def running_index() -> Iterator[Index]:
    index = Index()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"index": index}))
    index.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield index
    finally:
        index.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
