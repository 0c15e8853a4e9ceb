"""A channel to receive on: a `Line` has its consumers, and a `Delivery` is settled on the line that brought it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any

from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from pamqp.commands import Basic
from pamqp.commands import Queue as Queues
from pamqp.frame import marshal

from paigeant.counts import LARGEST_COUNT
from paigeant.transports.rabbitmq import frames
from paigeant.transports.rabbitmq.channel import Channel, Received, Told
from paigeant.transports.rabbitmq.headers import ATTEMPTS, count

__all__ = ["Delivery", "Line"]


class Delivery:
    """A message as it came, on the channel on which alone it can be settled."""

    __slots__ = (
        "_method",
        "_properties",
        "body",
        "body_bytes",
        "consumer",
        "line",
        "message_id",
        "tag",
        "topic",
    )

    def __init__(self, line: Line, received: Received) -> None:
        method, self._properties, self.body, self.body_bytes = received
        assert isinstance(method, Basic.Deliver), "nothing is sent here that could come back"
        self.line = line
        self._method = method
        self.consumer = method.consumer_tag
        self.tag = method.delivery_tag or 0
        self.message_id = self.topic = ""

    @property
    def property_id(self) -> str:
        """The message's id as the envelope says, for a body that doesn't say any."""
        if found := self._properties.message_id:
            return str(found)
        digest = hashlib.sha256(self.body)
        digest.update(b"%d" % self.body_bytes)  # of two long ones the beginnings may be the same
        return f"amqp-{digest.hexdigest()[:32]}"

    @property
    def headers(self) -> dict[str, Any]:
        return self._properties.headers or {}

    @property
    def returns(self) -> int:
        """How often it has come back to this queue; what a classic queue knows is only whether."""
        return count(self.headers, "x-delivery-count", int(bool(self._method.redelivered)))

    @property
    def attempts(self) -> int:
        """How often it was delivered, this time included; copies are counted on."""
        return min(count(self.headers, ATTEMPTS) + self.returns + 1, LARGEST_COUNT)

    def ack(self) -> None:
        self.line.settle(self, frames.ack)

    def give_back(self) -> None:
        self.line.settle(self, frames.give_back)


class Line:
    """A channel with the consumers of one feed, and what was handed out of it and is not settled.

    RabbitMQ sends a consumer no more than `prefetch` unsettled messages, those that have been handed out included. For
    an iteration that goes on without settling any there are more consumers, so that `prefetch` counts what is ahead.
    """

    def __init__(
        self,
        channel: Channel,
        queue: str,
        prefetch: int,
        news: Callable[[], None],
        cancelled: Callable[[Line], None],
    ) -> None:
        self.channel = channel
        self._queue = queue
        self._prefetch = prefetch
        self._news = news
        self._cancelled = cancelled
        self._consumers: dict[str, int] = {}  # and how many of what each has received are out
        self.inbox: deque[Delivery] = deque()
        """What was not handed out yet."""
        self.out: set[Delivery] = set()
        self.is_ending = False
        self.received = 0
        self.watching: asyncio.Task[None] | None = None
        self.is_void = False
        """Whether what came on it can't be settled any more."""
        channel.take = self._take
        channel.hear = self._hear

    @property
    def is_starved(self) -> bool:
        """Whether RabbitMQ sends nothing more before something is settled."""
        return self._ahead <= 0

    @property
    def _ahead(self) -> int:
        """How many messages RabbitMQ sends, or has sent, before one that is out is settled."""
        return self._prefetch * len(self._consumers) - sum(self._consumers.values())

    def hand_out(self) -> Delivery:
        delivery = self.inbox.popleft()
        self.out.add(delivery)
        if delivery.consumer in self._consumers:
            self._consumers[delivery.consumer] += 1
        return delivery

    async def open(self) -> None:
        """Receive the first `prefetch` messages."""
        await self.channel.ask(Basic.Qos(prefetch_count=self._prefetch))
        await self.consume()

    async def consume(self) -> None:
        """Receive `prefetch` messages more ahead."""
        consumer = secrets.token_hex(8)
        self._consumers[consumer] = 0
        await self.channel.ask(Basic.Consume(queue=self._queue, consumer_tag=consumer))

    async def stop(self) -> None:
        """Receive nothing more; returns when nothing more can come."""
        while self._consumers:
            consumer, _ = self._consumers.popitem()
            await self.channel.ask(Basic.Cancel(consumer))

    async def waiting(self) -> int:
        """How many messages wait in the queue."""
        declared = await self.channel.ask(Queues.Declare(queue=self._queue, passive=True))
        return declared.message_count or 0

    def give_back(self) -> None:
        """Have what was not handed out delivered again."""
        while self.inbox:
            self.channel.write(frames.give_back(self.channel.number, self.inbox.popleft().tag))

    def settle(self, delivery: Delivery, how: Callable[[int, int], bytes]) -> None:
        """Tell the broker, once. On a channel that is gone nothing happens: the message comes again by itself."""
        if delivery not in self.out:
            return  # RabbitMQ closes a channel on which something is settled twice
        self.out.discard(delivery)
        with contextlib.suppress(*CONNECTION_EXCEPTIONS):
            if delivery.consumer in self._consumers:
                self._consumers[delivery.consumer] -= 1
                if len(self._consumers) > 1 and self._ahead > self._prefetch:
                    self._end(delivery.consumer)  # first, or RabbitMQ sends another in its place
            self.channel.write(how(self.channel.number, delivery.tag))
            if self.is_ending and not self.out:
                self.channel.leave()

    def _end(self, consumer: str) -> None:
        del self._consumers[consumer]
        self.channel.write(marshal(Basic.Cancel(consumer, nowait=True), self.channel.number))

    def _take(self, received: Received) -> None:
        self.received += 1
        self.inbox.append(Delivery(self, received))
        self._news()

    def _hear(self, told: Told) -> None:
        assert isinstance(told, Basic.Cancel), "nothing is sent here that could be confirmed"
        self._cancelled(self)
