"""Postgres databases with Paigeant's tables, for tests. To empty one is quicker than to make another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql
from tests.services import new_database

from paigeant.databases.postgres import PostgresDatabase
from paigeant.tables import metadata

__all__ = ["database_with_tables", "empty", "make_tables"]


def make_tables(url: str) -> None:
    """Have the newest tables there, as `paigeant db upgrade` does."""
    database = PostgresDatabase(url)
    with database.as_it_is() as connection:
        database.prepare(connection)


@contextmanager
def database_with_tables(server_url: str) -> Iterator[str]:
    """The url of a new database with tables, dropped at the end."""
    with new_database(server_url) as url:
        make_tables(url)
        yield url


def empty(url: str) -> None:
    """Delete all rows."""
    with psycopg.connect(url, autocommit=True) as connection, connection.pipeline():
        for table in metadata.tables:
            connection.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(table)))
