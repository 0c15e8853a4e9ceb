"""A Postgres database: its connections, and transactions in two round trips.

The driver is psycopg 3. It was chosen by measurement over asyncpg for its pipeline mode: a transaction sends what opens
it along with its first question, and all that it writes along with its commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import psycopg
from psycopg import errors
from psycopg.types.string import TextLoader
from sqlalchemy import Connection, Engine, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from paigeant.clock import Clock
from paigeant.database import ENDED, READER, WRITER, Database, current_version, not_open
from paigeant.databases.postgres.bell import PostgresBell
from paigeant.databases.postgres.pipeline import (
    GreenConnection,
    Pipeline,
    ServerClock,
    Transaction,
    driver_of,
)
from paigeant.databases.postgres.place import read, shown
from paigeant.databases.postgres.pooler import check_pooler
from paigeant.databases.postgres.refusal import understood
from paigeant.databases.postgres.session import settings_of
from paigeant.databases.postgres.trouble import (
    Guard,
    meaning,
    reason_of,
    tellable,
    unavailable,
    writes_otherwise,
)
from paigeant.errors import (
    ConfigurationError,
    SchemaMismatch,
    StoreRefused,
    StoreUnavailable,
)
from paigeant.green import elsewhere
from paigeant.lane import Contended, Denied, Handler, Lane, Tx, transact
from paigeant.tables import SCHEMA_VERSION, VERSION_TABLE, metadata

__all__ = ["PostgresDatabase"]

_CONNECT_SECONDS = 5
_STUCK_SECONDS = 15.0
"""How long a transaction may take before its connection is given up: a network can swallow everything in silence."""

_OLDEST_SERVER = 120000

# What a user may not do with the tables of these names, and with the sequences that give those numbers.
_LACKING = text("""
SELECT current_user, current_schema(), what, string_agg(kind, ', ' ORDER BY kind) FROM (
    SELECT what, kind FROM unnest(CAST(:names AS text[])) AS what,
        unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS kind
    WHERE NOT has_table_privilege(what, kind)
    UNION ALL
    SELECT what, 'USAGE'
    FROM unnest(CAST(:numbered AS text[])) AS numbered, pg_get_serial_sequence(numbered, 'id') AS what
    WHERE NOT has_sequence_privilege(what, 'USAGE')
) AS lacking GROUP BY what ORDER BY what
""")
_BEGIN_READING = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_UPGRADE_LOCK = 0x70616967


class PostgresDatabase(Database):
    """A Postgres database that any number of processes use. It takes four connections in each of them, and
    one more where log lines are written to it.

    Its time is the server's. A test may have it go by a `clock` of its own.
    """

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        super().__init__(url)
        self.clock = clock
        given = read(url)
        self._parameters: dict[str, Any] = {
            "connect_timeout": _CONNECT_SECONDS,
            "application_name": "paigeant",
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 15000,
            **given,
            # The pipeline writes it, whatever the URL, the environment or the database would have clients speak.
            "client_encoding": "utf8",
        }
        self._place = shown(given)
        self._engine: Engine | None = None
        self._beater: Connection | None = None
        self._beside: Connection | None = None
        self._opening = _Opening()
        self._bell = PostgresBell(self._parameters, self._heard)
        self._clock = ServerClock()
        self._has_worked = False
        self._guard = Guard(self._place, self._ours)

    @property
    def hears_others(self) -> bool:
        return self._bell.works

    @property
    def place(self) -> str:
        return self._place

    @property
    def exists(self) -> bool:
        return True

    def attend(self, name: str) -> Callable[[], None]:
        return self._bell.attend(name)

    async def now(self) -> float:
        known = self.instant()
        return await super().now() if known is None else known

    def instant(self) -> float | None:
        return self._clock.now() if self.clock is None else self.clock.now()

    def elapsed(self) -> float:
        return super().elapsed() if self.clock is None else self.clock.now()

    async def _open(self) -> None:
        self._engine = self._make_engine()
        loop = asyncio.get_running_loop()
        self._writer = Lane(
            WRITER,
            partial(elsewhere, self._connect),
            guard=self._guard,
            begin=partial(self._begun, None, roughly=True),
            is_lost=_is_lost,
            heard=self._heard,
            tidy=_settle,
            limit=_STUCK_SECONDS,
            cut=_cut,
        )
        self._reader = Lane(
            READER,
            partial(elsewhere, self._connect),
            guard=self._guard,
            begin=partial(self._begun, _BEGIN_READING, roughly=True),
            is_lost=_is_lost,
            limit=_STUCK_SECONDS,
            cut=_cut,
        )
        self._loop = loop
        await self._reader.submit(self._check, None)
        self._has_worked = True
        self._bell.open()

    async def check_rights(self) -> None:
        tables = {
            "names": sorted(metadata.tables),
            "numbered": [
                table.name for table in metadata.sorted_tables if table.autoincrement_column is not None
            ],
        }
        found = await self.ask(lambda connection: connection.execute(_LACKING, tables).all())
        if found:
            user, schema, what, lacks = found[0]
            more = f", and rights on {len(found) - 1} others" if found[1:] else ""
            where = f'IN SCHEMA "{schema}" TO "{user}"'
            raise ConfigurationError(
                f"the user '{user}' of {self.place} lacks {lacks} on {what}{more}; GRANT SELECT, INSERT, UPDATE, "
                f"DELETE ON ALL TABLES {where}; GRANT USAGE ON ALL SEQUENCES {where}"
            )

    async def _shut(self) -> None:
        self._has_worked = False
        await self._bell.close()
        with self._beating:
            if self._beater is not None:
                self._closed(self._beater)
                self._beater = None
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def close_beside(self) -> None:
        if self._beside is not None:
            self._closed(self._beside)
            self._beside = None

    def _transact_now(self, handler: Handler, request: Any, *, beside: bool = False) -> Any:
        with self._guard:
            connected = self._connected_beside if beside else self._connected_beater
            begin = partial(self._begun_in_time, None)
            [result], rings = transact(connected, [(handler, request)], begin=begin, durable=not beside)
            if rings:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody here waits any more
                    self._loop.call_soon_threadsafe(self._heard, frozenset(rings))
                _settle(self._connected_beater(), rings)
        return result

    def _connected_beater(self) -> Connection:
        if self._beater is not None and _is_lost(self._beater):
            self._closed(self._beater)
            self._beater = None
        if self._beater is None:
            self._beater = self._connect()
        return self._beater

    def _connected_beside(self) -> Connection:
        if self._beside is not None and _is_lost(self._beside):
            self.close_beside()
        if self._beside is None:
            self._beside = self._connect()
        return self._beside

    def _closed(self, connection: Connection) -> None:
        with contextlib.suppress(Exception):  # what is lost can't be closed properly
            if _is_lost(connection):
                connection.invalidate()
            connection.close()

    def _connect(self) -> Connection:
        if self._engine is None:
            raise not_open(self.place)
        try:
            return self._engine.connect()
        finally:
            if self._opening.watch is not None:
                self._opening.watch.cancel()
                self._opening.watch = None

    # -- as it is, for those who change its tables

    @contextlib.contextmanager
    def as_it_is(self) -> Iterator[Connection]:
        engine = self._make_engine(plain=True)
        try:
            with self._guard, engine.connect() as connection, connection.begin():
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_UPGRADE_LOCK})"))
                yield connection
        finally:
            engine.dispose()

    def prepare(self, connection: Connection) -> None:
        from paigeant.migrations import upgrade  # here, because it loads Alembic

        if current_version(connection) is None:
            encoding = connection.execute(text("SHOW server_encoding")).scalar_one()
            if encoding != "UTF8":
                raise writes_otherwise(self.place, encoding)
            foreign = sorted(set(inspect(connection).get_table_names()) & set(metadata.tables))
            if foreign:
                raise SchemaMismatch(
                    f"{self.place} has a table '{foreign[0]}' that Paigeant did not make; name another database, "
                    "or a schema of its own by ?options=-csearch_path%3Dpaigeant"
                )
        upgrade(connection, self.place)
        self.check_whole(connection)

    def check_whole(self, connection: Connection) -> None:
        lost = [name for name in sorted(metadata.tables) if not inspect(connection).has_table(name)]
        if lost:
            raise SchemaMismatch(
                f"{self.place} has lost its table '{lost[0]}'; restore it from a backup, or name another database"
            )

    # -- inside

    def _make_engine(self, *, plain: bool = False) -> Engine:
        def connect() -> Any:
            try:
                driver = GreenConnection.connect(**self._parameters, autocommit=True)
            except psycopg.OperationalError as exc:
                if self._has_worked:  # it is waited for, whatever the reason
                    raise
                raise understood(exc, self._parameters) from exc
            if not plain:
                self._opening.watch = _watched(driver)
            # What was recorded comes back byte for byte, and is parsed by whoever needs it.
            for kind in ("json", "jsonb"):
                driver.adapters.register_loader(kind, TextLoader)
            session = settings_of(driver.info.server_version, plain=plain)
            driver.execute("; ".join(f"SET {name} = '{value}'" for name, value in session.items()))
            if plain:
                driver.autocommit = False
            else:
                driver.prepare_threshold = None  # it would do away with ours along with its own
            return driver

        return create_engine(
            "postgresql+psycopg://",
            creator=connect,
            poolclass=NullPool,
            pool_reset_on_return=None,  # a connection that is given back is closed, and may be lost already
            paramstyle="format",
            use_native_hstore=False,  # it would be looked for at the first connection
            hide_parameters=True,  # what runs are made of stands in no error
            # An upgrade that has waited for another sees what that has made.
            isolation_level="READ COMMITTED" if plain else "AUTOCOMMIT",
        )

    def _check(self, tx: Tx, requests: Sequence[None]) -> list[None]:
        connection = tx.connection
        row = connection.execute(
            text(
                "SELECT current_setting('server_version_num')::int, pg_is_in_recovery(), "
                "current_setting('default_transaction_read_only')::bool, current_setting('server_encoding'), "
                "pg_backend_pid(), "
                "(SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = to_regclass(:one))"
            ),
            {"one": VERSION_TABLE},
        ).one()
        version, is_replica, reads_only, encoding, process, schema = row
        if process != driver_of(connection).info.backend_pid:  # there is a pooler in between
            check_pooler(self._parameters, self.place)
        if version < _OLDEST_SERVER:
            raise ConfigurationError(f"{self.place} is a Postgres of before version 12; expected a newer one")
        if is_replica:
            raise StoreUnavailable(
                f"{self.place} is a replica that can't be written to; name the primary, or all hosts with "
                "?target_session_attrs=read-write"
            )
        if reads_only:
            raise StoreUnavailable(
                f"{self.place} only lets itself be read; expected default_transaction_read_only = off"
            )
        if encoding != "UTF8":
            raise writes_otherwise(self.place, encoding)
        found = current_version(connection)
        if found is None:
            raise SchemaMismatch(
                f"{self.place} has no tables of Paigeant yet; `paigeant db upgrade` makes them"
            )
        if found != SCHEMA_VERSION:
            from paigeant.migrations import check  # here, because it loads Alembic

            check(self.place, found)
            raise SchemaMismatch(
                f"{self.place} has the tables of migration {found}, this version of Paigeant needs "
                f"{SCHEMA_VERSION}; `paigeant db upgrade` brings them there"
            )
        self._bell.schema = schema
        return [None] * len(requests)

    @contextlib.contextmanager
    def _begun(
        self, opening: str | None, connection: Connection, durable: bool, *, roughly: bool = False
    ) -> Iterator[Tx]:
        clock = None if self.clock is None else self.clock.now
        driver = Transaction(connection, clock, self._clock, roughly=roughly)
        try:
            driver.begin(opening, durable=durable)
            tx = Tx(driver, foresees=roughly)
            yield tx
            # Rung for right behind the commit, not in it: a NOTIFY makes the commits of all wait for one another.
            ends = {name for name in tx.rings if name.startswith(ENDED)}
            driver.commit(*self._bell.rings(tx.rings - ends))
            # Who hears of an end relies on it. What is foreseen may be wrong, and the transaction undone.
            with contextlib.suppress(psycopg.Error):  # it is committed, and others will look by themselves
                driver.follow(*self._bell.rings(ends))
        except (psycopg.Error, DBAPIError) as exc:
            driver.abandon()
            cause = exc.orig if isinstance(exc, DBAPIError) else exc
            if isinstance(cause, errors.ReadOnlySqlTransaction):
                driver.close()  # perhaps another server has become the primary: it has to be looked for
            elif isinstance(cause, errors.FeatureNotSupported):
                # Somebody has changed the type of a column. What was prepared on this connection gives the old one.
                driver.close()
                raise Contended(reason_of(exc), is_lost=True) from exc
            elif _is_lost(connection):
                # Out of patience with us, the server has done nothing of it, whatever we have sent meanwhile. Whoever
                # only reads, reads again.
                does_nothing = opening is _BEGIN_READING or not driver.committing
                if does_nothing or isinstance(cause, errors.IdleInTransactionSessionTimeout):
                    raise Contended(reason_of(exc), is_lost=True) from exc
                raise unavailable(self.place, reason_of(exc)) from exc
            ours = self._ours(exc)
            if ours is exc:
                raise
            raise ours from tellable(exc)
        except BaseException:
            driver.abandon()
            raise

    @contextlib.contextmanager
    def _begun_in_time(self, opening: str | None, connection: Connection, durable: bool) -> Iterator[Tx]:
        watch = _watched(driver_of(connection))
        try:
            with self._begun(opening, connection, durable) as tx:
                yield tx
        finally:
            watch.cancel()

    def _ours(self, exc: psycopg.Error | DBAPIError) -> Exception:
        """What an error of the driver means here.

        What a setting or a migration has to mend before a database is opened, its administrator has changed since, and
        may change back: a password, a right, a table. No step may fail for it, and no result be lost.
        """
        ours = meaning(exc, self.place)
        if not self._has_worked or not isinstance(ours, (ConfigurationError, SchemaMismatch)):
            return ours
        cause = exc.orig if isinstance(exc, DBAPIError) else exc
        if isinstance(cause, psycopg.IntegrityError):  # of these rows, or what was to be deleted
            return ours
        was_connected = isinstance(cause, psycopg.Error) and cause.sqlstate is not None
        return (Denied if was_connected else StoreRefused)(str(ours))


class _Opening(threading.local):
    """What watches over the connection that a thread opens. Nothing that is asked on it then is a transaction yet."""

    watch: threading.Timer | None = None


def _settle(connection: Connection, rings: set[str]) -> None:
    if rings:
        Pipeline.of(connection).settle_quietly()  # should it fail, the others look by themselves, only later


def _is_lost(connection: Connection) -> bool:
    return connection.closed or connection.invalidated or driver_of(connection).closed


def _watched(driver: psycopg.Connection[Any]) -> threading.Timer:
    """Cuts the connection off unless it is cancelled in time."""
    watch = threading.Timer(_STUCK_SECONDS, _cut_driver, [driver])
    watch.daemon = True
    watch.start()
    return watch


def _cut(connection: Connection) -> None:
    with contextlib.suppress(Exception):  # it is just being closed
        _cut_driver(driver_of(connection))


def _cut_driver(driver: psycopg.Connection[Any]) -> None:
    """End a connection under whoever waits for an answer on it: it gets an error instead."""
    with contextlib.suppress(Exception):  # it is just being closed
        handle = socket.socket(fileno=os.dup(driver.fileno()))
        with handle:
            handle.shutdown(socket.SHUT_RDWR)
