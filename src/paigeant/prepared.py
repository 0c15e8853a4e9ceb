"""Prepared: a statement that SQLAlchemy writes once, for the dialect at hand, and the driver then runs by itself."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ClauseElement, Connection, Insert

__all__ = ["Prepared", "driver_of"]


class Prepared:
    """A statement that is compiled once and then run with plain tuples, in the order of its parameters.

    SQLAlchemy's own execution handles types, defaults and naming anew for each row; here all of that is known.
    """

    def __init__(self, statement: ClauseElement, parameters: Sequence[str] = ()) -> None:
        self._statement = statement
        self._parameters = list(parameters)
        self._texts: dict[str, str] = {}

    def rows(self, connection: Connection, *values: Any) -> list[tuple[Any, ...]]:
        """What the statement gives for one set of `values`."""
        rows: list[tuple[Any, ...]] = driver_of(connection).execute(self._text(connection), values).fetchall()
        return rows

    def each(self, connection: Connection, rows: list[tuple[Any, ...]]) -> None:
        """Run it for each of `rows`; none at all is harmless."""
        if rows:
            driver_of(connection).executemany(self._text(connection), rows)

    def _text(self, connection: Connection) -> str:
        dialect = connection.dialect
        text = self._texts.get(dialect.name)
        if text is None:
            columns = self._parameters if isinstance(self._statement, Insert) else None
            compiled: Any = self._statement.compile(dialect=dialect, column_keys=columns)
            order = list(compiled.positiontup or ())
            if order != self._parameters:
                raise AssertionError(f"parameters are in the order {order}, not {self._parameters}")
            text = self._texts[dialect.name] = str(compiled)
        return text


def driver_of(connection: Connection) -> sqlite3.Connection:
    """The driver's own connection: a small statement through SQLAlchemy takes several times as long."""
    driver: Any = connection.connection.dbapi_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver
