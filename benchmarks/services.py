"""Servers of a benchmark's own: started for it, durable as in production, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import redis
from tests.services import PostgresServer, RabbitServer, RedisServer, Server, ServerFailed, ServerMissing

from benchmarks.bench import Bench, NotMeasured
from paigeant.databases import open_database

__all__ = ["TRANSPORTS", "Services", "counted", "services"]

TRANSPORTS = ("postgres", "redis", "rabbitmq")

_Kind = TypeVar("_Kind", bound=Server)


class Services:
    """The servers of one benchmark, each started when it is first asked for. `conditions` says how they are set."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, postgres: Sequence[str] = ()) -> None:
        self.conditions: dict[str, str] = {}
        # Nothing but the measured work writes to the log: no checkpoint is due while a round lasts.
        self._postgres = ["checkpoint_timeout = 1h", "max_wal_size = 16GB", *postgres]
        self._folder = folder
        self._stack = stack
        self._running: dict[type[Server], Server] = {}

    @contextlib.contextmanager
    def store(self) -> Iterator[str]:
        """A new database with the tables of this version of the code; gives its URL."""
        with self.database() as url:
            database = open_database(url)
            with database.as_it_is() as connection:
                database.prepare(connection)
            yield url

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """A new database without any tables; gives its URL."""
        server = self._server(PostgresServer, self._postgres)
        with server.database() as url:
            with psycopg.connect(url, autocommit=True) as connection:
                self.conditions["postgres"] = f"{_postgres(connection)}, on {_file_system(self._folder)}"
                connection.execute("CHECKPOINT")
            yield url

    def transport(self, kind: str, store: str) -> str:
        """The URL of a transport, where that isn't the store itself."""
        match kind:
            case "redis":
                url = self._server(RedisServer).url
                self.conditions["redis"] = _redis(url)
                return url
            case "rabbitmq":
                server = self._server(RabbitServer)
                if kind not in self.conditions:
                    self.conditions[kind] = server.ctl("version").strip()
                return server.url
            case _:
                return store

    def _server(self, kind: type[_Kind], lines: Sequence[str] = ()) -> _Kind:
        if kind not in self._running:
            place = Path(tempfile.mkdtemp(dir=self._folder, prefix=f"{kind.name}-"))
            place.chmod(0o755)  # Postgres runs as a user of its own where we are root
            try:
                self._running[kind] = self._stack.enter_context(kind(folder=place, lines=lines))
            except (ServerMissing, ServerFailed) as exc:
                raise NotMeasured(str(exc)) from exc
        server = self._running[kind]
        assert isinstance(server, kind)
        return server


@contextlib.contextmanager
def services(bench: Bench, *, postgres: Sequence[str] = ()) -> Iterator[Services]:
    """Servers whose files are in the folder of the benchmarks, or in the temporary one if it isn't open to others.

    `postgres` are more lines of postgresql.conf.
    """
    bench.folder.mkdir(parents=True, exist_ok=True)
    folder = bench.folder.resolve()
    closed = [place for place in (folder, *folder.parents) if not place.stat().st_mode & 0o001]
    place = Path(tempfile.gettempdir()) if closed and os.geteuid() == 0 else folder
    with contextlib.ExitStack() as stack:
        started = Services(place, stack, postgres)
        yield started
        bench.conditions.update(started.conditions)


def counted(url: str) -> dict[str, float]:
    """What the server of a database has done so far, once nobody is connected to the database any more.

    Sessions add what they have done to the counters at their end, and else only now and then.
    """
    with psycopg.connect(url, autocommit=True) as connection:
        while (
            _one(connection, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()") > 1
        ):
            connection.execute("SELECT pg_sleep(0.02)")
        return {
            "syncs": _one(connection, "SELECT wal_sync FROM pg_stat_wal"),
            "bytes": _one(connection, "SELECT wal_bytes FROM pg_stat_wal"),
            "commits": _one(
                connection, "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
            ),
            # Those that wrote anything: the others have no number.
            "writing commits": _one(
                connection, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
            ),
        }


def _one(connection: psycopg.Connection[Any], query: Any) -> float:
    row = connection.execute(query).fetchone()
    assert row is not None
    return float(row[0])


def _postgres(connection: psycopg.Connection[Any]) -> str:
    names = ("fsync", "synchronous_commit", "full_page_writes", "wal_sync_method", "shared_buffers")
    settings = ", ".join(f"{name} {_text(connection, name)}" for name in names)
    return f"{_text(connection, 'server_version')}, {settings}"


def _text(connection: psycopg.Connection[Any], name: str) -> str:
    row = connection.execute("SELECT current_setting(%s)", [name]).fetchone()
    assert row is not None
    return str(row[0])


def _redis(url: str) -> str:
    with redis.Redis.from_url(url, decode_responses=True) as client:
        found: Any = client.config_get("append*")
        info: Any = client.info("server")
    return f"{info['redis_version']}, appendonly {found['appendonly']}, appendfsync {found['appendfsync']}"


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, as far as the system tells."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "an unknown file system"
    fitting = [(place, kind) for place, kind in mounts if folder.is_relative_to(place)]
    # In a chroot the root may be on no list.
    return max(fitting, key=lambda mount: len(mount[0]), default=("", "an unknown file system"))[1]
