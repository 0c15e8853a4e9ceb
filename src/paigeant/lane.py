"""Lane: one connection, through which the transactions of many tasks pass one by one, shared by whoever meets.

A transaction is awaited once, however many statements it has. Requests that come while one is under way gather and
become the next: one statement for each kind of request, one fsync for all (group commit).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from greenlet import getcurrent
from sqlalchemy import Connection, Dialect

from paigeant.errors import StoreRefused, StoreUnavailable
from paigeant.green import Green, Hands, TooSlow, elsewhere, pause

__all__ = [
    "Blocked",
    "Contended",
    "Denied",
    "Driver",
    "Handler",
    "Lane",
    "Later",
    "Misjudged",
    "Tx",
    "needing",
    "transact",
]

log = logging.getLogger("paigeant.lane")

_BATCH = 250
"""Requests in one transaction at the most: while they are put together nothing else runs."""

_BATCH_BYTES = 8 * 1024 * 1024
"""And their bytes, unless one alone has more: a database lets no transaction take longer than some seconds."""

_LAZY_SECONDS = 0.02
_MANY = 24
"""Requests that share their transaction well enough. A lane for which fewer are waiting rests until so many may be."""

_MOST_RESTS, _LONGEST_REST = 4, 0.01
"""As often as long as the last transaction took, and seconds: the longest rest."""

_TRIES = 8
"""How often a transaction is done again that another one got ahead of."""


class Contended(Exception):
    """A transaction did nothing, because another one got ahead of it or its connection was gone: do it again."""

    def __init__(self, reason: str, *, is_lost: bool = False) -> None:
        super().__init__(reason)
        self.is_lost = is_lost


class Misjudged(Contended):
    """A transaction did nothing, because things weren't as a handler had foreseen: do it again, and look first."""


class Blocked(StoreUnavailable):
    """A transaction did nothing: one of its requests takes too long, or too much room, or what another one keeps."""


class Denied(Blocked, StoreRefused):
    """A transaction did nothing: one of its requests may not be done by this user, or on these tables."""


class Driver(Protocol):
    """A driver's own connection within a transaction: a small statement takes SQLAlchemy's several times as long."""

    dialect: Dialect

    def rows(self, text: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Run a statement once; gives its rows."""
        ...

    def ask(self, text: str, values: Sequence[Any]) -> Callable[[], list[tuple[Any, ...]]]:
        """Run a statement once; gives what gives its rows."""
        ...

    def each(self, text: str, rows: Sequence[tuple[Any, ...]]) -> int | None:
        """Run a statement for each of the rows; gives how many it changed, None where that isn't told so soon."""
        ...

    def plain(self) -> Connection:
        """SQLAlchemy's connection, in the same transaction, for what is asked rarely."""
        ...

    def now(self) -> float:
        """The instant of the transaction."""
        ...

    def told_now(self) -> float | None:
        """The same without a question to anybody; None where a statement is to ask the server (`prepared.instant`)."""
        ...


class Tx:
    """A transaction in progress: its driver, its instant, and what others shall hear once it is committed.

    `foresees`: a handler may decide on what it expects to find, if it has the database check that: each question to a
    server costs a round trip, and a transaction without any is a single one. It raises Misjudged where it was wrong.
    """

    __slots__ = ("driver", "foresees", "is_beside", "locked", "rings")

    def __init__(self, driver: Driver, *, foresees: bool = False) -> None:
        self.driver = driver
        self.foresees = foresees
        self.rings: set[str] = set()
        self.locked: set[str] = set()
        """The runs that no other transaction can change until its end."""
        self.is_beside = False
        """Whether some who asked for it mostly go on while it is committed, and wait for that later."""

    @property
    def now(self) -> float:
        """Its instant by the database's clock, the same however often it is asked for."""
        return self.driver.now()

    @property
    def told_now(self) -> float | None:
        """Its instant for a statement's `prepared.instant`: None where the server puts in its own, unasked."""
        return self.driver.told_now()

    @property
    def connection(self) -> Connection:
        """SQLAlchemy's connection, for statements that are not worth being prepared.

        To be taken anew for each: what is asked of the transaction otherwise takes it away again.
        """
        return self.driver.plain()


Result = TypeVar("Result")

Handler = Callable[[Tx, Sequence[Any]], Sequence[Any]]
"""Does the requests of one kind within a transaction and gives a result for each, in their order."""


class Later(NamedTuple, Generic[Result]):
    """A result that is read when the transaction is committed, by a handler on whose answers nothing else depends.

    So its questions and the commit may go to a server together.
    """

    read: Callable[[], Result]


Marked = TypeVar("Marked", bound=Callable[..., Any])


def needing(
    take: Callable[[Tx, set[str]], object], of: Callable[[Any], Iterable[str]]
) -> Callable[[Marked], Marked]:
    """Marks a handler: before any handler of its transaction works, `take` gets what they all need `of` each request.

    Taken by one handler after the other, locks would come in no order: two transactions could wait for each other.
    """

    def mark(handler: Marked) -> Marked:
        vars(handler)["needs"] = take, of
        return handler

    return mark


Begin = Callable[[Connection, bool], AbstractContextManager[Tx]]
"""A transaction on a connection, durable or not, committed at the end of the block. It foresees where that pays."""


class _Op:
    """A request to a lane, and who waits for its result."""

    __slots__ = ("durable", "future", "handler", "request", "size")

    def __init__(
        self, handler: Handler, request: Any, future: asyncio.Future[Any] | None, durable: bool, size: int
    ) -> None:
        self.handler = handler
        self.request = request
        self.future = future
        self.durable = durable
        self.size = size


class Lane:
    """Runs transactions one by one, on a connection of its own that `connect` gives and `begin` begins them on.

    `guard` turns the driver's errors into ours, `is_lost` tells whether a connection can't be used any more.
    `committed` is called after each transaction that rang for something, `tidy` after each, when its results are on
    their way, with what it rang for; `heard` by the event loop itself. A transaction that takes longer than `limit`
    seconds is cut off with `cut`.

    All of this is in the thread of the event loop, which goes on while a transaction waits (`green.py`). Only one that
    is TooSlow is done in another thread.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Connection],
        *,
        guard: AbstractContextManager[None],
        begin: Begin,
        is_lost: Callable[[Connection], bool] = lambda _: False,
        committed: Callable[[set[str]], None] = lambda _: None,
        heard: Callable[[frozenset[str]], None] = lambda _: None,
        tidy: Callable[[Connection, set[str]], None] = lambda *_: None,
        limit: float | None = None,
        cut: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        self._connect = connect
        self._guard = guard
        self._begin = begin
        self._is_lost = is_lost
        self._after_commit = committed
        self._heard = heard
        self._tidy = tidy
        self._limit = limit
        self._cut = cut
        self._waiting: list[_Op] = []
        self._lazy: list[_Op] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopped = False
        self.loop = asyncio.get_running_loop()
        self._connection: Connection | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._began = 0.0
        self._batches: deque[list[_Op] | None] = deque()
        self._green: Green | None = None
        self._rests = True
        """Whether nothing is being done or tidied up."""
        self._hands = Hands(name)
        self._ended = asyncio.Event()

    def submit(
        self, handler: Handler, request: Any, *, durable: bool = True, size: int = 0
    ) -> asyncio.Future[Any]:
        """Have `request` done; the future has its result once its transaction is committed.

        `size`: the bytes of what it writes, where these may be many.
        """
        future: asyncio.Future[Any] = self.loop.create_future()
        if self._stopped:
            future.set_exception(StoreUnavailable("the database is closed"))
            return future
        self._waiting.append(_Op(handler, request, future, durable, size))
        if self._idle.is_set() and len(self._waiting) == 1:
            # Not at once: what other tasks ask for in this turn of the loop shares the transaction.
            self.loop.call_soon(self._next_if_idle)
        return future

    def submit_lazily(self, handler: Handler, request: Any) -> None:
        """Have `request` done along with the next transaction, or soon. For what may be lost in a crash."""
        if self._stopped:
            return
        self._lazy.append(_Op(handler, request, None, False, 0))
        if len(self._lazy) == 1:
            self.loop.call_later(_LAZY_SECONDS, self._next_if_idle)

    async def stop(self) -> None:
        """Finish what was asked for, and close the connection."""
        while self._waiting or self._lazy or not self._idle.is_set():
            self._next_if_idle()
            await self._idle.wait()
        self._stopped = True
        self._hand(None)
        await self._ended.wait()  # watched, as long as something is being tidied up
        if self._green is not None:
            self._green.end()
        if self._watch is not None:
            self._watch.cancel()

    # -- in the event loop

    def _next_if_idle(self) -> None:
        if self._idle.is_set() and (self._waiting or self._lazy):
            self._next()

    def _next(self) -> None:
        most = self._most()
        batch = self._lazy + self._waiting[:most]
        del self._waiting[:most]
        self._lazy = []
        self._idle.clear()
        self._began = time.monotonic()
        if self._limit is not None and self._watch is None:
            self._watch_over(self._limit, self._limit)
        self._hand(batch)

    def _most(self) -> int:
        """How many of those that wait may share a transaction."""
        size = 0
        for place, op in enumerate(self._waiting[:_BATCH]):
            size += op.size
            if size > _BATCH_BYTES:
                return max(place, 1)
        return _BATCH

    def _hand(self, batch: list[_Op] | None) -> None:
        """Have it done, after what is still being tidied up; None is the end."""
        self._batches.append(batch)
        if not self._rests:
            return
        self._rests = False
        green = self._green
        # Its loop may run in another thread by now.
        if green is None or green.dead or green.parent is not getcurrent():
            green = self._green = Green(self._hands)
        green.do(partial(self._run, green))

    def _watch_over(self, limit: float, seconds: float) -> None:
        # A server that has vanished without a word would keep the lane for ever. One watch for all transactions that
        # come meanwhile: a timer for each would be a twentieth of what a short one costs.
        self._watch = self.loop.call_later(seconds, self._overdue, limit)

    def _overdue(self, limit: float) -> None:
        self._watch = None
        if self._idle.is_set() and self._rests:  # else it may wait for the server while it tidies up
            return
        left = self._began + limit - time.monotonic()
        if (
            left > 0
        ):  # another one has begun, it has been tried again, or its requests are now done one by one
            self._watch_over(limit, left)
            return
        if self._connection is not None:
            log.warning("a transaction takes longer than %g s: its connection is cut off", limit)
            self._cut(self._connection)
        self._watch_over(limit, limit)  # the next try may meet the same

    def _done(self, batch: list[_Op], results: list[Any], rings: set[str]) -> None:
        for op, result in zip(batch, results, strict=True):
            if op.future is None or op.future.done():
                continue
            if isinstance(result, BaseException):
                op.future.set_exception(result)
            else:
                op.future.set_result(result)
        self._idle.set()
        if self._waiting:
            # Requests that come one by one, as from a broker, would else share little, and a transaction of one costs
            # as much of the processor as one of twenty.
            took = time.monotonic() - self._began
            rest = took * min(_MANY / len(self._waiting) - 1, _MOST_RESTS)
            self.loop.call_later(min(max(rest, 0.0), _LONGEST_REST), self._next_if_idle)
        elif self._lazy:  # their time may have come while this one was under way
            self.loop.call_later(_LAZY_SECONDS, self._next_if_idle)
        if rings:
            self._heard(frozenset(rings))

    # -- in a greenlet

    def _run(self, green: Green) -> None:
        try:
            while self._batches:
                if (batch := self._batches.popleft()) is not None:
                    self._work(green, batch)
                else:
                    self._disconnect()
                    self._hands.close()
                    green.later(self._ended.set)
        finally:
            self._rests = True

    def _work(self, green: Green, batch: list[_Op]) -> None:
        results, rings = self._transact_all(batch)
        try:
            if rings:
                self._after_commit(rings)
        except Exception:  # whatever it meets, those who wait must get their results
            log.exception("others were not told of a commit")
        green.later(partial(self._done, batch, results, rings))
        try:
            if self._connection is not None:
                self._tidy(self._connection, rings)
        except Exception:  # if it ended here, nobody would ever get an answer again
            log.exception("tidying up after a commit failed")

    def _transact_all(self, batch: list[_Op]) -> tuple[list[Any], set[str]]:
        try:
            return self._transact(batch)
        except BaseException as exc:
            if len(batch) == 1 or (isinstance(exc, StoreUnavailable) and not isinstance(exc, Blocked)):
                return [exc] * len(batch), set()
        # One request that can't be done must not fail those that happened to share its transaction.
        results: list[Any] = []
        rings: set[str] = set()
        for op in batch:
            try:
                result, rung = self._transact([op])
            except BaseException as exc:
                result, rung = [exc], set()
            results += result
            rings |= rung
        return results, rings

    def _transact(self, batch: Sequence[_Op]) -> tuple[list[Any], set[str]]:
        durable, requests = False, []
        for op in batch:
            durable = durable or op.durable
            requests.append((op.handler, op.request))

        def work() -> tuple[list[Any], set[str]]:
            with self._guard:
                return transact(self._connected, requests, begin=self._begin, durable=durable)

        try:
            return work()
        except TooSlow:
            return elsewhere(work)

    def _connected(self) -> Connection:
        if self._connection is not None and self._is_lost(self._connection):
            self._disconnect()
        if self._connection is None:
            self._connection = self._connect()
        self._began = time.monotonic()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):  # what can't be used can't be closed properly either
                if self._is_lost(self._connection):
                    self._connection.invalidate()
                self._connection.close()
            self._connection = None


def transact(
    connected: Callable[[], Connection],
    requests: Sequence[tuple[Handler, Any]],
    *,
    begin: Begin,
    durable: bool = True,
) -> tuple[list[Any], set[str]]:
    """Do `requests` in one transaction, those of a kind together; gives their results and what they rang for.

    `connected` gives the connection, a new one should that before be lost. Raises StoreUnavailable when it can't be
    done however often it is tried.
    """
    kinds: dict[Handler, list[int]] = {}
    for place, (handler, _) in enumerate(requests):
        kinds.setdefault(handler, []).append(place)
    # In one order, whichever that is, as a row that one kind has written another transaction's may have to wait for.
    in_order = (
        sorted(kinds.items(), key=lambda kind: kind[0].__qualname__) if len(kinds) > 1 else kinds.items()
    )
    needs: dict[Callable[[Tx, set[str]], object], set[str]] = {}
    for handler, places in in_order:
        if (need := getattr(handler, "needs", None)) is not None:
            take, of = need
            needs.setdefault(take, set()).update(*(of(requests[place][1]) for place in places))
    reason = ""
    for attempt in range(_TRIES):
        results: list[Any] = [None] * len(requests)
        try:
            with begin(connected(), durable) as tx:
                tx.foresees = tx.foresees and not attempt
                for take, names in needs.items():
                    take(tx, names)
                for handler, places in in_order:
                    answers = handler(tx, [requests[place][1] for place in places])
                    for place, answer in zip(places, answers, strict=True):
                        results[place] = answer
            return [result.read() if isinstance(result, Later) else result for result in results], tx.rings
        except Contended as exc:
            reason = str(exc)
            if exc.is_lost and attempt:  # an old connection may be gone; that a new one is, too, is trouble
                break
            if not isinstance(exc, Misjudged):
                pause(0.002 * 2**attempt * random.random())
    raise StoreUnavailable(f"a transaction could not be done, tried again and again: {reason}")
