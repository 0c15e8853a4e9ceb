"""Messages in Redis streams, one for each topic, that a consumer group shares out; an ack deletes the entry.

All keys of a topic share a hash tag, so that each script finds them on one node of a cluster. What may only be done by
the owner of an entry (ack, return, rejection) is done in scripts that look whose it is.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import logging
import math
import random
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlencode, urlsplit

from redis.asyncio import Connection, ConnectionPool, RedisCluster, Sentinel, SSLConnection
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import TimeoutError as TimedOut

from paigeant import host
from paigeant.errors import ConfigurationError, MessageInvalid, TransportUnavailable
from paigeant.message import DEFAULT_LIMIT_BYTES, PaigeantMessage, decode, encode
from paigeant.store import DeadLetter, Store
from paigeant.transport import BODY_KEPT_BYTES, Bury, TopicDepth

__all__ = ["RedisStreamTransport"]

log = logging.getLogger("paigeant.transports.redis")

_GROUP = "workers"
_HOLD_SECONDS = 30.0
"""How long a fetched message is kept from others. A claim acks it within milliseconds."""

_LOOK_SECONDS = 1.0
"""How often a subscriber looks for delayed messages that are due. Shorter delays ring a bell for it."""

_BLOCK_SECONDS = 1.0
"""How long a read waits for messages before the next one. Where CLIENT UNBLOCK isn't allowed, leaving takes so long."""

_ANSWER_SECONDS = 5.0
_QUICK_SECONDS, _SLOW_SECONDS = 0.05, 2.0
"""The first and the longest pause before a broken connection is opened again."""

_ANNOUNCE_SECONDS = 60.0
"""How often the name of a topic is written again: the set of names may have been wiped."""

_BATCH_COMMANDS, _BATCH_BYTES = 256, 1024 * 1024
_FETCH_BYTES = 16 * 1024 * 1024
_AT_ONCE = 100
_OLDEST_VERSION = (6, 2)

_TROUBLE = (RedisError, RedisClusterException, OSError)
_REFUSALS = (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    NoPermissionError,
)


class _Held(NamedTuple):
    """An entry that was delivered and not settled. `until` is when it may be somebody else's."""

    topic: str
    consumer: str
    entry: bytes
    until: float


class _Item(NamedTuple):
    entry: bytes
    message_id: str
    body: bytes
    until: float


@dataclass(eq=False, slots=True)
class _Subscription:
    """One iteration over a topic. Nobody else has its consumer's name, so what that has pending is known here."""

    topic: str
    prefetch: int
    consumer: str
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    ending: asyncio.Task[None] | None = None
    connection: Any = None
    client: int | None = None
    outstanding: bool = False
    """Whether an answer to a read is still to come on the connection."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while the iterator isn't fetching."""
    has_strays: bool = False
    """Whether the server may have given it entries that it doesn't know of."""
    check_at: float = math.inf
    """When to look for such entries once more."""
    fetched: deque[_Item] = field(default_factory=deque)
    lookout: asyncio.Task[None] | None = None
    bells: list[bytes] = field(default_factory=list)
    rung: asyncio.Event = field(default_factory=asyncio.Event)
    count: int = 16
    cursor: bytes = b"0-0"
    claim_at: float = 0.0
    tidy_at: float = 0.0
    failures: int = 0
    is_trouble_told: bool = False


class RedisStreamTransport:
    """Moves messages through the streams of a Redis server, a primary that sentinels name, or a cluster.

    `url` is redis:// or, with TLS, rediss://, with parameters of redis-py (`socket_timeout`, `ssl_ca_certs`, ...) and
    with these: `?sentinel=NAME` makes its servers the sentinels that know the primary by that name (they take
    `sentinel_username` and `sentinel_password`), `?cluster=true` nodes of a cluster, `namespace=` overrides that one.
    `namespace` is what all its keys begin with. `hold` is how many seconds a delivered message is kept from others.

    Messages come in the order in which they were published, save those that were delayed, returned or left by another.
    Raises ConfigurationError for a URL that can't work.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "paigeant",
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        hold: float = _HOLD_SECONDS,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.hold = hold
        self._place = _Place.read(url)
        self._prefix = quote(self._place.namespace or namespace, safe=":")
        self._servers: _Servers | None = None
        self._bury: Bury | None = None
        # Names this process, so that others of its host can tell when it is gone, and this transport within it.
        self._name = f"{host.host_id()}|{host.process_id()}|{secrets.token_hex(4)}"
        self._numbers = itertools.count()
        self._subscriptions: set[_Subscription] = set()
        self._held: dict[str, list[_Held]] = {}
        self._acks: dict[tuple[str, str], list[bytes]] = {}
        self._acking: asyncio.Task[None] | None = None
        self._left: set[tuple[str, str]] = set()
        """Topics and consumers of iterations that have ended while their last messages were not yet settled."""
        self._announced: dict[str, float] = {}

    # -- opening and closing

    async def connect(self) -> None:
        if self._servers is not None:
            return
        servers = _Servers(self._place)
        try:
            await servers.open()
            await self._check(servers)
        except BaseException as exc:
            await servers.close()
            if isinstance(exc, _TROUBLE):
                raise self._refusal(exc) from exc
            raise
        self._servers = servers

    async def _check(self, servers: _Servers) -> None:
        for where, line in servers.lines():
            info = await _info(line)
            version = info.get("redis_version", "")
            if version and _numbers(version) < _OLDEST_VERSION:
                raise ConfigurationError(
                    f"redis at {where} is version {version}, expected 6.2 or newer, which has XAUTOCLAIM; upgrade it"
                )
            if info.get("redis_mode") == "cluster" and not self._place.is_cluster:
                raise ConfigurationError(
                    f"redis at {where} is a node of a cluster; add cluster=true to the parameters of transport_url"
                )
            if info.get("role") == "slave" and self._place.service is None:
                raise ConfigurationError(
                    f"redis at {where} is a replica, which can't be written to; name its primary in transport_url, "
                    "or the sentinels (redis://host:26379/0?sentinel=name)"
                )
            policy = info.get("maxmemory_policy") or await _policy(line)
            if policy is None:
                log.warning(
                    "redis at %s lets neither INFO nor CONFIG GET be read, so its maxmemory-policy is unknown; "
                    "make sure that it is noeviction, else messages may be dropped",
                    where,
                )
            elif policy.startswith("allkeys"):
                # The volatile policies take away only keys that expire; none of ours does.
                raise ConfigurationError(
                    f"redis at {where} has maxmemory-policy {policy}, which drops whole topics when memory is short; "
                    "set it to noeviction: redis-cli CONFIG SET maxmemory-policy noeviction, and in redis.conf"
                )
        # Whether the user may run scripts on these keys shows here, not at the first message.
        await self._run_on(servers, _DEPTH, "")

    async def close(self) -> None:
        if self._servers is None:
            return
        await asyncio.gather(*(self._end(subscription) for subscription in tuple(self._subscriptions)))
        with contextlib.suppress(
            *_TROUBLE, TransportUnavailable
        ):  # what it held comes back by itself, only later
            async with asyncio.timeout(_ANSWER_SECONDS):
                if self._acking is not None:
                    await asyncio.shield(self._acking)
                await self._give_back_held()
        servers, self._servers = self._servers, None
        self._held.clear()
        self._acks.clear()
        self._left.clear()
        self._announced.clear()
        if servers is not None:
            await servers.close()

    async def _give_back_held(self) -> None:
        entries: dict[tuple[str, str], list[bytes]] = {}
        for held in itertools.chain.from_iterable(self._held.values()):
            entries.setdefault((held.topic, held.consumer), []).append(held.entry)
        await asyncio.gather(*(self._return(topic, by, ids) for (topic, by), ids in entries.items()))
        await asyncio.gather(
            *(self._run(_FORGET, topic, by, 0) for topic, by in self._left | entries.keys()),
        )

    def joins(self, store: Store) -> bool:
        return False

    def bury_with(self, bury: Bury) -> None:
        self._bury = bury

    # -- sending

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        body = encode(message, limit_bytes=self.limit_bytes)
        with self._told():
            if asyncio.get_running_loop().time() > self._announced.get(topic, -math.inf):
                await asyncio.gather(self._announce(topic), self._put(topic, message.message_id, body, delay))
            else:
                await self._put(topic, message.message_id, body, delay)

    async def _put(self, topic: str, message_id: str, body: bytes, delay: float) -> None:
        if delay > 0:
            await self._run(_LATER, topic, _LOOK_MICROS, _micros(delay), message_id, body)
        else:
            stream = self.stream_key(topic)
            await self._open().ask(stream, "XADD", stream, "*", "id", message_id, "body", body)

    async def _announce(self, topic: str) -> None:
        key = self._topics_key()
        await self._open().ask(key, "SADD", key, topic)
        self._announced[topic] = asyncio.get_running_loop().time() + _ANNOUNCE_SECONDS

    # -- receiving

    async def subscribe(self, topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
        self._open()
        loop = asyncio.get_running_loop()
        subscription = _Subscription(topic, prefetch, f"{self._name}|{next(self._numbers)}")
        subscription.count = min(prefetch, subscription.count)
        subscription.idle.set()
        self._subscriptions.add(subscription)
        subscription.lookout = loop.create_task(self._look_out(subscription))
        try:
            while not subscription.stopped.is_set():
                try:
                    subscription.fetched.extend(await self._fetch(subscription))
                except (*_TROUBLE, TransportUnavailable) as exc:
                    await self._pause(subscription, exc)
                    continue
                subscription.failures = 0
                if subscription.is_trouble_told:
                    log.info("receiving from %s again", topic)
                    subscription.is_trouble_told = False
                while subscription.fetched and not subscription.stopped.is_set():
                    item = subscription.fetched.popleft()
                    if loop.time() > item.until:
                        # Held too long: by now others may have it. What nobody has is given back.
                        subscription.fetched.clear()
                        subscription.has_strays = True
                        break
                    message = await self._opened(subscription, item)
                    if message is not None:
                        self._keep_in_hand(subscription, item, message.message_id)
                        yield message
        finally:
            await self._end(subscription)

    async def _fetch(self, subscription: _Subscription) -> list[_Item]:
        loop = asyncio.get_running_loop()
        subscription.idle.clear()
        try:
            if subscription.connection is None:
                await self._connect_reader(subscription)
            if subscription.has_strays or loop.time() >= subscription.check_at:
                await self._return_strays(subscription)
                subscription.has_strays = False
                if loop.time() >= subscription.check_at:
                    subscription.check_at = math.inf
            if loop.time() >= subscription.claim_at:
                claimed = await self._claim(subscription)
                if claimed:
                    return claimed
            if loop.time() >= subscription.tidy_at:
                await self._tidy(subscription)
            # Whoever stops it from here on finds that an answer is outstanding, and cuts the read short.
            return [] if subscription.stopped.is_set() else await self._read(subscription)
        finally:
            subscription.idle.set()

    async def _connect_reader(self, subscription: _Subscription) -> None:
        servers = self._open()
        stream = self.stream_key(subscription.topic)
        if subscription.failures:
            await servers.refresh(stream)
        connection = servers.connection(stream)
        subscription.connection = connection
        subscription.client = None
        async with asyncio.timeout(servers.timeout):
            await connection.connect()
            with contextlib.suppress(ResponseError):  # then a read isn't cut short when the iteration ends
                await connection.send_command("CLIENT", "ID")
                subscription.client = await connection.read_response(disconnect_on_error=False)

    async def _read(self, subscription: _Subscription) -> list[_Item]:
        servers = self._open()
        pause = min(subscription.claim_at, subscription.tidy_at) - asyncio.get_running_loop().time()
        block = max(1, math.ceil(min(pause, _BLOCK_SECONDS) * 1000))
        stream = self.stream_key(subscription.topic)
        command = ("XREADGROUP", "GROUP", _GROUP, subscription.consumer, "COUNT", subscription.count)
        connection = subscription.connection
        subscription.outstanding = True
        try:
            async with asyncio.timeout(block / 1000 + servers.timeout):
                await connection.send_command(*command, "BLOCK", block, "STREAMS", stream, ">")
                # A cancelled read leaves the connection whole: what it was to bring is fetched by `_put_away`.
                answer = await connection.read_response(timeout=math.inf, disconnect_on_error=False)
            subscription.outstanding = False
        except _TROUBLE:
            subscription.outstanding = False
            raise
        if not answer:
            return []
        return self._items(subscription, answer[0][1])

    def _items(self, subscription: _Subscription, entries: Iterable[Any]) -> list[_Item]:
        until = asyncio.get_running_loop().time() + self.hold
        items = []
        for each in entries:
            if not each or not each[1]:
                continue  # deleted by somebody else meanwhile
            entry, flat = each
            fields = dict(zip(flat[::2], flat[1::2], strict=False))
            if b"bell" in fields:
                subscription.bells.append(entry)
                subscription.rung.set()
                continue
            message_id = fields.get(b"id", entry).decode(errors="replace")
            items.append(_Item(entry, message_id, fields.get(b"body", b""), until))
        if items:
            # However large they are, no more of them are asked for than memory has room for.
            average = sum(len(item.body) for item in items) // len(items) + 1
            subscription.count = max(1, min(subscription.prefetch, _FETCH_BYTES // average))
        return items

    async def _look_out(self, subscription: _Subscription) -> None:
        """Move what is due into the stream when it is; the blocked read gets it from there."""
        # The end of a blocked read is no clock for that: a server that has nothing else to do is up to 0.1 s late.
        while True:
            subscription.rung.clear()
            bells, subscription.bells = subscription.bells, []
            try:
                wait = await self._run(_DUE, subscription.topic, _AT_ONCE, *bells)
            except Exception as exc:  # whatever it is, what is due later must come
                subscription.bells.extend(bells)
                if not isinstance(exc, (*_TROUBLE, TransportUnavailable)):  # of those the reader tells
                    log.exception("looking for due messages of %s failed", subscription.topic)
                wait = -1
            pause = _LOOK_SECONDS if wait < 0 else min(wait / 1e6, _LOOK_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await subscription.rung.wait()

    async def _claim(self, subscription: _Subscription) -> list[_Item]:
        """Take over what others have held for too long."""
        hold_ms = math.ceil(self.hold * 1000)
        while True:
            cursor, entries = await self._run(
                _CLAIM,
                subscription.topic,
                subscription.consumer,
                hold_ms,
                subscription.cursor,
                subscription.count,
            )
            subscription.cursor = cursor
            items = self._items(subscription, entries)
            if items:
                return items
            if cursor == b"0-0":
                break
        now = asyncio.get_running_loop().time()
        subscription.claim_at = now + self.hold / 3 * random.uniform(0.75, 1.25)
        self._forget_overdue(now)
        return []

    async def _tidy(self, subscription: _Subscription) -> None:
        """Give back at once what a process of this host held that is gone, and delete consumers that are no more."""
        topic = subscription.topic
        for name, pending, idle in await self._run(_CONSUMERS, topic):
            consumer = name.decode(errors="replace")
            gone = _is_gone(consumer)
            while gone and pending > 0:
                pending = await self._run(_RECLAIM, topic, consumer, _AT_ONCE)
            ended = (topic, consumer) in self._left
            if gone or ended or idle > 10 * self.hold * 1000:
                least = 0 if gone or ended else math.ceil(10 * self.hold * 1000)
                if await self._run(_FORGET, topic, consumer, least):
                    self._left.discard((topic, consumer))
        pause = self.hold * random.uniform(0.75, 1.25)
        subscription.tidy_at = asyncio.get_running_loop().time() + pause

    async def _opened(self, subscription: _Subscription, item: _Item) -> PaigeantMessage | None:
        try:
            return decode(item.body, limit_bytes=self.limit_bytes)
        except MessageInvalid as exc:
            held = _Held(subscription.topic, subscription.consumer, item.entry, item.until)
            try:
                await self._reject(held, item.message_id, exc.reason, str(exc))
            except Exception as trouble:  # whatever the keeper of dead letters meets, the iteration goes on
                log.warning(
                    "the dead letter %s is not kept yet, it comes again: %s", item.message_id, trouble
                )
            return None

    async def _pause(self, subscription: _Subscription, exc: Exception) -> None:
        """After a failure: make the group again if that is all, else wait a little before the next try."""
        subscription.failures += 1
        text = str(exc)
        if text.startswith("NOGROUP") or ("UNBLOCKED" in text and "no longer exists" in text):
            try:
                await self._make_group(subscription.topic)
            except (*_TROUBLE, TransportUnavailable) as trouble:
                exc = trouble
            else:
                if subscription.failures <= 3:
                    return
        await self._drop_reader(subscription)
        if not subscription.is_trouble_told:
            log.warning("can't receive from %s, will try again: %s", subscription.topic, self._trouble(exc))
            subscription.is_trouble_told = True
        pause = min(_QUICK_SECONDS * 2 ** min(subscription.failures - 1, 10), _SLOW_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause * random.uniform(0.5, 1.0)):
                await subscription.stopped.wait()

    async def _make_group(self, topic: str) -> None:
        self._announced.pop(topic, None)  # where the group is gone the names of the topics may be gone too
        stream = self.stream_key(topic)
        try:
            await self._open().ask(stream, "XGROUP CREATE", stream, _GROUP, "0", "MKSTREAM")
        except ResponseError as exc:
            if not str(exc).startswith("BUSYGROUP"):
                raise

    # -- the end of an iteration

    def _end(self, subscription: _Subscription) -> Awaitable[None]:
        subscription.stopped.set()
        if subscription.ending is None:
            subscription.ending = asyncio.get_running_loop().create_task(self._put_away(subscription))
        # It goes on whatever happens to who waits for it.
        return asyncio.shield(subscription.ending)

    async def _put_away(self, subscription: _Subscription) -> None:
        topic, consumer = subscription.topic, subscription.consumer
        if subscription.lookout is not None:
            subscription.lookout.cancel()
        try:
            with contextlib.suppress(*_TROUBLE, TransportUnavailable):
                async with asyncio.timeout(2 * _BLOCK_SECONDS):
                    await self._finish_read(subscription)
            await self._drop_reader(subscription)
            subscription.fetched.clear()
            with contextlib.suppress(*_TROUBLE, TransportUnavailable):  # it comes back by itself, only later
                async with asyncio.timeout(_ANSWER_SECONDS):
                    self._left.add((topic, consumer))
                    await self._return_strays(subscription)
                    if await self._run(_FORGET, topic, consumer, 0):
                        self._left.discard((topic, consumer))
        finally:
            self._subscriptions.discard(subscription)

    async def _finish_read(self, subscription: _Subscription) -> None:
        """Cut a read short that is under way, and take its answer off the connection."""
        if subscription.outstanding and subscription.client is not None:
            with contextlib.suppress(ResponseError):  # not allowed: the read ends by itself
                stream = self.stream_key(subscription.topic)
                await self._open().tell(stream, "CLIENT", "UNBLOCK", subscription.client)
        await subscription.idle.wait()
        if subscription.outstanding:
            subscription.outstanding = False
            await subscription.connection.read_response(timeout=math.inf, disconnect_on_error=False)

    async def _drop_reader(self, subscription: _Subscription) -> None:
        connection, subscription.connection = subscription.connection, None
        subscription.outstanding = False
        if connection is not None:
            # What the server gave to a read whose answer was lost is found by asking what is pending.
            subscription.has_strays = True
            # A server that hasn't noticed the break goes on with that read, though no longer than it was to block.
            subscription.check_at = asyncio.get_running_loop().time() + 2 * _BLOCK_SECONDS
            with contextlib.suppress(*_TROUBLE):
                await connection.disconnect(nowait=True)

    async def _return_strays(self, subscription: _Subscription) -> None:
        """Give back what this consumer was given and hasn't yielded."""
        start = b"-"
        while True:
            pending = await self._run(_PENDING, subscription.topic, subscription.consumer, start, _AT_ONCE)
            held = {each.entry for each in itertools.chain.from_iterable(self._held.values())}
            strays = [entry for entry in pending if entry not in held]
            if strays:
                await self._return(subscription.topic, subscription.consumer, strays, uncounted=True)
            if len(pending) < _AT_ONCE:
                return
            start = b"(" + pending[-1]

    # -- settling

    async def ack(self, message_id: str) -> None:
        # Nobody waits for the server here: an ack that gets lost brings the message again, as a duplicate.
        for held in self._let_go(message_id):
            self._acks.setdefault((held.topic, held.consumer), []).append(held.entry)
        if self._acks and self._acking is None:
            self._acking = asyncio.get_running_loop().create_task(self._send_acks())

    async def _send_acks(self) -> None:
        # What is acked while others are on their way goes together in one script.
        try:
            while self._acks:
                acks, self._acks = self._acks, {}
                sent = (self._run(_ACK, topic, by, *ids) for (topic, by), ids in acks.items())
                for answer in await asyncio.gather(*sent, return_exceptions=True):
                    if isinstance(answer, BaseException):
                        log.info("acks got lost, their messages come again: %s", self._trouble(answer))
        finally:
            self._acking = None

    async def nack(self, message_id: str, *, delay: float = 0) -> None:
        with self._told():
            for held in self._let_go(message_id):
                await self._return(held.topic, held.consumer, [held.entry], delay=delay)

    async def _return(
        self,
        topic: str,
        consumer: str,
        entries: Sequence[bytes],
        *,
        delay: float = 0,
        uncounted: bool = False,
    ) -> None:
        """Give entries back. `uncounted`: nobody has seen them, so this was no delivery."""
        for first in range(0, len(entries), _AT_ONCE):
            some = entries[first : first + _AT_ONCE]
            await self._run(
                _RETURN, topic, consumer, _LOOK_MICROS, _micros(max(delay, 0.0)), int(uncounted), *some
            )

    async def dead_letter(self, message_id: str, reason: str) -> None:
        for held in self._let_go(message_id):
            try:
                await self._reject(held, message_id, reason, reason)
            except BaseException:
                self._held.setdefault(message_id, []).append(held)  # so that it can be tried again
                raise

    async def _reject(self, held: _Held, message_id: str, reason: str, detail: str) -> None:
        with self._told():
            found = await self._run(_EXAMINE, held.topic, held.consumer, held.entry, BODY_KEPT_BYTES)
        if found is None:
            return
        attempts, body = found
        letter = DeadLetter.about(message_id, held.topic, reason, detail, body, attempts)
        # Kept first, taken out of the topic then: a crash in between does it again, a loss can't happen.
        await (self._keep(letter) if self._bury is None else self._bury(letter))
        with self._told():
            await self._run(_ACK, held.topic, held.consumer, held.entry)

    async def _keep(self, letter: DeadLetter) -> None:
        key = self._letters_key()
        with self._told():
            await self._open().ask(key, "HSETNX", key, letter.id, _write_letter(letter))

    async def kept_letters(self) -> list[DeadLetter]:
        """The dead letters that were kept here because nothing else kept them, by id."""
        key = self._letters_key()
        with self._told():
            values = await self._open().ask(key, "HVALS", key)
        return sorted((_read_letter(value) for value in values), key=lambda letter: letter.id)

    def _keep_in_hand(self, subscription: _Subscription, item: _Item, message_id: str) -> None:
        others = [held for held in self._held.get(message_id, []) if held.entry != item.entry]
        held = _Held(subscription.topic, subscription.consumer, item.entry, item.until)
        self._held[message_id] = [*others, held]

    def _let_go(self, message_id: str) -> list[_Held]:
        """What an ack or a return of `message_id` settles: one delivery, and those of it that are overdue."""
        deliveries = self._held.pop(message_id, [])
        now = asyncio.get_running_loop().time()
        for count, held in enumerate(deliveries, 1):
            if held.until > now:
                if deliveries[count:]:
                    self._held[message_id] = deliveries[count:]
                return deliveries[:count]
        return deliveries

    def _forget_overdue(self, now: float) -> None:
        """Let go of what nobody has settled long after it went to others."""
        for message_id, deliveries in tuple(self._held.items()):
            kept = [held for held in deliveries if held.until + 10 * self.hold > now]
            if kept:
                self._held[message_id] = kept
            else:
                del self._held[message_id]

    # -- what waits

    async def topics(self, known: Collection[str] = ()) -> list[TopicDepth]:
        key = self._topics_key()
        with self._told():
            listed = {name.decode(errors="replace") for name in await self._open().ask(key, "SMEMBERS", key)}
            mine = {subscription.topic for subscription in self._subscriptions}
            names = sorted(listed | mine | set(known) | self._announced.keys())
            answers = await asyncio.gather(*(self._run(_DEPTH, name) for name in names))
        depths = []
        for name, (waiting, taken, oldest_ms) in zip(names, answers, strict=True):
            if waiting > 0 or taken > 0:
                oldest = None if oldest_ms < 0 else oldest_ms / 1000
                depths.append(TopicDepth(name, max(waiting, 0), taken, oldest))
        return depths

    # -- keys and scripts

    def stream_key(self, topic: str) -> str:
        """The key of the stream that holds the messages of `topic`, each an entry with the fields `id` and `body`."""
        return f"{self._tag(topic)}:stream"

    def _tag(self, topic: str) -> str:
        # The braces must be the first of the key and not be empty, whatever the topic's name is.
        return f"{self._prefix}:{{{quote(topic, safe='') or '%'}}}"

    def _topics_key(self) -> str:
        return f"{self._prefix}:topics"

    def _letters_key(self) -> str:
        return f"{self._prefix}:dead-letters"

    async def _run(self, script: _Script, topic: str, *args: str | bytes | int) -> Any:
        return await self._run_on(self._open(), script, topic, *args)

    async def _run_on(self, servers: _Servers, script: _Script, topic: str, *args: str | bytes | int) -> Any:
        tag = self._tag(topic)
        stream = f"{tag}:stream"
        rest = (3, stream, f"{tag}:later", f"{tag}:due", _GROUP, *args)
        try:
            return await servers.ask(stream, "EVALSHA", script.sha, *rest)
        except NoScriptError:
            return await servers.ask(stream, "EVAL", script.text, *rest)

    def _open(self) -> _Servers:
        if self._servers is None:
            raise TransportUnavailable("the redis transport is not connected; call connect() first")
        return self._servers

    # -- errors

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except _TROUBLE as exc:
            raise TransportUnavailable(self._trouble(exc)) from exc

    def _refusal(self, exc: BaseException) -> ConfigurationError | TransportUnavailable:
        """What `connect` raises: settings that can't work, or a server that isn't there now."""
        text = str(exc)
        if isinstance(exc, _REFUSALS) or text.startswith("NOAUTH"):
            who = f"user '{self._place.username}'" if self._place.username else "the default user"
            return ConfigurationError(
                f"redis at {self._place.where} refuses {who}: {_plain(text)}; "
                "check the user name and password in transport_url, and what the ACL of that user allows"
            )
        if "DB index is out of range" in text or "invalid DB index" in text:
            return ConfigurationError(f"redis at {self._place.where} has no such database: {_plain(text)}")
        if "Cluster mode is not enabled" in text:
            return ConfigurationError(
                f"redis at {self._place.where} is no cluster; remove cluster=true from transport_url"
            )
        return TransportUnavailable(self._trouble(exc))

    def _trouble(self, exc: BaseException) -> str:
        """What is wrong at the server, and what to do."""
        where, text = self._place.where, _plain(str(exc))
        match exc:
            case TransportUnavailable():
                return text
            case OutOfMemoryError():
                return f"redis at {where} has no memory left: raise its maxmemory, or let workers catch up"
            case ReadOnlyError():
                return f"redis at {where} is a replica now and can't be written to: name its primary, or its sentinels"
            case BusyLoadingError():
                return f"redis at {where} is still loading its data: try again when it has"
            case MasterNotFoundError():
                return (
                    f"no sentinel of {where} names a healthy primary '{self._place.service}': check the name and that "
                    "they run; if they ask for a password, give sentinel_password"
                )
            case ResponseError() if text.startswith("MISCONF"):
                return f"redis at {where} can't write to its disk and takes no messages: see its log ({text})"
            case ResponseError():
                return f"redis at {where} refuses: {text}"
            case TimedOut() | TimeoutError():
                return (
                    f"redis at {where} doesn't answer: check that it runs, that the network lets it be reached, and "
                    f"whether it speaks TLS ({self._place.scheme}:// was asked for)"
                )
            case _:
                hint = "check that it runs, that the address is right, and whether it speaks TLS (rediss://)"
                if "certificate" in text.lower():
                    hint = (
                        "check its certificate, and name the authority that signed it with ssl_ca_certs=/path"
                    )
                elif "ssl" in text.lower():
                    hint = "it seems not to speak TLS: write redis:// instead of rediss://"
                return f"redis at {where} can't be reached: {text or type(exc).__name__}; {hint}"


# -- where the servers are, and how commands get there


@dataclass(frozen=True, slots=True)
class _Place:
    """What a URL says. Its text is never shown: it may hold a password."""

    nodes: tuple[tuple[str, int], ...]
    options: dict[str, Any] = field(repr=False)
    is_tls: bool
    is_cluster: bool
    service: str | None
    """The name by which sentinels know the primary; the nodes are these sentinels then."""
    sentinel_options: dict[str, Any] = field(repr=False)
    namespace: str | None

    @property
    def where(self) -> str:
        return ", ".join(f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name, port in self.nodes)

    @property
    def scheme(self) -> str:
        return "rediss" if self.is_tls else "redis"

    @property
    def username(self) -> str | None:
        return self.options.get("username")

    @classmethod
    def read(cls, url: str) -> _Place:
        """Raises ConfigurationError."""
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss"):
            raise ConfigurationError(f"expected a redis:// or rediss:// URL, found {parts.scheme}://")
        own: dict[str, str] = {}
        others: dict[str, str] = {}
        for name, _, value in (pair.partition("=") for pair in parts.query.split("&") if pair):
            mine = name in ("namespace", "sentinel", "cluster", "sentinel_username", "sentinel_password")
            (own if mine else others)[name] = unquote(value)
        is_cluster = own.get("cluster", "false").lower() in ("1", "true", "yes")
        service = own.get("sentinel")
        if is_cluster and service is not None:
            raise ConfigurationError("transport_url has both sentinel= and cluster=; a server is one of them")
        login, at, hosts = parts.netloc.rpartition("@")
        default = 6379 if service is None else 26379
        nodes = tuple(_address(each, default) for each in hosts.split(",") if each)
        if not nodes:
            nodes = (("localhost", default),)
        if len(nodes) > 1 and service is None and not is_cluster:
            raise ConfigurationError(
                "transport_url names several servers; say what they are: ?sentinel=NAME for sentinels that know the "
                "primary by NAME, ?cluster=true for nodes of a cluster"
            )
        database = parts.path.strip("/")
        if database and not database.isdecimal():
            raise ConfigurationError("the path of a redis URL is the number of a database, such as /0")
        if is_cluster and database.strip("0"):
            raise ConfigurationError(
                "a redis cluster has the database 0 only; leave the number out of transport_url"
            )
        name, port = nodes[0]
        name = f"[{name}]" if ":" in name else name
        others.pop("protocol", None)  # see _Servers: it is chosen there
        one = f"{parts.scheme}://{login}{at}{name}:{port}/{database}?{urlencode(others)}"
        options, is_tls = _options(one)
        sentinel_options = {
            name.removeprefix("sentinel_"): value
            for name, value in own.items()
            if name.startswith("sentinel_")
        }
        return cls(nodes, options, is_tls, is_cluster, service, sentinel_options, own.get("namespace"))


def _options(url: str) -> tuple[dict[str, Any], bool]:
    try:
        pool = ConnectionPool.from_url(url, protocol=2)
        pool.make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, RedisError) as exc:
        # The text of such an error names the parameter, never its value.
        raise ConfigurationError(
            f"transport_url has a parameter that can't be used: {_plain(str(exc))}"
        ) from None
    options = dict(pool.connection_kwargs)
    for name in ("host", "port", "protocol", "decode_responses", "himport_registry", "retry"):
        options.pop(name, None)
    return options, pool.connection_class is SSLConnection


def _address(text: str, default: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        name, port = parts.hostname, parts.port
    except ValueError:
        name = port = None
        text = ""
    if not name or (text.count(":") and port is None and not text.endswith("]")):
        # What stands there may be a part of a password, so it isn't shown.
        raise ConfigurationError(
            "transport_url names no server that can be read; expected redis://user:password@host:port/0, "
            "with / ? # @ and % in a password written as %2F %3F %23 %40 and %25"
        )
    return name, port or default


class _Servers:
    """The connections to one server, to the primary that sentinels name now, or to the nodes of a cluster."""

    def __init__(self, place: _Place) -> None:
        self.place = place
        self.timeout = float(place.options.get("socket_timeout") or _ANSWER_SECONDS)
        # Timeouts are for whole batches and reads, set where these are: a timer for each answer costs as much as the
        # answer. The older protocol has one shape of answers on all servers. Retries are decided here.
        self._options = {
            **place.options,
            "socket_timeout": None,
            "socket_connect_timeout": place.options.get("socket_connect_timeout") or self.timeout,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "driver_info": None,
        }
        self._lines: dict[str, _Line] = {}
        self._cluster: RedisCluster | None = None
        self._sentinel: Sentinel | None = None
        self._pool: ConnectionPool | None = None

    async def open(self) -> None:
        if self.place.is_cluster:
            await self._open_cluster()
        elif self.place.service is not None:
            self._open_sentinel(self.place.service)
        else:
            [(name, port)] = self.place.nodes
            kind = SSLConnection if self.place.is_tls else Connection
            self._pool = ConnectionPool(kind, host=name, port=port, **self._options)

    async def _open_cluster(self) -> None:
        options = {**self._options, "socket_timeout": self.timeout, "ssl": self.place.is_tls}
        options["retry"] = Retry(NoBackoff(), 3)
        options.pop("db", None)
        nodes = [ClusterNode(name, port) for name, port in self.place.nodes]
        try:
            self._cluster = RedisCluster(startup_nodes=nodes, **options)
        except TypeError as exc:
            raise ConfigurationError(f"transport_url has a parameter that no cluster takes: {exc}") from exc
        await self._cluster.initialize()

    def _open_sentinel(self, service: str) -> None:
        of_sentinels: dict[str, Any] = {
            name: value for name, value in self.place.options.items() if name.startswith(("ssl_", "socket_"))
        }
        self._sentinel = Sentinel(  # type: ignore[no-untyped-call]
            list(self.place.nodes),
            sentinel_kwargs={
                **of_sentinels,
                **self.place.sentinel_options,
                "socket_timeout": min(self.timeout, 2.0),
                "socket_connect_timeout": min(self.timeout, 2.0),
                "ssl": self.place.is_tls,
                "protocol": 2,
                "retry": Retry(NoBackoff(), 0),
                "driver_info": None,
            },
        )
        self._pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
            service, self._sentinel, ssl=self.place.is_tls, **self._options
        )

    async def close(self) -> None:
        for line in self._lines.values():
            await line.close()
        self._lines.clear()
        for each in (self._cluster, self._sentinel, self._pool):
            if each is not None:
                with contextlib.suppress(*_TROUBLE):
                    await each.aclose()

    def connection(self, key: str) -> Any:
        """A connection, not yet open, to the server that has `key`."""
        if self._cluster is None:
            assert self._pool is not None
            return self._pool.make_connection()  # type: ignore[no-untyped-call]
        node = self._cluster.get_node_from_key(key)
        if node is None:
            raise ClusterDownError("no node of the cluster serves this key now")
        return self._connection_to(node)

    def _connection_to(self, node: ClusterNode) -> Any:
        options = {**node.connection_kwargs, "socket_timeout": None, "retry": self._options["retry"]}
        return node.connection_class(**options)

    def lines(self) -> list[tuple[str, _Line]]:
        """A line to the server, or to each primary of the cluster, with its address."""
        if self._cluster is None:
            return [(self.place.where, self._line(""))]
        return [(node.name, self._line_to(node)) for node in self._cluster.get_primaries()]

    def _line(self, key: str) -> _Line:
        if self._cluster is not None:
            node = self._cluster.get_node_from_key(key)
            if node is None:
                raise ClusterDownError("no node of the cluster serves this key now")
            return self._line_to(node)
        line = self._lines.get("")
        if line is None:
            line = self._lines[""] = _Line(lambda: self.connection(key), self.timeout)
        return line

    def _line_to(self, node: ClusterNode) -> _Line:
        line = self._lines.get(node.name)
        if line is None:
            line = self._lines[node.name] = _Line(lambda: self._connection_to(node), self.timeout)
        return line

    async def ask(self, key: str, *command: str | bytes | int) -> Any:
        """The answer to `command`, sent to the server that has `key`."""
        if self._cluster is None:
            return await self._line(key).call(command)
        try:
            return await self._line(key).call(command)
        except (MovedError, AskError, TryAgainError, ClusterDownError, Disconnected, TimedOut, OSError):
            # The slow way knows how to follow the key, and learns the cluster's new shape by that.
            return await self._cluster.execute_command(*command)

    async def tell(self, key: str, *command: str | bytes | int) -> Any:
        """Like `ask`, for a command that is about that server and not about the key."""
        return await self._line(key).call(command)

    async def refresh(self, key: str) -> None:
        """Find out where `key` is now, after a connection to its server has failed."""
        if self._cluster is not None:
            await self._cluster.execute_command("EXISTS", key)


Command = Sequence[str | bytes | int]


class _Line:
    """One connection for commands. Those of one turn of the event loop share a round trip, and so do those that come
    while others are under way."""

    def __init__(self, make: Callable[[], Any], timeout: float) -> None:
        self._make = make
        self._timeout = timeout
        self._connection: Any = None
        self._queue: deque[tuple[Command, asyncio.Future[Any]]] = deque()
        self._sending: asyncio.Task[None] | None = None
        self._closed = False

    def call(self, command: Command) -> asyncio.Future[Any]:
        """The answer to `command`. Raises what redis-py raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if self._closed:
            future.set_exception(Disconnected("the transport was closed"))
            return future
        self._queue.append((command, future))
        if self._sending is None:
            self._sending = loop.create_task(self._send())
        return future

    async def close(self) -> None:
        self._closed = True
        if self._sending is not None:
            await asyncio.wait([self._sending])
        await self._drop()

    async def _send(self) -> None:
        try:
            while self._queue:
                batch = self._next_batch()
                try:
                    error = await self._exchange(batch)
                    if error is not None and batch:
                        raise error
                except Exception as exc:  # whatever it is, whoever waits must be told
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(exc)
        finally:
            self._sending = None

    def _next_batch(self) -> deque[tuple[Command, asyncio.Future[Any]]]:
        batch: deque[tuple[Command, asyncio.Future[Any]]] = deque()
        size = 0
        while self._queue and len(batch) < _BATCH_COMMANDS and size < _BATCH_BYTES:
            command, future = self._queue.popleft()
            if not future.cancelled():
                batch.append((command, future))
                size += sum(len(part) for part in command if isinstance(part, bytes))
        return batch

    async def _exchange(self, batch: deque[tuple[Command, asyncio.Future[Any]]]) -> Exception | None:
        """Send `batch` and take the answers; what was answered is taken off it. Gives what went wrong with the rest."""
        while batch:
            was_open = self._connection is not None and self._connection.is_connected
            try:
                async with asyncio.timeout(self._timeout):
                    await self._try(batch)
            except (Disconnected, OSError) as exc:
                await self._drop()
                # A connection that the server closed while it was idle shows only now. Doing a command twice is
                # harmless: a message may be doubled.
                if not was_open or isinstance(exc, TimeoutError):
                    return exc
            except RedisError as exc:
                await self._drop()
                return exc
        return None

    async def _try(self, batch: deque[tuple[Command, asyncio.Future[Any]]]) -> None:
        if self._connection is None:
            self._connection = self._make()
        connection = self._connection
        if not connection.is_connected:
            await connection.connect()
        await connection.send_packed_command(connection.pack_commands([command for command, _ in batch]))
        is_replica = False
        while batch:
            _, future = batch[0]
            answer: Any
            try:
                answer = await connection.read_response(disconnect_on_error=False)
            except ResponseError as exc:
                is_replica = is_replica or isinstance(exc, ReadOnlyError)
                if not future.done():
                    future.set_exception(exc)
            else:
                if not future.done():
                    future.set_result(answer)
            batch.popleft()
        if is_replica:
            await self._drop()  # the name may stand for another server by now

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*_TROUBLE):
                await connection.disconnect(nowait=True)


async def _info(line: _Line) -> dict[str, str]:
    try:
        text = (await line.call(("INFO",))).decode(errors="replace")
    except NoPermissionError:
        return {}
    return dict(pair.split(":", 1) for pair in text.splitlines() if ":" in pair)


async def _policy(line: _Line) -> str | None:
    try:
        answer = await line.call(("CONFIG", "GET", "maxmemory-policy"))
    except ResponseError:
        return None
    return str(answer[1].decode()) if len(answer) == 2 else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _micros(seconds: float) -> int:
    return math.ceil(seconds * 1_000_000)


_LOOK_MICROS = _micros(_LOOK_SECONDS)


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _is_gone(consumer: str) -> bool:
    """Whether `consumer` belonged to a process of this host that has ended for certain."""
    place, process, *rest = consumer.rsplit("|", 3)
    return len(rest) == 2 and place == host.host_id() and host.is_gone(process)


def _write_letter(letter: DeadLetter) -> bytes:
    values = {name: getattr(letter, name) for name in _LETTER_FIELDS}
    return json.dumps(values | {"body": base64.b64encode(letter.body).decode()}).encode()


def _read_letter(text: bytes) -> DeadLetter:
    values = json.loads(text)
    return DeadLetter(**values | {"body": base64.b64decode(values["body"])})


_LETTER_FIELDS = ("id", "topic", "reason", "detail", "attempts", "workflow_id", "step")


# -- scripts
#
# An entry of a stream has the fields `id` and `body`; one that was delivered before also `n`, how often, and `t`, the
# millisecond in which the message came first. A bell is an entry without a message: it wakes one of the subscribers,
# so that it looks when the next delayed message is due. Delayed messages wait as entries of a second stream, whose ids
# a sorted set has with the microsecond in which each is due.
#
# What frees memory comes before what takes some: a script that has written may go on when memory is full, so that a
# topic can be emptied then.


class _Script:
    def __init__(self, text: str) -> None:
        self.text = _COMMON + text
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_COMMON = """
local stream, later, due, group = KEYS[1], KEYS[2], KEYS[3], ARGV[1]

local function now()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function whole(number)
  return string.format('%.0f', number)
end

local function fields(entry)
  local found = {}
  for i = 1, #entry[2], 2 do found[entry[2][i]] = entry[2][i + 1] end
  return found
end

local function add(to, id, body, n, t)
  return redis.call('XADD', to, '*', 'id', id, 'body', body, 'n', whole(n), 't', t)
end

local function group_info()
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  if groups.err then return nil end
  for _, flat in ipairs(groups) do
    local found = {}
    for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
    if found.name == group then return found end
  end
end

local function next_undelivered(info)
  return redis.call('XRANGE', stream, '(' .. info['last-delivered-id'], '+', 'COUNT', 1)[1]
end

local function is_bell(entry)
  return entry ~= nil and fields(entry).bell ~= nil
end

local function set_aside(id, body, n, t, delay, look)
  local entry = add(later, id, body, n, t)
  redis.call('ZADD', due, whole(now() + delay), entry)
  -- Who is blocked looks again within `look`. One that is due before that, and before all others, must wake somebody,
  -- unless there is something that does so anyway.
  if delay <= look and redis.call('ZRANGE', due, 0, 0)[1] == entry then
    local info = group_info()
    if info and not next_undelivered(info) then redis.call('XADD', stream, '*', 'bell', '1') end
  end
end

local function pending(entry, consumer)
  local found = redis.pcall('XPENDING', stream, group, entry, entry, 1, consumer)
  return found[1]
end

local function remove(entry)
  redis.call('XACK', stream, group, entry)
  redis.call('XDEL', stream, entry)
end

local function give_back(entry, delivered, delay, look)
  local found = redis.call('XRANGE', stream, entry, entry)[1]
  remove(entry)
  if not found or is_bell(found) then return end
  local old = fields(found)
  local n = (tonumber(old.n) or 0) + delivered
  local t = old.t or string.match(entry, '^%d+')
  if delay > 0 then
    set_aside(old.id or entry, old.body or '', n, t, delay, look)
  else
    add(stream, old.id or entry, old.body or '', n, t)
  end
end
"""

_LATER = _Script("""
set_aside(ARGV[4], ARGV[5], 0, whole(math.floor(now() / 1000)), tonumber(ARGV[3]), tonumber(ARGV[2]))
""")
"""look, delay, id, body: have a message delivered later."""

_DUE = _Script("""
for i = 3, #ARGV do remove(ARGV[i]) end
local entries = redis.call('ZRANGEBYSCORE', due, '-inf', whole(now()), 'LIMIT', 0, ARGV[2])
for _, entry in ipairs(entries) do
  local found = redis.call('XRANGE', later, entry, entry)[1]
  redis.call('ZREM', due, entry)
  redis.call('XDEL', later, entry)
  if found then
    local old = fields(found)
    add(stream, old.id, old.body, tonumber(old.n), old.t)
  end
end
local following = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')
if not following[1] then return -1 end
return math.max(0, tonumber(following[2]) - now())
""")
"""limit, bells: move what is due into the stream; gives the microseconds until more is, or -1."""

_CLAIM = _Script("""
local found = redis.call('XAUTOCLAIM', stream, group, ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5])
return {found[1], found[2]}
""")
"""consumer, idle_ms, cursor, count: take over what was held for so long; gives the next cursor and the entries."""

_ACK = _Script("""
for i = 3, #ARGV do
  if pending(ARGV[i], ARGV[2]) then remove(ARGV[i]) end
end
""")
"""consumer, entries: delete those that are still its own."""

_RETURN = _Script("""
for i = 6, #ARGV do
  local mine = pending(ARGV[i], ARGV[2])
  if mine then give_back(ARGV[i], mine[4] - tonumber(ARGV[5]), tonumber(ARGV[4]), tonumber(ARGV[3])) end
end
""")
"""consumer, look, delay, uncounted deliveries, entries: give back those that are still its own."""

_EXAMINE = _Script("""
local mine = pending(ARGV[3], ARGV[2])
local found = redis.call('XRANGE', stream, ARGV[3], ARGV[3])[1]
if not mine or not found then return false end
local old = fields(found)
return {(tonumber(old.n) or 0) + mine[4], string.sub(old.body or '', 1, tonumber(ARGV[4]))}
""")
"""consumer, entry, bytes: how often it was delivered and the beginning of its body, if it is its own."""

_PENDING = _Script("""
local ids = {}
local found = redis.pcall('XPENDING', stream, group, ARGV[3], '+', ARGV[4], ARGV[2])
for i = 1, #found do ids[i] = found[i][1] end
return ids
""")
"""consumer, start, count: the ids of the entries that it has."""

_CONSUMERS = _Script("""
local consumers = {}
for i, flat in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
  local found = {}
  for j = 1, #flat, 2 do found[flat[j]] = flat[j + 1] end
  consumers[i] = {found.name, found.pending, found.idle}
end
return consumers
""")
"""Each consumer's name, how many entries it has, and for how many milliseconds it was not heard of."""

_RECLAIM = _Script("""
for _, each in ipairs(redis.call('XPENDING', stream, group, '-', '+', ARGV[3], ARGV[2])) do
  give_back(each[1], each[4], 0, 0)
end
return #redis.call('XPENDING', stream, group, '-', '+', 1, ARGV[2])
""")
"""consumer, limit: give back what a consumer had that is gone; gives whether there is more."""

_FORGET = _Script("""
local consumers = redis.pcall('XINFO', 'CONSUMERS', stream, group)
for i = 1, #consumers do
  local found = {}
  for j = 1, #consumers[i], 2 do found[consumers[i][j]] = consumers[i][j + 1] end
  if found.name == ARGV[2] then
    if found.pending > 0 or found.idle < tonumber(ARGV[3]) then return 0 end
    redis.call('XGROUP', 'DELCONSUMER', stream, group, ARGV[2])
  end
end
return 1
""")
"""consumer, idle_ms: delete it if it has nothing and was not heard of for so long; gives whether it is gone."""

_DEPTH = _Script("""
local waiting, taken, oldest = redis.call('XLEN', stream), 0, -1
local info = waiting > 0 and group_info()
if info then
  taken = info.pending
  waiting = waiting - taken
  if is_bell(next_undelivered(info)) then waiting = waiting - 1 end
end
local firsts = redis.call('XRANGE', stream, '-', '+', 'COUNT', 2)
table.insert(firsts, redis.call('XRANGE', later, '-', '+', 'COUNT', 1)[1])
for _, entry in ipairs(firsts) do
  if not is_bell(entry) then
    local age = now() / 1000 - tonumber(fields(entry).t or string.match(entry[1], '^%d+'))
    if age > oldest then oldest = age end
  end
end
return {waiting + redis.call('ZCARD', due), taken, oldest}
""")
"""How many wait, how many are taken, and the age of the oldest in milliseconds, or -1."""
