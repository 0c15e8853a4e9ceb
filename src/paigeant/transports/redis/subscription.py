"""One iteration over a topic: it fetches, takes over what others have left, tidies up after them, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Iterable
from typing import Any, NamedTuple

from redis.exceptions import AskError

from paigeant import host
from paigeant.transports.redis.hands import Hands, Held
from paigeant.transports.redis.lookout import Lookout
from paigeant.transports.redis.reader import BLOCK_SECONDS, Reader
from paigeant.transports.redis.servers import ANSWER_SECONDS
from paigeant.transports.redis.streams import AT_ONCE, Streams
from paigeant.transports.redis.trouble import FAILURES, explained

__all__ = ["Item", "Subscription", "names_of_consumers"]

log = logging.getLogger("paigeant.transports.redis")

_QUICK_SECONDS, _SLOW_SECONDS = 0.05, 2.0
"""The first and the longest pause before a broken connection is opened again."""

_AT_ONCE = 3
"""How often what is easily mended is tried again without a pause."""

_FETCH_BYTES = 16 * 1024 * 1024
_FIRST_COUNT = 1
"""How many messages are fetched before it is known how large they are."""


class Item(NamedTuple):
    """A message as it came."""

    held: Held
    message_id: str
    body: bytes


class Subscription:
    """What one iteration over a topic is given. Nobody else has its consumer's name, so what that has pending at the
    server is known here: fetched, in the transport's `hands`, or a stray, which is given back.

    It is among `fellows` until nothing more is to be done for it.
    """

    def __init__(
        self,
        streams: Streams,
        hands: Hands,
        topic: str,
        consumer: str,
        *,
        prefetch: int,
        hold: float,
        fellows: set[Subscription],
    ) -> None:
        self.topic = topic
        self._streams = streams
        self._hands = hands
        self._consumer = consumer
        self._prefetch = prefetch
        self._hold = hold
        self._fellows = fellows
        self._reader = Reader(streams, topic, consumer)
        self._lookout = Lookout(streams, topic)
        self._fetched: deque[Item] = deque()
        self._count = min(prefetch, _FIRST_COUNT)
        self._cursor = b"0-0"
        self._claim_at = self._tidy_at = 0.0
        self._stray_checks: list[float] = []
        """When to look for what the server has given it and it doesn't know of."""
        self._failures = 0
        self._told: set[str] = set()
        """What was said to be wrong since it last worked: the first trouble often only leads to that to be mended."""
        self._stopped = asyncio.Event()
        self._idle = asyncio.Event()
        """Set while nothing is being fetched."""
        self._idle.set()
        self._ending: asyncio.Task[None] | None = None
        fellows.add(self)

    async def next(self) -> Item | None:
        """The next message, whenever it comes; None once this has ended."""
        while not self._stopped.is_set():
            if self._fetched:
                item = self._fetched.popleft()
                if _now() <= item.held.until:
                    return item
                # Held too long: by now others may have it. What nobody has is given back.
                self._fetched.clear()
                self._stray_checks.append(_now())
            try:
                self._fetched.extend(await self._fetch())
            except FAILURES as exc:
                await self._pause(exc)
            else:
                self._failures = 0
                if self._told:
                    log.info("receiving from %s again", self.topic)
                    self._told.clear()
        return None

    # -- fetching

    async def _fetch(self) -> list[Item]:
        self._idle.clear()
        try:
            await self._reader.open(again=self._failures > 0)
            began = _now()
            if any(at <= began for at in self._stray_checks):
                await self._return_strays()
                self._stray_checks = [at for at in self._stray_checks if at > began]
            if _now() >= self._claim_at and (claimed := await self._claim()):
                return claimed
            if _now() >= self._tidy_at:
                await self._tidy()
            if self._stopped.is_set():
                return []
            # Whoever stops it from here on finds that an answer is outstanding, and cuts the read short.
            pause = min(self._claim_at, self._tidy_at) - _now()
            return self._items(await self._reader.read(self._count, pause))
        finally:
            self._idle.set()

    def _items(self, entries: Iterable[Any]) -> list[Item]:
        until = _now() + self._hold
        items = []
        for each in entries:
            if not each or not each[1]:
                continue  # deleted by somebody else meanwhile
            entry, flat = each
            fields = dict(zip(flat[::2], flat[1::2], strict=False))
            if b"bell" in fields:
                self._lookout.ring(entry)
                continue
            message_id = fields.get(b"id", entry).decode(errors="replace")
            held = Held(self.topic, self._consumer, entry, until)
            items.append(Item(held, message_id, fields.get(b"body", b"")))
        if items:
            # However large they are, no more of them are asked for than memory has room for.
            average = sum(len(item.body) for item in items) // len(items) + 1
            self._count = max(1, min(self._prefetch, _FETCH_BYTES // average, 2 * self._count))
        return items

    async def _return_strays(self) -> None:
        """Give back what this consumer was given and hasn't yielded."""
        start = b"-"
        while True:
            pending = await self._streams.pending(self.topic, self._consumer, start)
            yielded = self._hands.entries(self.topic, self._consumer)
            strays = [entry for entry in pending if entry not in yielded]
            await self._streams.give_back(self.topic, self._consumer, strays, uncounted=True)
            if len(pending) < AT_ONCE:
                return
            start = b"(" + pending[-1]

    # -- what others have left

    async def _claim(self) -> list[Item]:
        """Take over what others have held for too long."""
        while True:
            self._cursor, entries = await self._streams.claim(
                self.topic, self._consumer, self._hold, self._cursor, self._count
            )
            items = self._items(entries)
            if items:
                return items
            if self._cursor == b"0-0":
                break
        self._claim_at = _now() + self._hold / 3 * random.uniform(0.75, 1.25)
        self._hands.forget_overdue(10 * self._hold)
        return []

    async def _tidy(self) -> None:
        """Give back at once what a process of this host held that is gone, and delete consumers that are no more."""
        for name, pending, idle in await self._streams.consumers(self.topic):
            is_gone = host.is_holder_gone(name)
            if is_gone and pending > 0:
                await self._streams.reclaim(self.topic, name)
            has_ended = is_gone or (self.topic, name) in self._hands.left
            least = 0.0 if has_ended else 10 * self._hold
            if idle >= least:
                await self._forget(name, least)
        self._tidy_at = _now() + self._hold * random.uniform(0.75, 1.25)

    async def _forget(self, consumer: str, idle: float = 0) -> None:
        if await self._streams.forget(self.topic, consumer, idle):
            self._hands.left.discard((self.topic, consumer))

    # -- failures

    async def _pause(self, exc: Exception) -> None:
        """After a failure: make the group again if that is all, else wait a little before the next try."""
        self._failures += 1
        if _is_group_missing(exc):
            try:
                await self._streams.make_group(self.topic)
            except FAILURES as trouble:
                exc = trouble
            else:
                if self._failures <= _AT_ONCE:
                    return
        await self._drop_reader()
        if isinstance(exc, AskError) and self._failures <= _AT_ONCE:
            return  # the keys are moved to another node of the cluster, which the next try looks for
        why = explained(exc, self._streams.place)
        if why not in self._told:
            log.warning("can't receive from %s, will try again: %s", self.topic, why)
            self._told.add(why)
        pause = min(_QUICK_SECONDS * 2 ** min(self._failures - 1, 10), _SLOW_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause * random.uniform(0.5, 1.0)):
                await self._stopped.wait()

    async def _drop_reader(self) -> None:
        # What the server gave to a read whose answer was lost is looked for at once, and again later: a server that
        # hasn't noticed the break goes on with that read, though no longer than it was to block.
        if self._reader.is_open:
            self._stray_checks = [_now(), _now() + 2 * BLOCK_SECONDS]
            await self._reader.drop()

    # -- the end

    def end(self) -> Awaitable[None]:
        """Stop it, and give back what was not yielded. That goes on whatever happens to who waits for it."""
        self._stopped.set()
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._put_away())
        return asyncio.shield(self._ending)

    async def _put_away(self) -> None:
        self._lookout.stop()
        try:
            with contextlib.suppress(*FAILURES):
                async with asyncio.timeout(2 * BLOCK_SECONDS):
                    await self._reader.cut_short()
                    await self._idle.wait()
                    await self._reader.drain()
            await self._reader.drop()
            self._fetched.clear()
            with contextlib.suppress(*FAILURES):  # it comes back by itself, only later
                async with asyncio.timeout(ANSWER_SECONDS):
                    self._hands.left.add((self.topic, self._consumer))
                    await self._return_strays()
                    await self._forget(self._consumer)
        finally:
            self._fellows.discard(self)


def names_of_consumers(transport: str) -> str:
    """What the names of a transport's consumers begin with, by which others of its host can tell when it is gone."""
    return host.named_holder(transport)


def _is_group_missing(exc: Exception) -> bool:
    text = str(exc)
    return text.startswith("NOGROUP") or ("UNBLOCKED" in text and "no longer exists" in text)


def _now() -> float:
    """The steady clock of the process."""
    return time.monotonic()
