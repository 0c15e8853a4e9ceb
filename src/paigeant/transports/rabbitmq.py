"""Messages in queues of RabbitMQ: a durable queue for each topic, others in which delayed messages wait, and a confirm
for each publish.

Reconnecting is done here, on plain connections of aio-pika: its robust ones restore what they know after a lost
connection, but not a consumer that the broker has cancelled, and they don't tell when a delivery has become void.
Messages are published, consumed and acked on the channels of aiormq underneath, which costs half as much.

Names: `<namespace>.<topic>` for topics, quoted, and a digest where that is too long; what begins with `<namespace>:` is
ours and can't be a topic.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import random
import re
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, Generic, Literal, NamedTuple, TypeVar
from urllib.parse import quote, unquote

import aio_pika
import aiormq
from aio_pika.abc import AbstractChannel, ConnectionParameter
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AuthenticationError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    DeliveryError,
    InvalidFrameError,
    ProbableAuthenticationError,
    PublishError,
)
from aiormq.abc import DeliveredMessage
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource
from pamqp.commands import Basic
from yarl import URL

from paigeant.errors import ConfigurationError, MessageInvalid, PaigeantError, TransportUnavailable
from paigeant.message import DEFAULT_LIMIT_BYTES, PaigeantMessage, decode, encode
from paigeant.store import DeadLetter, Store
from paigeant.transport import Bury, TopicDepth

__all__ = ["RabbitMQTransport"]

log = logging.getLogger("paigeant.transport")

_NAME_BYTES = 255
"""What AMQP allows for the name of a queue, and for the message_id of a message."""

_HEARTBEAT_SECONDS = 10
"""A broker that has frozen is noticed after three of these. `?heartbeat=` in the URL overrides it."""

_PEER_SECONDS = 10
"""After this time a peer that is no longer there is noticed by the kernel, however busy or idle the connection is."""

_CONNECT_SECONDS = 5.0
_CLOSE_SECONDS = 5.0
_OPEN_SECONDS = 15.0
"""How long it may take to declare a queue and consume from it: of a cluster that recovers, several seconds."""

_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 2.0
"""Between attempts to receive again: first and last."""

_STARVED_SECONDS = 0.02
"""How long an iteration waits for a message while all that it has fetched is unsettled, before it fetches more."""

_DELETED_SECONDS = 1.0
"""How long a deleted queue is left alone before it is declared anew. RabbitMQ 3.10 tells its consumers a moment later;
if there is one of the same name again by then, it attaches them to that without a word, and nothing reaches them."""

_IDLE_SECONDS = 10.0
"""After this time without a message a consumer is opened anew, should it have been attached so."""

_RETURNS = 10
"""So often a message goes back to its queue, then a copy takes its place: RabbitMQ 4 drops what came back 20 times."""

_STEPS = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80)
"""Milliseconds that a wait queue holds messages, and ten times these, a hundred times, ...: whole seconds and minutes
are among them, and a delay is at most a third longer than asked for."""

_LONGEST_WAIT = 86_400.0
"""A wait queue holds no message for longer than a day; one that has further to go then takes another round."""

_WAIT_SPAN = 3600.0
_WAIT_SLACK = 600.0
"""Clocks that differ by up to this send no message into a wait queue that expires too soon."""

_REASON, _DETAIL, _TOPIC = "paigeant-reason", "paigeant-detail", "paigeant-topic"
_ATTEMPTS, _DUE = "paigeant-attempts", "paigeant-due-ms"
_DETAIL_CHARACTERS = 4096

_Opened = TypeVar("_Opened")


class _Queue(NamedTuple):
    """A queue as it has to be declared, after those that it refers to."""

    name: str
    arguments: Mapping[str, Any]
    needs: tuple[_Queue, ...] = ()


class RabbitMQTransport:
    """Moves messages through the queues of a RabbitMQ broker or cluster, 3.10 or later.

    `url` is `amqp://user:password@host:port/vhost` or `amqps://`, with aio-pika's parameters: `heartbeat`, and for TLS
    `cafile`, `certfile`, `keyfile`, `no_verify_ssl`. `namespace`, `queue_type`, `delivery_limit` may stand there, too.

    `namespace` begins the names of all queues. `queue_type` is quorum (replicated in a cluster) or classic, for good:
    RabbitMQ can't change it for a queue that is there. `delivery_limit`, for quorum queues: how often a message may
    come back before it becomes a dead letter; by default RabbitMQ's (none up to 3.13, 20 from 4.0).
    `publish_timeout`: seconds within which a message is confirmed, or TransportUnavailable is raised.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str | None = None,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        queue_type: Literal["quorum", "classic"] | None = None,
        delivery_limit: int | None = None,
        publish_timeout: float = 10.0,
    ) -> None:
        parsed, told = _parsed(url)
        self.limit_bytes = limit_bytes
        self.publish_timeout = publish_timeout
        self.queues = _Queues(
            namespace or told.get("namespace", "paigeant"),
            queue_type or told.get("queue_type", "quorum"),
            delivery_limit if delivery_limit is not None else _whole(told.get("delivery_limit")),
        )
        self._publisher = _Publisher(_Link(parsed, "publishing"), publish_timeout)
        self._receiving = _Link(parsed, "receiving")
        self._feeds: set[_Feed] = set()
        # By message id; several where the same message was delivered more than once.
        self._held: dict[str, list[_Delivery]] = {}
        self._used: set[str] = set()
        self._bury: Bury | None = None
        self._draining: asyncio.Task[None] | None = None
        self._closings = 0

    async def connect(self) -> None:
        # What aiormq says of each attempt belongs into a log that somebody has set up, not on the screen.
        for name in ("aiormq", "aio_pika"):
            logging.getLogger(name).addHandler(_SILENT)
        await self._publisher.open(self.queues.dead)

    async def close(self) -> None:
        self._closings += 1  # which ends the subscriptions
        draining, self._draining = self._draining, None
        if draining is not None:
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
        for feed in tuple(self._feeds):
            feed.stop()
        await self._receiving.close()  # the broker gives what is unacked to others
        await self._publisher.close()
        self._held.clear()

    def joins(self, store: Store) -> bool:
        return False

    def bury_with(self, bury: Bury) -> None:
        self._bury = bury

    # -- sending

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        body = encode(message, limit_bytes=self.limit_bytes)
        await self._post(topic, message.message_id, body, delay)

    async def _post(
        self, topic: str, message_id: str, body: bytes, delay: float, headers: Mapping[str, Any] | None = None
    ) -> None:
        self._used.add(topic)
        queue = self.queues.topic(topic)
        if delay > 0:
            if delay > _LONGEST_WAIT:
                headers = {**(headers or {}), _DUE: int((time.time() + delay) * 1000)}
                delay = _LONGEST_WAIT
            queue = self.queues.wait(queue, delay)
        await self._publisher.send(queue, message_id, body, headers)

    # -- receiving

    async def subscribe(self, topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
        self._used.add(topic)
        self._start_draining()
        feed = _Feed(self._receiving, self.queues.topic(topic), prefetch, self._drop)
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

    async def _opened(self, topic: str, delivery: _Delivery) -> PaigeantMessage | None:
        try:
            message = decode(delivery.body, limit_bytes=self.limit_bytes)
        except MessageInvalid as exc:
            about = (delivery.property_id, topic, exc.reason, str(exc), delivery.body, delivery.attempts)
            try:
                await self._reject(delivery, DeadLetter.about(*about))
            except PaigeantError as trouble:
                log.warning("the dead letter %s is not kept yet, it comes again: %s", about[0], trouble)
                await asyncio.sleep(_PAUSE_SECONDS)  # it has been given back, and comes at once
            return None
        if _DUE in delivery.headers and not await self._is_due(topic, message, delivery):
            return None
        delivery.message_id, delivery.topic = message.message_id, topic
        self._held.setdefault(message.message_id, []).append(delivery)
        return message

    async def _is_due(self, topic: str, message: PaigeantMessage, delivery: _Delivery) -> bool:
        """Whether its time has come; else it goes on to wait."""
        early = delivery.headers[_DUE] / 1000 - time.time()
        if early <= 0:
            return True
        headers = {_ATTEMPTS: delivery.attempts - 1}
        try:
            await self._post(topic, message.message_id, delivery.body, early, headers)
            await delivery.ack()
        except TransportUnavailable:
            await delivery.give_back()
        return False

    # -- settling

    async def ack(self, message_id: str) -> None:
        delivery = self._take(message_id)
        if delivery is not None:
            await delivery.ack()

    async def nack(self, message_id: str, *, delay: float = 0) -> None:
        delivery = self._take(message_id)
        if delivery is None:
            return
        if delay <= 0 and delivery.returns < self.queues.most_returns:
            await delivery.give_back()
            return
        headers = {_ATTEMPTS: delivery.attempts}
        try:
            # Confirmed first, acked then: a crash in between doubles the message, a loss can't happen.
            await self._post(delivery.topic, message_id, delivery.body, delay, headers)
        except TransportUnavailable:
            await delivery.give_back()  # too early, but not lost, and in nobody's way
            raise
        await delivery.ack()

    async def dead_letter(self, message_id: str, reason: str) -> None:
        delivery = self._take(message_id)
        if delivery is not None:
            letter = DeadLetter.about(
                message_id, delivery.topic, reason, reason, delivery.body, delivery.attempts
            )
            await self._reject(delivery, letter)

    async def _reject(self, delivery: _Delivery, letter: DeadLetter) -> None:
        # Kept first, taken out of the topic then: a crash in between does it again, a loss can't happen.
        try:
            if self._bury is None:
                await self._keep(letter)
            else:
                await self._bury(letter)
        except BaseException:
            await delivery.give_back()
            raise
        await delivery.ack()

    async def _keep(self, letter: DeadLetter) -> None:
        headers = {
            _REASON: letter.reason,
            _DETAIL: letter.detail[:_DETAIL_CHARACTERS],
            _TOPIC: letter.topic,
            _ATTEMPTS: letter.attempts,
        }
        await self._publisher.send(self.queues.dead, letter.id, letter.body, headers)

    def _take(self, message_id: str) -> _Delivery | None:
        """What is held under this id, the one that came first; it isn't any more."""
        held = self._held.get(message_id)
        if held is None:
            return None
        delivery = held.pop(0)
        if not held:
            del self._held[message_id]
        return delivery

    def _drop(self, delivery: _Delivery) -> None:
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
        feed = _Feed(self._receiving, self.queues.dead, 1, self._drop)
        self._feeds.add(feed)
        try:
            while True:
                try:
                    delivery = await feed.next()
                    if delivery is None:
                        return
                    await self._bury_drained(self._letter(delivery))
                    await delivery.ack()
                except ConfigurationError as exc:
                    log.warning("dead letters of RabbitMQ can't be read, will try again: %s", exc)
                    await asyncio.sleep(_LONGEST_PAUSE_SECONDS)
        finally:
            self._feeds.discard(feed)
            await feed.end()

    async def _bury_drained(self, letter: DeadLetter) -> None:
        # Held while the store can't take it: given back to its queue it would come at once, and not for ever.
        while True:
            try:
                assert self._bury is not None
                await self._bury(letter)
                return
            except Exception as exc:  # whatever the store's trouble is, the letter waits for its end
                log.warning("a dead letter can't be recorded, will try again: %s", exc)
                await asyncio.sleep(_LONGEST_PAUSE_SECONDS * random.uniform(0.5, 1.5))

    def _letter(self, delivery: _Delivery) -> DeadLetter:
        headers = delivery.headers
        try:
            message_id = decode(delivery.body, limit_bytes=len(delivery.body)).message_id
        except MessageInvalid:
            message_id = delivery.property_id
        if _REASON in headers:
            topic, reason, detail = (str(headers.get(name, "")) for name in (_TOPIC, _REASON, _DETAIL))
            return DeadLetter.about(
                message_id, topic, reason, detail, delivery.body, int(headers.get(_ATTEMPTS, 0))
            )
        deaths = headers.get("x-death") or [{}]
        queue, reason = str(deaths[0].get("queue", "")), str(deaths[0].get("reason", "unknown"))
        detail = f"RabbitMQ took it out of the queue '{queue}': {reason}"
        attempts = self.queues.delivery_limit + 1 if self.queues.delivery_limit is not None else 0
        topic = self.queues.topic_of(queue, self._used)
        return DeadLetter.about(message_id, topic, reason, detail, delivery.body, attempts)

    # -- what waits

    async def topics(self, known: Collection[str] = ()) -> list[TopicDepth]:
        """Those among `known`, and those that this transport has sent to or received from.

        RabbitMQ can't list its queues to a client, and tells neither what others hold nor ages.
        """
        names = sorted(self._used.union(known))
        counts = await self._publisher.counts([self.queues.topic(name).name for name in names])
        return [TopicDepth(name, count, 0, None) for name, count in zip(names, counts, strict=True) if count]


class _Queues:
    """The queues: their names and their settings, which must be the same wherever they are declared."""

    def __init__(self, namespace: str, queue_type: str, delivery_limit: int | None) -> None:
        if queue_type not in ("quorum", "classic"):
            raise ConfigurationError(f"queue_type is '{queue_type}'; expected quorum or classic")
        if not re.fullmatch(r"(?!amq\.)[A-Za-z0-9_.-]{1,100}", namespace):
            raise ConfigurationError(
                f"the namespace of RabbitMQ's queues is '{namespace}'; expected up to 100 letters, digits and -_. "
                "that don't begin with 'amq.'"
            )
        if delivery_limit is not None and queue_type == "classic":
            raise ConfigurationError("delivery_limit is for quorum queues; leave it out for classic ones")
        self.namespace = namespace
        self.queue_type = queue_type
        self.delivery_limit = delivery_limit
        # What is returned on purpose must not end as a dead letter: the limit is for those whose consumers die.
        self.most_returns = _RETURNS if delivery_limit is None else min(_RETURNS, delivery_limit // 2)
        self.dead = _Queue(f"{namespace}:dead-letters", {"x-queue-type": queue_type})
        self.names = {self.dead.name}
        """Of those that were asked for."""
        self._topics: dict[str, _Queue] = {}

    def topic(self, topic: str) -> _Queue:
        """The queue of a topic. What RabbitMQ itself takes out of it goes to the dead letters."""
        queue = self._topics.get(topic)
        if queue is None:
            arguments = self._dying_to(self.dead, self.queue_type)
            if self.delivery_limit is not None:
                arguments["x-delivery-limit"] = self.delivery_limit
            name = self._name(f"{self.namespace}.", _quoted(topic), f"{self.namespace}:topic.")
            queue = self._topics[topic] = _Queue(name, arguments, (self.dead,))
            self.names.add(name)
        return queue

    def wait(self, target: _Queue, delay: float) -> _Queue:
        """The queue in which messages wait for at least `delay` seconds before they go on to `target`.

        Always a classic queue: wait queues come and go, and with 3.10.8 a quorum queue that was made within the last
        second is dead for good when the broker crashes. A crash may cost a classic queue some of what waits in it, and
        what comes due before the topic's queue has a leader again is lost; the sweeper sends both when they are due.

        It vanishes by itself, at a time that it is given once, so there is a new one for each span of time, which
        outlives the last message sent to it in that span.
        """
        wait_ms = _rounded_up(delay)
        span = max(_WAIT_SPAN, wait_ms / 1000)
        arguments = self._dying_to(target, "classic") | {
            "x-message-ttl": wait_ms,
            "x-expires": int((span + wait_ms / 1000 + _WAIT_SLACK) * 1000),
        }
        begin = f"{self.namespace}:wait.{wait_ms}.{int(time.time() // span)}."
        name = self._name(begin, target.name, begin)
        self.names.add(name)
        return _Queue(name, arguments, (target,))

    def topic_of(self, queue: str, used: Collection[str]) -> str:
        """The topic whose queue this is; its name is kept short when it is long, then only `used` ones are found."""
        if queue.startswith(f"{self.namespace}."):
            return unquote(queue.removeprefix(f"{self.namespace}.").replace("+", "%"))
        return next((topic for topic in used if self.topic(topic).name == queue), queue)

    def _dying_to(self, target: _Queue, queue_type: str) -> dict[str, Any]:
        # At most once, as RabbitMQ does by default: what gets lost on this way the store has sent again. The strategy
        # at-least-once would need overflow=reject-publish, and quorum queues on both sides.
        return {
            "x-queue-type": queue_type,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": target.name,
        }

    @staticmethod
    def _name(begin: str, rest: str, begin_of_digest: str) -> str:
        name = begin + rest
        if len(name.encode()) > _NAME_BYTES:
            return begin_of_digest + hashlib.sha256(rest.encode()).hexdigest()
        return name


# -- connections


class _Socket(TransportFactory):
    """Opens the socket of a connection, and keeps it at hand to cut it."""

    def __init__(self) -> None:
        self.writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        factory = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        reader, self.writer = await factory.create(url, **kwargs)
        _watch_peer(self.writer.get_extra_info("socket"))
        return reader, self.writer

    def cut(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()


class _Connection(aio_pika.Connection):
    PARAMETERS = (
        *aio_pika.Connection.PARAMETERS,
        ConnectionParameter("transport_factory", parser=lambda factory: factory, is_kwarg=True),
    )


class _Single(Generic[_Opened]):
    """Does something once for all who ask for it at the same time."""

    def __init__(self, make: Callable[[], Awaitable[_Opened]]) -> None:
        self._make = make
        self._making: asyncio.Task[_Opened] | None = None

    async def get(self) -> _Opened:
        if self._making is None:
            self._making = asyncio.create_task(self._run())
            self._making.add_done_callback(self._done)
        return await asyncio.shield(self._making)

    async def cancel(self) -> None:
        if self._making is not None:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)

    async def _run(self) -> _Opened:
        return await self._make()

    def _done(self, making: asyncio.Task[_Opened]) -> None:
        self._making = None
        if not making.cancelled():
            making.exception()  # those who asked have it; it isn't lost when none is there any more


class _Link:
    """One connection to the broker: opened when it is asked for, and anew when it has gone."""

    def __init__(self, url: URL, role: str) -> None:
        self.url = url
        self._role = role
        self._connection: _Connection | None = None
        self._socket = _Socket()
        self._single = _Single(self._open)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have `work` go on by itself, for as long as the link isn't closed; it must not raise."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def open(self) -> aio_pika.Connection:
        """The connection. Raises TransportUnavailable, and ConfigurationError for what waiting can't mend."""
        if self._connection is not None and self._is_open(self._connection):
            return self._connection
        return await self._single.get()

    async def close(self) -> None:
        await self._single.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._dispose(connection, self._socket)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break a connection that doesn't answer."""
        self._socket.cut()

    async def is_blocked(self) -> bool:
        """Whether the broker has said that it takes no messages for now."""
        if self._connection is None or not self._is_open(self._connection):
            return False
        try:
            async with asyncio.timeout(0):
                await self._connection.transport.ready()  # type: ignore[union-attr]  # is open
        except TimeoutError:
            return True
        return False

    @staticmethod
    def _is_open(connection: aio_pika.Connection) -> bool:
        return connection.transport is not None and bool(connection.transport.connection.is_opened)

    async def _open(self) -> aio_pika.Connection:
        gone, self._connection = self._connection, None
        if gone is not None:
            await self._dispose(gone, self._socket)
        self._socket = wire = _Socket()
        connection = _Connection(
            self.url,
            client_properties={"connection_name": f"paigeant {self._role}"},
            transport_factory=wire,
        )
        try:
            await connection.connect(timeout=_CONNECT_SECONDS)
        except BaseException as exc:
            wire.cut()
            await connection.close()
            if isinstance(exc, CONNECTION_EXCEPTIONS):
                raise self._failure(exc) from exc
            raise
        self._connection = connection
        return connection

    @staticmethod
    async def _dispose(connection: aio_pika.Connection, wire: _Socket) -> None:
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await connection.close()
        except CONNECTION_EXCEPTIONS:
            wire.cut()

    def _failure(self, exc: BaseException) -> TransportUnavailable | ConfigurationError:
        where, user = place(self.url), self.url.user or "guest"
        if isinstance(exc, (ProbableAuthenticationError, AuthenticationError)):
            return ConfigurationError(
                f"RabbitMQ at {where} refuses the user '{user}' or its password; correct transport_url, "
                "and mind that 'guest' may only connect from the broker's own host"
            )
        if isinstance(exc, InvalidFrameError) and "Connection.Close" in str(exc):
            vhost = self.url.path.removeprefix("/") or "/"
            return ConfigurationError(
                f"RabbitMQ at {where} doesn't open the virtual host '{vhost}' to the user '{user}'; correct the path "
                f"of transport_url, or create it (rabbitmqctl add_vhost {vhost}) and permit it "
                f"(rabbitmqctl set_permissions -p {vhost} {user} '.*' '.*' '.*')"
            )
        if isinstance(exc, FileNotFoundError):
            return ConfigurationError(
                "a certificate that transport_url names isn't there; correct cafile, certfile and keyfile"
            )
        if isinstance(exc, TimeoutError):
            what = f"no answer within {_CONNECT_SECONDS:g} s"
        else:
            what = str(exc) or type(exc).__name__
        return TransportUnavailable(
            f"RabbitMQ at {where} can't be reached: {what}; start it, or correct transport_url"
        )


class _Publisher:
    """Sends with confirms, over a connection of its own: alarms of the broker block publishers and nobody else."""

    def __init__(self, link: _Link, timeout: float) -> None:
        self._link = link
        self._timeout = timeout
        self._channel: aiormq.Channel | None = None
        self._confirmed_at = 0.0
        self._single = _Single(self._open)
        self._declared: set[str] = set()
        self._declaring = asyncio.Lock()
        self._outstanding: set[str] = set()

    async def open(self, queue: _Queue) -> None:
        """Open it, and see to it that `queue` is there. Raises TransportUnavailable, ConfigurationError."""
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                await self._single.get() if self._channel is None or self._channel.is_closed else None
                await self._ready(queue)
        except CONNECTION_EXCEPTIONS as exc:
            raise self._unavailable(exc) from exc

    async def close(self) -> None:
        await self._single.cancel()
        self._channel = None
        await self._link.close()

    async def send(
        self, queue: _Queue, message_id: str, body: bytes, headers: Mapping[str, Any] | None = None
    ) -> None:
        """Publish; returns when the broker has confirmed that the message is in the queue, and safe there."""
        # aiormq finds what came back by its id: two that are under way at the same time need different ones.
        told_id = message_id if len(message_id.encode()) <= _NAME_BYTES else None
        if told_id in self._outstanding:
            told_id = None
        properties = Basic.Properties(
            content_type="application/json",
            delivery_mode=2,
            message_id=told_id,
            headers=dict(headers) if headers else None,
        )
        if told_id is not None:
            self._outstanding.add(told_id)
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                # Once more when the queue has been deleted or the connection has broken. A message that was confirmed
                # unheard is doubled by that, which is harmless.
                if not await self._sent(queue, properties, body, again=True):
                    await self._sent(queue, properties, body, again=False)
        except TimeoutError as exc:
            raise await self._late(began_at) from exc
        finally:
            if told_id is not None:
                self._outstanding.discard(told_id)

    async def _sent(self, queue: _Queue, properties: Basic.Properties, body: bytes, *, again: bool) -> bool:
        channel = None
        try:
            channel = await self._ready(queue)
            await channel.basic_publish(
                body, routing_key=queue.name, properties=properties, mandatory=True, wait=False
            )
        except PublishError as exc:
            self._declared.discard(queue.name)
            if channel is not None and channel is self._channel:
                # A channel numbers what it sends to a quorum queue. One that is deleted and declared anew confirms what
                # comes on an old channel, and waits for ever for what it takes to have come before.
                self._channel = None
                self._link.start(self._retire(channel))
            if not again:
                raise self._unavailable(exc) from exc
            await asyncio.sleep(_DELETED_SECONDS)
            return False
        except DeliveryError as exc:
            raise TransportUnavailable(
                f"RabbitMQ at {place(self._link.url)} refuses a message for the queue '{queue.name}'; "
                "it is full (max-length of a policy), or not enough of its replicas are there; when a queue doesn't "
                f"recover, delete it (rabbitmqctl delete_queue {queue.name}): it is declared anew"
            ) from exc
        except CONNECTION_EXCEPTIONS as exc:
            if not again:
                raise self._unavailable(exc) from exc
            return False
        except asyncio.CancelledError as exc:
            if _is_cancelled():
                raise
            raise self._unavailable(exc) from exc  # the connection was closed meanwhile
        except Exception as exc:
            if (
                type(exc) is not Exception
            ):  # which is what aiormq raises when somebody closes it without a reason
                raise
            raise self._unavailable(exc) from exc
        self._confirmed_at = time.monotonic()
        return True

    async def counts(self, names: Collection[str]) -> list[int]:
        """How many messages wait in each of these queues; 0 for one that isn't there."""
        found = []
        try:
            async with asyncio.timeout(_OPEN_SECONDS), contextlib.AsyncExitStack() as stack:
                connection = await self._link.open()
                channel: AbstractChannel | None = None
                for name in names:
                    if channel is None:
                        channel = await stack.enter_async_context(_throwaway(connection))
                    try:
                        queue = await channel.declare_queue(name, passive=True)
                        found.append(queue.declaration_result.message_count or 0)
                    except ChannelNotFoundEntity:
                        found.append(0)
                        channel = None  # RabbitMQ has closed it
        except CONNECTION_EXCEPTIONS as exc:
            raise self._unavailable(exc) from exc
        return found

    async def _ready(self, queue: _Queue) -> aiormq.Channel:
        """The channel, with `queue` declared and the broker willing to take messages."""
        channel = self._channel
        if channel is None or channel.is_closed:
            try:
                channel = await self._single.get()
            except ConfigurationError as exc:  # it has worked before: perhaps the broker is still starting
                raise TransportUnavailable(str(exc)) from exc
        if queue.name not in self._declared:
            async with self._declaring:
                if queue.name not in self._declared:
                    await _declare(await self._link.open(), queue)
                    self._declared.add(queue.name)
        await (
            channel.connection.ready()
        )  # waits while an alarm blocks publishers: what isn't sent isn't doubled
        return channel

    async def _open(self) -> aiormq.Channel:
        connection = await self._link.open()
        channel = connection.channel(publisher_confirms=True, on_return_raises=True)
        async with asyncio.timeout(_OPEN_SECONDS):
            await channel.initialize()
        self._declared.clear()  # by now it may be another broker, or an emptied one
        self._channel = await _underlay(channel)
        return self._channel

    async def _retire(self, channel: aiormq.Channel) -> None:
        await asyncio.sleep(self._timeout)  # until nobody waits for a confirm on it
        with contextlib.suppress(*CONNECTION_EXCEPTIONS):
            await channel.close()

    async def _late(self, began_at: float) -> TransportUnavailable:
        why = "it is overloaded, frozen, or cut off"
        if await self._link.is_blocked():
            why = "it blocks publishers by a memory or disk alarm (see `rabbitmqctl status`)"
        elif self._confirmed_at < began_at:
            self._link.cut()  # what doesn't answer at all is opened anew
        return TransportUnavailable(
            f"RabbitMQ at {place(self._link.url)} has not confirmed a message within {self._timeout:g} s: {why}"
        )

    def _unavailable(self, exc: BaseException) -> TransportUnavailable:
        what = str(exc) or type(exc).__name__
        return TransportUnavailable(f"RabbitMQ at {place(self._link.url)} doesn't serve: {what}")


# -- receiving


class _Delivery:
    """A message as it came, on the channel on which alone it can be settled."""

    __slots__ = ("_line", "_message", "body", "message_id", "topic")

    def __init__(self, line: _Line, message: DeliveredMessage) -> None:
        self._line = line
        self._message = message
        self.body = message.body
        self.message_id = self.topic = ""

    @property
    def line(self) -> _Line:
        return self._line

    @property
    def consumer(self) -> str:
        return self._message.consumer_tag or ""

    @property
    def tag(self) -> int:
        return self._message.delivery_tag or 0

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
        return int(self.headers.get("x-delivery-count", bool(self._message.redelivered)))

    @property
    def attempts(self) -> int:
        """How often it was delivered, this time included; copies are counted on."""
        return int(self.headers.get(_ATTEMPTS, 0)) + self.returns + 1

    async def ack(self) -> None:
        await self._line.settle(self, lambda channel: channel.basic_ack(self.tag, wait=False))

    async def give_back(self) -> None:
        await self._line.settle(self, lambda channel: channel.basic_nack(self.tag, requeue=True, wait=False))


class _Line:
    """A channel with the consumers of one feed, and what was handed out of it and is not settled.

    RabbitMQ sends a consumer no more than `prefetch` unsettled messages, those that have been handed out included. For
    an iteration that goes on without settling any there are more consumers, so that `prefetch` counts what is ahead.
    """

    def __init__(self, channel: aiormq.Channel, queue: str, prefetch: int) -> None:
        self.channel = channel
        self._queue = queue
        self._prefetch = prefetch
        self._consumers: dict[str, int] = {}  # and how many of what each has received are out
        self.out: set[_Delivery] = set()
        self.is_ending = False
        self.received = 0
        self.watching: asyncio.Task[None] | None = None
        self.is_void = False
        """Whether what came on it can't be settled any more."""
        self.receive: Callable[[DeliveredMessage], Coroutine[Any, Any, None]]

    @property
    def is_starved(self) -> bool:
        """Whether RabbitMQ sends nothing more before something is settled."""
        return self._ahead <= 0

    @property
    def _ahead(self) -> int:
        """How many messages RabbitMQ sends, or has sent, before one that is out is settled."""
        return self._prefetch * len(self._consumers) - sum(self._consumers.values())

    def hand_out(self, delivery: _Delivery) -> None:
        self.out.add(delivery)
        if delivery.consumer in self._consumers:
            self._consumers[delivery.consumer] += 1

    async def consume(self) -> None:
        """Receive `prefetch` messages more ahead."""
        consuming = await self.channel.basic_consume(self._queue, self.receive)
        self._consumers[str(consuming.consumer_tag)] = 0

    async def stop(self) -> None:
        """Receive nothing more; returns when nothing more can come."""
        while self._consumers:
            await self._cancel(next(iter(self._consumers)))

    async def _cancel(self, consumer: str) -> None:
        del self._consumers[consumer]
        await self.channel.basic_cancel(consumer)

    async def settle(self, delivery: _Delivery, how: Callable[[aiormq.Channel], Awaitable[None]]) -> None:
        """Tell the broker. On a channel that is gone nothing happens: the message comes again by itself."""
        self.out.discard(delivery)
        try:
            if delivery.consumer in self._consumers:
                self._consumers[delivery.consumer] -= 1
                if len(self._consumers) > 1 and self._ahead > self._prefetch:
                    await self._cancel(delivery.consumer)  # first, or RabbitMQ sends another in its place
            await how(self.channel)
            if self.is_ending and not self.out:
                await self.close()
        except CONNECTION_EXCEPTIONS:
            pass
        except asyncio.CancelledError:
            if _is_cancelled():
                raise

    async def close(self) -> None:
        """End it; RabbitMQ gives what is unsettled to others."""
        with contextlib.suppress(*CONNECTION_EXCEPTIONS):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self.channel.close(None)


class _Feed:
    """What one queue delivers, for ever: over one line at a time, and a new one when it has gone, however it went."""

    def __init__(self, link: _Link, queue: _Queue, prefetch: int, drop: Callable[[_Delivery], None]) -> None:
        self._link = link
        self._queue = queue
        self._prefetch = prefetch
        self._drop = drop
        self._line: _Line | None = None
        self._inbox: deque[_Delivery] = deque()
        self._news = asyncio.Event()
        self._has_worked = False
        self._was_deleted = False
        self._is_over = False

    async def next(self) -> _Delivery | None:
        """The next message; None when the transport was closed. Raises ConfigurationError before it first works."""
        while not self._is_over:
            line = self._line
            if line is None:
                await self._reopen()
            elif self._inbox:
                delivery = self._inbox.popleft()
                line.hand_out(delivery)
                return delivery
            else:
                await self._wait(line)
        return None

    def stop(self) -> None:
        """The transport closes."""
        self._is_over = True
        self._news.set()

    async def end(self) -> None:
        """Give back what was not handed out. The channel stays open for what was, until that is settled."""
        try:
            await asyncio.shield(self._link.start(self._end()))
        except asyncio.CancelledError:
            if _is_cancelled():  # else the transport was closed meanwhile, which gives back all of it
                raise

    async def _end(self) -> None:
        self._is_over = True
        line, self._line = self._line, None
        if line is None:
            return
        line.is_ending = True
        if line.watching is not None:
            line.watching.cancel()
        with contextlib.suppress(*CONNECTION_EXCEPTIONS):
            async with asyncio.timeout(_CLOSE_SECONDS):
                if line.out:
                    await line.stop()
                    while self._inbox:
                        tag = self._inbox.popleft().tag
                        await line.channel.basic_nack(tag, requeue=True, wait=False)
        if not line.out:
            await line.close()

    async def _wait(self, line: _Line) -> None:
        self._news.clear()
        if not line.is_starved:
            await self._news.wait()
            return
        try:
            async with asyncio.timeout(_STARVED_SECONDS):
                await self._news.wait()
        except TimeoutError:
            if line.is_starved and line is self._line:
                with contextlib.suppress(*CONNECTION_EXCEPTIONS):
                    await line.consume()

    async def _reopen(self) -> None:
        pause = _PAUSE_SECONDS
        while not self._is_over and self._line is None:
            if self._has_worked:
                await self._rest(pause / 4, pause)
                if self._was_deleted:
                    self._was_deleted = False
                    await self._rest(_DELETED_SECONDS, 2 * _DELETED_SECONDS)
            try:
                async with asyncio.timeout(_OPEN_SECONDS):
                    line = await self._open()
                self._has_worked = True
                if not line.is_void:
                    self._line = line
                    return
                trouble: BaseException = ConnectionError("it was lost at once")
            except ConfigurationError as exc:
                # After it has worked, a setting may be refused by a broker that is still starting.
                if not self._has_worked:
                    raise
                trouble = exc
            except (TransportUnavailable, *CONNECTION_EXCEPTIONS) as exc:
                trouble = exc
            except asyncio.CancelledError as exc:
                if _is_cancelled():
                    raise
                trouble = exc
            log.warning(
                "can't receive from '%s', will try again: %s",
                self._queue.name,
                str(trouble) or type(trouble).__name__,
            )
            if isinstance(trouble, TimeoutError):
                self._link.cut()
            if not self._has_worked:
                await self._rest(pause / 4, pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _rest(self, least: float, most: float) -> None:
        until = asyncio.get_running_loop().time() + random.uniform(least, most)
        while not self._is_over:
            self._news.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._news.wait()
            except TimeoutError:
                return

    async def _open(self) -> _Line:
        self._inbox.clear()
        connection = await self._link.open()
        await _declare(connection, self._queue)
        opening = connection.channel(publisher_confirms=False)
        try:
            await opening.initialize()
            channel = await _underlay(opening)
            line = _Line(channel, self._queue.name, self._prefetch)

            async def receive(message: DeliveredMessage) -> None:
                line.received += 1
                if not line.is_void:
                    self._inbox.append(_Delivery(line, message))
                    self._news.set()

            def lost(_: object) -> None:
                self._lose(line)

            async def cancelled(_: object) -> None:
                # The queue was deleted, or the node that has it is gone.
                self._was_deleted = True
                self._lose(line)
                self._link.start(line.close())

            line.receive = receive
            channel.on_consumer_cancel_callbacks.add(cancelled)
            channel.closing.add_done_callback(lost)
            await channel.basic_qos(prefetch_count=self._prefetch)
            await line.consume()
            line.watching = self._link.start(self._watch(line))
        except BaseException:
            if opening.is_initialized and not opening.is_closed:
                with contextlib.suppress(*CONNECTION_EXCEPTIONS):
                    await opening.close()
            raise
        return line

    async def _watch(self, line: _Line) -> None:
        """Open the line anew when nothing comes: whether the broker still knows it can't be asked."""
        before = -1
        while line.received != before or line.out:
            before = line.received
            await asyncio.sleep(_IDLE_SECONDS * random.uniform(0.75, 1.25))
        line.watching = None  # this, which `_lose` would cancel
        self._lose(line)
        await line.close()

    def _lose(self, line: _Line) -> None:
        """What came on a channel that is gone will come again: forget it."""
        line.is_void = True
        if line.watching is not None:
            line.watching.cancel()
        for delivery in tuple(line.out):
            self._drop(delivery)
        line.out.clear()
        if self._line is line:
            self._line = None
            self._inbox.clear()
            self._news.set()


async def _declare(connection: aio_pika.Connection, queue: _Queue) -> None:
    """Make sure that there are this queue and those that it needs. Raises ConfigurationError when it doesn't fit."""
    for needed in queue.needs:
        await _declare(connection, needed)
    try:
        # On a channel of its own: RabbitMQ closes it when the queue doesn't fit, with all that is under way on it.
        async with _throwaway(connection) as channel:
            await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.arguments))
    except ChannelPreconditionFailed as exc:
        raise ConfigurationError(
            f"the queue '{queue.name}' of RabbitMQ at {place(connection.url)} is there with other settings: {exc}. "
            "Set queue_type and delivery_limit to what it has, choose another namespace, or delete it once it is empty "
            f"(rabbitmqctl delete_queue {queue.name}): messages that are lost are sent again"
        ) from exc
    except (ChannelAccessRefused, ChannelLockedResource) as exc:
        raise ConfigurationError(
            f"the user of transport_url may not declare the queue '{queue.name}' of RabbitMQ at "
            f"{place(connection.url)}: {exc}. It needs the permissions configure, write and read"
        ) from exc


async def _underlay(channel: AbstractChannel) -> aiormq.Channel:
    found = await channel.get_underlay_channel()
    assert isinstance(found, aiormq.Channel)
    return found


@contextlib.asynccontextmanager
async def _throwaway(connection: aio_pika.Connection) -> AsyncIterator[AbstractChannel]:
    channel = connection.channel(publisher_confirms=False)
    await channel.initialize()
    try:
        yield channel
    finally:
        if not channel.is_closed:
            await channel.close()


# -- small things

_SILENT = logging.NullHandler()

_SETTINGS = ("namespace", "queue_type", "delivery_limit")
"""What the URL may say besides aio-pika's own parameters."""


def place(url: URL) -> str:
    """host:port, for messages."""
    return f"{url.host}:{url.port or (5671 if url.scheme == 'amqps' else 5672)}"


def _parsed(url: str) -> tuple[URL, dict[str, str]]:
    """The URL as aio-pika takes it, and the settings of ours that stood in it."""
    try:
        parsed = URL(url)
        if parsed.scheme not in ("amqp", "amqps") or not parsed.host:
            raise ValueError
        place(parsed)
    except ValueError:
        raise ConfigurationError(
            "transport_url is not one of RabbitMQ; expected amqp://user:password@host:port/vhost, or amqps://"
        ) from None
    query = dict(parsed.query)
    told: dict[str, str] = {name: query.pop(name) for name in _SETTINGS if name in query}
    query.setdefault("heartbeat", str(_HEARTBEAT_SECONDS))
    return parsed.with_query(query), told


def _whole(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise ConfigurationError(f"delivery_limit is '{text}'; expected a whole number")
    return int(text)


def _rounded_up(delay: float) -> int:
    """The shortest time in milliseconds, among those of the wait queues, that is no shorter than `delay` seconds."""
    wanted = max(math.ceil(delay * 1000 - 1e-6), _STEPS[0])
    scale = 1
    while wanted > 10 * _STEPS[0] * scale:
        scale *= 10
    steps = (*_STEPS, 10 * _STEPS[0])
    return min(next(step * scale for step in steps if step * scale >= wanted), int(_LONGEST_WAIT * 1000))


def _quoted(topic: str) -> str:
    """A topic in the characters that pamqp allows in the name of a queue; each other byte as + and two digits."""
    return quote(topic, safe="-_.:@#,/ ").replace("~", "%7E").replace("%", "+")


def _is_cancelled() -> bool:
    """Whether a CancelledError is for us. aiormq raises it as well in those who wait on what is being closed."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


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
