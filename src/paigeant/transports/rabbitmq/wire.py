"""A connection and its socket: how that is opened, written to, watched and cut."""

from __future__ import annotations

import asyncio
import socket
import traceback
from importlib.metadata import version
from typing import Any

import aio_pika
import aiormq
from aio_pika.abc import ConnectionParameter
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, AMQPConnectionError, ChannelInvalidStateError
from aiormq.connection import TransportFactory
from yarl import URL

from paigeant.errors import ConfigurationError

__all__ = ["Closed", "Connection", "Wire"]

_PEER_SECONDS = 10
"""After this time a peer that is no longer there is noticed by the kernel, however busy or idle the connection is."""

_MOST_GATHERED_BYTES = 262_144
"""What is more is sent at once: joined and waiting for a peer that doesn't read, all of it would be kept twice."""

_MOST_CHANNELS = 65535
"""Where the broker sets no limit."""


class Closed(ConnectionError):
    """What was waited for can't come any more: the connection was closed meanwhile."""


class Wire(TransportFactory):
    """Opens the socket of a connection, and keeps it at hand to write to it and to cut it."""

    def __init__(self) -> None:
        self._writer: _Writer | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        certificates = kwargs.pop("ssl_context_provider")
        try:
            context = await certificates.get_context() if url.scheme == "amqps" else None
        except OSError as exc:  # errors of ssl are among them
            raise ConfigurationError(
                f"a certificate that transport_url names can't be read: {exc}; correct cafile, certfile and keyfile"
            ) from exc
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
    """One of aio-pika's, with its wire and with channels of ours."""

    PARAMETERS = (
        *aio_pika.Connection.PARAMETERS,
        ConnectionParameter("transport_factory", parser=lambda factory: factory, is_kwarg=True),
    )

    def __init__(self, url: URL, wire: Wire, name: str) -> None:
        super().__init__(url, client_properties={"connection_name": name}, transport_factory=wire)
        self.wire = wire
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when it has ended."""
        self.reason: Exception = Closed("the connection was closed")
        """Why it has ended."""

    async def connect(self, timeout: float | None = None) -> None:
        await super().connect(timeout)
        assert self.transport is not None
        self._client: aiormq.abc.AbstractConnection = self.transport.connection
        self.frame_max = self._client.connection_tune.frame_max
        """How many bytes a frame may have; 0 for any number."""
        self._client.closing.add_done_callback(self._lose)

    @property
    def is_blocked(self) -> bool:
        """Whether the broker has said that it takes no messages for now."""
        waiting = self._client.ready()
        try:
            waiting.send(None)  # aiormq tells only by letting wait
        except StopIteration:
            return False
        waiting.close()
        return True

    async def unblocked(self) -> None:
        """Returns when the broker takes messages, mostly at once. Raises `reason` when it is gone before."""
        if self.is_blocked:
            waiting = asyncio.ensure_future(self._client.ready())
            try:
                await asyncio.wait([waiting, self.gone], return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
        if self.gone.done():
            raise self.reason.with_traceback(None)  # it may be raised often

    def join(self, channel: Any) -> int:
        """Have what comes on the lowest number that is free put into the `frames` of `channel`; gives the number."""
        channels = self._client.channels
        most = self._client.connection_tune.channel_max or _MOST_CHANNELS
        number = next((each for each in range(1, most + 1) if each not in channels), None)
        if number is None:
            raise ChannelInvalidStateError(
                f"all {most} channels of the connection are in use; raise channel_max of RabbitMQ"
            )
        channels[number] = channel
        return number

    def keep(self, channel: Any) -> None:
        """Keep the number of `channel` for one more frame that closes it: aiormq has freed it for the first."""
        self._client.channels[channel.number] = channel

    def _lose(self, closing: asyncio.Future[Any]) -> None:
        reason = None if closing.cancelled() else closing.exception()
        if isinstance(reason, CONNECTION_EXCEPTIONS):
            self.reason = reason
        elif isinstance(reason, (AttributeError, TypeError)) and _raiser(reason).startswith("aiormq."):
            self.reason = ConfigurationError(
                f"aiormq {version('aiormq')} hands on what comes in another way than this version of Paigeant knows; "
                "install aiormq 7.2.4, or a newer Paigeant"
            )
        elif not self.close_called:
            # aiormq has no words for it: an end of the stream between two frames, or else it has cancelled its reader.
            if reason is None:
                what = "the broker has ended it"
            elif isinstance(reason, asyncio.CancelledError):
                what = "no heartbeat has come for long"
            else:  # of ours, in what takes a frame that came
                what = f"{type(reason).__name__}: {reason}"
            self.reason = AMQPConnectionError(f"the connection is lost: {what}")
        self.gone.set_result(None)


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


def _raiser(error: BaseException) -> str:
    """The module in which it was raised."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"])


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
