"""What the contract asks of a transport, on Redis streams."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Collection

from paigeant.envelope import Envelope, PlainEnvelope
from paigeant.errors import MessageInvalid
from paigeant.message import PaigeantMessage
from paigeant.store import DeadLetter, Store
from paigeant.transport import BODY_KEPT_BYTES, Bury, TopicDepth
from paigeant.transports.redis.hands import Hands, Held
from paigeant.transports.redis.letters import Letters
from paigeant.transports.redis.place import Place
from paigeant.transports.redis.servers import ANSWER_SECONDS
from paigeant.transports.redis.streams import Streams
from paigeant.transports.redis.subscription import Item, Subscription, names_of_consumers
from paigeant.transports.redis.trouble import FAILURES, told

__all__ = ["RedisStreamTransport"]

log = logging.getLogger("paigeant.transports.redis")

_HOLD_SECONDS = 30.0
"""How long a fetched message is kept from others. A claim acks it within milliseconds."""


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
        envelope: Envelope | None = None,
        hold: float = _HOLD_SECONDS,
    ) -> None:
        self.envelope = envelope or PlainEnvelope()
        self.hold = hold
        self._place = Place.read(url)
        self._streams = Streams(self._place, namespace)
        self._hands = Hands(self._streams)
        self._letters = Letters(self._streams)
        self._bury: Bury | None = None
        self._name = names_of_consumers(secrets.token_hex(4))
        self._numbers = itertools.count()
        self._subscriptions: set[Subscription] = set()

    async def connect(self) -> None:
        await self._streams.open()

    async def close(self) -> None:
        if not self._streams.is_open:
            return
        await asyncio.gather(*(subscription.end() for subscription in tuple(self._subscriptions)))
        with contextlib.suppress(*FAILURES):  # what it held comes back by itself, only later
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._hands.give_back()
        self._hands.clear()
        await self._streams.close()

    async def check_room(self) -> None:
        """Raises TransportUnavailable where the server, or one of the cluster, takes no messages now, and why."""
        with told(self._place):
            await self._streams.check_room()

    def joins(self, store: Store) -> bool:
        return False

    def keeps_rows(self, topic: str) -> bool:
        return False

    def bury_with(self, bury: Bury) -> None:
        self._bury = bury

    # -- sending

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        body = self.envelope.seal(message, topic)
        with told(self._place):
            await self._streams.add(topic, message.message_id, body, delay)

    # -- receiving

    async def subscribe(self, topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
        subscription = self._subscription(topic, prefetch)
        try:
            while (item := await subscription.next()) is not None:
                message = await self._opened(item)
                if message is not None:
                    self._hands.take(message.message_id, item.held)
                    yield message
        finally:
            await subscription.end()

    def _subscription(self, topic: str, prefetch: int) -> Subscription:
        return Subscription(
            self._streams,
            self._hands,
            topic,
            f"{self._name}|{next(self._numbers)}",
            prefetch=prefetch,
            hold=self.hold,
            fellows=self._subscriptions,
        )

    async def _opened(self, item: Item) -> PaigeantMessage | None:
        try:
            return await self.envelope.open(item.held.topic, item.body)
        except MessageInvalid as exc:
            try:
                await self._reject(item.held, item.message_id, exc.reason, str(exc))
            except Exception as trouble:  # whatever the keeper of dead letters meets, the iteration goes on
                log.warning(
                    "the dead letter %s is not kept yet, it comes again: %s", item.message_id, trouble
                )
            return None

    # -- settling

    async def ack(self, message_id: str) -> None:
        self._hands.ack(message_id)

    async def nack(self, message_id: str, *, delay: float = 0) -> None:
        with told(self._place):
            for held in self._hands.let_go(message_id):
                await self._streams.give_back(held.topic, held.consumer, [held.entry], delay=delay)

    async def dead_letter(self, message_id: str, reason: str) -> None:
        deliveries = self._hands.let_go(message_id)
        try:
            while deliveries:
                await self._reject(deliveries[0], message_id, reason, reason)
                del deliveries[0]
        finally:
            self._hands.take_again(message_id, deliveries)  # so that it can be tried again

    async def _reject(self, held: Held, message_id: str, reason: str, detail: str) -> None:
        topic, consumer, entry = held.topic, held.consumer, held.entry
        with told(self._place):
            found = await self._streams.examine(topic, consumer, entry, BODY_KEPT_BYTES)
        if found is None:
            return
        attempts, body = found
        letter = DeadLetter.about(message_id, topic, reason, detail, body, attempts)
        # Kept first, taken out of the topic then: a crash in between does it again, a loss can't happen.
        if self._bury is not None:
            await self._bury(letter)
        with told(self._place):
            if self._bury is None:
                await self._letters.keep(letter)
            await self._streams.ack(topic, consumer, [entry])

    # -- what waits, and what is kept

    async def topics(self, known: Collection[str] = ()) -> list[TopicDepth]:
        """Those whose names somebody has written, those among `known`, and those that are used here."""
        with told(self._place):
            names = (await self._streams.names()).union(known)
            names.update(subscription.topic for subscription in self._subscriptions)
            return await self._streams.depths(sorted(names))

    async def kept_letters(self) -> list[DeadLetter]:
        """The dead letters that were kept here because nothing else kept them, by id."""
        with told(self._place):
            return await self._letters.all()

    def stream_key(self, topic: str) -> str:
        """The key of the stream that holds the messages of `topic`, each an entry with the fields `id` and `body`."""
        return self._streams.stream_key(topic)
