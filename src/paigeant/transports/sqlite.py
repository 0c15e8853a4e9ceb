"""Messages in a table of the embedded SQLite file. Whoever takes one holds it for a while; an ack deletes it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import bindparam, case, delete, func, literal_column, null, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from paigeant import host
from paigeant.database import Database
from paigeant.errors import MessageInvalid, StoreUnavailable, TransportUnavailable
from paigeant.lane import Tx
from paigeant.message import DEFAULT_LIMIT_BYTES, PaigeantMessage, decode, encode
from paigeant.prepared import Prepared
from paigeant.store import DeadLetter, Store
from paigeant.tables import dead_letters, messages
from paigeant.transport import Bury, Posting, TopicDepth

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
        self._closings = 0

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
            self._closings += 1  # which ends the subscriptions
            self._wake(frozenset({"*"}))
            with contextlib.suppress(StoreUnavailable):  # what it held comes back by itself, only later
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
        rows = [
            (posting.message_id, posting.topic, posting.body, tx.now + posting.delay, tx.now, 0)
            for posting in postings
        ]
        _POST.each(tx.connection, rows)
        tx.rings.update(f"topic {posting.topic}" for posting in postings)

    def waiting(self, tx: Tx, message_ids: Sequence[str]) -> set[str]:
        """Those of the messages that are still here, taken or not."""
        return {message_id for (message_id,) in _WAITING.rows(tx.connection, json.dumps(message_ids))}

    # -- receiving

    async def subscribe(self, topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
        waker = asyncio.Event()
        self._wakers.setdefault(topic, set()).add(waker)
        gone: tuple[str, ...] = ()
        held: list[_Fetched] = []
        closings = self._closings
        try:
            while closings == self._closings:
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
        fetching = asyncio.ensure_future(self.database.write(self._fetch, request, durable=False))
        try:
            return await asyncio.shield(fetching)
        except asyncio.CancelledError:
            # What is being taken for a subscriber that leaves is for others.
            fetching.add_done_callback(self._return_all)
            raise
        except StoreUnavailable:
            await asyncio.sleep(_LOOK_SECONDS * random.uniform(0.5, 1.5))  # locked or full for now: try again
            return [], None, 0.0

    def _return_all(self, fetching: asyncio.Future[tuple[list[_Fetched], float | None, float]]) -> None:
        if not fetching.cancelled() and fetching.exception() is None:
            for item in fetching.result()[0]:
                self.database.write_lazily(self._return, (item.message_id, 0.0))

    def _fetch(self, tx: Tx, requests: Sequence[_Fetch]) -> list[tuple[list[_Fetched], float | None, float]]:
        return [self._fetch_topic(tx, request) for request in requests]

    def _fetch_topic(self, tx: Tx, request: _Fetch) -> tuple[list[_Fetched], float | None, float]:
        connection = tx.connection
        for holder in request.gone:
            _FREE.each(connection, [(tx.now, holder)])
        until = tx.now + _HOLD_SECONDS
        rows = _TAKE.rows(connection, until, self._holder, request.topic, tx.now, request.most)
        # The rows come in no order of their own; ids rise as messages do.
        fetched = [_Fetched(id_, _as_bytes(body), deliveries) for _, id_, body, deliveries in sorted(rows)]
        next_at = None
        if len(fetched) < request.most:
            [(next_at,)] = _NEXT.rows(connection, request.topic, tx.now)
        return fetched, next_at, until - 1.0

    async def _opened(self, topic: str, item: _Fetched) -> PaigeantMessage | None:
        try:
            return decode(item.body, limit_bytes=self.limit_bytes)
        except MessageInvalid as exc:
            await self._reject(
                DeadLetter.about(item.message_id, topic, exc.reason, str(exc), item.body, item.deliveries)
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
        try:
            holders = await self.database.ask(lambda connection: connection.execute(query).scalars().all())
        except StoreUnavailable:
            return ()  # locked, or closed meanwhile: their hold runs out by itself
        return tuple(holder for holder in holders if holder and _is_gone(holder))

    # -- settling

    async def ack(self, message_id: str) -> None:
        # Not worth a commit of its own: an ack that a crash loses brings the message again, as a duplicate.
        self.database.write_lazily(self._ack, message_id)

    def _ack(self, tx: Tx, requests: Sequence[str]) -> list[None]:
        _ACK.each(tx.connection, [(message_id, self._holder) for message_id in requests])
        return [None] * len(requests)

    async def nack(self, message_id: str, *, delay: float = 0) -> None:
        await self._write(self._return, (message_id, delay))

    def _return(self, tx: Tx, requests: Sequence[tuple[str, float]]) -> list[None]:
        for message_id, delay in requests:
            for (topic,) in _RETURN.rows(tx.connection, tx.now + delay, message_id, self._holder):
                tx.rings.add(f"topic {topic}")
        return [None] * len(requests)

    def _give_back(self, tx: Tx, requests: Sequence[None]) -> list[None]:
        values = {"visible_at": tx.now, "holder": None}
        mine = update(messages).where(messages.c.holder == self._holder).values(values)
        topics = tx.connection.execute(mine.returning(messages.c.topic)).scalars()
        tx.rings.update(f"topic {topic}" for topic in topics)
        return [None] * len(requests)

    async def dead_letter(self, message_id: str, reason: str) -> None:
        query = select(messages).where(messages.c.message_id == message_id)
        row = await self.database.ask(lambda connection: connection.execute(query).first())
        if row is None or row.holder != self._holder:
            return
        await self._reject(DeadLetter.about(message_id, row.topic, reason, reason, row.body, row.deliveries))

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

    async def topics(self, known: Collection[str] = ()) -> list[TopicDepth]:
        now = self.database.clock.now()
        taken = func.sum(case((messages.c.holder.is_not(None), 1), else_=0))
        query = (
            select(messages.c.topic, func.count(), taken, func.min(messages.c.created_at))
            .group_by(messages.c.topic)
            .order_by(messages.c.topic)
        )
        rows = await self.database.ask(lambda connection: connection.execute(query).all())
        return [TopicDepth(topic, count - held, held, now - oldest) for topic, count, held, oldest in rows]

    async def _write(
        self, handler: Callable[[Tx, Sequence[Any]], Sequence[Any]], request: Any, *, durable: bool = True
    ) -> Any:
        try:
            return await self.database.write(handler, request, durable=durable)
        except StoreUnavailable as exc:
            raise TransportUnavailable(str(exc)) from exc


def _post() -> Prepared:
    """Inserts a message; one of the same id that still waits is only made due again."""
    columns = ("message_id", "topic", "body", "visible_at", "created_at", "deliveries")
    statement = upsert(messages)
    due = func.min(messages.c.visible_at, statement.excluded.visible_at)
    again = {"visible_at": due, "holder": null()}
    return Prepared(statement.on_conflict_do_update(index_elements=["message_id"], set_=again), columns)


def _take() -> Prepared:
    """Holds the next messages of a topic, those that have waited longest first."""
    columns = messages.c
    waiting = (
        select(columns.id)
        .where(columns.topic == bindparam("topic"), columns.visible_at <= bindparam("now"))
        .order_by(columns.visible_at)
        .limit(bindparam("most"))
        .offset(literal_column("0"))  # else the dialect adds a parameter of its own
    )
    return Prepared(
        update(messages)
        .where(columns.id.in_(waiting))
        .values(
            visible_at=bindparam("until"),
            deliveries=columns.deliveries + literal_column("1"),
            holder=bindparam("by"),
        )
        .returning(columns.id, columns.message_id, columns.body, columns.deliveries),
        ["until", "by", "topic", "now", "most"],
    )


_ids = func.json_each(bindparam("ids")).table_valued("value")
_WAITING = Prepared(select(messages.c.message_id).join(_ids, messages.c.message_id == _ids.c.value), ["ids"])
_POST = _post()
_TAKE = _take()
_NEXT = Prepared(
    select(func.min(messages.c.visible_at)).where(
        messages.c.topic == bindparam("topic"), messages.c.visible_at > bindparam("now")
    ),
    ["topic", "now"],
)
_FREE = Prepared(
    update(messages)
    .where(messages.c.holder == bindparam("by"))
    .values(visible_at=bindparam("now"), holder=null()),
    ["now", "by"],
)
_ACK = Prepared(
    delete(messages).where(messages.c.message_id == bindparam("id_"), messages.c.holder == bindparam("by")),
    ["id_", "by"],
)
_RETURN = Prepared(
    update(messages)
    .where(messages.c.message_id == bindparam("id_"), messages.c.holder == bindparam("by"))
    .values(visible_at=bindparam("at"), holder=null())
    .returning(messages.c.topic),
    ["at", "id_", "by"],
)


def _as_bytes(body: object) -> bytes:
    # The column holds what was put into it: a row that somebody wrote by hand may have a text there.
    return body if isinstance(body, bytes) else str(body).encode()


def _is_gone(holder: str) -> bool:
    place, process, _ = holder.rsplit("|", 2)
    return place == host.host_id() and host.is_gone(process)
