"""What the contract asks of a transport, on queues of RabbitMQ."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any, Literal

from paigeant.clock import Clock, SystemClock, is_duration
from paigeant.envelope import HEAD_BYTES, Envelope, PlainEnvelope
from paigeant.errors import ConfigurationError, MessageInvalid, MessageTooLarge, TransportUnavailable
from paigeant.message import PaigeantMessage
from paigeant.store import DeadLetter, Store
from paigeant.transport import BODY_KEPT_BYTES, Bury, TopicDepth
from paigeant.transports.rabbitmq import letters
from paigeant.transports.rabbitmq.feed import LONGEST_PAUSE_SECONDS, PAUSE_SECONDS, Feed
from paigeant.transports.rabbitmq.frames import Outgoing
from paigeant.transports.rabbitmq.headers import ATTEMPTS, instant
from paigeant.transports.rabbitmq.line import Delivery
from paigeant.transports.rabbitmq.link import Link, read_url
from paigeant.transports.rabbitmq.publisher import Publisher
from paigeant.transports.rabbitmq.queues import Queues

__all__ = ["RabbitMQTransport"]

log = logging.getLogger("paigeant.transport")

_DUE = "paigeant-due-ms"

_REJECTED_SECONDS = 1.0
"""After this time a message comes again whose dead letter couldn't be kept."""

_SILENT = logging.NullHandler()


class RabbitMQTransport:
    """Moves messages through the queues of a RabbitMQ broker or cluster, 3.10 or later.

    `url` is `amqp://user:password@host:port/vhost` or `amqps://`, with aio-pika's parameters: `heartbeat`, and for TLS
    `cafile`, `certfile`, `keyfile`, `no_verify_ssl`. `namespace`, `queue_type`, `delivery_limit` may stand there, too.

    `namespace` begins the names of all queues. `queue_type` is quorum (replicated in a cluster) or classic, for good:
    RabbitMQ can't change it for a queue that is there. `delivery_limit`, for quorum queues: how often a message may
    come back before it becomes a dead letter; by default RabbitMQ's (none up to 3.13, 20 from 4.0).
    `publish_timeout`: seconds within which a message is confirmed, or TransportUnavailable is raised.
    `clock`, this host's by default: by it delays of more than a day end, and wait queues are named.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str | None = None,
        envelope: Envelope | None = None,
        queue_type: Literal["quorum", "classic"] | None = None,
        delivery_limit: int | None = None,
        publish_timeout: float = 10.0,
        clock: Clock | None = None,
    ) -> None:
        parsed, told = read_url(url)
        self.clock = clock or SystemClock()
        self.envelope = envelope or PlainEnvelope()
        self.publish_timeout = publish_timeout
        self.queues = Queues(
            namespace or told.get("namespace", "paigeant"),
            queue_type or told.get("queue_type", "quorum"),
            delivery_limit if delivery_limit is not None else _whole(told.get("delivery_limit")),
            clock=self.clock,
        )
        self._publisher = Publisher(Link(parsed, "publishing"), publish_timeout)
        self._receiving = Link(parsed, "receiving")
        self._feeds: set[Feed] = set()
        # By message id; several where the same message was delivered more than once.
        self._held: dict[str, list[Delivery]] = {}
        self._used: set[str] = set()
        self._bury: Bury | None = None
        self._draining: asyncio.Task[None] | None = None
        self._closings = 0
        self._is_closed = False

    async def connect(self) -> None:
        # What aiormq says of each attempt belongs into a log that somebody has set up, not on the screen.
        for name in ("aiormq", "aio_pika"):
            logging.getLogger(name).addHandler(_SILENT)
        await self._publisher.open(self.queues.dead, self.queues.trial())
        self._is_closed = False

    async def close(self) -> None:
        self._closings += 1  # which ends the subscriptions
        self._is_closed = True
        draining, self._draining = self._draining, None
        if draining is not None:
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
        for feed in tuple(self._feeds):
            feed.stop()
        await self._receiving.close()  # the broker gives what is unacked to others
        await self._publisher.close()
        self._held.clear()

    async def check_room(self) -> None:
        """Raises TransportUnavailable where the broker takes no messages now, and why."""
        await self._publisher.check_room(self.queues.trial())

    def joins(self, store: Store) -> bool:
        return False

    def keeps_rows(self, topic: str) -> bool:
        return False

    def bury_with(self, bury: Bury) -> None:
        self._bury = bury

    # -- sending

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        body = self.envelope.seal(message, topic)
        await self._post(topic, message.message_id, body, delay)

    async def _post(
        self, topic: str, message_id: str, body: bytes, delay: float, headers: Mapping[str, Any] | None = None
    ) -> None:
        self._used.add(topic)
        queue = self.queues.topic(topic)
        if delay > 0:
            if delay > self.queues.longest_wait:
                headers = {**(headers or {}), _DUE: int((self.clock.now() + delay) * 1000)}
                delay = self.queues.longest_wait
            queue = self.queues.wait(queue, delay)
        await self._publisher.send(queue, Outgoing(message_id, body, headers))

    # -- receiving

    async def subscribe(self, topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
        self._used.add(topic)
        if self._is_closed:  # nobody would close what it opens
            return
        self._start_draining()
        # No more than what would be refused as too large, and what is kept of that.
        keeps = max(self.envelope.limit_bytes, BODY_KEPT_BYTES) + HEAD_BYTES
        feed = Feed(self._receiving, self.queues.topic(topic), prefetch, self._drop, keeps=keeps)
        self._feeds.add(feed)
        closings = self._closings
        try:
            while closings == self._closings:
                delivery = await feed.next()
                if delivery is None:
                    return  # closed
                message = await self._opened(topic, delivery)
                if message is not None:
                    yield message
        finally:
            self._feeds.discard(feed)
            await feed.end()

    async def _opened(self, topic: str, delivery: Delivery) -> PaigeantMessage | None:
        try:
            if delivery.body_bytes > len(delivery.body):
                raise MessageTooLarge(delivery.body_bytes, self.envelope.limit_bytes)
            message = await self.envelope.open(topic, delivery.body)
            if not await self._is_due(topic, message, delivery):
                return None
        except MessageInvalid as exc:
            about = (delivery.property_id, topic, exc.reason, str(exc), delivery.body, delivery.attempts)
            try:
                await self._reject(delivery, DeadLetter.about(*about))
            except Exception as trouble:  # whatever the keeper of dead letters meets, the iteration goes on
                log.warning("the dead letter %s is not kept yet, it comes again: %s", about[0], trouble)
                delivery.give_back()
                await asyncio.sleep(PAUSE_SECONDS)  # it comes at once
            return None
        except BaseException:
            delivery.give_back()  # else nobody would ever settle it
            raise
        if delivery.line.is_void:  # lost while it was opened: it comes again
            return None
        delivery.message_id, delivery.topic = message.message_id, topic
        self._held.setdefault(message.message_id, []).append(delivery)
        return message

    async def _is_due(self, topic: str, message: PaigeantMessage, delivery: Delivery) -> bool:
        """Whether its time has come; else it goes on to wait."""
        due = instant(delivery.headers, _DUE)
        early = 0.0 if due is None else due - self.clock.now()
        if not is_duration(early):
            return True  # nobody of us sends one that is so far away
        headers = {ATTEMPTS: delivery.attempts - 1}
        try:
            await self._post(topic, message.message_id, delivery.body, early, headers)
        except TransportUnavailable as exc:
            log.warning("a message of %s that isn't due can't be sent on, it comes again: %s", topic, exc)
            delivery.give_back()
            await asyncio.sleep(PAUSE_SECONDS)
        else:
            delivery.ack()
        return False

    # -- settling

    async def ack(self, message_id: str) -> None:
        delivery = self._take(message_id)
        if delivery is not None:
            delivery.ack()

    async def nack(self, message_id: str, *, delay: float = 0) -> None:
        delivery = self._take(message_id)
        if delivery is None:
            return
        if delay <= 0 and delivery.returns < self.queues.most_returns:
            delivery.give_back()
            return
        headers = {ATTEMPTS: delivery.attempts}
        try:
            # Confirmed first, acked then: a crash in between doubles the message, a loss can't happen.
            await self._post(delivery.topic, message_id, delivery.body, delay, headers)
        except Exception:
            self._receiving.start(self._give_back_later(delivery, delay))
            raise
        except BaseException:
            delivery.give_back()  # too early, but not lost, and in nobody's way
            raise
        delivery.ack()

    @staticmethod
    async def _give_back_later(delivery: Delivery, delay: float) -> None:
        """Give back what can't go elsewhere, but not at once.

        It would come again hundreds of times in a second, and soon as often as a delivery limit lets it.
        """
        await asyncio.sleep(min(max(delay, PAUSE_SECONDS), LONGEST_PAUSE_SECONDS))
        delivery.give_back()

    async def dead_letter(self, message_id: str, reason: str) -> None:
        delivery = self._take(message_id)
        if delivery is not None:
            letter = DeadLetter.about(
                message_id, delivery.topic, reason, reason, delivery.body, delivery.attempts
            )
            await self._reject(delivery, letter)

    async def _reject(self, delivery: Delivery, letter: DeadLetter) -> None:
        # Kept first, taken out of the topic then: a crash in between does it again, a loss can't happen.
        try:
            if self._bury is None:
                await self._publisher.send(self.queues.dead, letters.packed(letter))
            else:
                await self._bury(letter)
        except Exception:
            self._receiving.start(self._give_back_later(delivery, _REJECTED_SECONDS))
            raise
        except BaseException:
            delivery.give_back()
            raise
        delivery.ack()

    def _take(self, message_id: str) -> Delivery | None:
        """What is held under this id, the one that came first; it isn't any more."""
        held = self._held.get(message_id)
        if held is None:
            return None
        delivery = held.pop(0)
        if not held:
            del self._held[message_id]
        return delivery

    def _drop(self, delivery: Delivery) -> None:
        """Forget what was delivered on a channel that is gone: the broker delivers it again."""
        held = self._held.get(delivery.message_id, [])
        if delivery in held:
            held.remove(delivery)
            if not held:
                del self._held[delivery.message_id]

    # -- dead letters of the broker

    def _start_draining(self) -> None:
        if self._bury is not None and self._draining is None:
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Bury what RabbitMQ itself took out of a topic, and what a transport without a store has kept there."""
        feed = Feed(self._receiving, self.queues.dead, 1, self._drop)
        self._feeds.add(feed)
        try:
            while True:
                try:
                    delivery = await feed.next()
                    if delivery is None:
                        return
                    await self._drain_one(delivery)
                except Exception as exc:  # whatever it is, those that come after it must be recorded
                    log.warning("dead letters of RabbitMQ can't be read, will try again: %s", exc)
                    await asyncio.sleep(LONGEST_PAUSE_SECONDS)
        finally:
            self._feeds.discard(feed)
            await feed.end()

    async def _drain_one(self, delivery: Delivery) -> None:
        try:
            await self._bury_drained(letters.unpacked(delivery, self.queues, self._used))
        except BaseException:
            delivery.give_back()
            raise
        delivery.ack()

    async def _bury_drained(self, letter: DeadLetter) -> None:
        # Held while the store can't take it: given back to its queue it would come at once, and not for ever.
        while True:
            try:
                assert self._bury is not None
                await self._bury(letter)
                return
            except Exception as exc:  # whatever the store's trouble is, the letter waits for its end
                log.warning("a dead letter can't be recorded, will try again: %s", exc)
                await asyncio.sleep(LONGEST_PAUSE_SECONDS * random.uniform(0.5, 1.5))

    # -- what waits

    async def topics(self, known: Collection[str] = ()) -> list[TopicDepth]:
        """Those among `known`, and those that this transport has sent to or received from.

        RabbitMQ can't list its queues to a client, and tells neither what others hold nor ages.
        """
        names = sorted(self._used.union(known))
        counts = await self._publisher.counts([self.queues.topic(name).name for name in names])
        return [TopicDepth(name, count, 0, None) for name, count in zip(names, counts, strict=True) if count]


def _whole(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 9:
        raise ConfigurationError(f"delivery_limit is '{text}'; expected a whole number of up to nine digits")
    return int(text)
