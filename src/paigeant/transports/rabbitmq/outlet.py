"""A channel to publish on: an `Outlet` numbers what it sends, as the broker does, and so finds who waits for it."""

from __future__ import annotations

import asyncio
import secrets
from itertools import takewhile
from typing import Any, NamedTuple

import aiormq
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, DeliveryError, PublishError
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from paigeant.transports.rabbitmq import frames
from paigeant.transports.rabbitmq.frames import Outgoing
from paigeant.transports.rabbitmq.link import Closed, underlay
from paigeant.transports.rabbitmq.passage import Confirm, Passage
from paigeant.transports.rabbitmq.queues import NAME_BYTES
from paigeant.transports.rabbitmq.wire import Connection

__all__ = ["Outlet"]


class _Sent(NamedTuple):
    message_id: str
    confirm: asyncio.Future[None]
    """Cancelled where nobody waits for it any more."""


class Outlet:
    """Publishes with confirms on one channel."""

    def __init__(self, connection: Connection, channel: aiormq.Channel) -> None:
        self._passage = Passage(connection, channel, self._returned, self._confirmed)
        self._sent = 0
        self._waiting: dict[int, _Sent] = {}
        """By number, what isn't confirmed, the lowest first."""
        self._numbers: dict[str, int] = {}
        """Of these, by the id of the message."""
        channel.closing.add_done_callback(self._lose)

    @classmethod
    async def open(cls, connection: Connection) -> Outlet:
        opening = connection.channel(publisher_confirms=False)
        await opening.initialize()
        channel = await underlay(opening)
        outlet = cls(connection, channel)
        await outlet._passage.ask(channel.confirm_delivery())
        return outlet

    @property
    def is_closed(self) -> bool:
        return self._passage.is_closed

    @property
    def given_up(self) -> set[int]:
        """The numbers of what isn't confirmed and nobody waits for any more."""
        return {number for number, sent in self._waiting.items() if sent.confirm.cancelled()}

    async def publish(self, queue: str, message: Outgoing) -> None:
        """Returns when the broker has confirmed it.

        Raises PublishError where there is no such queue, DeliveryError where it takes no message, and what has closed
        the channel.
        """
        # What comes back is found by its id: two that are under way need different ones, given up or not.
        if len(message.message_id.encode()) > NAME_BYTES or message.message_id in self._numbers:
            message = message._replace(message_id=secrets.token_hex(16))
        channel = self._passage.channel
        most_bytes = channel.connection.connection_tune.frame_max
        self._passage.write(frames.publishing(channel.number, queue, message, most_bytes=most_bytes))
        self._sent += 1
        self._numbers[message.message_id] = self._sent
        confirm = asyncio.get_running_loop().create_future()
        self._waiting[self._sent] = _Sent(message.message_id, confirm)
        await confirm

    async def unblocked(self) -> None:
        """Returns at once, unless the broker takes no messages now."""
        await self._passage.channel.connection.ready()

    async def close(self) -> None:
        await self._passage.close()

    def _confirmed(self, frame: Confirm) -> None:
        last = frame.delivery_tag or 0
        numbers = list(takewhile(last.__ge__, self._waiting)) if frame.multiple else [last]
        for number in numbers:
            self._settle(number, None if isinstance(frame, Basic.Ack) else DeliveryError(None, frame))

    def _returned(self, message: DeliveredMessage) -> None:
        """What nothing takes comes back, and is confirmed after that."""
        number = self._numbers.get(message.header.properties.message_id or "")
        if number is not None:
            self._settle(number, PublishError(message, message.delivery))

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

    def _lose(self, closing: asyncio.Future[Any]) -> None:
        """The channel is gone: what isn't confirmed by now never will be."""
        reason = None if closing.cancelled() else closing.exception()
        if not isinstance(reason, CONNECTION_EXCEPTIONS):
            reason = Closed("the connection was closed")
        for number in tuple(self._waiting):
            self._settle(number, reason)
