"""Messages in a table of a database. Whoever takes one holds it for a while; an ack deletes it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy import Update, bindparam, case, delete, func, literal_column, null, select, update

from paigeant import host
from paigeant.database import TOPIC, Database
from paigeant.databases import open_database
from paigeant.envelope import HEAD_BYTES, Envelope, PlainEnvelope
from paigeant.errors import (
    MessageInvalid,
    MessageTooLarge,
    PaigeantError,
    StoreRefused,
    StoreUnavailable,
    TransportUnavailable,
)
from paigeant.lane import Later, Tx
from paigeant.message import PaigeantMessage
from paigeant.prepared import Prepared, each_of, instant, upsert
from paigeant.store import DeadLetter, Store
from paigeant.tables import dead_letters, messages
from paigeant.transport import Bury, Posting, TopicDepth

__all__ = ["TableTransport"]

log = logging.getLogger("paigeant.transports")

_HOLD_SECONDS = 30.0
"""How long a fetched message is kept from others. A claim acks it within milliseconds."""

_LOOK_SECONDS = 1.0
_LOOK_OFTEN_SECONDS = 0.02


class _Fetch(NamedTuple):
    topic: str
    most: int
    gone: tuple[str, ...]


class _Item(NamedTuple):
    message_id: str
    body: bytes
    """Its beginning only where it is larger than any message may be: no other part of it is read."""
    deliveries: int
    size: int


class _Fetched(NamedTuple):
    """What was taken, for so many seconds, and in how many the next message is due, if that is known."""

    items: list[_Item]
    hold: float = 0.0
    next_in: float | None = None


class TableTransport:
    """Moves messages through the `messages` table of a database that several processes may have open.

    `database` is one to share with a store, or the URL of one to have for itself.
    """

    def __init__(self, database: Database | str, *, envelope: Envelope | None = None) -> None:
        self.database = open_database(database) if isinstance(database, str) else database
        self.envelope = envelope or PlainEnvelope()
        # Names this process, so that others can tell when it is gone, and this transport within it.
        self._holder = host.named_holder(secrets.token_hex(4))
        self._wakers: dict[str, set[asyncio.Event]] = {}
        self._bury: Bury | None = None
        self._forget: Callable[[], None] | None = None
        self._closings = 0

    async def connect(self) -> None:
        if self._forget is None:
            with _told():
                await self.database.connect()
            self._forget = self.database.on_change(self._wake)

    async def close(self) -> None:
        if self._forget is not None:
            self._forget()
            self._forget = None
            self._closings += 1  # which ends the subscriptions
            self._wake(frozenset({"*"}))
            if self._wakers:  # it has received
                with contextlib.suppress(StoreUnavailable):  # what it held comes back by itself, only later
                    await self.database.write(self._give_back, None)
            await self.database.close()

    def joins(self, store: Store) -> bool:
        return getattr(store, "database", None) is self.database

    def keeps_rows(self, topic: str) -> bool:
        return True

    def bury_with(self, bury: Bury) -> None:
        self._bury = bury

    # -- sending

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        body = self.envelope.seal(message, topic)
        posting = Posting(topic, message.message_id, body, delay)
        await self._write(self._publish, posting, size=len(body))

    def _publish(self, tx: Tx, requests: Sequence[Posting]) -> list[None]:
        self.post(tx, requests)
        return [None] * len(requests)

    def post(self, tx: Tx, postings: Sequence[Posting]) -> None:
        """Write messages within a transaction that somebody else has begun."""
        rows = [
            (posting.message_id, posting.topic, posting.body, tx.now + posting.delay, 0.0, tx.now, 0)
            for posting in postings
        ]
        # In one order, so that no two transactions wait for each other.
        _POST.each(tx, sorted(rows))
        tx.rings.update(f"{TOPIC}{posting.topic}" for posting in postings)

    def waiting(self, tx: Tx, message_ids: Sequence[str]) -> set[str]:
        """Those of the messages that can be taken now. One that was taken, or is due later, is not among them."""
        return {message_id for (message_id,) in _WAITING.rows(tx, json.dumps(message_ids), tx.now)}

    # -- receiving

    async def subscribe(self, topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
        waker = asyncio.Event()
        self._wakers.setdefault(topic, set()).add(waker)
        leave = self.database.attend(f"{TOPIC}{topic}")
        gone: tuple[str, ...] = ()
        items: list[_Item] = []
        closings = self._closings
        try:
            while closings == self._closings:
                # Clear before fetching: a message that comes in between is not slept over.
                waker.clear()
                items, hold, next_in = await self._fetched(_Fetch(topic, prefetch, gone))
                until = self.database.elapsed() + hold
                gone = ()
                is_full = len(items) == prefetch
                while items:
                    item = items.pop(0)
                    if self.database.elapsed() > until:
                        break  # held too long: by now others may have it
                    message = await self._opened(topic, item)
                    if message is not None:
                        yield message
                items = []
                if not is_full:
                    await self._sleep(waker, next_in)
                    if not waker.is_set():
                        gone = await self._gone()
        finally:
            leave()
            self._wakers[topic].discard(waker)
            for item in items:
                self.database.write_lazily(self._return, (item.message_id, 0.0))

    async def _fetched(self, request: _Fetch) -> _Fetched:
        fetching = self.database.write(self._fetch, request, durable=False)
        try:
            return await asyncio.shield(fetching)
        except asyncio.CancelledError:
            # What is being taken for a subscriber that leaves is for others.
            fetching.add_done_callback(self._return_all)
            raise
        except StoreRefused:  # of that the log is to tell
            raise
        except StoreUnavailable:
            await asyncio.sleep(_LOOK_SECONDS * random.uniform(0.5, 1.5))  # locked or full for now: try again
            return _Fetched([])

    def _return_all(self, fetching: asyncio.Future[_Fetched]) -> None:
        if not fetching.cancelled() and fetching.exception() is None:
            for item in fetching.result().items:
                self.database.write_lazily(self._return, (item.message_id, 0.0))

    def _fetch(self, tx: Tx, requests: Sequence[_Fetch]) -> list[_Fetched | Later[_Fetched]]:
        return [self._ask(tx, request) for request in requests]

    def _ask(self, tx: Tx, request: _Fetch) -> Later[_Fetched]:
        # Nothing is decided on what it finds, so that all of it is one round trip to a server.
        now = tx.told_now
        _FREE.each(tx, [(0.0, holder) for holder in request.gone])
        largest = self.envelope.limit_bytes + HEAD_BYTES
        take = _TAKE.ask(tx, request.topic, now, now, request.most, now, _HOLD_SECONDS, self._holder, largest)
        following = _NEXT.ask(tx, now, request.topic, now)

        def taken() -> _Fetched:
            # The rows come in no order of their own; ids rise as messages do.
            items = [_Item(id_, _as_bytes(body), *rest) for _, id_, body, *rest in sorted(take())]
            [(next_in,)] = following()
            return _Fetched(items, _HOLD_SECONDS - 1.0, next_in)

        return Later(taken)

    async def _opened(self, topic: str, item: _Item) -> PaigeantMessage | None:
        try:
            if item.size > self.envelope.limit_bytes + HEAD_BYTES:
                raise MessageTooLarge(item.size, self.envelope.limit_bytes)
            return await self.envelope.open(topic, item.body)
        except MessageInvalid as exc:
            letter = DeadLetter.about(
                item.message_id, topic, exc.reason, str(exc), item.body, item.deliveries
            )
            try:
                await self._reject(letter)
            except PaigeantError as trouble:
                log.warning("the dead letter %s is not kept yet, it comes again: %s", letter.id, trouble)
            return None

    async def _sleep(self, waker: asyncio.Event, next_in: float | None) -> None:
        look = _LOOK_SECONDS if self.database.hears_others else _LOOK_OFTEN_SECONDS
        pause = look * random.uniform(0.75, 1.25)
        if next_in is not None:
            # Not all at once: of several that ask at the same instants, the same one would get the message each time,
            # also one that gives it back because it can't do it.
            pause = min(pause, next_in + random.uniform(0.001, 0.005))
        try:
            async with asyncio.timeout(pause):
                await waker.wait()
        except TimeoutError:
            pass

    def _wake(self, names: frozenset[str]) -> None:
        for topic, wakers in self._wakers.items():
            if "*" in names or f"{TOPIC}{topic}" in names:
                for waker in wakers:
                    waker.set()

    async def _gone(self) -> tuple[str, ...]:
        """Holders whose process is known to have ended: what they held is free at once. Others' holds run out."""
        return ()

    # -- settling

    async def ack(self, message_id: str) -> None:
        # Not worth a commit of its own: an ack that a crash loses brings the message again, as a duplicate.
        self.database.write_lazily(self._ack, message_id)

    def _ack(self, tx: Tx, requests: Sequence[str]) -> list[None]:
        _ACK.each(tx, [(message_id, self._holder) for message_id in sorted(requests)])
        return [None] * len(requests)

    async def nack(self, message_id: str, *, delay: float = 0) -> None:
        await self._write(self._return, (message_id, delay))

    def _return(self, tx: Tx, requests: Sequence[tuple[str, float]]) -> list[None]:
        for message_id, delay in sorted(requests):
            for (topic,) in _RETURN.rows(tx, tx.now + delay, 0.0, message_id, self._holder):
                tx.rings.add(f"{TOPIC}{topic}")
        return [None] * len(requests)

    def _give_back(self, tx: Tx, requests: Sequence[None]) -> list[None]:
        values = {"held_until": 0.0, "holder": None}
        mine = update(messages).where(messages.c.holder == self._holder).values(values)
        topics = tx.connection.execute(mine.returning(messages.c.topic)).scalars()
        tx.rings.update(f"{TOPIC}{topic}" for topic in topics)
        return [None] * len(requests)

    async def dead_letter(self, message_id: str, reason: str) -> None:
        query = select(messages).where(messages.c.message_id == message_id)
        with _told():
            row = await self.database.ask(lambda connection: connection.execute(query).first())
        if row is None or row.holder != self._holder:
            return
        await self._reject(DeadLetter.about(message_id, row.topic, reason, reason, row.body, row.deliveries))

    async def _reject(self, letter: DeadLetter) -> None:
        # Kept first, taken out of the topic then: a crash in between does it again, a loss can't happen.
        if self._bury is None:
            await self._write(self._keep, letter, size=len(letter.body))
        else:
            await self._bury(letter)
        await self._write(self._ack, letter.id)

    def _keep(self, tx: Tx, requests: Sequence[DeadLetter]) -> list[None]:
        letters = [replace(letter, created_at=tx.now) for letter in requests]
        _KEEP.each(
            tx, [tuple(getattr(letter, column.name) for column in dead_letters.c) for letter in letters]
        )
        return [None] * len(requests)

    # -- what waits

    async def topics(self, known: Collection[str] = ()) -> list[TopicDepth]:
        taken = func.sum(case((messages.c.holder.is_not(None), 1), else_=0))
        query = (
            select(messages.c.topic, func.count(), taken, func.min(messages.c.created_at))
            .group_by(messages.c.topic)
            .order_by(messages.c.topic)
        )
        with _told():
            now = await self.database.now()
            rows = await self.database.ask(lambda connection: connection.execute(query).all())
        return [TopicDepth(topic, count - held, held, now - oldest) for topic, count, held, oldest in rows]

    async def _write(
        self, handler: Callable[[Tx, Sequence[Any]], Sequence[Any]], request: Any, *, size: int = 0
    ) -> Any:
        with _told():
            return await self.database.write(handler, request, size=size)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raises TransportUnavailable when the database can't be reached: here it is what moves messages."""
    try:
        yield
    except StoreUnavailable as exc:
        raise TransportUnavailable(str(exc)) from exc


def _earlier(new: Any) -> dict[str, Any]:
    """A message that still waits is only made due again, at the earlier of the two instants."""
    due = case((messages.c.due_at < new.due_at, messages.c.due_at), else_=new.due_at)
    return {"due_at": due, "held_until": new.held_until, "holder": null()}


def _take(dialect: str) -> Update:
    """Holds the next messages of a topic, those that have waited longest first."""
    columns = messages.c
    free = (
        select(columns.id)
        .where(
            columns.topic == bindparam("topic"),
            columns.due_at <= instant(bindparam("now")),
            columns.held_until < instant(bindparam("same")),
        )
        .order_by(columns.due_at)
        .limit(bindparam("most"))
    )
    # Without an offset SQLite's dialect adds a parameter of its own.
    free = free.offset(literal_column("0")) if dialect == "sqlite" else free.with_for_update(skip_locked=True)
    # Picked once and for all: a sub-select with a limit may be looked at again and lock more rows than that.
    picked = free.cte("picked")
    return (
        update(messages)
        .where(columns.id.in_(select(picked.c.id)))
        .values(
            held_until=instant(bindparam("since")) + bindparam("hold"),
            deliveries=columns.deliveries + literal_column("1"),
            holder=bindparam("by"),
        )
        .returning(
            columns.id,
            columns.message_id,
            func.substr(columns.body, literal_column("1"), bindparam("largest")),
            columns.deliveries,
            func.length(columns.body),
        )
    )


_COLUMNS = ("message_id", "topic", "body", "due_at", "held_until", "created_at", "deliveries")
_POST = upsert(messages, _COLUMNS, key=["message_id"], update=_earlier)
_KEEP = upsert(dead_letters, [column.name for column in dead_letters.c], key=["id"], update=None)
_TAKE = Prepared(_take, ["topic", "now", "same", "most", "since", "hold", "by", "largest"])
_ids = each_of(bindparam("ids")).table_valued("value")
_WAITING = Prepared(
    select(messages.c.message_id)
    .join(_ids, messages.c.message_id == _ids.c.value)
    .where(messages.c.holder.is_(None), messages.c.due_at <= bindparam("now")),
    ["ids", "now"],
)
_NEXT = Prepared(
    select(func.min(messages.c.due_at) - instant(bindparam("now"))).where(
        messages.c.topic == bindparam("topic"), messages.c.due_at > instant(bindparam("same"))
    ),
    ["now", "topic", "same"],
)
_FREE = Prepared(
    update(messages)
    .where(messages.c.holder == bindparam("by"))
    .values(held_until=bindparam("until"), holder=null()),
    ["until", "by"],
)
_ACK = Prepared(
    delete(messages).where(messages.c.message_id == bindparam("id_"), messages.c.holder == bindparam("by")),
    ["id_", "by"],
)
_RETURN = Prepared(
    update(messages)
    .where(messages.c.message_id == bindparam("id_"), messages.c.holder == bindparam("by"))
    .values(due_at=bindparam("at"), held_until=bindparam("until"), holder=null())
    .returning(messages.c.topic),
    ["at", "until", "id_", "by"],
)


def _as_bytes(body: object) -> bytes:
    # The column holds what was put into it: a row that somebody wrote by hand may have a text there.
    # Of an empty one SQLite says that the beginning is null.
    return body if isinstance(body, bytes) else str(body or "").encode()
