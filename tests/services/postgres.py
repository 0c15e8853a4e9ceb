"""Private Postgres servers, and new databases on any."""

from __future__ import annotations

import fcntl
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, LiteralString
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql
from tests.services.programs import program
from tests.services.server import Server, ServerFailed
from tests.services.session import session_folder

__all__ = ["PostgresServer", "new_database"]


class PostgresServer(Server):
    """A Postgres, user postgres without a password; `lines` are lines of postgresql.conf: `["fsync = off"]`.

    What it has committed outlasts a stop and a kill. fsync is on unless `lines` say otherwise. Its `url` names the
    database `postgres`; `with server.database() as url` gives a new one.
    """

    name = "postgres"

    @property
    def url(self) -> str:
        return f"postgresql://postgres@{self.host}:{self.port}/postgres"

    def database(self, name: str | None = None) -> AbstractContextManager[str]:
        """A context that gives the url of a new, empty database, and drops it at the end."""
        return new_database(self.url, name)

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop it. `fast` ends the sessions and writes all out; `immediate` is a crash that it has to recover from.

        `smart` waits for the clients to leave. Nothing happens when it doesn't run.
        """
        if self.is_running:
            self.send_signal(
                {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode]
            )
            self._wait_for_stop()

    def restart(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop it in this mode and start it again."""
        self.stop(mode)
        self.start()

    def _user(self) -> str | None:
        return unprivileged()

    def _prepare(self) -> None:
        shutil.copytree(_template(), self._data, symlinks=True)
        lines = [
            f"listen_addresses = '{self.host}'",
            f"port = {self.port}",
            "unix_socket_directories = ''",
            "max_connections = 300",
            *self.lines,
        ]
        with (self._data / "postgresql.conf").open("a") as file:
            file.write("\n".join(lines) + "\n")
        (self._data / "pg_hba.conf").write_text("host all all all trust\n")
        give_away(self._data)

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _command(self) -> list[str]:
        return [str(program("postgres")), "-D", str(self._data)]

    def _environment(self) -> Mapping[str, str]:
        return {**super()._environment(), "LANG": "C"}

    def _is_ready(self) -> bool:
        try:
            psycopg.connect(self.url, connect_timeout=30).close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def new_database(server_url: str, name: str | None = None) -> Iterator[str]:
    """Give the url of a new, empty database on this server; drop it at the end, whoever is connected to it."""
    name = name or f"test_{secrets.token_hex(6)}"
    parts = urlsplit(server_url)
    _run(server_url, "CREATE DATABASE {}", name)
    try:
        yield urlunsplit(parts._replace(path=f"/{name}"))
    finally:
        _run(server_url, "DROP DATABASE IF EXISTS {} WITH (FORCE)", name)


def _run(server_url: str, statement: LiteralString, name: str) -> None:
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(sql.Identifier(name)))


def unprivileged() -> str | None:
    """Who runs Postgres when root may not: its own account, or else that of nobody. None when we aren't root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return "nobody"


def give_away(folder: Path) -> None:
    user = unprivileged()
    if user is not None:
        account = pwd.getpwnam(user)
        for file in [folder, *folder.rglob("*")]:
            os.chown(file, account.pw_uid, account.pw_gid)


def _template() -> Path:
    """A cluster as initdb makes it, made once in a session; the servers begin with a copy."""
    folder = session_folder() / "postgres-template"
    with (session_folder() / "postgres-template.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _initdb(folder)
    return folder


def _initdb(folder: Path) -> None:
    user = unprivileged()
    with tempfile.TemporaryDirectory(prefix="paigeant-initdb-") as place:
        cluster = Path(place) / "data"
        give_away(Path(place))
        done = subprocess.run(
            [
                str(program("initdb")),
                f"--pgdata={cluster}",
                "--username=postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--no-locale",
                "--no-sync",
            ],
            cwd=place,
            env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C"},
            user=user,
            group=user and pwd.getpwnam(user).pw_gid,
            extra_groups=[] if user else None,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ServerFailed(f"initdb failed:\n{done.stdout}\n{done.stderr}")
        shutil.move(cluster, folder)
