"""A channel to receive on: a `Line` has its consumers, and a `Delivery` is settled on the line that brought it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from typing import Any

import aiormq
from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from aiormq.abc import DeliveredMessage

from paigeant.policy import LARGEST_COUNT
from paigeant.transports.rabbitmq import frames
from paigeant.transports.rabbitmq.headers import ATTEMPTS, count
from paigeant.transports.rabbitmq.link import CLOSE_SECONDS, closings
from paigeant.transports.rabbitmq.passage import Passage
from paigeant.transports.rabbitmq.wire import Connection

__all__ = ["Delivery", "Line"]


class Delivery:
    """A message as it came, on the channel on which alone it can be settled."""

    __slots__ = ("_message", "body", "consumer", "line", "message_id", "tag", "topic")

    def __init__(self, line: Line, message: DeliveredMessage) -> None:
        self.line = line
        self._message = message
        self.body = message.body
        self.consumer = message.consumer_tag or ""
        self.tag = message.delivery_tag or 0
        self.message_id = self.topic = ""

    @property
    def property_id(self) -> str:
        """The message's id as the envelope says, for a body that doesn't say any."""
        found = self._message.header.properties.message_id
        return str(found) if found else f"amqp-{hashlib.sha256(self.body).hexdigest()[:32]}"

    @property
    def headers(self) -> dict[str, Any]:
        return self._message.header.properties.headers or {}

    @property
    def returns(self) -> int:
        """How often it has come back to this queue; what a classic queue knows is only whether."""
        return count(self.headers, "x-delivery-count", int(bool(self._message.redelivered)))

    @property
    def attempts(self) -> int:
        """How often it was delivered, this time included; copies are counted on."""
        return min(count(self.headers, ATTEMPTS) + self.returns + 1, LARGEST_COUNT)

    async def ack(self) -> None:
        await self.line.settle(self, frames.ack)

    async def give_back(self) -> None:
        await self.line.settle(self, frames.give_back)


class Line:
    """A channel with the consumers of one feed, and what was handed out of it and is not settled.

    RabbitMQ sends a consumer no more than `prefetch` unsettled messages, those that have been handed out included. For
    an iteration that goes on without settling any there are more consumers, so that `prefetch` counts what is ahead.
    """

    def __init__(
        self,
        connection: Connection,
        channel: aiormq.Channel,
        queue: str,
        prefetch: int,
        receive: Callable[[Delivery], None],
    ) -> None:
        self.channel = channel
        self._passage = Passage(connection, channel, self._take)
        self._receive = receive
        self._queue = queue
        self._prefetch = prefetch
        self._consumers: dict[str, int] = {}  # and how many of what each has received are out
        self.out: set[Delivery] = set()
        self.is_ending = False
        self.received = 0
        self.watching: asyncio.Task[None] | None = None
        self.is_void = False
        """Whether what came on it can't be settled any more."""

    @property
    def is_starved(self) -> bool:
        """Whether RabbitMQ sends nothing more before something is settled."""
        return self._ahead <= 0

    @property
    def _ahead(self) -> int:
        """How many messages RabbitMQ sends, or has sent, before one that is out is settled."""
        return self._prefetch * len(self._consumers) - sum(self._consumers.values())

    def hand_out(self, delivery: Delivery) -> None:
        self.out.add(delivery)
        if delivery.consumer in self._consumers:
            self._consumers[delivery.consumer] += 1

    async def open(self) -> None:
        """Receive the first `prefetch` messages."""
        await self._passage.ask(self.channel.basic_qos(prefetch_count=self._prefetch))
        await self.consume()

    async def consume(self) -> None:
        """Receive `prefetch` messages more ahead."""
        consuming = await self._passage.ask(self.channel.basic_consume(self._queue, _nothing))
        self._consumers[str(consuming.consumer_tag)] = 0

    async def stop(self) -> None:
        """Receive nothing more; returns when nothing more can come."""
        while self._consumers:
            await self._cancel(next(iter(self._consumers)))

    async def _cancel(self, consumer: str) -> None:
        del self._consumers[consumer]
        await self._passage.ask(self.channel.basic_cancel(consumer))

    async def waiting(self) -> int:
        """How many messages wait in the queue."""
        declared = await self._passage.ask(self.channel.queue_declare(self._queue, passive=True))
        return declared.message_count or 0

    def give_back(self, delivery: Delivery) -> None:
        """Have what was not handed out delivered again."""
        self._passage.write(frames.give_back(self.channel.number, delivery.tag))

    async def settle(self, delivery: Delivery, how: Callable[[int, int], bytes]) -> None:
        """Tell the broker, once. On a channel that is gone nothing happens: the message comes again by itself."""
        if delivery not in self.out:
            return  # RabbitMQ closes a channel on which something is settled twice
        self.out.discard(delivery)
        with contextlib.suppress(*CONNECTION_EXCEPTIONS), closings():
            if delivery.consumer in self._consumers:
                self._consumers[delivery.consumer] -= 1
                if len(self._consumers) > 1 and self._ahead > self._prefetch:
                    await self._cancel(delivery.consumer)  # first, or RabbitMQ sends another in its place
            self._passage.write(how(self.channel.number, delivery.tag))
            if self.is_ending and not self.out:
                await self.close()

    async def close(self) -> None:
        """End it; RabbitMQ gives what is unsettled to others."""
        with contextlib.suppress(*CONNECTION_EXCEPTIONS):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._passage.close()

    def _take(self, message: DeliveredMessage) -> None:
        self.received += 1
        if not self.is_void:
            self._receive(Delivery(self, message))


async def _nothing(_: DeliveredMessage) -> None:
    """For aiormq, which is given a consumer and gets no message for it."""
