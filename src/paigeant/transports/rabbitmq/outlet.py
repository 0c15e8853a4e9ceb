"""A channel to publish on: an `Outlet` numbers what it sends, as the broker does, and so finds who waits for it."""

from __future__ import annotations

import asyncio
import secrets
from itertools import takewhile
from typing import NamedTuple

from aio_pika.exceptions import DeliveryError
from pamqp.commands import Basic, Confirm

from paigeant.transports.rabbitmq import frames
from paigeant.transports.rabbitmq.channel import Channel, Received, Told
from paigeant.transports.rabbitmq.frames import Outgoing
from paigeant.transports.rabbitmq.queues import NAME_BYTES
from paigeant.transports.rabbitmq.wire import Connection

__all__ = ["NoRoute", "Outlet"]


class NoRoute(Exception):
    """A message has come back: there is no such queue."""


class _Sent(NamedTuple):
    message_id: str
    queue: str
    confirm: asyncio.Future[None]
    """Cancelled where nobody waits for it any more."""


class Outlet:
    """Publishes with confirms on one channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._sent = 0
        self._waiting: dict[int, _Sent] = {}
        """By number, what isn't confirmed, the lowest first."""
        self._numbers: dict[str, int] = {}
        """Of these, by the id of the message."""
        channel.take = self._returned
        channel.hear = self._confirmed
        channel.ended.add_done_callback(self._lose)

    @classmethod
    async def open(cls, connection: Connection) -> Outlet:
        channel = await Channel.open(connection)
        try:
            await channel.ask(Confirm.Select())
        except BaseException:
            channel.leave()
            raise
        return cls(channel)

    @property
    def is_closed(self) -> bool:
        # Of the end of the connection its channels hear in the next turn of the event loop.
        return self._channel.is_closed or self._channel.connection.gone.done()

    @property
    def oldest(self) -> int | None:
        """The number of what isn't confirmed for the longest time, whether or not somebody still waits for that."""
        return next(iter(self._waiting), None)

    def awaits(self, number: int) -> str | None:
        """The queue that was sent the message of this number and hasn't confirmed it; None when it has."""
        sent = self._waiting.get(number)
        return None if sent is None else sent.queue

    async def publish(self, queue: str, message: Outgoing) -> None:
        """Returns when the broker has confirmed it.

        Raises NoRoute where there is no such queue, DeliveryError where it takes no message, and what has closed
        the channel.
        """
        # What comes back is found by its id: two that are under way need different ones, given up or not.
        if len(message.message_id.encode()) > NAME_BYTES or message.message_id in self._numbers:
            message = message._replace(message_id=secrets.token_hex(16))
        channel = self._channel
        most_bytes = channel.connection.frame_max
        channel.write(frames.publishing(channel.number, queue, message, most_bytes=most_bytes))
        self._sent += 1
        self._numbers[message.message_id] = self._sent
        confirm = asyncio.get_running_loop().create_future()
        self._waiting[self._sent] = _Sent(message.message_id, queue, confirm)
        await confirm

    async def unblocked(self) -> None:
        """Returns when the broker takes messages, mostly at once. Raises one of CONNECTION_EXCEPTIONS."""
        await self._channel.connection.unblocked()

    def leave(self) -> None:
        """Close its channel."""
        self._channel.leave()

    def _confirmed(self, frame: Told) -> None:
        assert isinstance(frame, (Basic.Ack, Basic.Nack)), "there are no consumers here"
        last = frame.delivery_tag or 0
        numbers = list(takewhile(last.__ge__, self._waiting)) if frame.multiple else [last]
        for number in numbers:
            self._settle(number, None if isinstance(frame, Basic.Ack) else DeliveryError(None, frame))

    def _returned(self, message: Received) -> None:
        """What nothing takes comes back, and is confirmed after that."""
        number = self._numbers.get(message.properties.message_id or "")
        if number is not None:
            assert isinstance(message.method, Basic.Return)
            self._settle(number, NoRoute(f"{message.method.reply_text}: '{message.method.routing_key}'"))

    def _settle(self, number: int, error: Exception | None) -> None:
        sent = self._waiting.pop(number, None)
        if sent is None:
            return
        del self._numbers[sent.message_id]
        if sent.confirm.done():
            return
        if error is None:
            sent.confirm.set_result(None)
        else:
            sent.confirm.set_exception(error)

    def _lose(self, _: asyncio.Future[None]) -> None:
        """The channel is gone: what isn't confirmed by now never will be."""
        for number in tuple(self._waiting):
            self._settle(number, self._channel.reason)
