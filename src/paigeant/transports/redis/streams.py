"""The topics at the servers: their keys, and each thing that is done to one of them.

All keys of a topic share a hash tag, so that each script finds them on one node of a cluster. What may only be done by
the owner of an entry (ack, return, rejection) is done in scripts that look whose it is.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from redis.exceptions import NoScriptError, ResponseError

from paigeant.errors import ConfigurationError, TransportUnavailable
from paigeant.transport import TopicDepth
from paigeant.transports.redis import scripts
from paigeant.transports.redis.checks import check, check_room
from paigeant.transports.redis.place import Place
from paigeant.transports.redis.scripts import Script
from paigeant.transports.redis.servers import Servers
from paigeant.transports.redis.trouble import TROUBLE, refusal

__all__ = ["AT_ONCE", "GROUP", "LOOK_SECONDS", "Consumer", "Streams"]

log = logging.getLogger("paigeant.transports.redis")

GROUP = "workers"

LOOK_SECONDS = 1.0
"""How often a subscriber looks for delayed messages that are due. Shorter delays ring a bell for it."""

AT_ONCE = 100
"""How many entries one script handles: the server does nothing else meanwhile."""

_ANNOUNCE_SECONDS = 60.0
"""How often the name of a topic is written again: the set of names may have been wiped."""


class Consumer(NamedTuple):
    """One that the server knows of a topic, how many entries it has, and for how many seconds it was not heard of."""

    name: str
    pending: int
    idle: float


class Streams:
    """The topics of a namespace at the servers of a place. Raises what redis-py raises, and TransportUnavailable while
    it isn't open."""

    def __init__(self, place: Place, namespace: str) -> None:
        self.place = place
        self._prefix = quote(place.namespace or namespace, safe=":")
        self._servers: Servers | None = None
        self._announced: dict[str, float] = {}
        """The topics whose names were written, and when that is to be done again."""
        self._broken: set[str] = set()
        """The topics whose keys hold something else, which was told."""

    async def open(self) -> None:
        """Raises ConfigurationError and TransportUnavailable. Opening twice is harmless."""
        if self._servers is not None:
            return
        servers = Servers(self.place)
        try:
            await servers.open()
            await check(servers)
            await self._check_rights(servers)
        except BaseException as exc:
            await servers.close()
            if isinstance(exc, TROUBLE):
                raise refusal(exc, self.place) from exc
            raise
        self._servers = servers

    async def _check_rights(self, servers: Servers) -> None:
        """What the user may not do shows here, not at the first message."""
        # By its text, whoever has had it run before: a server that has lost all scripts is sent them again.
        found = await servers.ask(self.stream_key(""), "EVAL", scripts.RIGHTS.text, *self._given(""))
        if found:
            lacking = ", ".join(sorted({name.decode() for name in found}))
            raise ConfigurationError(
                f"redis at {self.place.where} refuses {self.place.user} the commands {lacking}; "
                "permit them in the ACL of that user"
            )
        await self._run_on(servers, scripts.DEPTH, "")  # by its digest

    async def check_room(self) -> None:
        """Raises TransportUnavailable where no message can be written now, and what redis-py raises."""
        # It is refused like any other message would be, and otherwise written nowhere: no stream has this key.
        key = f"{self._tag('')}:trial"
        await self.servers.ask(key, "XADD", key, "NOMKSTREAM", "*", "id", "")
        if self.place.is_cluster:
            await check_room(self.servers)

    async def close(self) -> None:
        """Closing twice is harmless."""
        servers, self._servers = self._servers, None
        self._announced.clear()
        if servers is not None:
            await servers.close()

    @property
    def is_open(self) -> bool:
        return self._servers is not None

    @property
    def servers(self) -> Servers:
        """Raises TransportUnavailable before `open` and after `close`."""
        if self._servers is None:
            raise TransportUnavailable("the redis transport is not connected; call connect() first")
        return self._servers

    # -- keys

    def stream_key(self, topic: str) -> str:
        """The key of the stream that holds the messages of `topic`."""
        return f"{self._tag(topic)}:stream"

    def _tag(self, topic: str) -> str:
        # The braces must be the first of the key and not be empty, whatever the topic's name is.
        return f"{self._prefix}:{{{quote(topic, safe='') or '%'}}}"

    @property
    def letters_key(self) -> str:
        return f"{self._prefix}:dead-letters"

    @property
    def _topics_key(self) -> str:
        return f"{self._prefix}:topics"

    # -- topics

    async def names(self) -> set[str]:
        """The topics to which somebody has sent a message, as far as that isn't forgotten."""
        try:
            names = await self.servers.ask(self._topics_key, "SMEMBERS", self._topics_key)
        except ResponseError as exc:
            if "WRONGTYPE" not in str(exc):
                raise
            log.warning("the key %s holds something else than names of topics: %s", self._topics_key, exc)
            names = []
        return {name.decode(errors="replace") for name in names}.union(self._announced)

    async def depths(self, topics: Collection[str]) -> list[TopicDepth]:
        """What waits in each of these. Those that hold nothing are left out, and with a warning those whose keys are no
        topic's: one that somebody has broken must not hide the others."""
        found = await asyncio.gather(*(self._depth(topic) for topic in topics))
        return [depth for depth in found if depth is not None and (depth.waiting > 0 or depth.taken > 0)]

    async def _depth(self, topic: str) -> TopicDepth | None:
        try:
            waiting, taken, oldest_ms = await self._run(scripts.DEPTH, topic)
        except ResponseError as exc:
            if "WRONGTYPE" not in str(exc):
                raise
            if topic not in self._broken:
                self._broken.add(topic)
                log.warning("a key of the topic %s holds something else, it isn't counted: %s", topic, exc)
            return None
        self._broken.discard(topic)
        return TopicDepth(topic, max(waiting, 0), taken, None if oldest_ms < 0 else oldest_ms / 1000)

    async def make_group(self, topic: str) -> None:
        """Have consumers share the stream, from its first entry on, if they don't yet."""
        self._announced.pop(topic, None)  # where the group is gone the names of the topics may be gone too
        stream = self.stream_key(topic)
        try:
            await self.servers.ask(stream, "XGROUP CREATE", stream, GROUP, "0", "MKSTREAM")
        except ResponseError as exc:
            if not str(exc).startswith("BUSYGROUP"):
                raise

    # -- messages

    async def add(self, topic: str, message_id: str, body: bytes, delay: float) -> None:
        """A new message, to be delivered in `delay` seconds."""
        adding = self._add(topic, message_id, body, delay)
        if time.monotonic() <= self._announced.get(topic, -math.inf):
            return await adding
        told, added = await asyncio.gather(self._announce(topic), adding, return_exceptions=True)
        if isinstance(added, BaseException):
            raise added
        self._announced[topic] = time.monotonic() + _ANNOUNCE_SECONDS
        if isinstance(told, BaseException):
            # Only listings need it. In a cluster it may be on a node that is away while the topic's is there.
            log.warning("the name of the topic %s can't be written, listings may lack it: %s", topic, told)

    async def _announce(self, topic: str) -> None:
        await self.servers.ask(self._topics_key, "SADD", self._topics_key, topic)

    async def _add(self, topic: str, message_id: str, body: bytes, delay: float) -> None:
        if delay > 0:
            await self._run(scripts.LATER, topic, _micros(LOOK_SECONDS), _micros(delay), message_id, body)
        else:
            stream = self.stream_key(topic)
            await self.servers.ask(stream, "XADD", stream, "*", "id", message_id, "body", body)

    async def move_due(self, topic: str, bells: Iterable[bytes]) -> float | None:
        """Have messages delivered whose time has come, and remove `bells`. Gives the seconds until the next one's, None
        when there is none."""
        wait = await self._run(scripts.DUE, topic, AT_ONCE, *bells)
        return None if wait < 0 else wait / 1e6

    async def claim(
        self, topic: str, consumer: str, hold: float, cursor: bytes, count: int
    ) -> tuple[bytes, list[Any]]:
        """Take over entries that others have held for `hold` seconds. Gives where to go on, b"0-0" at the end."""
        cursor, entries = await self._run(scripts.CLAIM, topic, consumer, _millis(hold), cursor, count)
        return cursor, entries

    # -- what a consumer has: nothing happens to an entry that is another's by now

    async def pending(self, topic: str, consumer: str, start: bytes = b"-") -> list[bytes]:
        """The first entries that it has, up to AT_ONCE of them."""
        return list(await self._run(scripts.PENDING, topic, consumer, start, AT_ONCE))

    async def ack(self, topic: str, consumer: str, entries: Iterable[bytes]) -> None:
        """Delete entries."""
        await self._run(scripts.ACK, topic, consumer, *entries)

    async def give_back(
        self,
        topic: str,
        consumer: str,
        entries: Sequence[bytes],
        *,
        delay: float = 0,
        uncounted: bool = False,
    ) -> None:
        """Have entries delivered again. `uncounted`: nobody has seen them, so this was no delivery."""
        times = (_micros(LOOK_SECONDS), _micros(max(delay, 0.0)))
        for first in range(0, len(entries), AT_ONCE):
            some = entries[first : first + AT_ONCE]
            await self._run(scripts.RETURN, topic, consumer, *times, int(uncounted), *some)

    async def examine(
        self, topic: str, consumer: str, entry: bytes, limit_bytes: int
    ) -> tuple[int, bytes] | None:
        """How often it was delivered, and the beginning of its body; None if it is another's."""
        found = await self._run(scripts.EXAMINE, topic, consumer, entry, limit_bytes)
        return None if found is None else (found[0], found[1])

    # -- consumers

    async def consumers(self, topic: str) -> list[Consumer]:
        """Those that the server knows."""
        return [
            Consumer(name.decode(errors="replace"), pending, idle_ms / 1000)
            for name, pending, idle_ms in await self._run(scripts.CONSUMERS, topic)
        ]

    async def reclaim(self, topic: str, consumer: str) -> None:
        """Give back all that a consumer had that is gone."""
        while await self._run(scripts.RECLAIM, topic, consumer, AT_ONCE):
            pass

    async def forget(self, topic: str, consumer: str, idle: float = 0) -> bool:
        """Delete a consumer that has nothing and was not heard of for `idle` seconds. Gives whether it is gone."""
        return bool(await self._run(scripts.FORGET, topic, consumer, _millis(idle)))

    # -- scripts

    async def _run(self, script: Script, topic: str, *args: str | bytes | int) -> Any:
        return await self._run_on(self.servers, script, topic, *args)

    async def _run_on(self, servers: Servers, script: Script, topic: str, *args: str | bytes | int) -> Any:
        stream, given = self.stream_key(topic), self._given(topic, *args)
        try:
            return await servers.ask(stream, "EVALSHA", script.sha, *given)
        except NoScriptError:
            return await servers.ask(stream, "EVAL", script.text, *given)

    def _given(self, topic: str, *args: str | bytes | int) -> tuple[str | bytes | int, ...]:
        """What each script is given: the keys and the group of a topic, and its own arguments."""
        tag = self._tag(topic)
        return (3, self.stream_key(topic), f"{tag}:later", f"{tag}:due", GROUP, *args)


def _micros(seconds: float) -> int:
    return math.ceil(seconds * 1_000_000)


def _millis(seconds: float) -> int:
    return math.ceil(seconds * 1000)
