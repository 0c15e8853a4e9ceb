"""Messages in the memory of this process: for tests, and for work that may be lost with the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from paigeant.clock import Clock, SystemClock
from paigeant.errors import MessageInvalid
from paigeant.message import DEFAULT_LIMIT_BYTES, PaigeantMessage, decode, encode
from paigeant.store import DeadLetter, Store
from paigeant.transport import BODY_KEPT_BYTES, Bury, TopicDepth

__all__ = ["MemoryTransport"]

_LOOK_SECONDS = 0.05


@dataclass(slots=True)
class _Held:
    topic: str
    body: bytes
    visible_at: float
    created_at: float
    deliveries: int = 0
    holder: int | None = None


class MemoryTransport:
    """Moves messages within one process. Bodies are encoded like everywhere, so that what works here travels elsewhere."""

    def __init__(self, *, clock: Clock | None = None, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.clock = clock or SystemClock()
        self.limit_bytes = limit_bytes
        self.dead_letters: list[DeadLetter] = []
        self._messages: dict[str, _Held] = {}
        self._wakers: dict[str, set[asyncio.Event]] = {}
        self._bury: Bury | None = None
        self._subscribers = 0

    async def connect(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        for message in self._messages.values():
            message.holder = None

    def joins(self, store: Store) -> bool:
        return False

    def bury_with(self, bury: Bury) -> None:
        self._bury = bury

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        self.put(topic, message.message_id, encode(message, limit_bytes=self.limit_bytes), delay=delay)

    def put(self, topic: str, message_id: str, body: bytes, *, delay: float = 0) -> None:
        """Have `body` delivered as it is, message or not."""
        now = self.clock.now()
        there = self._messages.get(message_id)
        if there is None:
            self._messages[message_id] = _Held(topic, body, now + delay, now)
        else:
            there.visible_at = min(there.visible_at, now + delay)
            there.holder = None
        self.wake(topic)

    def wake(self, topic: str | None = None) -> None:
        """Have the subscribers of `topic`, or all, look again: there is a message, or the clock was set."""
        for name, wakers in self._wakers.items():
            if topic is None or name == topic:
                for waker in wakers:
                    waker.set()

    async def subscribe(self, topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
        self._subscribers += 1
        holder = self._subscribers
        waker = asyncio.Event()
        self._wakers.setdefault(topic, set()).add(waker)
        try:
            while True:
                waker.clear()
                message_id = self._take(topic, holder)
                if message_id is None:
                    await self._sleep(topic, waker)
                    continue
                message = await self._opened(message_id)
                if message is not None:
                    yield message
        finally:
            self._wakers[topic].discard(waker)

    def _take(self, topic: str, holder: int) -> str | None:
        now = self.clock.now()
        for message_id, held in self._messages.items():
            if held.topic == topic and held.holder is None and held.visible_at <= now:
                held.holder = holder
                held.deliveries += 1
                return message_id
        return None

    async def _sleep(self, topic: str, waker: asyncio.Event) -> None:
        later = any(held.topic == topic and held.holder is None for held in self._messages.values())
        try:
            async with asyncio.timeout(_LOOK_SECONDS if later else None):
                await waker.wait()
        except TimeoutError:
            pass

    async def _opened(self, message_id: str) -> PaigeantMessage | None:
        held = self._messages[message_id]
        try:
            return decode(held.body, limit_bytes=self.limit_bytes)
        except MessageInvalid as exc:
            await self._reject(message_id, exc.reason, str(exc))
            return None

    async def ack(self, message_id: str) -> None:
        held = self._messages.get(message_id)
        if held is not None and held.holder is not None:
            del self._messages[message_id]

    async def nack(self, message_id: str, *, delay: float = 0) -> None:
        held = self._messages.get(message_id)
        if held is not None and held.holder is not None:
            held.holder = None
            held.visible_at = self.clock.now() + delay
            self.wake(held.topic)

    async def dead_letter(self, message_id: str, reason: str) -> None:
        if message_id in self._messages:
            await self._reject(message_id, reason, reason)

    async def _reject(self, message_id: str, reason: str, detail: str) -> None:
        held = self._messages[message_id]
        body = held.body[:BODY_KEPT_BYTES]
        letter = DeadLetter(message_id, held.topic, reason, detail, body, held.deliveries)
        if self._bury is None:
            self.dead_letters.append(letter)
        else:
            await self._bury(letter)
        self._messages.pop(message_id, None)

    async def topics(self) -> list[TopicDepth]:
        now = self.clock.now()
        names = sorted({held.topic for held in self._messages.values()})
        depths = []
        for name in names:
            there = [held for held in self._messages.values() if held.topic == name]
            taken = sum(held.holder is not None for held in there)
            depths.append(
                TopicDepth(name, len(there) - taken, taken, now - min(held.created_at for held in there))
            )
        return depths
