"""The tables in an SQLite file: whose they are, and whether they are those of this version."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from paigeant.database import current_version
from paigeant.errors import SchemaMismatch
from paigeant.tables import SCHEMA_VERSION, VERSION_TABLE, metadata

__all__ = ["check_is_ours", "check_whole", "prepare"]


def prepare(connection: Connection, path: Path) -> None:
    """Make sure that the file has the tables of this version: a new one gets them, an older one is migrated.

    Raises SchemaMismatch for a file that newer code has written, or that holds other tables of these names.
    """
    found = current_version(connection)
    names = set(inspect(connection).get_table_names())
    if found == SCHEMA_VERSION:
        check_whole(names, path)
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


def check_whole(names: set[str], path: Path) -> None:
    """Raise SchemaMismatch unless all tables are among the `names` of those that there are."""
    missing = sorted(set(metadata.tables) - names)
    if missing:
        raise SchemaMismatch(
            f"{path} has lost its table '{missing[0]}'; put a copy of the file there, or name another in the URL"
        )


def check_is_ours(connection: sqlite3.Connection, path: Path) -> None:
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
