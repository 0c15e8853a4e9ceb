"""One SQLite file as the adapters see it: short transactions, shared by whoever commits at the same moment.

Each transaction is one hop to a thread that owns the writing connection, however many statements it has; awaiting each
statement through an async driver costs a hop apiece, which is most of the time of a small commit. Requests that arrive
while a commit is under way gather and become the next transaction (group commit): one multi-row statement for each kind
of change, one fsync for all. A server database takes the same handlers through `AsyncConnection.run_sync`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError
from sqlalchemy.pool import NullPool

from paigeant.clock import Clock, SystemClock
from paigeant.errors import ConfigurationError, PaigeantError, SchemaMismatch, StoreUnavailable
from paigeant.tables import SCHEMA_VERSION, metadata
from paigeant.wakeup import Bell

__all__ = ["Database", "Tx", "database_path"]

Request = TypeVar("Request")
Result = TypeVar("Result")

_BATCH = 1000
"""Requests in one transaction at the most: it bounds how long others wait for the file."""

_CHECKPOINT_BYTES = 8 * 1024 * 1024
_BUSY_SECONDS = 15.0
_LAZY_SECONDS = 0.02


class Tx:
    """A transaction in progress: its connection, its instant, and what other processes shall hear once it is durable."""

    __slots__ = ("connection", "now", "rings")

    def __init__(self, connection: Connection, now: float) -> None:
        self.connection = connection
        self.now = now
        self.rings: set[str] = set()


Handler = Callable[[Tx, Sequence[Any]], Sequence[Any]]
"""Does the requests of one kind within a transaction and gives a result for each, in their order."""


class _Op:
    __slots__ = ("future", "handler", "request")

    def __init__(self, handler: Handler, request: Any, future: asyncio.Future[Any] | None) -> None:
        self.handler = handler
        self.request = request
        self.future = future


def database_path(url: str) -> Path:
    """The file that `sqlite:///path` names. Raises ConfigurationError for a URL without one."""
    scheme, _, rest = url.partition("://")
    path = rest.partition("?")[0].removeprefix("/")
    if scheme != "sqlite" or not path:
        raise ConfigurationError(
            f"{url!r} names no file; expected sqlite:///file.db, or sqlite:////folder/file.db for an absolute path"
        )
    return Path(path)


class Database:
    """An open SQLite file, with the tables of this version of the code. One for each process and file."""

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        self.url = url
        self.path = database_path(url)
        self.clock = clock or SystemClock()
        self._engine: Engine | None = None
        self._users = 0
        self._waiting: list[_Op] = []
        self._lazy: list[_Op] = []
        self._busy = False
        self._writer: _Thread | None = None
        self._reader: _Thread | None = None
        self._beater: Connection | None = None
        self._listeners: list[Callable[[frozenset[str]], None]] = []
        self._bell = Bell(self.path, self._heard)
        self._commits = 0

    @property
    def hears_others(self) -> bool:
        """Whether commits of other processes are heard at once. Otherwise whoever waits has to look often."""
        return self._bell.works

    # -- opening and closing

    async def connect(self) -> None:
        """Open it, or count one more user of it. Raises ConfigurationError, SchemaMismatch, StoreUnavailable."""
        self._users += 1
        if self._users > 1:
            return
        try:
            self._engine = _engine(self.path)
            self._writer = _Thread("paigeant-writer", self._engine)
            self._reader = _Thread("paigeant-reader", self._engine)
            await self._writer.call(lambda connection: prepare(connection, self.path))
        except BaseException:
            await self._shut()
            self._users = 0
            raise
        self._bell.open()

    async def close(self) -> None:
        """Commit what was begun and close it, once its last user does so."""
        self._users = max(self._users - 1, 0)
        if self._users or self._engine is None:
            return
        while self._busy or self._waiting or self._lazy:
            self._pump(lazily=True)
            await asyncio.sleep(0.001)
        await self._shut()

    async def _shut(self) -> None:
        self._bell.close()
        for thread in (self._writer, self._reader):
            if thread is not None:
                await thread.stop()
        self._writer = self._reader = None
        if self._beater is not None:
            self._beater.close()
            self._beater = None
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    # -- transactions

    async def write(self, handler: Callable[[Tx, Sequence[Request]], Sequence[Result]], request: Request) -> Result:
        """Have `handler` do `request` in a transaction, with others of its kind; gives its result once it is durable.

        Raises StoreUnavailable when the transaction couldn't be written: then nothing of it has been, unless the
        answer to the commit itself was lost.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Op(handler, request, future))
        self._pump()
        return await future

    def write_lazily(self, handler: Callable[[Tx, Sequence[Request]], Sequence[Any]], request: Request) -> None:
        """Have `handler` do `request` along with the next transaction, or soon. For what may be lost in a crash."""
        self._lazy.append(_Op(handler, request, None))
        if len(self._lazy) == 1:
            asyncio.get_running_loop().call_later(_LAZY_SECONDS, self._pump, True)

    async def read(self, query: Callable[[Connection], Result]) -> Result:
        """What `query` gives, from one consistent state, beside the writer. Raises StoreUnavailable."""
        if self._reader is None:
            raise StoreUnavailable(f"{self.path} is not open")
        return await self._reader.call(query)

    def write_now(self, handler: Callable[[Tx, Sequence[Request]], Sequence[Result]], request: Request) -> Result:
        """Like `write`, blocking and alone, on a connection of the calling thread: always the same one."""
        if self._engine is None:
            raise StoreUnavailable(f"{self.path} is not open")
        if self._beater is None:
            with _translated(self.path):
                self._beater = self._engine.connect()
        tx = self._transact(self._beater, [_Op(handler, request, None)], results := [])
        self._bell.ring(tx.rings)
        result: Result = results[0]
        return result

    def on_change(self, listener: Callable[[frozenset[str]], None]) -> Callable[[], None]:
        """Call `listener` in the event loop with what commits of any process rang for. Gives what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # -- inside

    def _heard(self, names: frozenset[str]) -> None:
        for listener in tuple(self._listeners):
            listener(names)

    def _pump(self, lazily: bool = False) -> None:
        if self._busy or not (self._waiting or (lazily and self._lazy)):
            return
        if self._writer is None:
            stopped = StoreUnavailable(f"{self.path} is not open")
            self._settle(self._waiting, None, stopped)
            self._waiting = []
            return
        batch = self._lazy + self._waiting[:_BATCH]
        self._waiting = self._waiting[_BATCH:]
        self._lazy = []
        self._busy = True
        loop = asyncio.get_running_loop()
        self._writer.put(lambda connection: self._commit(connection, batch, loop))

    def _commit(self, connection: Connection, batch: list[_Op], loop: asyncio.AbstractEventLoop) -> None:
        results: list[Any] = []
        rings: set[str] = set()
        error: BaseException | None = None
        try:
            rings = self._transact(connection, batch, results).rings
        except StoreUnavailable as exc:
            error = exc
        except BaseException as exc:
            if len(batch) == 1:
                error = exc
            else:
                results, rings = self._one_by_one(connection, batch)
        if rings:
            self._bell.ring(rings)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self._committed, batch, results, rings, error)
        self._checkpoint(connection)

    def _one_by_one(self, connection: Connection, batch: list[_Op]) -> tuple[list[Any], set[str]]:
        # One request that can't be done must not fail those that happened to share its transaction.
        results: list[Any] = []
        rings: set[str] = set()
        for op in batch:
            try:
                rings |= self._transact(connection, [op], results).rings
            except BaseException as exc:
                results.append(exc)
        return results, rings

    def _transact(self, connection: Connection, batch: Sequence[_Op], results: list[Any]) -> Tx:
        kinds: dict[Handler, list[int]] = {}
        for position, op in enumerate(batch):
            kinds.setdefault(op.handler, []).append(position)
        done: list[Any] = [None] * len(batch)
        with _translated(self.path), connection.begin():
            tx = Tx(connection, self.clock.now())
            for handler, positions in kinds.items():
                answers = handler(tx, [batch[position].request for position in positions])
                for position, answer in zip(positions, answers, strict=True):
                    done[position] = answer
        results.extend(done)
        return tx

    def _committed(
        self, batch: list[_Op], results: list[Any], rings: set[str], error: BaseException | None
    ) -> None:
        self._busy = False
        self._settle(batch, results, error)
        if rings:
            self._heard(frozenset(rings))
        self._pump()

    @staticmethod
    def _settle(batch: Iterable[_Op], results: list[Any] | None, error: BaseException | None) -> None:
        for position, op in enumerate(batch):
            if op.future is None or op.future.done():
                continue
            outcome = error if results is None or error is not None else results[position]
            if isinstance(outcome, BaseException):
                op.future.set_exception(outcome)
            else:
                op.future.set_result(outcome)

    def _checkpoint(self, connection: Connection) -> None:
        # Nobody checkpoints by itself (wal_autocheckpoint=0): SQLite before 3.51.3 may corrupt the file when a
        # checkpoint races with a commit that resets the log (sqlite.org/wal.html#walresetbug). TRUNCATE holds the
        # write lock while it works, so it can't race; when it isn't given the lock soon, the next commit tries again.
        self._commits += 1
        if self._commits % 16:
            return
        with contextlib.suppress(OSError, DBAPIError):
            if os.path.getsize(f"{self.path}-wal") > _CHECKPOINT_BYTES:
                raw: Any = connection.connection.dbapi_connection
                raw.execute("PRAGMA busy_timeout=250")
                raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                raw.execute(f"PRAGMA busy_timeout={int(_BUSY_SECONDS * 1000)}")


class _Thread:
    """A thread with a connection of its own that does one thing after the other."""

    def __init__(self, name: str, engine: Engine) -> None:
        self._engine = engine
        self._jobs: queue.SimpleQueue[Callable[[Connection], None] | None] = queue.SimpleQueue()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[Connection], None]) -> None:
        """Have `job` done; it must not raise."""
        self._jobs.put(job)

    async def call(self, query: Callable[[Connection], Result]) -> Result:
        """What `query` gives, or its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if not future.done():
                future.set_result(result) if error is None else future.set_exception(error)

        def job(connection: Connection) -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                with _translated(self._path(connection)), connection.begin():
                    result = query(connection)
            except BaseException as exc:
                error = exc
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, result, error)

        self.put(job)
        return await future

    @staticmethod
    def _path(connection: Connection) -> Path:
        return Path(connection.engine.url.database or "")

    async def stop(self) -> None:
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._connection is None:
                self._connection = self._engine.connect()
            job(self._connection)
        if self._connection is not None:
            self._connection.close()


def _engine(path: Path) -> Engine:
    folder = path.parent
    if not folder.is_dir():
        raise ConfigurationError(f"the folder {folder} of the database {path.name} doesn't exist; make it first")
    if path.exists():
        _check_is_database(path)
    elif not os.access(folder, os.W_OK):
        raise ConfigurationError(f"can't make {path}: the folder {folder.resolve()} is read-only")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigurationError(f"{path} is read-only; Paigeant needs to write to it")
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=NullPool,
        connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False, "isolation_level": None},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: object) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=0", "foreign_keys=OFF"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred transaction that turns into a writing one after another commit fails at once, whatever the busy
        # timeout is; an immediate one waits for its turn.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if not _reads_only() else "BEGIN")

    return engine


def _reads_only() -> bool:
    return threading.current_thread().name == "paigeant-reader"


def _check_is_database(path: Path) -> None:
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder; expected a database file")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as exc:
        raise ConfigurationError(f"can't read {path}: {exc.strerror}") from exc
    if start and start != b"SQLite format 3\0":
        raise ConfigurationError(
            f"{path} is not an SQLite database (it starts with {start[:12]!r}); name another file in the URL"
        )


@contextlib.contextmanager
def _translated(path: Path) -> Any:
    """Turns what the driver reports into errors of ours."""
    try:
        yield
    except PaigeantError:
        raise
    except OperationalError as exc:
        raise StoreUnavailable(f"can't use {path}: {exc.orig}") from exc
    except DatabaseError as exc:
        if isinstance(exc.orig, sqlite3.DatabaseError) and "not a database" in str(exc.orig):
            raise ConfigurationError(f"{path} is not an SQLite database; name another file in the URL") from exc
        raise


def prepare(connection: Connection, path: Path) -> None:
    """Make sure that the file has the tables of this version: a new one gets them, an older one is migrated.

    Raises SchemaMismatch for a file that newer code has written, or that holds other tables of these names.
    """
    found = current_version(connection)
    if found == SCHEMA_VERSION:
        return
    if found is None:
        foreign = sorted(set(inspect(connection).get_table_names()) & set(metadata.tables))
        if foreign:
            raise SchemaMismatch(
                f"{path} has a table '{foreign[0]}' that Paigeant did not make; name another file in the URL"
            )
        metadata.create_all(connection)
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
        connection.execute(text("INSERT INTO alembic_version VALUES (:version)"), {"version": SCHEMA_VERSION})
        return
    from paigeant.migrations import upgrade  # here, because it loads Alembic, which only an old file needs

    upgrade(connection, str(path))


def current_version(connection: Connection) -> str | None:
    """The migration that a database is at; None for one without any."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
