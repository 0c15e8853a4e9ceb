"""The socket of a connection: how it is opened, written to, watched and cut."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import aio_pika
from aio_pika.abc import ConnectionParameter
from aio_pika.exceptions import AMQPConnectionError
from aiormq.connection import TransportFactory
from yarl import URL

__all__ = ["Connection", "Wire"]

_PEER_SECONDS = 10
"""After this time a peer that is no longer there is noticed by the kernel, however busy or idle the connection is."""

_MOST_GATHERED_BYTES = 262_144
"""What is more is sent at once: joined and waiting for a peer that doesn't read, all of it would be kept twice."""


class Wire(TransportFactory):
    """Opens the socket of a connection, and keeps it at hand to write to it and to cut it."""

    def __init__(self) -> None:
        self._writer: _Writer | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        certificates = kwargs.pop("ssl_context_provider")
        context = await certificates.get_context() if url.scheme == "amqps" else None
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        try:
            transport, _ = await loop.create_connection(
                lambda: protocol, url.host or "", url.port or 0, ssl=context, **kwargs
            )
        except OSError as exc:
            raise AMQPConnectionError(*exc.args) from exc
        _watch_peer(transport.get_extra_info("socket"))
        self._writer = _Writer(transport, protocol, reader, loop)
        return reader, self._writer

    def write(self, frames: bytes) -> None:
        """Send whole frames on a connection that was opened."""
        assert self._writer is not None
        self._writer.write(frames)

    def cut(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()


class Connection(aio_pika.Connection):
    """One of aio-pika's, with its wire."""

    PARAMETERS = (
        *aio_pika.Connection.PARAMETERS,
        ConnectionParameter("transport_factory", parser=lambda factory: factory, is_kwarg=True),
    )

    def __init__(self, url: URL, wire: Wire, name: str) -> None:
        super().__init__(url, client_properties={"connection_name": name}, transport_factory=wire)
        self.wire = wire


class _Writer(asyncio.StreamWriter):
    """Sends what is first in a turn of the event loop at once, and what follows in the same turn at its end, together.

    So a message that is alone doesn't wait. Of many each would take a system call here, and have RabbitMQ read once
    more. aiormq writes by this, too: nothing overtakes what was written before it.
    """

    _gathered: list[bytes] | None = None
    _gathered_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._gathered is None:
            self._gathered = []
            asyncio.get_running_loop().call_soon(self._flush)
            super().write(data)
        else:
            self._gathered.append(bytes(data))
            self._gathered_bytes += len(data)
            if self._gathered_bytes > _MOST_GATHERED_BYTES:
                self._flush()

    async def drain(self) -> None:
        self._flush()
        await super().drain()

    def write_eof(self) -> None:
        self._flush()
        super().write_eof()

    def close(self) -> None:
        self._flush()
        super().close()

    def _flush(self) -> None:
        gathered, self._gathered, self._gathered_bytes = self._gathered, None, 0
        if gathered and not self.is_closing():  # what is lost here is told by the end of the connection
            super().write(b"".join(gathered))


def _watch_peer(wire: socket.socket | None) -> None:
    """Have the kernel notice a peer that vanished without a word, within seconds."""
    if wire is None:
        return
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _PEER_SECONDS // 2),
        ("TCP_KEEPINTVL", max(_PEER_SECONDS // 5, 1)),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", _PEER_SECONDS * 1000),
    ):
        if hasattr(socket, name):  # not on every platform
            wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
