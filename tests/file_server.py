"""A file server on the loopback that can resume, cut its answers and change its file; for tests of downloads."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

DATA = bytes(range(256)) * 4000
SHA = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content`; cuts each answer after `cut` bytes while `cuts` lasts; counts what it sent."""

    content: bytes = DATA
    etag: str | None = '"v1"'
    ranges: bool = True
    cut: int = 0
    cuts: int = 0
    requests: ClassVar[list[tuple[str | None, int]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/model.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        start = 0
        if asked and server.ranges and condition in (None, server.etag):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if self.path == "/gone":
            self.send_error(404)
            return
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if server.cuts:
            server.cuts -= 1
            body = body[: server.cut]
            self.close_connection = True
        server.requests.append((asked, len(body)))
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Stay quiet."""


@contextmanager
def serving() -> Iterator[Server]:
    """A running server with fresh settings."""
    made = Server(("127.0.0.1", 0), Handler)
    made.requests.clear()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def quiet(_: str) -> None:
    """Take a report line and drop it."""


def archive(*members: tuple[str, bytes], link: str = "") -> bytes:
    """A zip archive of these members; `link` adds a symbolic link of that name that points out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for name, data in members:
            bundle.writestr(name, data)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            bundle.writestr(info, "/etc/passwd")
    return buffer.getvalue()
