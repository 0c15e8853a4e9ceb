"""Questions to the store of a test, past the product: on SQLite and on Postgres."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import psycopg
from tests.patience import PATIENCE

from paigeant.databases import open_database

__all__ = ["make_tables", "rows", "sqlite_file", "write"]


def rows(url: str, query: str) -> list[Any]:
    """What the database says."""
    if url.startswith("sqlite:"):
        with contextlib.closing(sqlite3.connect(sqlite_file(url), timeout=PATIENCE)) as connection:
            return connection.execute(query).fetchall()
    with psycopg.connect(url, autocommit=True) as server:
        return server.execute(query.encode()).fetchall()


def write(url: str, statement: str) -> None:
    """Change it behind the product's back."""
    if url.startswith("sqlite:"):
        with contextlib.closing(sqlite3.connect(sqlite_file(url), timeout=PATIENCE)) as connection:
            connection.execute(statement)
            connection.commit()
    else:
        with psycopg.connect(url, autocommit=True) as server:
            server.execute(statement.encode())


def sqlite_file(url: str) -> Path:
    """The file that a url of SQLite names."""
    return Path(url.removeprefix("sqlite:///"))


def make_tables(url: str) -> None:
    """What `paigeant db upgrade` does."""
    database = open_database(url)
    with database.as_it_is() as connection:
        database.prepare(connection)
