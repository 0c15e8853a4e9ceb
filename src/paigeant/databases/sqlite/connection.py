"""Connections to an SQLite file: how they are made, and how their transactions begin, and end on the disk."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Dialect, Engine, create_engine, event
from sqlalchemy.pool import NullPool

from paigeant.clock import Clock
from paigeant.databases.sqlite.schema import check_is_ours
from paigeant.green import TooSlow, elsewhere, is_green, pause
from paigeant.lane import Tx

__all__ = [
    "Synced",
    "Transaction",
    "checkpoint",
    "counting",
    "driver_of",
    "engine_of",
    "is_long",
]

_CHECKPOINT_BYTES = 16 * 1024 * 1024
_BUSY_SECONDS = 15.0
_QUICK_SECONDS = 0.002
"""What a commit may take on average that the event loop waits for."""

_SHORT_SECONDS = 0.0003
"""The same where somebody goes on meanwhile: to hand it over and hear of its end takes nearly as long."""


def engine_of(path: Path, *, reads_only: bool = False, as_it_is: bool = False) -> Engine:
    """What makes connections to the file. `as_it_is`: whatever is in it."""
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=NullPool,
        connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False, "isolation_level": None},
        hide_parameters=True,  # what runs are made of stands in no error
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: object) -> None:
        if not as_it_is:
            check_is_ours(connection, path)
            # Which stays with the file. Of two that switch a new one at the same moment SQLite turns one away, mostly
            # at once, without regard to the timeout, but sometimes only after all of it.
            connection.execute("PRAGMA busy_timeout=0")
            _patiently(connection, "PRAGMA journal_mode=WAL", _BUSY_SECONDS)
        for pragma in ("synchronous=FULL", "wal_autocheckpoint=0", "foreign_keys=OFF"):
            connection.execute(f"PRAGMA {pragma}")
        # Who writes waits for its turn by itself, see below.
        connection.execute(f"PRAGMA busy_timeout={int(_BUSY_SECONDS * 1000) if reads_only else 0}")

    return engine


def counting(place: Path) -> sqlite3.Connection:
    """A connection that only counts: while it is open no other one is the last, for which SQLite tidies up."""
    connection = sqlite3.connect(place, timeout=_BUSY_SECONDS, check_same_thread=False)
    connection.execute("PRAGMA user_version").fetchall()  # with that it begins
    return connection


def driver_of(connection: Connection) -> sqlite3.Connection:
    """The driver's own connection."""
    driver: Any = connection.connection.dbapi_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


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


class Transaction:
    """One that is committed at the end of the block, or rolled back by an error.

    One that writes takes its turn at once, within `patience` seconds, which are many unless told otherwise: a deferred
    transaction that turns into a writing one after another commit fails immediately, whatever the busy timeout is.
    `synced`: its commit waits for the disk. (Generators would take a tenth of what a short one costs.)
    """

    __slots__ = ("_clock", "_connection", "_driver", "_patience", "_reads_only", "_synced", "_tx")

    def __init__(
        self,
        connection: Connection,
        clock: Clock,
        *,
        reads_only: bool = False,
        patience: float | None = None,
        synced: Synced | None = None,
    ) -> None:
        self._connection = connection
        self._driver = driver_of(connection)
        self._clock = clock
        self._reads_only = reads_only
        self._patience = patience
        self._synced = synced

    def __enter__(self) -> Tx:
        if self._reads_only:
            self._driver.execute("BEGIN")
        else:
            seconds = _BUSY_SECONDS if self._patience is None else self._patience
            _patiently(self._driver, "BEGIN IMMEDIATE", seconds)
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


class Synced:
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


def is_long(log: str) -> bool:
    """Whether the log has become so long that it should be put into the file."""
    return os.path.getsize(log) > min(_CHECKPOINT_BYTES, _room(log))


def _room(log: str) -> int:
    """How large the log may become on its disk: on a full one it couldn't be put into the file, which has to grow."""
    disk = shutil.disk_usage(log)
    return disk.free if disk.total else _CHECKPOINT_BYTES  # some say nothing of their size


def checkpoint(driver: sqlite3.Connection) -> None:
    """Put the log into the file, if nobody else writes just now."""
    driver.execute("PRAGMA busy_timeout=250")
    try:
        driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:  # the disk may be full
        driver.execute("PRAGMA busy_timeout=0")
