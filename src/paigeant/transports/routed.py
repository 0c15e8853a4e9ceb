"""Topics of other brokers: what is published to them goes there, everything else to the transport of one's own.

A slip may so travel over several brokers. Each worker receives from its own transport alone, and the other broker is
opened when something is first published there. While it is out of reach, publishing fails at once: the step stays
ready, the sweeper tries again, and nothing else waits for it. Whether it is back one publish finds out, for all others.
Where it refuses one topic alone, its others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from paigeant.errors import (
    ConfigurationError,
    MessageInvalid,
    PaigeantError,
    TopicUnavailable,
    TransportUnavailable,
)

if TYPE_CHECKING:
    from paigeant.message import PaigeantMessage
    from paigeant.store import Store
    from paigeant.transport import Bury, TopicDepth, Transport

__all__ = ["Route", "RoutedTransport"]

log = logging.getLogger("paigeant.transports.routed")

_PATIENCE_SECONDS = 15.0
"""Longer than a transport takes to say itself what is wrong: RabbitMQ waits ten seconds for a confirm."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


class Route:
    """Another broker, called `name` in what is said of it. It is opened when it is first needed."""

    def __init__(self, name: str, transport: Transport, *, patience: float = _PATIENCE_SECONDS) -> None:
        self.name = name
        self.transport = transport
        self._patience = patience
        self._opening = asyncio.Lock()
        self._is_open = self._was_tried = self._is_tried_again = False
        self._pause = 0.0
        self._failed_at = self._closed_until = 0.0

    async def do(self, work: Callable[[Transport], Awaitable[Any]]) -> Any:
        """What `work` gives for the open transport. Raises TransportUnavailable, at once while it is out of reach."""
        began_at = time.monotonic()
        left = self._closed_until - began_at
        if left > 0:
            raise TransportUnavailable(f"{self.name} is out of reach, and asked again in {left:.0f} s")
        if not self._pause:
            return await self._try(work, began_at)
        # One that still hangs must have one waiting for it, not each worker's every place.
        if self._is_tried_again:
            raise TransportUnavailable(f"{self.name} is out of reach, and is just asked again")
        self._is_tried_again = True
        try:
            return await self._try(work, began_at)
        finally:
            self._is_tried_again = False

    async def _try(self, work: Callable[[Transport], Awaitable[Any]], began_at: float) -> Any:
        try:
            # One that neither answers nor refuses must not hold up what goes elsewhere.
            async with asyncio.timeout(self._patience):
                await self._open()
                found = await self._asked(work)
        except MessageInvalid:
            raise  # the message's fault
        except TopicUnavailable:
            self._pause = 0.0
            raise  # the broker is there, and what goes to its other topics must not wait
        except (PaigeantError, TimeoutError) as exc:
            self._close_for_a_while(began_at)
            reason = _said(exc) or f"no answer within {self._patience:g} s"
            raise TransportUnavailable(f"{self.name} is out of reach: {reason}") from exc
        self._pause = 0.0
        return found

    async def _asked(self, work: Callable[[Transport], Awaitable[Any]]) -> Any:
        try:
            return await work(self.transport)
        except (TopicUnavailable, ConfigurationError) as exc:  # it has been opened: this is about one topic
            raise TopicUnavailable(f"{self.name} refuses this: {_said(exc)}") from exc

    def _close_for_a_while(self, began_at: float) -> None:
        # What was under way when it failed last is a part of that failure, and no further one: a hundred publishes that
        # end together must not make of a broker's restart half a minute.
        if began_at > self._failed_at:
            self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
            self._failed_at = time.monotonic()
            self._closed_until = self._failed_at + self._pause

    async def _open(self) -> None:
        async with self._opening:
            if not self._is_open:
                self._was_tried = True
                await self.transport.connect()
                self._is_open = True

    async def close(self) -> None:
        """Close it, if it was opened, or half opened."""
        if self._was_tried:
            self._is_open = self._was_tried = False
            await self.transport.close()


def _said(exc: BaseException) -> str:
    # What a transport says to correct is `transport_url`: it doesn't know that it is a route's.
    return str(exc).replace("transport_url", "routes")


class RoutedTransport:
    """One's own transport, and routes to others by patterns of topics, of which the first that fits counts.

    A pattern that leads to None keeps its topics here.
    """

    def __init__(self, own: Transport, routes: Mapping[str, Route | None]) -> None:
        self.own = own
        self.routes = dict(routes)

    def route(self, topic: str) -> Route | None:
        """Where messages of `topic` go; None: to one's own transport."""
        for pattern, route in self.routes.items():
            if fnmatchcase(topic, pattern):
                return route
        return None

    async def connect(self) -> None:
        await self.own.connect()

    async def close(self) -> None:
        # What one's own holds is for others at once, and no broker that hangs keeps another one waiting.
        routes = {route for route in self.routes.values() if route is not None}
        closing = [self.own.close(), *(_closed(route) for route in routes)]
        for trouble in await asyncio.gather(*closing, return_exceptions=True):
            if trouble is not None:
                raise trouble

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        route = self.route(topic)
        if route is None:
            await self.own.publish(topic, message, delay=delay)
        else:
            await route.do(lambda transport: transport.publish(topic, message, delay=delay))

    def subscribe(self, topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
        route = self.route(topic)
        if route is not None:
            log.warning(
                "topic %s is served here, but messages for it go to %s: `routes` sends them there; "
                "serve it with a worker whose transport_url is that broker",
                topic,
                route.name,
            )
        return self.own.subscribe(topic, prefetch=prefetch)

    async def ack(self, message_id: str) -> None:
        await self.own.ack(message_id)

    async def nack(self, message_id: str, *, delay: float = 0) -> None:
        await self.own.nack(message_id, delay=delay)

    async def dead_letter(self, message_id: str, reason: str) -> None:
        await self.own.dead_letter(message_id, reason)

    async def topics(self, known: Collection[str] = ()) -> list[TopicDepth]:
        found = {depth.topic: depth for depth in await self.own.topics(known)}
        routes = {route for route in self.routes.values() if route is not None}
        for depths in await asyncio.gather(*(self._waiting(route, known) for route in routes)):
            for depth in depths:
                found[depth.topic] = _added(found.get(depth.topic), depth)
        return [found[topic] for topic in sorted(found)]

    async def _waiting(self, route: Route, known: Collection[str]) -> list[TopicDepth]:
        """What waits in the topics of a route; nothing where its broker can't be asked."""
        theirs = [topic for topic in known if self.route(topic) is route]
        try:
            depths = await route.do(lambda transport: transport.topics(theirs))
        except TransportUnavailable as exc:
            log.warning("what waits there isn't counted: %s", exc)
            return []
        return [depth for depth in depths if self.route(depth.topic) is route]  # others use that broker too

    def joins(self, store: Store) -> bool:
        return self.own.joins(store)

    def keeps_rows(self, topic: str) -> bool:
        route = self.route(topic)
        return (self.own if route is None else route.transport).keeps_rows(topic)

    def bury_with(self, bury: Bury) -> None:
        self.own.bury_with(bury)


async def _closed(route: Route) -> None:
    with contextlib.suppress(PaigeantError):  # its trouble, and nobody's here
        await route.close()


def _added(one: TopicDepth | None, other: TopicDepth) -> TopicDepth:
    """A topic of which messages wait on two brokers: one was set before `routes` was."""
    if one is None:
        return other
    ages = [age for age in (one.oldest, other.oldest) if age is not None]
    return replace(
        other,
        waiting=one.waiting + other.waiting,
        taken=one.taken + other.taken,
        oldest=max(ages, default=None),
    )
