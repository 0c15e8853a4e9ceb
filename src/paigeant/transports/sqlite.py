"""Messages in a table of the embedded SQLite file. Whoever takes one holds it for a while; an ack deletes it."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, case, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from paigeant import host
from paigeant.database import Database, Tx
from paigeant.errors import MessageInvalid, StoreUnavailable, TransportUnavailable
from paigeant.message import DEFAULT_LIMIT_BYTES, PaigeantMessage, decode, encode
from paigeant.store import DeadLetter, Store
from paigeant.tables import dead_letters, messages
from paigeant.transport import BODY_KEPT_BYTES, Bury, Posting, TopicDepth

__all__ = ["SqliteTransport"]

_HOLD_SECONDS = 30.0
"""How long a fetched message is kept from others. A claim acks it within milliseconds."""

_LOOK_SECONDS = 1.0
_LOOK_OFTEN_SECONDS = 0.02


class _Fetch(NamedTuple):
    topic: str
    most: int
    gone: tuple[str, ...]


class _Fetched(NamedTuple):
    message_id: str
    body: bytes
    deliveries: int


class SqliteTransport:
    """Moves messages through the `messages` table of a database that several processes may have open."""

    def __init__(self, database: Database, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.database = database
        self.limit_bytes = limit_bytes
        # Names this process, so that others can tell when it is gone, and this transport within it.
        self._holder = f"{host.host_id()}|{host.process_id()}|{secrets.token_hex(4)}"
        self._wakers: dict[str, set[asyncio.Event]] = {}
        self._bury: Bury | None = None
        self._forget: Callable[[], None] | None = None

    async def connect(self) -> None:
        if self._forget is None:
            try:
                await self.database.connect()
            except StoreUnavailable as exc:
                raise TransportUnavailable(str(exc)) from exc
            self._forget = self.database.on_change(self._wake)

    async def close(self) -> None:
        if self._forget is not None:
            self._forget()
            self._forget = None
            await self.database.write(self._give_back, None)
            await self.database.close()

    def joins(self, store: Store) -> bool:
        return getattr(store, "database", None) is self.database

    def bury_with(self, bury: Bury) -> None:
        self._bury = bury

    # -- sending

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        body = encode(message, limit_bytes=self.limit_bytes)
        await self._write(self._publish, Posting(topic, message.message_id, body, delay))

    def _publish(self, tx: Tx, requests: Sequence[Posting]) -> list[None]:
        self.post(tx, requests)
        return [None] * len(requests)

    def post(self, tx: Tx, postings: Sequence[Posting]) -> None:
        """Write messages within a transaction that somebody else has begun."""
        statement = insert_or_wake()
        rows = [
            {
                "message_id": posting.message_id,
                "topic": posting.topic,
                "body": posting.body,
                "visible_at": tx.now + posting.delay,
                "created_at": tx.now,
                "deliveries": 0,
            }
            for posting in postings
        ]
        tx.connection.execute(statement, rows)
        tx.rings.update(f"topic {posting.topic}" for posting in postings)

    # -- receiving

    async def subscribe(self, topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
        waker = asyncio.Event()
        self._wakers.setdefault(topic, set()).add(waker)
        gone: tuple[str, ...] = ()
        held: list[_Fetched] = []
        try:
            while True:
                # Clear before fetching: a message that comes in between is not slept over.
                waker.clear()
                held, next_at, until = await self._fetched(_Fetch(topic, prefetch, gone))
                gone = ()
                full = len(held) == prefetch
                while held:
                    item = held.pop(0)
                    if self.database.clock.now() > until:
                        break  # held too long: by now others may have it
                    message = await self._opened(topic, item)
                    if message is not None:
                        yield message
                held = []
                if not full:
                    await self._sleep(waker, next_at)
                    if not waker.is_set():
                        gone = await self._gone()
        finally:
            self._wakers[topic].discard(waker)
            for item in held:
                self.database.write_lazily(self._return, (item.message_id, 0.0))

    async def _fetched(self, request: _Fetch) -> tuple[list[_Fetched], float | None, float]:
        try:
            return await self._write(self._fetch, request)
        except TransportUnavailable:
            await asyncio.sleep(_LOOK_SECONDS * random.uniform(0.5, 1.5))  # locked or full for now: try again
            return [], None, 0.0

    def _fetch(
        self, tx: Tx, requests: Sequence[_Fetch]
    ) -> list[tuple[list[_Fetched], float | None, float]]:
        return [self._fetch_topic(tx, request) for request in requests]

    def _fetch_topic(self, tx: Tx, request: _Fetch) -> tuple[list[_Fetched], float | None, float]:
        execute = tx.connection.execute
        columns = messages.c
        if request.gone:
            dead = update(messages).where(columns.holder.in_(request.gone))
            execute(dead.values(holder=None, visible_at=tx.now))
        waiting = (
            select(columns.id)
            .where(columns.topic == request.topic, columns.visible_at <= tx.now)
            .order_by(columns.visible_at)
            .limit(request.most)
        )
        until = tx.now + _HOLD_SECONDS
        ids = execute(waiting).scalars().all()
        fetched: list[_Fetched] = []
        if ids:
            take = (
                update(messages)
                .where(columns.id.in_(ids))
                .values(visible_at=until, holder=self._holder, deliveries=columns.deliveries + 1)
                .returning(columns.id, columns.message_id, columns.body, columns.deliveries)
            )
            place = {row_id: n for n, row_id in enumerate(ids)}
            rows = sorted(execute(take), key=lambda row: place[row.id])
            fetched = [_Fetched(row.message_id, row.body, row.deliveries) for row in rows]
        next_at = None
        if len(fetched) < request.most:
            later = select(func.min(columns.visible_at)).where(
                columns.topic == request.topic, columns.visible_at > tx.now
            )
            next_at = execute(later).scalar()
        return fetched, next_at, until - 1.0

    async def _opened(self, topic: str, item: _Fetched) -> PaigeantMessage | None:
        try:
            return decode(item.body, limit_bytes=self.limit_bytes)
        except MessageInvalid as exc:
            await self._reject(
                DeadLetter(
                    item.message_id, topic, exc.reason, str(exc), item.body[:BODY_KEPT_BYTES], item.deliveries
                )
            )
            return None

    async def _sleep(self, waker: asyncio.Event, next_at: float | None) -> None:
        look = _LOOK_SECONDS if self.database.hears_others else _LOOK_OFTEN_SECONDS
        pause = look * random.uniform(0.75, 1.25)
        if next_at is not None:
            pause = min(pause, max(next_at - self.database.clock.now(), 0.0) + 0.001)
        try:
            async with asyncio.timeout(pause):
                await waker.wait()
        except TimeoutError:
            pass

    def _wake(self, names: frozenset[str]) -> None:
        for topic, wakers in self._wakers.items():
            if "*" in names or f"topic {topic}" in names:
                for waker in wakers:
                    waker.set()

    async def _gone(self) -> tuple[str, ...]:
        """Holders on this host whose process has ended: what they held is free at once."""
        query = select(messages.c.holder).where(messages.c.holder.is_not(None)).distinct()
        holders = await self.database.read(lambda connection: connection.execute(query).scalars().all())
        return tuple(holder for holder in holders if holder and _is_gone(holder))

    # -- settling

    async def ack(self, message_id: str) -> None:
        # Not worth a commit of its own: an ack that a crash loses brings the message again, as a duplicate.
        self.database.write_lazily(self._ack, message_id)

    def _ack(self, tx: Tx, requests: Sequence[str]) -> list[None]:
        self._own(tx.connection, requests, delete(messages))
        return [None] * len(requests)

    async def nack(self, message_id: str, *, delay: float = 0) -> None:
        await self._write(self._return, (message_id, delay))

    def _return(self, tx: Tx, requests: Sequence[tuple[str, float]]) -> list[None]:
        for message_id, delay in requests:
            values = {"visible_at": tx.now + delay, "holder": None}
            self._own(tx.connection, [message_id], update(messages).values(values))
        topics = select(messages.c.topic).where(messages.c.message_id.in_([m for m, _ in requests]))
        tx.rings.update(f"topic {topic}" for topic in tx.connection.execute(topics).scalars())
        return [None] * len(requests)

    def _give_back(self, tx: Tx, requests: Sequence[None]) -> list[None]:
        values = {"visible_at": tx.now, "holder": None}
        mine = update(messages).where(messages.c.holder == self._holder).values(values)
        topics = tx.connection.execute(mine.returning(messages.c.topic)).scalars()
        tx.rings.update(f"topic {topic}" for topic in topics)
        return [None] * len(requests)

    def _own(self, connection: Connection, message_ids: Sequence[str], statement: Any) -> None:
        connection.execute(
            statement.where(messages.c.message_id.in_(message_ids), messages.c.holder == self._holder)
        )

    async def dead_letter(self, message_id: str, reason: str) -> None:
        query = select(messages).where(messages.c.message_id == message_id)
        row = await self.database.read(lambda connection: connection.execute(query).first())
        if row is None or row.holder != self._holder:
            return
        body = row.body[:BODY_KEPT_BYTES]
        await self._reject(DeadLetter(message_id, row.topic, reason, reason, body, row.deliveries))

    async def _reject(self, letter: DeadLetter) -> None:
        # Kept first, taken out of the topic then: a crash in between does it again, a loss can't happen.
        if self._bury is None:
            await self._write(self._keep, letter)
        else:
            await self._bury(letter)
        await self._write(self._ack, letter.id)

    def _keep(self, tx: Tx, requests: Sequence[DeadLetter]) -> list[None]:
        rows = [
            {column.name: getattr(letter, column.name) for column in dead_letters.c} | {"created_at": tx.now}
            for letter in requests
        ]
        tx.connection.execute(upsert(dead_letters).on_conflict_do_nothing(), rows)
        return [None] * len(requests)

    # -- what waits

    async def topics(self) -> list[TopicDepth]:
        now = self.database.clock.now()
        taken = func.sum(case((messages.c.holder.is_not(None), 1), else_=0))
        query = (
            select(messages.c.topic, func.count(), taken, func.min(messages.c.created_at))
            .group_by(messages.c.topic)
            .order_by(messages.c.topic)
        )
        rows = await self.database.read(lambda connection: connection.execute(query).all())
        return [TopicDepth(topic, count - held, held, now - oldest) for topic, count, held, oldest in rows]

    async def _write(self, handler: Callable[[Tx, Sequence[Any]], Sequence[Any]], request: Any) -> Any:
        try:
            return await self.database.write(handler, request)
        except StoreUnavailable as exc:
            raise TransportUnavailable(str(exc)) from exc


def insert_or_wake() -> Any:
    """Inserts a message; one of the same id that still waits is only made due again."""
    statement = upsert(messages)
    due = func.min(messages.c.visible_at, statement.excluded.visible_at)
    return statement.on_conflict_do_update(
        index_elements=["message_id"], set_={"visible_at": due, "holder": None}
    )


def _is_gone(holder: str) -> bool:
    place, process, _ = holder.rsplit("|", 2)
    return place == host.host_id() and host.is_gone(process)
