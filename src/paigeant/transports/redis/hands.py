"""What was delivered through a transport and is not settled."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from typing import NamedTuple

from paigeant.transports.redis.streams import Streams
from paigeant.transports.redis.trouble import explained

__all__ = ["Hands", "Held"]

log = logging.getLogger("paigeant.transports.redis")


class Held(NamedTuple):
    """An entry that was delivered and not settled. `until` is when it may be somebody else's."""

    topic: str
    consumer: str
    entry: bytes
    until: float


class Hands:
    """Who holds what, by the ids of the messages: a message that was sent twice may be held twice."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._held: dict[str, list[Held]] = {}
        # By topic and consumer, what is acked: the acks that are to be sent, and those that are on their way.
        self._acks: dict[tuple[str, str], list[bytes]] = {}
        self._sent: dict[tuple[str, str], list[bytes]] = {}
        self._acking: asyncio.Task[None] | None = None
        self.left: set[tuple[str, str]] = set()
        """Topics and consumers of iterations that have ended while their last messages were not yet settled."""

    @property
    def is_acking(self) -> bool:
        """Whether the server hasn't answered to all acks."""
        return self._acking is not None

    def take(self, message_id: str, held: Held) -> None:
        others = [each for each in self._held.get(message_id, []) if each.entry != held.entry]
        self._held[message_id] = [*others, held]

    def take_again(self, message_id: str, deliveries: list[Held]) -> None:
        """Those that `let_go` gave can be settled after all."""
        if deliveries:
            self._held[message_id] = [*deliveries, *self._held.get(message_id, [])]

    def let_go(self, message_id: str) -> list[Held]:
        """What an ack or a return of `message_id` settles: one delivery, and those of it that are overdue."""
        deliveries = self._held.pop(message_id, [])
        now = time.monotonic()
        valid = (count for count, held in enumerate(deliveries, 1) if held.until > now)
        count = next(valid, len(deliveries))
        if deliveries[count:]:
            self._held[message_id] = deliveries[count:]
        return deliveries[:count]

    def entries(self, topic: str, consumer: str) -> set[bytes]:
        """What a consumer was given that was yielded, and that the server doesn't know to be settled."""
        key = (topic, consumer)
        held = {each.entry for each in self._all() if (each.topic, each.consumer) == key}
        return held.union(self._acks.get(key, ()), self._sent.get(key, ()))

    def forget_overdue(self, slack: float) -> None:
        """Let go of what nobody has settled for `slack` seconds after it went to others."""
        now = time.monotonic()
        for message_id, deliveries in tuple(self._held.items()):
            kept = [held for held in deliveries if held.until + slack > now]
            if kept:
                self._held[message_id] = kept
            else:
                del self._held[message_id]

    def ack(self, message_id: str) -> None:
        """Nobody waits for the server here: an ack that gets lost brings the message again, as a duplicate."""
        for held in self.let_go(message_id):
            self._acks.setdefault((held.topic, held.consumer), []).append(held.entry)
        if self._acks and self._acking is None:
            self._acking = asyncio.get_running_loop().create_task(self._send_acks())

    async def _send_acks(self) -> None:
        # What is acked while others are on their way goes together in one script.
        try:
            while self._acks:
                self._sent, self._acks = self._acks, {}
                acks = (self._streams.ack(topic, by, ids) for (topic, by), ids in self._sent.items())
                for answer in await asyncio.gather(*acks, return_exceptions=True):
                    if isinstance(answer, BaseException):
                        reason = explained(answer, self._streams.place)
                        log.info("acks got lost, their messages come again: %s", reason)
        finally:
            self._sent = {}
            self._acking = None

    async def give_back(self) -> None:
        """Finish the acks and give back all that is held, for others to have at once."""
        if self._acking is not None:
            await asyncio.shield(self._acking)
        entries: dict[tuple[str, str], list[bytes]] = {}
        for held in self._all():
            entries.setdefault((held.topic, held.consumer), []).append(held.entry)
        streams = self._streams
        await asyncio.gather(*(streams.give_back(topic, by, ids) for (topic, by), ids in entries.items()))
        await asyncio.gather(*(streams.forget(topic, by) for topic, by in self.left | entries.keys()))

    def clear(self) -> None:
        self._held.clear()
        self._acks.clear()
        self.left.clear()

    def _all(self) -> itertools.chain[Held]:
        return itertools.chain.from_iterable(self._held.values())
