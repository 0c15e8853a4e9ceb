"""Messages in the memory of this process: for tests, and for work that may be lost with the process."""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass

from paigeant.clock import Clock, SystemClock
from paigeant.envelope import Envelope, PlainEnvelope
from paigeant.errors import MessageInvalid, PaigeantError
from paigeant.message import PaigeantMessage
from paigeant.store import DeadLetter, Store
from paigeant.transport import Bury, TopicDepth

__all__ = ["MemoryTransport"]

log = logging.getLogger("paigeant.transports")

_HOLD_SECONDS = 30.0
"""How long a delivered message is kept from others. A claim acks it within milliseconds."""

_LOOK_SECONDS = 0.05


@dataclass(slots=True)
class _Held:
    topic: str
    body: bytes
    visible_at: float
    created_at: float
    number: int
    deliveries: int = 0
    taken: bool = False


class MemoryTransport:
    """Moves messages within one process. Bodies are encoded like everywhere, so that what works here travels elsewhere.

    Whoever sets `clock` calls `wake` after it, so that what is due by then is delivered at once.
    """

    def __init__(self, *, clock: Clock | None = None, envelope: Envelope | None = None) -> None:
        self.clock = clock or SystemClock()
        self.envelope = envelope or PlainEnvelope()
        self.dead_letters: list[DeadLetter] = []
        self._messages: dict[str, _Held] = {}
        # For each topic when its messages are due, the next one first. Entries of messages that have moved or gone
        # since are passed over when they come up.
        self._due: dict[str, list[tuple[float, int, str]]] = {}
        self._wakers: dict[str, set[asyncio.Event]] = {}
        self._listeners: list[Callable[[], None]] = []
        self._bury: Bury | None = None
        self._published = 0
        self._chance = random.Random(0)  # the same each time, so that a test that is repeated plays the same
        self._closings = 0

    async def connect(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        self._closings += 1
        for message_id, held in self._messages.items():
            if held.taken:
                self._give_back(message_id, held, self.clock.now())
        self.wake()

    def joins(self, store: Store) -> bool:
        return False

    def keeps_rows(self, topic: str) -> bool:
        return False

    def bury_with(self, bury: Bury) -> None:
        self._bury = bury

    # -- sending

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        self.put(topic, message.message_id, self.envelope.seal(message, topic), delay=delay)

    def put(self, topic: str, message_id: str, body: bytes, *, delay: float = 0) -> None:
        """Have `body` delivered as it is, message or not."""
        now = self.clock.now()
        there = self._messages.get(message_id)
        if there is None:
            self._published += 1
            there = self._messages[message_id] = _Held(topic, body, now + delay, now, self._published)
            self._schedule(message_id, there)
        else:
            self._give_back(message_id, there, min(there.visible_at, now + delay))
        self.wake(topic)

    def wake(self, topic: str | None = None) -> None:
        """Have the subscribers of `topic`, or all, look again: there is a message, or the clock was set."""
        for name, wakers in self._wakers.items():
            if topic is None or name == topic:
                for waker in wakers:
                    waker.set()
        for heard in tuple(self._listeners):
            heard()

    # -- receiving

    async def subscribe(self, topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
        waker = asyncio.Event()
        self._wakers.setdefault(topic, set()).add(waker)
        closings = self._closings
        try:
            while closings == self._closings:
                # Clear before looking: a message that comes in between is not slept over.
                waker.clear()
                message_id = self._take(topic)
                if message_id is None:
                    await self._sleep(topic, waker)
                    continue
                message = await self._opened(message_id)
                if message is not None:
                    yield message
        finally:
            self._wakers[topic].discard(waker)

    def _take(self, topic: str) -> str | None:
        now = self.clock.now()
        entry = self._next(topic)
        if entry is None or entry[0] > now:
            return None
        message_id = entry[2]
        held = self._messages[message_id]
        held.taken = True
        held.deliveries += 1
        held.visible_at = now + _HOLD_SECONDS
        self._schedule(message_id, held)
        return message_id

    async def _sleep(self, topic: str, waker: asyncio.Event) -> None:
        # Not all at once: of several that look at the same instants, the same one would get a message each time, also
        # one that gives it back because it can't do it.
        look = _LOOK_SECONDS * self._chance.uniform(0.5, 1.0)
        try:
            async with asyncio.timeout(None if self._next(topic) is None else look):
                await waker.wait()
        except TimeoutError:
            pass

    async def _opened(self, message_id: str) -> PaigeantMessage | None:
        held = self._messages[message_id]
        try:
            return await self.envelope.open(held.topic, held.body)
        except MessageInvalid as exc:
            try:
                await self._reject(message_id, held, exc.reason, str(exc))
            except PaigeantError as trouble:
                log.warning("the dead letter %s is not kept yet, it comes again: %s", message_id, trouble)
            return None

    # -- settling

    async def ack(self, message_id: str) -> None:
        if self._taken(message_id) is not None:
            self._forget(message_id)

    async def nack(self, message_id: str, *, delay: float = 0) -> None:
        held = self._taken(message_id)
        if held is not None:
            self._give_back(message_id, held, self.clock.now() + delay)
            self.wake(held.topic)

    async def dead_letter(self, message_id: str, reason: str) -> None:
        held = self._taken(message_id)
        if held is not None:
            await self._reject(message_id, held, reason, reason)

    async def _reject(self, message_id: str, held: _Held, reason: str, detail: str) -> None:
        letter = DeadLetter.about(message_id, held.topic, reason, detail, held.body, held.deliveries)
        if self._bury is None:
            self.dead_letters.append(letter)
        else:
            await self._bury(letter)
        self._forget(message_id)

    # -- what waits

    async def topics(self, known: Collection[str] = ()) -> list[TopicDepth]:
        now = self.clock.now()
        names = sorted({held.topic for held in self._messages.values()})
        depths = []
        for name in names:
            there = [held for held in self._messages.values() if held.topic == name]
            taken = sum(held.taken for held in there)
            oldest = now - min(held.created_at for held in there)
            depths.append(TopicDepth(name, len(there) - taken, taken, oldest))
        return depths

    def is_busy(self, topics: Collection[str]) -> bool:
        """Whether a message of one of `topics` has been delivered and not settled, or can be delivered now."""
        now = self.clock.now()
        return any(
            held.topic in topics and (held.taken or held.visible_at <= now)
            for held in self._messages.values()
        )

    def next_delivery(self, topics: Collection[str]) -> float | None:
        """When the next message of one of `topics` is due; None when there is none."""
        entries = [entry for entry in map(self._next, topics) if entry is not None]
        return min(entries)[0] if entries else None

    def on_change(self, heard: Callable[[], None]) -> Callable[[], None]:
        """Call `heard` when messages come, go, or change hands. Gives what ends that."""
        self._listeners.append(heard)
        return lambda: self._listeners.remove(heard)

    # -- inside

    def _taken(self, message_id: str) -> _Held | None:
        held = self._messages.get(message_id)
        return held if held is not None and held.taken else None

    def _give_back(self, message_id: str, held: _Held, visible_at: float) -> None:
        held.taken = False
        held.visible_at = visible_at
        self._schedule(message_id, held)

    def _forget(self, message_id: str) -> None:
        self._messages.pop(message_id, None)
        for heard in tuple(self._listeners):
            heard()

    def _schedule(self, message_id: str, held: _Held) -> None:
        entry = (held.visible_at, held.number, message_id)
        heapq.heappush(self._due.setdefault(held.topic, []), entry)

    def _next(self, topic: str) -> tuple[float, int, str] | None:
        due = self._due.get(topic, [])
        while due:
            visible_at, number, message_id = due[0]
            held = self._messages.get(message_id)
            if held is not None and (held.visible_at, held.number) == (visible_at, number):
                return due[0]
            heapq.heappop(due)
        return None
