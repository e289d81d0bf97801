"""A real S3 server on loopback, and before it a proxy that writes down every request and spoils some.

The proxy hands each request on as it is. What it is told to spoil it spoils once: a 503, a body cut half-way, a
connection reset, an answer that does not come. Nothing here knows of layerprobe.
"""

import http.client
import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Request", "Spoiler", "serve_s3"]

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_UNAVAILABLE = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>Please try again.</Message></Error>'
)


@dataclass(frozen=True)
class Request:
    """One request, as the server saw it and as it was answered."""

    method: str
    path: str
    status: int
    received_bytes: int
    sent_bytes: int
    fault: str | None


class Spoiler:
    """What goes through the proxy: every request, and the faults still to be injected.

    `faults` are used one by one: each is a kind (`500`, `503`, `cut`, `reset`, `stall`), and the method and the part of
    a path that it waits for.
    """

    def __init__(self, url: str, upstream: int) -> None:
        self.url = url
        self.upstream = upstream
        self.requests: list[Request] = []
        self.faults: deque[tuple[str, str, str]] = deque()
        # what stalls ends with the test, not with a clock
        self.release = threading.Event()

    def spoil(self, *kinds: str, method: str = "GET", path: str = "") -> None:
        """Spoil the next requests of a method whose path contains `path`, one each."""
        self.faults.extend((kind, method, path) for kind in kinds)

    def take_fault(self, method: str, path: str) -> str | None:
        if self.faults and self.faults[0][1] == method and self.faults[0][2] in path:
            return self.faults.popleft()[0]
        return None

    def count(self, method: str) -> int:
        return sum(request.method == method for request in self.requests)

    def describe_latest(self, most: int = 60) -> str:
        """Say what the latest requests were and how they were answered, one a line; for the report of a failure."""
        requests = list(self.requests)
        lines = [
            f"{request.method} {request.path} took {request.received_bytes}, answered {request.status} with "
            f"{request.sent_bytes}" + (f" ({request.fault})" if request.fault else "")
            for request in requests[-most:]
        ]
        return "\n".join([f"the last {len(lines)} of {len(requests)} requests, in bytes:", *lines])

    def clear(self) -> None:
        """Forget what came, and what was to be spoilt."""
        self.requests.clear()
        self.faults.clear()

    def stop_stalling(self) -> None:
        """Let go of the requests that wait."""
        release, self.release = self.release, threading.Event()
        release.set()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    spoiler: Spoiler

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
        """Write nothing to stderr."""

    def _handle(self) -> None:
        body = self._read_body()
        fault = self.spoiler.take_fault(self.command, self.path)
        if fault == "stall":
            self.spoiler.release.wait(60)
        if fault in ("stall", "reset"):
            self._note(0, len(body), 0, fault)
            self.close_connection = True
            return
        if fault in ("500", "503"):
            code = {"500": b"InternalError", "503": b"SlowDown"}[fault]
            self._send(int(fault), {"Content-Type": "application/xml"}, _UNAVAILABLE % code, body, fault)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.spoiler.upstream)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        connection.request(self.command, self.path, body or None, {**headers, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
        if self.command == "HEAD":
            kept["Content-Length"] = answer.getheader("Content-Length") or "0"
        self._send(answer.status, kept, data, body, fault)
        connection.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, headers: dict[str, str], data: bytes, body: bytes, fault: str | None) -> None:
        sent = data[: len(data) // 2] if fault == "cut" else data
        self._note(status, len(body), len(sent), fault)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        self.close_connection = fault == "cut"

    def _note(self, status: int, received: int, sent: int, fault: str | None) -> None:
        self.spoiler.requests.append(Request(self.command, self.path, status, received, sent, fault))


@contextmanager
def serve_s3() -> Iterator[Spoiler]:
    """Run both servers; the proxy's address is `spoiler.url`."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        proxy.daemon_threads = True
        spoiler = handler.spoiler = Spoiler(f"http://127.0.0.1:{proxy.server_address[1]}", port)
        thread = threading.Thread(target=proxy.serve_forever, name="proxy")
        thread.start()
        try:
            yield spoiler
        finally:
            spoiler.stop_stalling()
            proxy.shutdown()
            thread.join()
            server.stop()
