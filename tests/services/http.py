"""The skeleton of small HTTP servers that tests write themselves: a free port of this host, threads, an end."""

from __future__ import annotations

import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

__all__ = ["HttpServer", "Incoming"]


class Incoming(BaseHTTPRequestHandler):
    """A request as it comes, and where its answer goes."""

    outer: HttpServer

    def do_GET(self) -> None:  # the names that the standard library calls
        self.outer.serve(self)

    def do_POST(self) -> None:
        self.outer.serve(self)

    def body(self) -> bytes:
        """What was sent along."""
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def reply(
        self,
        status: int,
        body: bytes = b"",
        *,
        kind: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer, and let it be if whoever asked has gone."""
        try:
            self.send_response(status)
            sent = {"content-type": kind, "content-length": str(len(body)), **(headers or {})}
            for name, value in sent.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing is printed: a test looks at what its server has kept."""


class HttpServer(ABC):
    """Serves on a free port of this host while the block lasts. Derived classes say in `serve` what is answered.

    With `tls` it speaks https, with the certificate of that.
    """

    protocol = "HTTP/1.0"
    """With HTTP/1.1 connections are kept, and answers may be streamed."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        handler = type("Handler", (Incoming,), {"outer": self, "protocol_version": self.protocol})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        if tls is not None:  # who breaks the handshake off is let go, see `socketserver`
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        scheme = "http" if tls is None else "https"
        self.origin = f"{scheme}://127.0.0.1:{self._server.server_port}"

    @abstractmethod
    def serve(self, request: Incoming) -> None:
        """Answer `request`, in a thread of its own."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
