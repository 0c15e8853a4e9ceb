"""Rows of signals and requests, within a transaction: put, taken, kept, found. `outside.py` opens the transactions."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic_core import from_json
from sqlalchemy import Text, and_, bindparam, insert, literal, literal_column, or_, select, update

from paigeant import interventions, ledger
from paigeant.due import is_in
from paigeant.identity import GRANT_SIGNAL
from paigeant.lane import Tx
from paigeant.ledger import Changes
from paigeant.prepared import Prepared, upsert
from paigeant.rows import KEY, save_units, unit_of
from paigeant.slip import Phase, StepStatus
from paigeant.store import REQUEST_SIGNAL, Request, Signal, StepKey
from paigeant.tables import step_executions, workflow_requests, workflow_signals

__all__ = ["grant", "keep_request", "put", "requests_of", "take", "untaken", "waiting_for"]

_signals = workflow_signals.c
_PUT = Prepared(insert(workflow_signals), ["workflow_id", "name", "value", "created_at", "sender"])
_UNTAKEN = Prepared(
    select(_signals.name).where(_signals.workflow_id == bindparam("of"), _signals.taken_by.is_(None)), ["of"]
)
_OLDEST = Prepared(
    select(_signals.id, _signals.value, _signals.created_at, _signals.sender)
    .where(
        _signals.workflow_id == bindparam("of"),
        _signals.name == bindparam("called"),
        _signals.taken_by.is_(None),
    )
    .order_by(_signals.id)
    .limit(literal_column("1"))
    .offset(literal_column("0")),  # without one SQLite's dialect adds a parameter of its own
    ["of", "called"],
)
_TAKE = Prepared(
    update(workflow_signals).where(_signals.id == bindparam("number")).values(taken_by=bindparam("by")),
    ["by", "number"],
)
_WAITING = Prepared(
    select(*KEY, step_executions.c.waits_for).where(
        step_executions.c.workflow_id == bindparam("of"), is_in(StepStatus.WAITING)
    ),
    ["of"],
)
_KEEP = upsert(workflow_requests, [column.name for column in workflow_requests.c], key=["id"], update=None)


def untaken(tx: Tx, workflow_id: str) -> set[str]:
    """The names of the run's signals that nobody has taken."""
    return {name for (name,) in _UNTAKEN.rows(tx, workflow_id)}


def take(tx: Tx, key: StepKey, unit: str, name: str, otherwise: bytes | None) -> bytes | None:
    """The record of a unit: the oldest signal of this name that nobody has taken, or else `otherwise`.

    Unless there is one already.
    """
    recorded = unit_of(tx, key, unit)
    if recorded is not None:
        return recorded
    found = _OLDEST.rows(tx, key.workflow_id, name)
    if not found:
        save_units(tx, [] if otherwise is None else [(key, unit, otherwise)])
        return otherwise
    number, value, created_at, sender = found[0]
    envelope = Signal(name, value.encode(), created_at, sender).envelope
    _TAKE.each(tx, [(key.step, number)])
    save_units(tx, [(key, unit, envelope)])
    return envelope


def put(tx: Tx, workflow_id: str, name: str, value: bytes, sender: str) -> Changes:
    """Keep a signal; gives what changes with it: the step that waits for it is ready."""
    _PUT.each(tx, [(workflow_id, name, value.decode(), tx.now, sender)])
    changes = Changes()
    for key in waiting_for(tx, workflow_id, name):
        ledger.wake(key, changes, now=tx.now)
    return changes


def waiting_for(tx: Tx, workflow_id: str, name: str) -> list[StepKey]:
    """The steps of the run that wait for a signal of this name."""
    return [
        StepKey(run_id, step, Phase(phase))
        for run_id, step, phase, waits_for in _WAITING.rows(tx, workflow_id)
        if name in from_json(waits_for or "[]")
    ]


def grant(
    tx: Tx, workflow_id: str, headers: Mapping[str, str] | None, sender: str, *, grace: float
) -> tuple[list[StepKey], Changes]:
    """The steps that a fresh grant wakes, and what changes with it. Raises InvalidTransition, see `interventions`."""
    waiting, changes = waiting_for(tx, workflow_id, GRANT_SIGNAL), Changes()
    interventions.grant(workflow_id, waiting, headers, changes, now=tx.now, grace=grace)
    if headers is not None:
        _PUT.each(tx, [(workflow_id, GRANT_SIGNAL, "null", tx.now, sender)])
    return waiting, changes


def keep_request(tx: Tx, request: Request) -> bool:
    """Keep a request; gives whether it is new. One of the same id stays as it is."""
    is_new = not requests_of(tx, request_id=request.id)
    row = (
        request.id,
        request.workflow_id,
        request.step,
        request.kind,
        request.name,
        request.asked.decode(),
        tx.now,
        request.expires_at,
    )
    _KEEP.each(tx, [row])
    return is_new


def requests_of(
    tx: Tx,
    *,
    request_id: str | None = None,
    workflow_id: str | None = None,
    only_open: bool = False,
    limit: int = 1,
) -> list[Request]:
    """The request of an id, or those of a run, or of all, as they stand now, the oldest first."""
    asked = workflow_requests.c
    # One answer at most: it is sent under the lock of the run, after a look whether there is one.
    answer = and_(
        _signals.workflow_id == asked.workflow_id, _signals.name == literal(REQUEST_SIGNAL, Text) + asked.id
    )
    waits = (
        select(step_executions.c.step)
        .where(
            step_executions.c.workflow_id == asked.workflow_id,
            step_executions.c.step == asked.step,
            step_executions.c.status.in_(sorted(ledger.OPEN)),
        )
        .exists()
    )
    query = (
        select(workflow_requests, waits, _signals.value, _signals.created_at, _signals.sender)
        .outerjoin(workflow_signals, answer)
        .order_by(asked.created_at, asked.id)
        .limit(limit)
    )
    if request_id is not None:
        query = query.where(asked.id == request_id)
    if workflow_id is not None:
        query = query.where(asked.workflow_id == workflow_id)
    if only_open:
        query = query.where(
            _signals.id.is_(None),
            waits,
            or_(asked.expires_at.is_(None), asked.expires_at > tx.now),
        )
    found = []
    for *columns, still, value, answered_at, sender in tx.connection.execute(query):
        id_, of, step, kind, name, text, created_at, expires_at = columns
        request = Request(id_, of, step, kind, name, text.encode(), created_at, expires_at)
        signal = None if value is None else Signal(request.signal, value.encode(), answered_at, sender)
        found.append(request.with_answer(signal, tx.now, waits=bool(still)))
    return found
