"""A private PgBouncer in front of a Postgres."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import psycopg
from tests.services.postgres import give_away, unprivileged
from tests.services.programs import program
from tests.services.server import Server

__all__ = ["PgBouncer"]


class PgBouncer(Server):
    """Pools connections to `behind`, the url of a Postgres; `lines` are lines of the section [pgbouncer].

    In the mode `transaction` each transaction of a client may be done on another connection of the server; in the mode
    `session` a client keeps its connection until it leaves.
    """

    name = "pgbouncer"

    def __init__(
        self,
        behind: str,
        *,
        mode: Literal["session", "transaction"],
        lines: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        super().__init__(lines=lines, folder=folder)
        self.behind = urlsplit(behind)
        self.mode = mode

    @property
    def url(self) -> str:
        return self.of(urlunsplit(self.behind))

    def of(self, url: str) -> str:
        """The url of a database of that Postgres, by way of this pooler."""
        parts = urlsplit(url)
        return urlunsplit(parts._replace(netloc=f"{parts.username}@{self.host}:{self.port}"))

    def _user(self) -> str | None:
        return unprivileged()

    def _prepare(self) -> None:
        lines = [
            "[databases]",
            f"* = host={self.behind.hostname} port={self.behind.port}",
            "[pgbouncer]",
            f"listen_addr = {self.host}",
            f"listen_port = {self.port}",
            "unix_socket_dir =",
            "auth_type = trust",
            f"auth_file = {self.folder / 'users.txt'}",
            f"pool_mode = {self.mode}",
            "default_pool_size = 20",
            "max_client_conn = 300",
            *self.lines,
        ]
        (self.folder / "users.txt").write_text(f'"{self.behind.username}" ""\n')
        (self.folder / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
        give_away(self.folder)

    def _command(self) -> list[str]:
        return [str(program("pgbouncer")), str(self.folder / "pgbouncer.ini")]

    def _is_ready(self) -> bool:
        try:
            psycopg.connect(self.url, connect_timeout=30).close()
        except psycopg.OperationalError:
            return False
        return True
