"""Sending: every message is confirmed, or an error."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Collection
from typing import NamedTuple
from weakref import WeakValueDictionary

from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelNotFoundEntity, DeliveryError
from pamqp.commands import Queue as Queues

from paigeant.errors import (
    ConfigurationError,
    MessageTooLarge,
    TopicUnavailable,
    TransportUnavailable,
)
from paigeant.transports.rabbitmq.channel import Channel, throwaway
from paigeant.transports.rabbitmq.frames import Outgoing
from paigeant.transports.rabbitmq.link import OPEN_SECONDS, Link, closings, place
from paigeant.transports.rabbitmq.outlet import NoRoute, Outlet
from paigeant.transports.rabbitmq.outlets import Outlets
from paigeant.transports.rabbitmq.queues import DELETED_SECONDS, Queue, check_rights, declare
from paigeant.transports.rabbitmq.wire import Closed, Connection

__all__ = ["Publisher"]

_ROOM_SECONDS = 5.0

_MOST_DECLARING = 50
"""So many queues are declared at the same time: each takes a channel, of which a connection may have some 2,000."""

_FRESH_SECONDS = 5.0
_STARTING_SECONDS = 0.2
"""A quorum queue that two declare at the same moment is there for the second before it takes messages: what it refuses
so soon is sent to it again a moment later."""

_ALARM = (
    "it blocks publishers by a memory or disk alarm (see `rabbitmqctl status`); give it room, "
    "or let workers catch up"
)
_WHEN_LOST = "when a queue doesn't recover, delete it (rabbitmqctl delete_queue {}): it is declared anew"


class _Declared(NamedTuple):
    at: float
    until: float
    """Until when it is sure that the queue is there."""


class Publisher:
    """Sends with confirms, over a connection of its own: alarms of the broker block publishers and nobody else."""

    def __init__(self, link: Link, timeout: float) -> None:
        self._link = link
        self._timeout = timeout
        self._outlets = Outlets(link, self._open, timeout)
        self._confirmed_at = 0.0
        self._declared: dict[str, _Declared] = {}
        """The queues that are there, as far as `_connection` knows."""
        self._connection: Connection | None = None
        self._declaring: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._places = asyncio.Semaphore(_MOST_DECLARING)
        self._is_closed = False

    async def open(self, queue: Queue, trial: Queue) -> None:
        """Open it, and see to it that `queue` is there and the user has the rights that `trial` takes.

        Raises TransportUnavailable, ConfigurationError, and leaves nothing open then.
        """
        was_closed, self._is_closed = self._is_closed, False
        try:
            await self._begin(queue, trial)
        except BaseException:
            self._is_closed = was_closed
            await self._drop()
            raise

    async def _begin(self, queue: Queue, trial: Queue) -> None:
        try:
            with closings():
                async with asyncio.timeout(OPEN_SECONDS):
                    await self._outlets.common()
                    await self._declare(queue)
                    await check_rights(await self._connected(), trial)
        except TopicUnavailable as exc:  # without these two there is nothing that could go on
            raise TransportUnavailable(str(exc)) from exc
        except CONNECTION_EXCEPTIONS as exc:
            raise self._unavailable(exc) from exc

    async def close(self) -> None:
        self._is_closed = True
        await self._drop()

    async def _drop(self) -> None:
        await self._outlets.drop()
        await self._link.close()

    async def send(self, queue: Queue, message: Outgoing) -> None:
        """Publish; returns when the broker has confirmed that the message is in the queue, and safe there."""
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout) as limit:
                # Again when the queue has been deleted, the connection has broken, or RabbitMQ has closed the channel
                # for another's message; twice, since there may be more than one of those. A message that was confirmed
                # unheard is doubled by that, which is harmless.
                for again in (True, True, False):
                    if await self._sent(queue, message, limit, again=again):
                        return
        except TimeoutError as exc:
            raise await self._late(began_at, self._timeout, queue) from exc

    async def _sent(self, queue: Queue, message: Outgoing, limit: asyncio.Timeout, *, again: bool) -> bool:
        outlet = None
        try:
            with closings():
                outlet = await self._ready(queue)
                self._outlets.watch()
                await outlet.publish(queue.name, message)
        except NoRoute as exc:
            self._declared.pop(queue.name, None)
            # A channel numbers what it sends to a quorum queue. One that is deleted and declared anew confirms what
            # comes on an old channel, and waits for ever for what it takes to have come before.
            self._outlets.retire(outlet)
            if not again:
                raise self._unavailable(exc) from exc
            await asyncio.sleep(DELETED_SECONDS)
            return False
        except DeliveryError as exc:
            declared = self._declared.get(queue.name)
            if again and declared is not None and time.monotonic() - declared.at < _FRESH_SECONDS:
                await asyncio.sleep(_STARTING_SECONDS)
                return False
            raise TopicUnavailable(
                f"RabbitMQ at {place(self._link.url)} refuses a message for the queue '{queue.name}'; "
                "it is full (max-length of a policy), or not enough of its replicas are there; "
                f"{_WHEN_LOST.format(queue.name)}"
            ) from exc
        except asyncio.CancelledError:
            if limit.expired():  # it may be waiting for ever for what a queue that was deleted has taken
                self._outlets.retire(outlet)
            raise
        except CONNECTION_EXCEPTIONS as exc:
            _check_size(exc, message.body)
            if not again or isinstance(exc, Closed):
                raise self._unavailable(exc) from exc
            return False
        self._confirmed_at = time.monotonic()
        self._outlets.confirmed(queue.name, outlet)
        return True

    async def check_room(self, trial: Queue) -> None:
        """Raises TransportUnavailable for a broker that takes no messages now. `trial` is a queue that isn't there."""
        began_at = time.monotonic()
        try:
            with closings():
                async with asyncio.timeout(_ROOM_SECONDS):
                    outlet = await self._outlets.common()
                    # It tells of an alarm only to those who publish, and takes the first message of each connection.
                    for _ in range(2):
                        with contextlib.suppress(NoRoute):
                            await outlet.publish(trial.name, Outgoing(trial.name, b""))
        except TimeoutError as exc:
            raise await self._late(began_at, _ROOM_SECONDS) from exc
        except CONNECTION_EXCEPTIONS as exc:
            raise self._unavailable(exc) from exc

    async def counts(self, names: Collection[str]) -> list[int]:
        """How many messages wait in each of these queues; 0 for one that isn't there."""
        try:
            with closings():
                async with asyncio.timeout(OPEN_SECONDS):
                    return await self._counts(names)
        except CONNECTION_EXCEPTIONS as exc:
            raise self._unavailable(exc) from exc

    async def _counts(self, names: Collection[str]) -> list[int]:
        found = []
        async with contextlib.AsyncExitStack() as stack:
            connection = await self._connected()
            if connection.is_blocked:  # RabbitMQ reads nothing from it before the alarm is over
                apart = self._link.apart()
                stack.push_async_callback(self._link.part, apart)
                connection = await apart.open()
            channel: Channel | None = None
            for name in names:
                if channel is None:
                    channel = await stack.enter_async_context(throwaway(connection))
                try:
                    declared = await channel.ask(Queues.Declare(queue=name, passive=True))
                    found.append(declared.message_count or 0)
                except ChannelNotFoundEntity:
                    found.append(0)
                    channel = None  # RabbitMQ has closed it
        return found

    async def _ready(self, queue: Queue) -> Outlet:
        """Where to publish, with `queue` declared and the broker willing to take messages."""
        try:
            outlet = await self._outlets.of(queue.name)
        except ConfigurationError as exc:  # it has worked before: perhaps the broker is still starting
            raise TransportUnavailable(str(exc)) from exc
        try:
            await self._declare(queue)
        except ConfigurationError as exc:
            # Of this queue alone: what goes to others must not wait for its mending.
            raise TopicUnavailable(str(exc)) from exc
        # Waits while an alarm blocks publishers: what isn't sent isn't doubled.
        await outlet.unblocked()
        return outlet

    async def _declare(self, queue: Queue) -> None:
        if not self._is_there(queue):
            async with self._declaring.setdefault(queue.name, asyncio.Lock()), self._places:
                if not self._is_there(queue):
                    await declare(await self._connected(), queue)
                    self._remember(queue)

    def _is_there(self, queue: Queue) -> bool:
        declared = self._declared.get(queue.name)
        return declared is not None and declared.until > time.monotonic()

    def _remember(self, queue: Queue) -> None:
        now = time.monotonic()
        # Each hour has wait queues of its own, for each topic and delay: those of a worker's whole life would add up.
        self._declared = {name: each for name, each in self._declared.items() if each.until > now}
        self._declared[queue.name] = _Declared(now, now + queue.lasts)

    async def _connected(self) -> Connection:
        if self._is_closed:  # nobody would close it
            raise Closed("the transport is closed")
        return await self._link.open()

    async def _open(self) -> Outlet:
        connection = await self._connected()
        async with asyncio.timeout(OPEN_SECONDS):
            outlet = await Outlet.open(connection)
        if connection is not self._connection:
            self._declared.clear()  # by now it may be another broker, or an emptied one
            self._connection = connection
        return outlet

    async def _late(
        self, began_at: float, seconds: float, queue: Queue | None = None
    ) -> TransportUnavailable:
        begin = f"RabbitMQ at {place(self._link.url)} has not confirmed a message"
        if self._link.is_blocked:
            return TransportUnavailable(f"{begin} within {seconds:g} s: {_ALARM}")
        if queue is not None and await self._link.answers():
            return TopicUnavailable(
                f"{begin} for the queue '{queue.name}' within {seconds:g} s, but it answers: it is overloaded, or not "
                f"enough of the queue's replicas are there; {_WHEN_LOST.format(queue.name)}"
            )
        if self._confirmed_at < began_at:
            self._link.cut()  # what doesn't answer at all is opened anew
        return TransportUnavailable(f"{begin} within {seconds:g} s: it is overloaded, frozen, or cut off")

    def _unavailable(self, exc: BaseException) -> TransportUnavailable:
        what = str(exc) or type(exc).__name__
        if isinstance(exc, TimeoutError) and self._link.is_blocked:
            what = _ALARM
        return TransportUnavailable(f"RabbitMQ at {place(self._link.url)} doesn't serve: {what}")


def _check_size(exc: BaseException, body: bytes) -> None:
    """Raise MessageTooLarge where RabbitMQ has closed the channel for the size of this message, and not of another."""
    found = re.search(r"message size (\d+) is larger than configured max size (\d+)", str(exc))
    if found and int(found[1]) == len(body):
        raise MessageTooLarge(len(body), int(found[2])) from exc
