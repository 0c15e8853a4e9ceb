"""Database: SQL as the adapters see it: transactions that many tasks share, and word of what others commit.

Transactions pass through two lanes (`lane.py`), one that writes and one that reads. Awaiting each statement through an
async driver would cost a hop or a round trip apiece, which is most of the time of a small commit; here a whole
transaction is one hop. The kinds of databases are in `databases/`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from sqlalchemy import Connection, inspect, text

from paigeant.errors import InputInvalid, PaigeantError, StoreUnavailable
from paigeant.lane import Handler, Lane, Later, Tx
from paigeant.tables import VERSION_TABLE

__all__ = ["ENDED", "READER", "TOPIC", "WRITER", "Database", "current_version", "no_unicode", "not_open"]

Request = TypeVar("Request")
Result = TypeVar("Result")

WRITER, READER = "paigeant-writer", "paigeant-reader"

TOPIC = "topic "
"""How the names begin that commits ring for with messages of a topic: only those who attend it hear of others'."""

ENDED = "ended "
"""The same for the ends of runs, all of which are attended by this beginning: most workers wait for none."""


class Database(ABC):
    """An open database with the tables of this version of the code. One for each process and place.

    A kind of database says how to `_open` and `_shut` it, and how to do one transaction from any thread
    (`_transact_now`).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._users = 0
        self._writer: Lane | None = None
        self._reader: Lane | None = None
        self._beating = threading.Lock()
        self._listeners: list[Callable[[frozenset[str]], None]] = []

    @property
    @abstractmethod
    def hears_others(self) -> bool:
        """Whether commits of other processes are heard at once. Otherwise whoever waits has to look often."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Which database it is, as a message may say it: without secrets."""

    @property
    @abstractmethod
    def exists(self) -> bool:
        """Whether there is something to open. What isn't there is made when it is opened."""

    def elapsed(self) -> float:
        """Seconds by a steady clock of this process; an embedded database of a test goes by the test's clock."""
        return time.monotonic()

    @abstractmethod
    def instant(self) -> float | None:
        """The database's time as far as this process knows it without asking; None when it hasn't heard it for long."""

    # -- as it is, for those who change its tables

    @abstractmethod
    def as_it_is(self) -> AbstractContextManager[Connection]:
        """A transaction on the database as it is, whatever tables it has. Committed at the end of the block.

        Raises ConfigurationError, StoreUnavailable.
        """

    @abstractmethod
    def prepare(self, connection: Connection) -> None:
        """Make the tables of this version, or bring those of an older one to it.

        Raises SchemaMismatch for a database that newer code has changed, or that has other tables of these names.
        """

    @abstractmethod
    def check_whole(self, connection: Connection) -> None:
        """Raises SchemaMismatch where one of the tables of this version isn't there: no migration makes it anew."""

    # -- opening and closing

    async def connect(self) -> None:
        """Open it, or count one more user of it. Raises ConfigurationError, SchemaMismatch, StoreUnavailable."""
        self._users += 1
        if self._users > 1:
            return
        try:
            await self._open()
        except BaseException:
            await self._close_lanes()
            await self._shut()
            self._users = 0
            raise

    async def close(self) -> None:
        """Commit what was begun and close it, once its last user does so."""
        was_open = self._users > 0
        self._users = max(self._users - 1, 0)
        if was_open and not self._users:
            await self._close_lanes()
            await self._shut()

    @abstractmethod
    async def _open(self) -> None: ...

    @abstractmethod
    async def _shut(self) -> None: ...

    async def _close_lanes(self) -> None:
        for lane in (self._writer, self._reader):
            if lane is not None:
                await lane.stop()
        self._writer = self._reader = None

    async def check_rights(self) -> None:  # noqa: B027  # whoever can open a file may do all to it
        """Raises ConfigurationError where its user may do less to the tables than a worker has to."""

    # -- transactions

    def write(
        self,
        handler: Callable[[Tx, Sequence[Request]], Sequence[Result | Later[Result]]],
        request: Request,
        *,
        durable: bool = True,
        size: int = 0,
    ) -> asyncio.Future[Result]:
        """Have `handler` do `request` in a transaction, with others of its kind; gives its result once it is committed.

        What isn't `durable` survives the death of this process, but perhaps not a loss of power: for what may be done
        again, such as a claim. `size`: the bytes that `request` writes, where these may be many: few such share a
        transaction. Raises StoreUnavailable when the transaction couldn't be written: then nothing of it
        has been, unless the answer to the commit itself was lost.
        """
        return self._submit(self._writer, handler, request, durable=durable, size=size)

    def write_lazily(
        self, handler: Callable[[Tx, Sequence[Request]], Sequence[Any]], request: Request
    ) -> None:
        """Have `handler` do `request` along with the next transaction, or soon. For what may be lost in a crash."""
        if self._writer is not None:
            self._writer.submit_lazily(handler, request)

    def read(
        self, handler: Callable[[Tx, Sequence[Request]], Sequence[Result | Later[Result]]], request: Request
    ) -> asyncio.Future[Result]:
        """What `handler` finds for `request`, with others of its kind, from one consistent state, beside the writer.

        Raises StoreUnavailable.
        """
        return self._submit(self._reader, handler, request)

    async def ask(self, query: Callable[[Connection], Result]) -> Result:
        """What `query` gives, from one consistent state: a `read` of a kind of its own."""
        return await self.read(lambda tx, _: [query(tx.connection)], None)

    async def now(self) -> float:
        """The database's time."""
        return await self.read(_instants, None)

    def write_now(
        self, handler: Callable[[Tx, Sequence[Request]], Sequence[Result]], request: Request
    ) -> Result:
        """Like `write`, blocking and alone, from any thread; of several one waits for the other."""
        with self._beating:
            result: Result = self._transact_now(handler, request)
        return result

    def write_beside(
        self, handler: Callable[[Tx, Sequence[Request]], Sequence[Result]], request: Request
    ) -> Result:
        """Like `write_now`, not durable and on one more connection: for what no step and no heartbeat may wait for.

        It gives up early where others are in its way. For one thread, which opens that connection with its first call.
        """
        result: Result = self._transact_now(handler, request, beside=True)
        return result

    @abstractmethod
    def close_beside(self) -> None:
        """Close the connection of `write_beside`, in its thread."""

    @abstractmethod
    def _transact_now(self, handler: Handler, request: Any, *, beside: bool = False) -> Any: ...

    # -- word of commits

    def on_change(self, listener: Callable[[frozenset[str]], None]) -> Callable[[], None]:
        """Call `listener` in the event loop with what commits of any process rang for. Gives what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def check_loop(self) -> None:
        """Raises PaigeantError in another event loop than the one that it was opened in: nobody is woken there."""
        if self._reader is not None and self._reader.loop is not asyncio.get_running_loop():
            raise _in_another_loop(self.place)

    def attend(self, name: str) -> Callable[[], None]:
        """Hear also of what others' commits bring for a topic (TOPIC and its name), or of ends (ENDED).

        Gives what ends that. Once it is so the listeners are told `name`, for what was before may not have been heard.
        """
        return lambda: None

    def _heard(self, names: frozenset[str]) -> None:
        for listener in tuple(self._listeners):
            listener(names)

    def _submit(
        self, lane: Lane | None, handler: Handler, request: Any, *, durable: bool = True, size: int = 0
    ) -> asyncio.Future[Any]:
        if lane is not None:
            if lane.loop is not asyncio.get_running_loop():
                # Its future could be awaited by nobody there, and what it asks for would be done all the same.
                raise _in_another_loop(self.place)
            return lane.submit(handler, request, durable=durable, size=size)
        closed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        closed.set_exception(not_open(self.place))
        return closed


def not_open(place: object) -> StoreUnavailable:
    """What is raised where a database is used before it was opened, or after it was closed."""
    return StoreUnavailable(f"{place} is not open; connect() opens it, as `async with Paigeant(...)` does")


def _in_another_loop(place: str) -> PaigeantError:
    return PaigeantError(
        f"{place} was opened in another event loop; have it asked there, as "
        "asyncio.run_coroutine_threadsafe(app.dispatch(...), loop) does"
    )


def _instants(tx: Tx, requests: Sequence[None]) -> list[float]:
    return [tx.now] * len(requests)


def current_version(connection: Connection) -> str | None:
    """The migration that a database is at; None for one without any."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()


def no_unicode(place: str) -> InputInvalid:
    """The error for a text that a driver can't hand over: a name that came in by a command line, say."""
    return InputInvalid(
        f"{place} can't hold that: a text holds half of a surrogate pair, which is no Unicode"
    )
