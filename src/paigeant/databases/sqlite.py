"""One SQLite file: how it is opened and checked, its transactions and checkpoints."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Dialect, Engine, create_engine, event, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from paigeant.clock import Clock, SystemClock
from paigeant.database import READER, WRITER, Database, current_version, no_unicode, not_open
from paigeant.errors import ConfigurationError, PaigeantError, SchemaMismatch, StoreDamaged, StoreUnavailable
from paigeant.green import TooSlow, elsewhere, is_green, pause
from paigeant.lane import Blocked, Handler, Lane, Tx, transact
from paigeant.tables import SCHEMA_VERSION, VERSION_TABLE, metadata
from paigeant.wakeup import Bell

__all__ = ["SqliteDatabase", "database_path", "prepare"]

_CHECKPOINT_BYTES = 16 * 1024 * 1024
_BUSY_SECONDS = 15.0
_QUICK_SECONDS = 0.002
"""What a commit may take on average that the event loop waits for."""

_SHORT_SECONDS = 0.0003
"""The same where somebody goes on meanwhile: to hand it over and hear of its end takes nearly as long."""

_BESIDE_SECONDS = 2.0
"""How long that waits for its turn which nobody waits for."""


def database_path(url: str) -> Path:
    """The file that `sqlite:///path` names. Raises ConfigurationError for a URL without one."""
    scheme, _, rest = url.partition("://")
    path = rest.removeprefix("/")
    if scheme != "sqlite" or not path:
        raise ConfigurationError(
            f"{url!r} names no file; expected sqlite:///file.db, or sqlite:////folder/file.db for an absolute path"
        )
    if path == ":memory:":  # SQLite would give each connection a database of its own
        raise ConfigurationError(
            f"{url!r} names no file; expected sqlite:///file.db, or memory:// for what ends with the process"
        )
    if "?" in path:
        raise ConfigurationError(f"{url!r} has options behind a '?'; expected sqlite:///file.db without any")
    if "\0" in path or any(len(os.fsencode(part)) > 255 for part in Path(path).parts):
        raise ConfigurationError(f"no file can be called {path!r}; expected sqlite:///file.db")
    return Path(path)


class SqliteDatabase(Database):
    """An SQLite file that several processes of one host may have open."""

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        super().__init__(url)
        self.path = database_path(url)
        self.clock = clock or SystemClock()
        self._engine: Engine | None = None
        self._beater: Connection | None = None
        self._beside: Connection | None = None
        self._last: sqlite3.Connection | None = None
        self._file: tuple[Path, tuple[int, int]] | None = None
        self._helpers: tuple[tuple[str, tuple[int, int]], ...] = ()
        self._bell = Bell(self.path, self._heard)
        self._commits = 0
        self._synced = _Synced()
        self._guard = _Guard(self.path, self._check_is_there)
        self._durable = True

    @property
    def hears_others(self) -> bool:
        return self._bell.works

    @property
    def place(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        return self.path.exists()

    def elapsed(self) -> float:
        return self.clock.now()

    async def now(self) -> float:
        return self.clock.now()

    def instant(self) -> float | None:
        return self.clock.now()

    async def _open(self) -> None:
        self._durable = True
        if self.path.exists() and _identity(self.path) in _NEVER_CLOSED:
            raise _helper_gone(f"{self.path}-shm")
        engine = self._engine = _engine(self.path)
        reader = _engine(self.path, reads_only=True)
        self._writer = Lane(
            WRITER,
            partial(elsewhere, engine.connect),
            guard=self._guard,
            begin=self._begin,
            committed=self._bell.ring,
            heard=self._heard,
            tidy=lambda connection, _: self._tidy(connection),
        )
        self._reader = Lane(
            READER, partial(elsewhere, reader.connect), guard=self._guard, begin=self._begin_reading
        )
        await self._writer.submit(self._prepare, None)
        self._bell.open()

    async def _shut(self) -> None:
        self._bell.close()
        if self._beater is not None:
            self._beater.close()
            self._beater = None
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None
        self._leave_to_others()
        if self._last is not None and self._last not in _NEVER_CLOSED.values():
            self._last.close()
        self._file, self._helpers, self._last = None, (), None

    def close_beside(self) -> None:
        if self._beside is not None:
            self._beside.close()
            self._beside = None

    def _transact_now(self, handler: Handler, request: Any, *, beside: bool = False) -> Any:
        if self._engine is None:
            raise not_open(self.path)
        with self._guard:
            begin = self._begin_beside if beside else self._begin_beating
            connection = self._connected_beside() if beside else self._connected_beater()
            [result], rings = transact(lambda: connection, [(handler, request)], begin=begin)
        if rings:
            self._bell.ring(rings)
        return result

    def _connected_beater(self) -> Connection:
        assert self._engine is not None
        if self._beater is None:
            self._beater = self._engine.connect()
        return self._beater

    def _connected_beside(self) -> Connection:
        assert self._engine is not None
        if self._beside is None:
            self._beside = self._engine.connect()
            driver_of(self._beside).execute("PRAGMA synchronous=NORMAL")
        return self._beside

    # -- as it is, for those who change its tables

    @contextlib.contextmanager
    def as_it_is(self) -> Iterator[Connection]:
        engine = _engine(self.path, as_it_is=True)
        try:
            with _Guard(self.path), engine.connect() as connection, connection.begin():
                yield connection
        finally:
            engine.dispose()

    def prepare(self, connection: Connection) -> None:
        prepare(connection, self.path)

    def check_whole(self, connection: Connection) -> None:
        _check_whole(set(inspect(connection).get_table_names()), self.path)

    # -- inside

    def _begin(self, connection: Connection, durable: bool) -> _Transaction:
        if durable != self._durable:
            # A NORMAL commit is written but not synced; the next FULL one syncs it as well.
            driver_of(connection).execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        return _Transaction(connection, self.clock, _BUSY_SECONDS, self._synced if durable else None)

    def _begin_reading(self, connection: Connection, _: bool) -> _Transaction:
        return _Transaction(connection, self.clock)

    def _begin_beating(self, connection: Connection, _: bool) -> _Transaction:
        return _Transaction(connection, self.clock, _BUSY_SECONDS)

    def _begin_beside(self, connection: Connection, _: bool) -> _Transaction:
        return _Transaction(connection, self.clock, _BESIDE_SECONDS)

    def _check_is_there(self) -> None:
        # A file that was deleted can still be written to, and nobody would ever see what is written.
        if self._file is None:
            return
        place, identity = self._file
        try:
            found = _identity(place)
        except FileNotFoundError:
            raise StoreUnavailable(f"{self.path} was deleted while it was in use; put it back") from None
        except OSError as exc:  # its folder or its disk is away
            raise StoreUnavailable(f"can't use {self.path}: {exc.strerror}") from exc
        if found != identity:
            raise StoreUnavailable(
                f"{self.path} was replaced while it was in use; start again with the new one"
            )
        # Nor what is written to its log, or by another index of that: while we have the file open SQLite neither
        # removes nor makes one, and whoever finds none makes its own.
        for helper, identity in self._helpers:
            with contextlib.suppress(OSError):
                if _identity(helper) == identity:
                    continue
            self._leave_to_others()
            raise _helper_gone(helper)

    def _leave_to_others(self) -> None:
        """Keep SQLite from tidying up as our connections close, if others may have recorded by another log or index.

        By this index it would overwrite in the file what they have recorded since, and remove the log in which that is.
        If nobody has, it puts into the file what only a log holds that was deleted.
        """
        if self._file is None or self._last is None:
            return
        for helper, identity in self._helpers:
            with contextlib.suppress(OSError):
                if _identity(helper) != identity:
                    if os.path.getsize(helper):
                        _never_close(self._last, self._file[1])
                    return  # another log that is empty is of who has only read, whatever index there is

    def _prepare(self, tx: Tx, requests: Sequence[None]) -> list[None]:
        prepare(tx.connection, self.path)
        place = self.path.resolve()
        self._file = place, _identity(place)
        if self._last is None:
            self._last = _counting(place)
        helpers = [f"{place}-wal", f"{place}-shm"]
        self._helpers = tuple((helper, _identity(helper)) for helper in helpers if os.path.exists(helper))
        return [None] * len(requests)

    def _tidy(self, connection: Connection) -> None:
        # Nobody checkpoints by itself (wal_autocheckpoint=0): SQLite before 3.51.3 may corrupt the file when a
        # checkpoint races with a commit that resets the log (sqlite.org/wal.html#walresetbug). TRUNCATE holds the
        # write lock while it works, so it can't race; when it isn't given the lock soon, the next commit tries again.
        self._commits += 1
        if self._commits % 16 or self._file is None:
            return
        with contextlib.suppress(OSError, sqlite3.Error):
            log = f"{self._file[0]}-wal"
            if os.path.getsize(log) > min(_CHECKPOINT_BYTES, _room(log)):
                elsewhere(partial(_checkpoint, driver_of(connection)))


def _room(log: str) -> int:
    """How large the log may become on its disk: on a full one it couldn't be put into the file, which has to grow."""
    disk = shutil.disk_usage(log)
    return disk.free if disk.total else _CHECKPOINT_BYTES  # some say nothing of their size


class _Synced:
    """Commits that wait for the disk: where it is, if the disk has lately been quick, else in another thread.

    One that somebody goes on `beside` is handed over to a quicker disk as well.
    """

    def __init__(self) -> None:
        self._seconds = 2 * _QUICK_SECONDS

    def commit(self, driver: sqlite3.Connection, *, beside: bool) -> None:
        if beside and self._seconds > _SHORT_SECONDS:
            # Not timed: while Python goes on here, it ends there only when that pauses.
            elsewhere(driver.commit)
        elif self._seconds > _QUICK_SECONDS:
            elsewhere(partial(self._commit, driver))
        else:
            self._commit(driver)

    def _commit(self, driver: sqlite3.Connection) -> None:
        began = time.monotonic()
        driver.commit()
        self._seconds += 0.1 * (time.monotonic() - began - self._seconds)


def _checkpoint(driver: sqlite3.Connection) -> None:
    driver.execute("PRAGMA busy_timeout=250")
    try:
        driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:  # the disk may be full
        driver.execute("PRAGMA busy_timeout=0")


class _Driver:
    """The driver's own connection."""

    __slots__ = ("_connection", "_driver", "_now", "dialect")

    def __init__(self, connection: Connection, driver: sqlite3.Connection, now: float) -> None:
        self.dialect: Dialect = connection.dialect
        self._connection = connection
        self._driver = driver
        self._now = now

    def rows(self, text: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = self._driver.execute(text, values).fetchall()
        return rows

    def ask(self, text: str, values: Sequence[Any]) -> Callable[[], list[tuple[Any, ...]]]:
        rows = self.rows(text, values)
        return lambda: rows

    def each(self, text: str, rows: Sequence[tuple[Any, ...]]) -> int | None:
        return self._driver.executemany(text, rows).rowcount

    def plain(self) -> Connection:
        if is_green():  # a server looks through many rows by itself; here nothing else would go on meanwhile
            raise TooSlow
        return self._connection

    def now(self) -> float:
        return self._now

    def told_now(self) -> float | None:
        return self._now


def driver_of(connection: Connection) -> sqlite3.Connection:
    """The driver's own connection."""
    driver: Any = connection.connection.dbapi_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


def _engine(path: Path, *, reads_only: bool = False, as_it_is: bool = False) -> Engine:
    try:
        # Where SQLite follows a symbolic link to, and has its log.
        folder = (path.resolve() if path.is_symlink() else path).parent
    except RuntimeError as exc:
        raise ConfigurationError(f"{path} is a symbolic link that leads to itself; remove it") from exc
    if not folder.is_dir():
        raise ConfigurationError(
            f"the folder {folder} of the database {path.name} doesn't exist; make it first"
        )
    if path.exists():
        _check_is_database(path)
    elif not os.access(folder, os.W_OK):
        raise ConfigurationError(f"can't make {path}: the folder {folder.resolve()} is read-only")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigurationError(f"{path} is read-only; Paigeant needs to write to it")
    if not os.access(folder, os.W_OK):
        raise ConfigurationError(
            f"the folder {folder.resolve()} of {path.name} is read-only; SQLite has to write files beside the database"
        )
    for helper in (f"{path.resolve()}-wal", f"{path.resolve()}-shm"):
        if _is_withheld(helper):
            raise ConfigurationError(
                f"{helper}, which belongs to {path.name}, is of another user and can't be read and written to; "
                "have all processes that use the database run as one user"
            )
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=NullPool,
        connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False, "isolation_level": None},
        hide_parameters=True,  # what runs are made of stands in no error
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: object) -> None:
        if not as_it_is:
            _check_is_ours(connection, path)
            # Which stays with the file. Of two that switch a new one at the same moment SQLite turns one away, mostly
            # at once, without regard to the timeout, but sometimes only after all of it.
            connection.execute("PRAGMA busy_timeout=0")
            _patiently(connection, "PRAGMA journal_mode=WAL", _BUSY_SECONDS)
        for pragma in ("synchronous=FULL", "wal_autocheckpoint=0", "foreign_keys=OFF"):
            connection.execute(f"PRAGMA {pragma}")
        # Who writes waits for its turn by itself, see below.
        connection.execute(f"PRAGMA busy_timeout={int(_BUSY_SECONDS * 1000) if reads_only else 0}")

    return engine


def _is_withheld(helper: str) -> bool:
    """Whether it is there, and this user can't read and write it."""
    # Once more: who closes the database last deletes it, and one that has just gone can't be read, either.
    return os.path.exists(helper) and not os.access(helper, os.R_OK | os.W_OK) and os.path.exists(helper)


def _patiently(driver: sqlite3.Connection, statement: str, seconds: float) -> None:
    """Execute `statement` once the file is free for it, or raise when it isn't for so long."""
    # SQLite's own waiting sleeps 1, 2, 5, 10, 15 ms and more between its looks, while others hold the lock for less
    # than one: two workers on a file would spend most of their time asleep.
    until = time.monotonic() + seconds
    seconds_asleep = 0.0001
    while True:
        try:
            driver.execute(statement)
            return
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        pause(seconds_asleep * random.uniform(0.5, 1.5))
        seconds_asleep = min(seconds_asleep * 1.5, 0.01)


class _Transaction:
    """One that is committed at the end of the block, or rolled back by an error.

    One that writes takes its turn at once, within `patience` seconds: a deferred transaction that turns into a writing
    one after another commit fails immediately, whatever the busy timeout is. Without `patience` it only reads.
    `synced`: its commit waits for the disk. (Generators would take a tenth of what a short one costs.)
    """

    __slots__ = ("_clock", "_connection", "_driver", "_patience", "_synced", "_tx")

    def __init__(
        self,
        connection: Connection,
        clock: Clock,
        patience: float | None = None,
        synced: _Synced | None = None,
    ) -> None:
        self._connection = connection
        self._driver = driver_of(connection)
        self._clock = clock
        self._patience = patience
        self._synced = synced

    def __enter__(self) -> Tx:
        if self._patience is None:
            self._driver.execute("BEGIN")
        else:
            _patiently(self._driver, "BEGIN IMMEDIATE", self._patience)
        self._tx = Tx(_Driver(self._connection, self._driver, self._clock.now()))
        return self._tx

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._commit()
                return
        except BaseException:
            self._roll_back()
            raise
        self._roll_back()

    def _commit(self) -> None:
        self._connection.commit()
        if not self._driver.in_transaction:
            return  # all of it went through SQLAlchemy
        if self._synced is not None:
            self._synced.commit(self._driver, beside=self._tx.is_beside)
        else:
            self._driver.commit()

    def _roll_back(self) -> None:
        self._connection.rollback()
        if self._driver.in_transaction:
            self._driver.rollback()


def _check_is_database(path: Path) -> None:
    # Without opening it, see `_identity`. What is in it SQLite says.
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a device or pipe"
        raise ConfigurationError(f"{path} is {what}; expected a database file")
    if not os.access(path, os.R_OK):
        raise ConfigurationError(f"can't read {path}: {os.strerror(errno.EACCES)}")
    if path.stat().st_nlink > 1:
        # SQLite names the log after the file: under each name there is another, and what is in one of them is lost.
        raise ConfigurationError(
            f"{path} has another name, by a hard link; remove that, SQLite would have a log for each"
        )


def _no_database(path: Path) -> ConfigurationError:
    """The error for a file that SQLite has said this of: so nothing here has locks on it that reading it could end."""
    start = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(12)
    how = "" if b"SQLite format".startswith(start) else f" (it starts with {start!r})"
    return ConfigurationError(f"{path} is not an SQLite database{how}; name another file in the URL")


def _identity(path: Path | str) -> tuple[int, int]:
    """Which file it is, whatever its name.

    It must not be opened for that: to close it again would give up all locks that SQLite has on it in this process, and
    who closes it in another one would take away its log.
    """
    found = os.stat(path)
    return found.st_dev, found.st_ino


_NEVER_CLOSED: dict[tuple[int, int], sqlite3.Connection] = {}
"""Files of which others have another log or index of it than this process."""


def _never_close(connection: sqlite3.Connection, file: tuple[int, int]) -> None:
    if file not in _NEVER_CLOSED:
        _NEVER_CLOSED[file] = connection
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # nor as the interpreter ends


def _counting(place: Path) -> sqlite3.Connection:
    """A connection that only counts: while it is open no other one is the last, for which SQLite tidies up."""
    connection = sqlite3.connect(place, timeout=_BUSY_SECONDS, check_same_thread=False)
    connection.execute("PRAGMA user_version").fetchall()  # with that it begins
    return connection


def _helper_gone(helper: str) -> StoreUnavailable:
    return StoreUnavailable(f"{helper} was deleted while it was in use; start again")


class _Guard:
    """Turns what the driver reports into errors of ours, after `check`."""

    def __init__(self, path: Path, check: Callable[[], object] = bool) -> None:
        self._path = path
        self._check = check

    def __enter__(self) -> None:
        self._check()

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, UnicodeEncodeError):
            raise no_unicode(str(self._path)) from exc
        if isinstance(exc, (DBAPIError, sqlite3.DatabaseError)) and (ours := self._ours(exc)) is not None:
            raise ours from exc

    def _ours(self, exc: DBAPIError | sqlite3.DatabaseError) -> PaigeantError | None:
        cause = exc.orig if isinstance(exc, DBAPIError) else exc
        if "not a database" in str(cause):
            return _no_database(self._path)
        # A damaged file is plainly a DatabaseError; the other kinds below it are mistakes in a statement.
        if type(cause) is sqlite3.DatabaseError:
            return StoreDamaged(f"can't use {self._path}: {cause}")
        if isinstance(cause, sqlite3.OperationalError):
            is_full = getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            return (Blocked if is_full else StoreUnavailable)(f"can't use {self._path}: {cause}")
        return None


def prepare(connection: Connection, path: Path) -> None:
    """Make sure that the file has the tables of this version: a new one gets them, an older one is migrated.

    Raises SchemaMismatch for a file that newer code has written, or that holds other tables of these names.
    """
    found = current_version(connection)
    names = set(inspect(connection).get_table_names())
    if found == SCHEMA_VERSION:
        _check_whole(names, path)
        return
    if found is None:
        _check_not_foreign(names, path)
        metadata.create_all(connection)
        connection.execute(
            text(f"CREATE TABLE IF NOT EXISTS {VERSION_TABLE} (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
        )
        connection.execute(
            text(f"INSERT INTO {VERSION_TABLE} VALUES (:version)"), {"version": SCHEMA_VERSION}
        )
        return
    from paigeant.migrations import upgrade  # here, because it loads Alembic, which only an old file needs

    upgrade(connection, str(path))


def _check_whole(names: set[str], path: Path) -> None:
    missing = sorted(set(metadata.tables) - names)
    if missing:
        raise SchemaMismatch(
            f"{path} has lost its table '{missing[0]}'; put a copy of the file there, or name another in the URL"
        )


def _check_is_ours(connection: sqlite3.Connection, path: Path) -> None:
    """Raise SchemaMismatch for the database of another program, or of newer code, before anything in it changes."""
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if VERSION_TABLE not in names:
        _check_not_foreign(names, path)
        return
    found = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()
    if found is not None and found[0] != SCHEMA_VERSION:
        from paigeant.migrations import check  # here, because it loads Alembic, which only such a file needs

        check(str(path), found[0])


def _check_not_foreign(names: set[str], path: Path) -> None:
    foreign = sorted(names & set(metadata.tables))
    if foreign:
        raise SchemaMismatch(
            f"{path} has a table '{foreign[0]}' that Paigeant did not make; name another file in the URL"
        )
