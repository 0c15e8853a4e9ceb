"""Past aiormq: what comes and goes for each message doesn't take aiormq's way.

aiormq has a task send each frame, and another one put together what comes, which begins one more for each message.
That took half of a message's time and three turns of the event loop. All else about a channel is aiormq's: it is
opened, asked, watched and closed as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from io import BytesIO
from typing import Any, TypeVar

import aiormq
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelInvalidStateError
from aiormq.abc import DeliveredMessage
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.commands import Channel as Channels
from pamqp.header import ContentHeader

from paigeant.errors import ConfigurationError
from paigeant.transports.rabbitmq.wire import Connection

__all__ = ["Confirm", "Passage"]

Confirm = Basic.Ack | Basic.Nack

_Answer = TypeVar("_Answer")


class Passage:
    """A channel of aiormq. `take` gets each message that comes on it, `confirm` what the broker says of those sent."""

    def __init__(
        self,
        connection: Connection,
        channel: aiormq.Channel,
        take: Callable[[DeliveredMessage], None],
        confirm: Callable[[Confirm], None] | None = None,
    ) -> None:
        self.channel = channel
        self._wire = connection.wire
        self._closing: asyncio.Future[None] | None = None  # the event loop itself keeps none
        self._frames = channel.frames = _Frames(channel, take, confirm)  # type: ignore[assignment]

    @property
    def is_closed(self) -> bool:
        """Whether nothing may be sent any more: the broker ends the whole connection for what comes after a close.

        aiormq says so only when the close has been agreed on.
        """
        return self._frames.is_closed or self.channel.is_closed

    async def ask(self, question: Coroutine[Any, Any, _Answer]) -> _Answer:
        """What the broker answers to one of aiormq's calls on the channel, which is closed when nobody waits for it."""
        try:
            answer = await question
        except (Exception, asyncio.CancelledError):
            self._frames.is_closed = True
            # aiormq has sent a close already, but not for what was given up before it was asked.
            self._closing = asyncio.ensure_future(self._close_unasked())
            raise
        if not self._frames.are_used:
            raise ConfigurationError(
                f"aiormq {version('aiormq')} hands on what comes in another way than this version of Paigeant knows; "
                "install aiormq 7.2.4, or a newer Paigeant"
            )
        return answer

    async def close(self) -> None:
        self._frames.is_closed = True
        await self.channel.close(None)

    async def _close_unasked(self) -> None:
        with contextlib.suppress(*CONNECTION_EXCEPTIONS):  # it is closed then, and nobody asks how
            await self.close()

    def write(self, frames: bytes) -> None:
        """Send whole frames. Raises one of CONNECTION_EXCEPTIONS where they can't go."""
        if self.is_closed:
            raise ChannelInvalidStateError(f"{self.channel!r} is closed")
        self._wire.write(frames)


class _Frames:
    """In the place of the queue from which a channel takes what came: only what is no part of a message gets there.

    It has what aiormq asks of that queue, and no more: for what a newer one asks there is an error, and no standstill.
    """

    def __init__(
        self,
        channel: aiormq.Channel,
        take: Callable[[DeliveredMessage], None],
        confirm: Callable[[Confirm], None] | None,
    ) -> None:
        self.is_closed = False
        """Whether the broker has closed the channel, or was told to."""
        self.are_used = False
        """Whether an answer has come this way."""
        self._others: asyncio.Queue[Any] = channel.frames  # where it waits already
        self._channel = channel
        self._take = take
        self._confirm = confirm
        self._method: Basic.Deliver | Basic.Return | None = None
        self._header: ContentHeader | None = None
        self._body = BytesIO()
        self._missing = 0

    async def put(self, item: tuple[int, Any]) -> None:
        frame = item[1]
        if self._method is not None:
            self._add(self._method, frame)
        elif isinstance(frame, (Basic.Deliver, Basic.Return)):
            self._method = frame
        elif self._confirm is not None and isinstance(frame, Confirm):
            self._confirm(frame)
        else:
            self.are_used = True
            self.is_closed = self.is_closed or isinstance(frame, Channels.Close)
            await self._others.put(item)

    async def get(self) -> Any:
        return await self._others.get()

    def task_done(self) -> None:
        self._others.task_done()

    def _add(self, method: Basic.Deliver | Basic.Return, frame: ContentHeader | ContentBody) -> None:
        """The header of a message's content comes first, then its body in parts, or none if it is empty."""
        if isinstance(frame, ContentHeader):
            self._header, self._missing = frame, frame.body_size
        else:
            self._body.write(frame.value)
            self._missing -= len(frame.value)
        if self._missing > 0:
            return
        assert self._header is not None
        # Its buffer is given, not a copy of it: a large body isn't there twice.
        message = DeliveredMessage(method, self._header, self._body.getvalue(), self._channel)
        self._method, self._body = None, BytesIO()
        self._take(message)
