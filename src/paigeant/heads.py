"""Heads: what decisions have to know of steps, read while their runs are locked, or foreseen and then checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Float,
    FromClause,
    Integer,
    Select,
    String,
    and_,
    bindparam,
    case,
    cast,
    column,
    extract,
    func,
    literal_column,
    null,
    select,
    table,
)

from paigeant.lane import Tx
from paigeant.ledger import Head
from paigeant.prepared import Keyed, Prepared, instant
from paigeant.rows import KEY, PHASES, RUNS, STEPS, of_runs
from paigeant.store import StepKey
from paigeant.tables import step_executions, workflow_runs

__all__ = ["MISJUDGED", "STUCK_SECONDS", "foreseen_heads", "heads_of", "lock_runs"]

_HELD = (
    step_executions.c.seq,
    workflow_runs.c.status,
    step_executions.c.status,
    step_executions.c.epoch,
    step_executions.c.attempt,
    step_executions.c.worker,
)
"""What of a head is foreseen, behind its key."""

_HEAD = (
    *_HELD,
    step_executions.c.not_before,
    step_executions.c.wake_at,
    step_executions.c.created_at,
)


def _head_query(keys: FromClause, key: Sequence[ColumnElement[Any]]) -> Select[Any]:
    # A join with the keys as a table: SQLite answers `(a, b, c) IN (...)` with a scan of the whole index.
    return (
        select(*KEY, *_HEAD)
        .select_from(keys)
        .join(step_executions, _equal(KEY, key))
        .join(workflow_runs, workflow_runs.c.id == step_executions.c.workflow_id)
    )


MISJUDGED = "Paigeant looks again: a step was not as it was taken to be"
"""Is in the error with which a server ends a transaction that went by what was foreseen wrongly."""


def _foreseen_query(heads: FromClause, head: Sequence[ColumnElement[Any]]) -> Select[Any]:
    """The same for heads as they are foreseen; one that is otherwise, or isn't there, is an error: MISJUDGED."""
    steps, known = step_executions.c, len(KEY)
    as_foreseen = (
        column.is_not_distinct_from(value) for column, value in zip(_HELD, head[known:], strict=True)
    )
    is_so = and_(*as_foreseen, steps.not_before <= instant(null()))
    # What can't be read as a number stands in the server's log, so it says what it is.
    checked = cast(case((is_so, _text("1")), else_=_text(MISJUDGED)), Integer)
    return (
        select(*KEY, *_HEAD, checked)
        .select_from(heads)
        .outerjoin(step_executions, _equal(KEY, head[:known]))
        .outerjoin(workflow_runs, workflow_runs.c.id == steps.workflow_id)
    )


def _text(text: str) -> ColumnElement[str]:
    return literal_column(f"'{text}'", String)


def _equal(
    columns: Sequence[ColumnElement[Any]], values: Sequence[ColumnElement[Any]]
) -> ColumnElement[bool]:
    return and_(*(column == value for column, value in zip(columns, values, strict=True)))


def _lock(*, skip: bool) -> Keyed:
    def locked(rows: Select[Any]) -> Select[Any]:
        # In one order, so that no two transactions wait for each other.
        return rows.order_by(workflow_runs.c.id).with_for_update(
            of=workflow_runs, key_share=True, skip_locked=skip
        )

    return of_runs(workflow_runs, workflow_runs.c.id, more=locked)


_LOCK, _LOCK_FREE = _lock(skip=False), _lock(skip=True)

STUCK_SECONDS = 6.0
"""After so long a transaction whose server waits for its client is stuck: the client was stopped, or cut off.

Longer than one waits for a lock. The server itself ends what is idle in a transaction, but not what has stopped between
two statements of a pipeline: the rest of that may always be on its way.
"""

_others = table(
    "pg_stat_activity",
    *map(column, ("pid", "datname", "usename", "application_name", "wait_event", "state", "xact_start")),
).c
_END_STUCK = Prepared(
    select(func.pg_terminate_backend(_others.pid)).where(
        _others.datname == func.current_database(),
        _others.usename == func.current_user(),
        _others.application_name == func.current_setting(literal_column("'application_name'")),
        _others.wait_event == literal_column("'ClientRead'"),
        _others.state == literal_column("'active'"),
        extract("epoch", func.clock_timestamp() - _others.xact_start) > bindparam("seconds", type_=Float),
    ),
    ["seconds"],
)


def lock_runs(tx: Tx, workflow_ids: Collection[str], *, only_free: bool = False) -> set[str]:
    """Keep other transactions from changing these runs, and read what they have committed from here on.

    A run's row is the lock for all of its rows. `only_free` leaves out those that another transaction holds now; gives
    those that are locked, and sees to it that a process that is stuck doesn't hold the others for ever. In SQLite there
    is one writer at a time, and nothing to do.
    """
    ids = set(workflow_ids)
    if tx.driver.dialect.name == "sqlite" or ids <= tx.locked:
        return ids
    if only_free:
        free = {run_id for (run_id,) in _LOCK_FREE.rows(tx, sorted(ids))}
        if len(free) < len(ids):
            _END_STUCK.rows(tx, STUCK_SECONDS)
        tx.locked |= free
        return free
    _LOCK.each(tx, sorted(ids - tx.locked))
    tx.locked |= ids
    return ids


_HEADS = Keyed(_head_query, KEY)
_FORESEEN = Keyed(_foreseen_query, (*KEY, *_HELD))


def heads_of(tx: Tx, keys: Sequence[StepKey]) -> dict[StepKey, Head]:
    """What decisions need to know of those of the steps that exist. Their runs are locked."""
    lock_runs(tx, [key.workflow_id for key in keys])
    return _heads(_HEADS.rows(tx, keys))


def foreseen_heads(
    tx: Tx, foreseen: Collection[Head | None]
) -> tuple[dict[StepKey, Head], Callable[[], dict[StepKey, Head]]] | None:
    """The heads as they are foreseen, and what reads them as they are once the transaction is committed.

    It isn't where they are otherwise: it raises Misjudged. None when not all of them are foreseen, or the transaction
    doesn't go by that. Their runs are locked.
    """
    if not tx.foresees:
        return None
    heads = {head.key: head for head in foreseen if head is not None}
    if len(heads) < len(foreseen):
        return None
    lock_runs(tx, [key.workflow_id for key in heads])
    told = [
        (*head.key, head.seq, head.run, head.status, head.epoch, head.attempt, head.worker)
        for head in heads.values()
    ]
    found = _FORESEEN.ask(tx, told)
    return heads, lambda: _heads(row[:-1] for row in found())


def _heads(rows: Iterable[Sequence[Any]]) -> dict[StepKey, Head]:
    heads = {}
    for workflow_id, step, phase, seq, run, status, *rest in rows:
        key = StepKey(workflow_id, step, PHASES[phase])
        heads[key] = Head(key, seq, RUNS[run], STEPS[status], *rest)
    return heads
