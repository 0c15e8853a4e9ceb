"""A channel of a connection: what is asked and sent on it, and what comes.

aiormq opens the connection, reads its frames and hands on each to the channel of its number. Its own channels have a
task send each frame and another one put together what comes, which begins one more for each message; that took half of
a message's time. They also send what ends the whole connection: a close when the broker has closed already, and a
number that is used again before the broker was told that its close has come.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from io import BytesIO
from typing import Any, NamedTuple

from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelInvalidStateError
from aiormq.channel import exception_by_code
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.commands import Channel as Channels
from pamqp.frame import marshal
from pamqp.header import ContentHeader

from paigeant.transports.rabbitmq.wire import Closed, Connection

__all__ = ["Channel", "Received", "Told", "throwaway"]

_CLOSE_SECONDS = 5.0


class Received(NamedTuple):
    """A message as it came: delivered, or returned to its sender."""

    method: Basic.Deliver | Basic.Return
    properties: Basic.Properties
    body: bytes
    """Its beginning, where it is longer than the channel `keeps`."""
    body_bytes: int


Told = Basic.Ack | Basic.Nack | Basic.Cancel
"""What the broker says unasked: how a message that was sent has fared, or that a consumer is none any more."""


class Channel:
    """One that is open. Who uses it sets `take`, which gets each message that comes, and `hear`, what is told."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.number = connection.join(self)
        self.take: Callable[[Received], None] = _pass_over
        self.hear: Callable[[Told], None] = _pass_over
        self.keeps = sys.maxsize
        """How many bytes of a body are kept: whoever can send may send many large ones at the same time."""
        self.is_closed = False
        """Whether nothing may be sent any more: the broker ends the whole connection for what comes after a close."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the broker has closed it, or agreed to, or the connection is gone."""
        self.reason: Exception = Closed("the channel was closed")
        """Why it has ended."""
        self._answer: asyncio.Future[Any] | None = None
        self._is_answered = asyncio.Event()
        self._is_answered.set()
        self._method: Basic.Deliver | Basic.Return | None = None
        self._header: ContentHeader | None = None
        self._body = BytesIO()
        self._missing = 0
        self._is_crossed = False
        connection.gone.add_done_callback(self._lose)

    @classmethod
    async def open(cls, connection: Connection) -> Channel:
        await connection.unblocked()
        channel = cls(connection)
        try:
            await channel.ask(Channels.Open())
        except BaseException:
            channel.leave()
            raise
        return channel

    @property
    def frames(self) -> Channel:
        """Where aiormq puts what comes, by `put`."""
        return self  # kept in an attribute it would hold itself, until the garbage collector comes by

    def write(self, frames: bytes) -> None:
        """Send whole frames. Raises why they can't go, mostly one of CONNECTION_EXCEPTIONS."""
        if self.ended.done():
            raise self.reason.with_traceback(None)  # it may be raised often
        if self.is_closed:
            raise ChannelInvalidStateError(f"the channel {self.number} is closed")
        self.connection.wire.write(frames)

    async def ask(self, question: Frame) -> Any:
        """The broker's answer, which passes unheard when nobody waits for it any more.

        One question at a time: not all are answered in their order.
        """
        while not self._is_answered.is_set():
            await self._is_answered.wait()
        self.write(marshal(question, self.number))
        self._is_answered.clear()
        self._answer = asyncio.get_running_loop().create_future()
        return await self._answer

    def leave(self) -> None:
        """Close it. The broker gives what came on it and isn't settled to others, and what is still to come."""
        if not self.is_closed:
            with contextlib.suppress(*CONNECTION_EXCEPTIONS):  # where they can't go it has ended
                self.write(marshal(Channels.Close(200, "", 0, 0), self.number))
            self.is_closed = True
            # It isn't answered any more, and what the broker is busy with may keep it from agreeing for long.
            self._give_up(Closed("the channel was closed"))

    async def close(self) -> None:
        """Close it; returns when the broker has agreed, or doesn't say so for long."""
        self.leave()
        await asyncio.wait([self.ended], timeout=_CLOSE_SECONDS)

    async def put(self, item: tuple[int, Any]) -> None:
        """A frame that came."""
        frame = item[1]
        if self._method is not None:
            self._add(self._method, frame)
        elif isinstance(frame, (Basic.Deliver, Basic.Return)):
            self._method = frame
        elif isinstance(frame, Told):
            if not self.is_closed:
                self.hear(frame)
        elif isinstance(frame, Channels.Close):
            self._lose_to(frame)
        elif isinstance(frame, Channels.CloseOk):
            if self._is_crossed:
                self._agree()
            self._end(Closed("the channel was closed"))
        else:
            self._is_answered.set()
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(frame)

    def _add(self, method: Basic.Deliver | Basic.Return, frame: ContentHeader | ContentBody) -> None:
        """The header of a message's content comes first, then its body in parts, or none if it is empty."""
        if isinstance(frame, ContentHeader):
            self._header, self._missing = frame, frame.body_size
        else:
            self._body.write(frame.value[: max(self.keeps - self._body.tell(), 0)])
            self._missing -= len(frame.value)
        if self._missing > 0:
            return
        assert self._header is not None
        # Its buffer is given, not a copy of it: a large body isn't there twice.
        header = self._header
        received = Received(method, header.properties, self._body.getvalue(), header.body_size)
        self._method, self._body = None, BytesIO()
        if not self.is_closed:  # as in `put`: what has come back would else be confirmed, its return unheard
            self.take(received)

    def _lose_to(self, close: Channels.Close) -> None:
        if self.is_closed:
            # It has crossed with ours, to which an answer is to come: the next channel of this number must not get it.
            # Agreed to before that, RabbitMQ would end the channel, and now and then its answer with it.
            self.connection.keep(self)
            self._is_crossed = True
        else:
            self.is_closed = True
            self._agree()
        self._end(exception_by_code(close))

    def _agree(self) -> None:
        """Tell the broker that its close has come: from now on its number is free."""
        with contextlib.suppress(*CONNECTION_EXCEPTIONS):
            self.connection.wire.write(marshal(Channels.CloseOk(), self.number))

    def _lose(self, _: asyncio.Future[None]) -> None:
        self._end(self.connection.reason)

    def _end(self, reason: Exception) -> None:
        if self.ended.done():
            return
        self.is_closed = True
        self.reason = reason
        self.connection.gone.remove_done_callback(self._lose)
        self.ended.set_result(None)
        self._give_up(reason)

    def _give_up(self, reason: Exception) -> None:
        """Have nobody wait for an answer."""
        self._is_answered.set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(reason)


@contextlib.asynccontextmanager
async def throwaway(connection: Connection) -> AsyncIterator[Channel]:
    """A channel for what makes RabbitMQ close it when the answer is no."""
    channel = await Channel.open(connection)
    try:
        yield channel
    finally:
        channel.leave()


def _pass_over(_: object) -> None:
    """For a channel on which nothing comes."""
