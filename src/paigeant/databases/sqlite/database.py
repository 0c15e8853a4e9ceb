"""An SQLite database: its connections, their transactions, and when its log is put into the file."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, inspect

from paigeant.clock import Clock, SystemClock
from paigeant.database import READER, WRITER, Database, not_open
from paigeant.databases.sqlite.connection import (
    Synced,
    Transaction,
    checkpoint,
    driver_of,
    engine_of,
    is_long,
)
from paigeant.databases.sqlite.file import OpenFile, check_usable, database_path
from paigeant.databases.sqlite.schema import check_whole, prepare
from paigeant.databases.sqlite.trouble import Guard
from paigeant.green import elsewhere
from paigeant.lane import Handler, Lane, Tx, transact
from paigeant.wakeup import Bell

__all__ = ["SqliteDatabase"]

_BESIDE_SECONDS = 2.0
"""How long that waits for its turn which nobody waits for."""


class SqliteDatabase(Database):
    """An SQLite file that several processes of one host may have open."""

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        super().__init__(url)
        self.path = database_path(url)
        self.clock = clock or SystemClock()
        self._engine: Engine | None = None
        self._beater: Connection | None = None
        self._beside: Connection | None = None
        self._file = OpenFile(self.path)
        self._bell = Bell(self.path, self._heard)
        self._commits = 0
        self._synced = Synced()
        self._guard = Guard(self.path, self._file.check)
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
        self._file.check_not_left()
        check_usable(self.path)
        engine = self._engine = engine_of(self.path)
        reader = engine_of(self.path, reads_only=True)
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
        self._file.leave()

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
        check_usable(self.path)
        engine = engine_of(self.path, as_it_is=True)
        try:
            with Guard(self.path), engine.connect() as connection, connection.begin():
                yield connection
        finally:
            engine.dispose()

    def prepare(self, connection: Connection) -> None:
        prepare(connection, self.path)

    def check_whole(self, connection: Connection) -> None:
        check_whole(set(inspect(connection).get_table_names()), self.path)

    # -- inside

    def _begin(self, connection: Connection, durable: bool) -> Transaction:
        if durable != self._durable:
            # A NORMAL commit is written but not synced; the next FULL one syncs it as well.
            driver_of(connection).execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        return Transaction(connection, self.clock, synced=self._synced if durable else None)

    def _begin_reading(self, connection: Connection, _: bool) -> Transaction:
        return Transaction(connection, self.clock, reads_only=True)

    def _begin_beating(self, connection: Connection, _: bool) -> Transaction:
        return Transaction(connection, self.clock)

    def _begin_beside(self, connection: Connection, _: bool) -> Transaction:
        return Transaction(connection, self.clock, patience=_BESIDE_SECONDS)

    def _prepare(self, tx: Tx, requests: Sequence[None]) -> list[None]:
        prepare(tx.connection, self.path)
        self._file.note()
        return [None] * len(requests)

    def _tidy(self, connection: Connection) -> None:
        # Nobody checkpoints by itself (wal_autocheckpoint=0): SQLite before 3.51.3 may corrupt the file when a
        # checkpoint races with a commit that resets the log (sqlite.org/wal.html#walresetbug). TRUNCATE holds the
        # write lock while it works, so it can't race; when it isn't given the lock soon, the next commit tries again.
        self._commits += 1
        log = self._file.log
        if self._commits % 16 or log is None:
            return
        with contextlib.suppress(OSError, sqlite3.Error):
            if is_long(log):
                elsewhere(partial(checkpoint, driver_of(connection)))
