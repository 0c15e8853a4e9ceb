"""The rows of runs in SQL: what is read and written of them, statement by statement, for several runs at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Select,
    Table,
    Update,
    and_,
    bindparam,
    case,
    func,
    insert,
    null,
    select,
    update,
)

from paigeant.errors import RunNotFound
from paigeant.lane import Tx
from paigeant.prepared import MOST_BYTES, Keyed, Prepared, is_longer, upsert
from paigeant.slip import Phase, RunStatus, StepStatus
from paigeant.store import RunDetail, RunRecord, Signal, StepKey, StepRecord
from paigeant.tables import step_executions, step_units, workflow_runs, workflow_signals, workflow_variables

__all__ = [
    "KEY",
    "NEW_RUN",
    "NEW_STEP",
    "PHASES",
    "RUNS",
    "STARTED",
    "STEPS",
    "ask_unit",
    "detail_of",
    "details_of",
    "encoded",
    "key_of",
    "new_run",
    "new_step",
    "of_runs",
    "patch_rows",
    "run_of",
    "save_units",
    "save_variables",
    "statuses_of",
    "unit_of",
    "units_of",
    "variable_in",
]

KEY = (step_executions.c.workflow_id, step_executions.c.step, step_executions.c.phase)


def encoded(text: str | None) -> bytes | None:
    """JSON as the records have it."""
    return None if text is None else text.encode()


_AS_TEXT: dict[type, Callable[[Any], str]] = {
    bytes: bytes.decode,
    dict: json.dumps,
    **dict.fromkeys((Phase, RunStatus, StepStatus), str.__str__),
}
"""How a driver is given JSON and states: as texts, which it takes without a detour."""


def _plain(values: Iterable[Any]) -> list[Any]:
    """`values` as the driver takes them."""
    return [value if (text := _AS_TEXT.get(type(value))) is None else text(value) for value in values]


def key_of(row: Any) -> StepKey:
    """What names the step in a row with the columns of KEY."""
    return StepKey(row.workflow_id, row.step, Phase(row.phase))


# -- statements


def of_runs(
    table: Table,
    *columns: ColumnElement[Any],
    parameters: Sequence[str] = (),
    more: Callable[[Select[Any]], Select[Any]] = lambda rows: rows,
) -> Keyed:
    """The rows of `table` that belong to the runs asked for; `more` says in which order, or locks them."""
    own = table.c.id if table is workflow_runs else table.c.workflow_id

    def query(runs: FromClause, run: Sequence[ColumnElement[Any]]) -> Select[Any]:
        return more(select(*(columns or table.c)).select_from(runs).join(table, own == run[0]))

    return Keyed(query, [own], parameters)


STARTED = of_runs(workflow_runs, workflow_runs.c.id, workflow_runs.c.workflow, workflow_runs.c.input_hash)
PHASES = {phase.value: phase for phase in Phase}
RUNS = {status.value: status for status in RunStatus}
STEPS = {status.value: status for status in StepStatus}


@lru_cache(maxsize=64)
def _update(table: Table, columns: tuple[str, ...]) -> Prepared:
    keys = list(table.primary_key)
    places = [f"key_of{place}" for place in range(len(keys))]

    def statement(dialect: str) -> Update:
        return (
            update(table)
            .where(and_(*(column == bindparam(place) for column, place in zip(keys, places, strict=True))))
            .values({table.c[name]: _new_value(table.c[name], dialect) for name in columns})
        )

    # The statement names its columns in the order of the table.
    ordered = [f"_{column.name}" for column in table.c if column.name in columns]
    return Prepared(statement, [*ordered, *places])


def _new_value(changed: ColumnElement[Any], dialect: str) -> ColumnElement[Any]:
    value: ColumnElement[Any] = bindparam(f"_{changed.key}", type_=changed.type)
    if changed is not step_executions.c.started_at:
        return value
    # As `ledger.claim` says, also where that knows nothing of the row.
    later_of = func.max if dialect == "sqlite" else func.greatest
    return later_of(value, step_executions.c.created_at, type_=changed.type)


@lru_cache(maxsize=64)
def _order(table: Table, columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(column.name for column in table.c if column.name in columns)


def patch_rows(tx: Tx, table: Table, patches: Iterable[tuple[Sequence[str], dict[str, Any]]]) -> None:
    """Change columns of existing rows: (primary key, values), one statement for each set of columns."""
    kinds: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
    for key, patch in patches:
        columns = _order(table, tuple(patch))
        kinds.setdefault(columns, []).append(tuple(_plain([*[patch[name] for name in columns], *key])))
    for columns, rows in kinds.items():
        _update(table, columns).each(tx, rows)


def _insert(table: Table, columns: Sequence[str]) -> Prepared:
    ordered = [column.name for column in table.c if column.name in columns]
    return Prepared(insert(table), ordered)


_SAVE_VARIABLE = upsert(
    workflow_variables,
    ["workflow_id", "key", "value"],
    key=["workflow_id", "key"],
    update=lambda new: {"value": new.value},
)


def save_variables(tx: Tx, rows: Sequence[tuple[str, str, str]]) -> None:
    """Set variables: (run, name, JSON)."""
    if tx.driver.dialect.name == "postgresql":
        rows = [(run_id, name, _sealed(value)) for run_id, name, value in rows]
    _SAVE_VARIABLE.each(tx, list(rows))


# JSONB keeps numbers as decimals and has no text with a zero in it: 1e22 would come back as an integer, -0.0 as 0.0.
_TEXT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_CHANGED_TEXT = re.compile(r'\\u0000|\\u[dD][89a-fA-F]|"\$json"')
_CHANGED_NUMBER = re.compile(r"\d[eE]|-0(?!\.?\d*[1-9])")


def _sealed(text: str) -> str:
    """The JSON as JSONB can hold it: a text within an object, where JSONB would change what it says."""
    # What looks like such a number is mostly part of a text, of a UUID say, which JSONB leaves as it is.
    number = _CHANGED_NUMBER.search(text) and _CHANGED_NUMBER.search(_TEXT.sub("", text))
    return json.dumps({"$json": text}) if number or _CHANGED_TEXT.search(text) else text


def variable_in(column: str) -> bytes:
    """The JSON of a variable from what its column holds."""
    if column.startswith('{"$json": '):
        text: str = json.loads(column)["$json"]
        return text.encode()
    return column.encode()


_STATUSES = of_runs(workflow_runs, workflow_runs.c.id, workflow_runs.c.status)


def statuses_of(tx: Tx, workflow_ids: Collection[str]) -> dict[str, RunStatus]:
    """The states of those of the runs that exist."""
    rows = _STATUSES.rows(tx, list(workflow_ids))
    return {run_id: RUNS[status] for run_id, status in rows}


_UNIT = Prepared(
    select(step_units.c.value).where(
        *(step_units.c[name] == bindparam(f"_{name}") for name in ("workflow_id", "step", "phase", "name"))
    ),
    ["_workflow_id", "_step", "_phase", "_name"],
)


def unit_of(tx: Tx, key: StepKey, name: str) -> bytes | None:
    """The recorded value of a unit inside a step; None when there is none."""
    return ask_unit(tx, key, name)()


def ask_unit(tx: Tx, key: StepKey, name: str) -> Callable[[], bytes | None]:
    """Gives what gives the recorded value of a unit, to be read later."""
    asked = _UNIT.ask(tx, key.workflow_id, key.step, key.phase.value, name)

    def read() -> bytes | None:
        rows = asked()
        return encoded(rows[0][0]) if rows else None

    return read


_UNITS = Prepared(
    select(step_units.c.name, step_units.c.value).where(
        *(step_units.c[name] == bindparam(f"_{name}") for name in ("workflow_id", "step", "phase"))
    ),
    ["_workflow_id", "_step", "_phase"],
)


_SAVE_UNIT = upsert(
    step_units,
    ["workflow_id", "step", "phase", "name", "value"],
    key=["workflow_id", "step", "phase", "name"],
    update=None,
)


def save_units(tx: Tx, units: Iterable[tuple[StepKey, str, bytes]]) -> bool:
    """Record values of units; of one name the first stays the first. Gives whether all are known to be the first."""
    # In one order, so that no two transactions wait for each other.
    rows = [(*key[:2], key.phase.value, name, value.decode()) for key, name, value in units]
    return _SAVE_UNIT.each(tx, sorted(rows, key=lambda row: row[:4])) == len(rows)


def units_of(tx: Tx, key: StepKey) -> dict[str, bytes]:
    """The recorded values of all units inside a step, by name."""
    rows = _UNITS.rows(tx, key.workflow_id, key.step, key.phase.value)
    return {name: value.encode() for name, value in rows}


# -- rows


_RUN_FIELDS = [column.name for column in workflow_runs.c]
NEW_RUN = _insert(workflow_runs, _RUN_FIELDS)
_run_values = attrgetter(*_RUN_FIELDS)


def new_run(run: RunRecord, *, now: float, ended: bool) -> tuple[Any, ...]:
    """The values for NEW_RUN."""
    run = replace(run, created_at=now, headers=dict(run.headers))
    if ended:
        run = replace(run, status=RunStatus.COMPLETED, started_at=now, completed_at=now)
    return tuple(_plain(_run_values(run)))


def run_of(row: Mapping[str, Any]) -> RunRecord:
    """The record in a row; columns that weren't asked for are empty."""
    values = dict(row)
    values["status"] = RunStatus(values["status"])
    values["headers"] = json.loads(values["headers"])
    values["input"] = (values.get("input") or "").encode()
    values["slip"] = (values.get("slip") or "").encode()
    return RunRecord(**values)


_NEW_STEP_COLUMNS = (
    "workflow_id",
    "step",
    "phase",
    "seq",
    "activity",
    "topic",
    "status",
    "epoch",
    "attempt",
    "worker",
    "not_before",
    "wake_at",
    "created_at",
    "started_at",
)
NEW_STEP = _insert(step_executions, _NEW_STEP_COLUMNS)
_new_step_values = attrgetter(*_NEW_STEP_COLUMNS)


def new_step(step: StepRecord) -> tuple[Any, ...]:
    """The values for NEW_STEP."""
    return tuple(_plain(_new_step_values(step)))


_STEP_PLACES = {column.name: place for place, column in enumerate(step_executions.c)}
"""Where a row of steps has each field of StepRecord, which has them in the same order."""

_STEP_JSON = [_STEP_PLACES[name] for name in ("input", "output", "revision", "usage", "waits_for")]


def _step(row: Sequence[Any]) -> StepRecord:
    values = list(row)
    phase, status = _STEP_PLACES["phase"], _STEP_PLACES["status"]
    values[phase], values[status] = PHASES[values[phase]], STEPS[values[status]]
    for place in _STEP_JSON:
        values[place] = encoded(values[place])
    return StepRecord(*values)


_DETAIL_RUNS = of_runs(workflow_runs)
_too_large = is_longer(step_executions.c.output, bindparam("limit"))
_shown_output = case(
    (is_longer(step_executions.c.output, bindparam("same")), null()), else_=step_executions.c.output
)
_DETAIL_STEPS = of_runs(
    step_executions,
    _too_large.label("too_large"),
    *(_shown_output if column.name == "output" else column for column in step_executions.c),
    parameters=["limit", "same"],
    more=lambda rows: rows.order_by(step_executions.c.seq),
)
_DETAIL_VARIABLES = of_runs(workflow_variables)
_DETAIL_SIGNALS = of_runs(workflow_signals, more=lambda rows: rows.order_by(workflow_signals.c.id))


Rows = list[tuple[Any, ...]]


def details_of(
    tx: Tx, workflow_ids: Collection[str], inline_bytes: int | None
) -> Callable[[], dict[str, RunDetail]]:
    """What gives the runs that there are, with all of their rows."""
    ids = list(workflow_ids)
    limit = MOST_BYTES if inline_bytes is None else min(inline_bytes, MOST_BYTES)
    # All asked first and then read: one round trip.
    step_rows = _DETAIL_STEPS.ask(tx, ids, limit, limit)
    variable_rows, signal_rows = _DETAIL_VARIABLES.ask(tx, ids), _DETAIL_SIGNALS.ask(tx, ids)
    run_rows = _DETAIL_RUNS.ask(tx, ids)
    return lambda: _details(run_rows(), step_rows(), variable_rows(), signal_rows())


def _details(run_rows: Rows, step_rows: Rows, variable_rows: Rows, signal_rows: Rows) -> dict[str, RunDetail]:
    steps: dict[str, list[StepRecord]] = {}
    stored: dict[str, set[str]] = {}
    for too_large, *values in step_rows:
        step = _step(values)
        steps.setdefault(step.workflow_id, []).append(step)
        if too_large:
            stored.setdefault(step.workflow_id, set()).add(step.step)
    variables: dict[str, dict[str, bytes]] = {}
    for run_id, name, value in variable_rows:
        variables.setdefault(run_id, {})[name] = variable_in(value)
    signals: dict[str, list[Signal]] = {}
    for _, run_id, name, value, *rest in signal_rows:
        signals.setdefault(run_id, []).append(Signal(name, value.encode(), *rest))
    runs = [run_of(dict(zip(_RUN_FIELDS, row, strict=True))) for row in run_rows]
    return {
        run.id: RunDetail(
            run,
            tuple(steps.get(run.id, ())),
            variables.get(run.id, {}),
            tuple(signals.get(run.id, ())),
            frozenset(stored.get(run.id, ())),
        )
        for run in runs
    }


def detail_of(tx: Tx, workflow_id: str, inline_bytes: int | None) -> RunDetail:
    """The run with all of its rows. Raises RunNotFound."""
    found = details_of(tx, [workflow_id], inline_bytes)()
    if workflow_id not in found:
        raise RunNotFound(workflow_id)
    return found[workflow_id]
