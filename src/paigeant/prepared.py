"""Prepared: a statement that SQLAlchemy writes once for each dialect, and the driver then runs by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Boolean,
    ClauseElement,
    ColumnElement,
    Dialect,
    Double,
    FromClause,
    Insert,
    Integer,
    Table,
    bindparam,
    cast,
    literal_column,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

if TYPE_CHECKING:
    from paigeant.lane import Tx

__all__ = ["MOST_BYTES", "Answer", "Keyed", "Prepared", "each_of", "instant", "is_longer", "item", "upsert"]


MOST_BYTES = 2**31 - 1
"""What no value in a database exceeds."""

Answer = Callable[[], list[tuple[Any, ...]]]
"""Gives the rows that were asked for."""


class Prepared:
    """A statement that is compiled once and then run with plain tuples, in the order of its parameters.

    SQLAlchemy's own execution handles types, defaults and naming anew for each row; here all of that is known.
    `statement` may be a function that writes it for the dialect of a name, where the dialects differ.
    """

    def __init__(
        self, statement: ClauseElement | Callable[[str], ClauseElement], parameters: Sequence[str] = ()
    ) -> None:
        self._statement = statement
        self._parameters = list(parameters)
        self._written: dict[str, tuple[str, list[int] | None]] = {}

    def rows(self, tx: Tx, *values: Any) -> list[tuple[Any, ...]]:
        """What the statement gives for one set of `values`."""
        text, places = self._for(tx.driver.dialect)
        return tx.driver.rows(text, values if places is None else [values[place] for place in places])

    def ask(self, tx: Tx, *values: Any) -> Answer:
        """Like `rows`, to be read later: what is asked meanwhile goes along in one round trip."""
        text, places = self._for(tx.driver.dialect)
        return tx.driver.ask(text, values if places is None else [values[place] for place in places])

    def each(self, tx: Tx, rows: list[tuple[Any, ...]]) -> int | None:
        """Run it for each of `rows`, or for none; gives how many it changed, None where that isn't told so soon."""
        if not rows:
            return 0
        text, places = self._for(tx.driver.dialect)
        if places is not None:
            rows = [tuple(row[place] for place in places) for row in rows]
        return tx.driver.each(text, rows)

    def _for(self, dialect: Dialect) -> tuple[str, list[int] | None]:
        """The statement for a dialect, and in which order that takes the parameters, where it isn't their own."""
        written = self._written.get(dialect.name)
        if written is None:
            statement = self._statement
            if not isinstance(statement, ClauseElement):
                statement = statement(dialect.name)
            columns = self._parameters if isinstance(statement, Insert) else None
            compiled: Any = statement.compile(dialect=dialect, column_keys=columns)
            order = list(compiled.positiontup or ())
            if sorted(order) != sorted(self._parameters):
                raise AssertionError(f"parameters are {order}, not {self._parameters}")
            places = None if order == self._parameters else [self._parameters.index(name) for name in order]
            written = self._written[dialect.name] = str(compiled), places
        return written


class Keyed:
    """A question about what there is for each of some keys: one statement for a single key, and one for several.

    `query` writes both. It is given what to select from, a row for each key, and the values of that row's key: those of
    `columns`. A key of one column is a plain value. The other `parameters` come first in both.

    A server that has nothing but parameters needs half the time for one key that JSON takes; for two it needs as long.
    """

    def __init__(
        self,
        query: Callable[[FromClause, Sequence[ColumnElement[Any]]], ClauseElement],
        columns: Sequence[ColumnElement[Any]],
        parameters: Sequence[str] = (),
    ) -> None:
        names = [f"key{place}" for place in range(len(columns))]
        values = [bindparam(name, type_=column.type) for name, column in zip(names, columns, strict=True)]
        self._is_plain = len(columns) == 1
        self._one = Prepared(
            query(select(literal_column("1")).subquery("one"), values), [*parameters, *names]
        )
        keys = each_of(bindparam("keys")).table_valued("value")
        items = [_item(keys.c.value, place, column) for place, column in enumerate(columns)]
        self._several = Prepared(
            query(keys, [keys.c.value] if self._is_plain else items), [*parameters, "keys"]
        )

    def rows(self, tx: Tx, keys: Sequence[Any], *values: Any) -> list[tuple[Any, ...]]:
        """What there is for these keys."""
        statement, key = self._for(keys)
        return statement.rows(tx, *values, *key)

    def ask(self, tx: Tx, keys: Sequence[Any], *values: Any) -> Answer:
        """Like `rows`, to be read later."""
        statement, key = self._for(keys)
        return statement.ask(tx, *values, *key)

    def each(self, tx: Tx, keys: Sequence[Any]) -> None:
        """The same where nobody wants to know."""
        statement, key = self._for(keys)
        statement.each(tx, [key])

    def _for(self, keys: Sequence[Any]) -> tuple[Prepared, tuple[Any, ...]]:
        if len(keys) == 1:
            key = (keys[0],) if self._is_plain else tuple(keys[0])
            # Half of a surrogate pair is no parameter. JSON can say it: SQLite finds nothing then, Postgres says why.
            for value in key:
                if type(value) is str and not value.isascii():
                    break
            else:
                return self._one, key
        return self._several, (json.dumps(keys),)


def _item(array: ColumnElement[Any], place: int, column: ColumnElement[Any]) -> ColumnElement[Any]:
    text = item(array, literal_column(str(place)))
    return cast(text, Integer) if isinstance(column.type, Integer) else text


_INSERTS: dict[str, Callable[[Table], Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def upsert(
    table: Table,
    columns: Sequence[str],
    *,
    key: Sequence[str],
    update: Callable[[Any], dict[str, Any]] | None,
) -> Prepared:
    """Inserts rows of `columns`. One whose `key` is there already is changed as `update` says, from the new row.

    Without `update` it stays as it is.
    """
    ordered = [column.name for column in table.c if column.name in columns]

    def statement(dialect: str) -> ClauseElement:
        insert = _INSERTS[dialect](table)
        if update is None:
            unchanged: ClauseElement = insert.on_conflict_do_nothing(index_elements=list(key))
            return unchanged
        changed: ClauseElement = insert.on_conflict_do_update(
            index_elements=list(key), set_=update(insert.excluded)
        )
        return changed

    return Prepared(statement, ordered)


class each_of(FunctionElement[Any]):  # noqa: N801  # a function of SQL
    """The items of a JSON array, as rows with the column `value`; of `.table_valued("value")`."""

    name = "each_of"
    inherit_cache = True


class item(FunctionElement[Any]):  # noqa: N801
    """The text at a place of a JSON array: item(array, literal_column("0"))."""

    name = "item"
    inherit_cache = True


class is_longer(FunctionElement[bool]):  # noqa: N801
    """Whether a JSON text has more bytes than a bound: is_longer(column, bound)."""

    name = "is_longer"
    type = Boolean()
    inherit_cache = True


class instant(FunctionElement[Any]):  # noqa: N801
    """The instant of the transaction: the one that is given, or the server's own where that is null."""

    name = "instant"
    type = Double()
    inherit_cache = True


@compiles(each_of, "sqlite")
def _each_of_in_sqlite(element: each_of, compiler: SQLCompiler, **kw: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **kw)})"


@compiles(each_of, "postgresql")
def _each_of_in_postgres(element: each_of, compiler: SQLCompiler, **kw: Any) -> str:
    return f"json_array_elements_text(CAST({compiler.process(element.clauses, **kw)} AS JSON))"


@compiles(item, "sqlite")
def _item_in_sqlite(element: item, compiler: SQLCompiler, **kw: Any) -> str:
    array, place = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"json_extract({array}, '$[{place}]')"


@compiles(item, "postgresql")
def _item_in_postgres(element: item, compiler: SQLCompiler, **kw: Any) -> str:
    array, place = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"(CAST({array} AS JSON) ->> {place})"


@compiles(is_longer, "sqlite")
def _is_longer_in_sqlite(element: is_longer, compiler: SQLCompiler, **kw: Any) -> str:
    value, bound = (compiler.process(clause, **kw) for clause in element.clauses)
    # Of a text SQLite counts characters.
    return f"(length(CAST({value} AS BLOB)) > {bound})"


@compiles(is_longer, "postgresql")
def _is_longer_in_postgres(element: is_longer, compiler: SQLCompiler, **kw: Any) -> str:
    value, bound = (compiler.process(clause, **kw) for clause in element.clauses)
    # To count them it is read and unpacked, which takes 10 ms a megabyte. What takes more than that as it is kept,
    # packed perhaps and with a header of 4 bytes at most, needn't be.
    return (
        f"CASE WHEN {bound} = {MOST_BYTES} THEN false WHEN pg_column_size({value}) - 4 > {bound} THEN true "
        f"ELSE octet_length(CAST({value} AS TEXT)) > {bound} END"
    )


@compiles(instant, "sqlite")
def _instant_in_sqlite(element: instant, compiler: SQLCompiler, **kw: Any) -> str:
    return compiler.process(element.clauses, **kw)


@compiles(instant, "postgresql")
def _instant_in_postgres(element: instant, compiler: SQLCompiler, **kw: Any) -> str:
    # It stays the same within a transaction, so that an index can go by it.
    given = compiler.process(element.clauses, **kw)
    return f"coalesce(CAST({given} AS float8), extract(epoch FROM transaction_timestamp())::float8)"
