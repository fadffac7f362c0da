"""A proxy in front of an S3 server that makes its answers as bad as networks and stores do, by a seeded chance."""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>planted</Message></Error>"


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        busy, cut, closed, slow: chance of a 503; of an answer with only part of its body; of no answer at all; of one
            that comes after `stall_s` seconds.
        expired: access keys that are answered with ExpiredToken.
        counts: how often each has happened, by name, and all requests as `all`.
    """

    busy: float = 0.0
    cut: float = 0.0
    closed: float = 0.0
    slow: float = 0.0
    stall_s: float = 3.0
    expired: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    luck: random.Random = field(default_factory=lambda: random.Random(1))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self) -> str:
        """What befalls the next request; empty for nothing."""
        with self.lock:
            self.counts["all"] += 1
            chance = self.luck.random()
            for name in ("busy", "cut", "closed", "slow"):
                chance -= getattr(self, name)
                if chance < 0:
                    self.counts[name] += 1
                    return name
        return ""


@contextmanager
def fault_proxy(endpoint: str, faults: Faults) -> Iterator[str]:
    """Serve `endpoint` through a proxy with these faults; yields the proxy's own endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(endpoint, faults))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(endpoint: str, faults: Faults) -> type[BaseHTTPRequestHandler]:
    target = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: Any) -> None:
            pass

        def _serve(self) -> None:
            if self.headers.get("Expect"):
                self.send_response_only(100)
                self.end_headers()
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = faults.draw()
            if any(f"Credential={key}/" in self.headers.get("Authorization", "") for key in faults.expired):
                faults.counts["expired"] += 1
                return self._refuse(400, "ExpiredToken")
            if fault == "busy":
                return self._refuse(503, "SlowDown")
            if fault == "closed":
                return self._hang_up()
            if fault == "slow":
                time.sleep(faults.stall_s)
            return self._forward(body, cut=fault == "cut")

        def _forward(self, body: bytes, cut: bool) -> None:
            connection = http.client.HTTPConnection(target, timeout=60)
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")
            }
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            data = answer.read()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            connection.close()
            if cut:
                self._hang_up()

        def _refuse(self, status: int, code: str) -> None:
            data = ERROR.format(code=code).encode()
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else data)

        def _hang_up(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815 - names of http.server

    return Handler
